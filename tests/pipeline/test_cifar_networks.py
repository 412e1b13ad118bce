"""The networks of MEAL v1 in the commands: a start, a teacher, what is exported and pushed."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from conftest import ROOT
from mealv2.models import create_classifier

Run = Callable[..., Any]
NAME = "cifar_mobilenet"


@pytest.fixture(scope="module")
def original_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A {net, acc} file as MEAL's code saves it, of three classes."""
    torch.manual_seed(5)
    state = timm.create_model(NAME, num_classes=3).state_dict()
    renamed = {"conv_stem": "conv1", "classifier": "linear"}
    keys = {key: ".".join(renamed.get(part, part) for part in key.split(".")) for key in state}
    # blocks of five stages in one list: layers.0 to layers.12
    blocks = list(dict.fromkeys(key[: len("blocks.0.0")] for key in state if "blocks" in key))
    for key in [key for key in state if "blocks" in key]:
        rest = key[len("blocks.0.0") :].replace("conv_dw", "conv1").replace("conv_pw", "conv2")
        keys[key] = f"layers.{blocks.index(key[: len('blocks.0.0')])}{rest}"
    path = tmp_path_factory.mktemp("original") / "ckpt.t7"
    torch.save({"net": {f"module.{keys[k]}": v for k, v in state.items()}, "acc": 90.0}, path)
    return path


@pytest.fixture(scope="module")
def run_folder(
    done: Run, original_file: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("cifar") / "run"
    flags = ["--data-dir", data_dir, "--img-size", 32, "--batch-size", 8, "--workers", 0]
    start = ["--model", NAME, "--initial-checkpoint", original_file]
    done("finetune", *flags, *start, "--epochs", 1, "--lr", 0.01, "--output", run)
    return run


@pytest.mark.slow
def test_a_run_from_the_originals_file_evaluates_and_predicts(
    done: Run, run_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    flags = ["--data-dir", data_dir, "--workers", 0, "--results-file", tmp_path / "found.json"]
    done("evaluate", *flags, "--checkpoint", run_folder)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["model"], found["img_size"]) == (NAME, 32)
    predicted = done("predict", data_dir / "val", "--checkpoint", run_folder)
    assert "%" in predicted.stdout


@pytest.mark.slow
def test_the_originals_file_and_a_run_are_teachers(
    done: Run, run_folder: Path, original_file: Path, data_dir: Path, tmp_path: Path
) -> None:
    teachers = ["--teacher", f"{NAME}={original_file}", "--teacher", f"{NAME}={run_folder}"]
    flags = ["--data-dir", data_dir, "--img-size", 32, "--num-views", 1, "--workers", 0]
    done("precompute", *flags, *teachers, "--output", tmp_path / "labels")
    student = ["--model", NAME, "--no-pretrained", "--batch-size", 8, "--workers", 0]
    flags = ["--data-dir", data_dir, "--labels", tmp_path / "labels", "--epochs", 1]
    result = done("distill", *flags, *student, "--output", tmp_path / "student")
    assert result.report["model"] == NAME


@pytest.mark.slow
def test_exported_folders_import_what_timm_lacks(
    done: Run, run_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hub"
    done("export", run_folder, "--to", "hub-folder", "--output", out)
    assert "import mealv2.models" in (out / "README.md").read_text()
    code = f"""
import torch
model = torch.hub.load({str(out)!r}, {NAME!r}, source="local")
print(model(torch.zeros(2, 3, 32, 32)).shape)
"""
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[2, 3]" in found.stdout
    expected = create_classifier(NAME, num_classes=3, checkpoint=run_folder)
    again = timm.create_model(f"local-dir:{out}", pretrained=True)
    pairs = zip(expected.backbone.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.slow
def test_a_space_cannot_build_it(run_cli: Run, run_folder: Path, tmp_path: Path) -> None:
    flags = ["--space", "--dry-run", "--output", tmp_path / "push"]
    result = run_cli("push", run_folder, "hf://user/model", *flags)
    assert result.code == 2
    assert f"--space: the Space installs timm, which cannot build {NAME} without" in result.stderr


# --- docs/reference/cifar-networks.md ---

PAGE = (ROOT / "docs" / "reference" / "cifar-networks.md").read_text(encoding="utf-8")
QUICK = {"finetune": ["--epochs", "1"], "distill": ["--epochs", "1"], "precompute": []}


def test_the_table_of_the_page_is_what_the_networks_are() -> None:
    rows = [line.split("|")[1:] for line in PAGE.splitlines() if line.startswith("| `cifar_")]
    for name, count, _, sizes, _, _ in rows:
        with torch.device("meta"):
            model: Any = timm.create_model(name.strip(" `"))
        assert f"{sum(p.numel() for p in model.parameters()):,}" == count.strip()
        assert ",".join(map(str, model.default_out_dims)) == sizes.strip()
    assert sorted(name.strip(" `") for name, *_ in rows) == timm.list_models(module="cifar")


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    done: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        _, *words = shlex.split(line)
        workers = [] if words[0] == "export" else ["--workers", "0"]
        done(*words, *QUICK.get(words[0], []), *workers)
    assert (tmp_path / "runs" / "distilled" / "student" / "config.json").is_file()
