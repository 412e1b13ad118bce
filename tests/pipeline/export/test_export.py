"""pipeline.export: what others load answers as the checkpoint does; the card says what is so."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch import Tensor, nn

from cases import mostly_slow
from conftest import Result
from mealv2.errors import MealError
from mealv2.models import Classifier, create_classifier, read_metadata
from pipeline import export
from pipeline.config import ExportConfig
from pipeline.export.model_card import escaped

Run = Callable[..., Result]
MODELS = ["test_resnet", "test_efficientnet", "test_vit"]
KINDS = ["timm", "hub-folder", "onnx", "torchscript"]
STRANGE = ("<b>ants</b> & | co", "*bees* [x](http://y) `z`", "cats: {a: #1}\n---\n$x$ _é_")


@pytest.fixture(scope="module")
def local_folder(make_model: Callable[..., Path]) -> Callable[[str], Path]:
    """A function: the folder of a trained model by name, made once. Not to be changed."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, seed=3, steps=3)
        return made[name]

    return find


@pytest.fixture(scope="module")
def distilled(
    done: Run, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run with its label set. Not to be changed."""
    run = tmp_path_factory.mktemp("distilled") / "run"
    done(*distill_flags, "--epochs", 1, "--lr", 0.02, "--output", run)
    return run


def images(num_images: int) -> Tensor:
    return torch.rand(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def checkpoint_of(folder: Path) -> Classifier:
    """Load the model that was exported, past the code under test."""
    name = read_metadata(folder)["architecture"]
    path = folder / "model.safetensors"
    model = create_classifier(name, num_classes=3, checkpoint=path, img_size=32)
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    return model.eval()(images_BCHW)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- timm and torch.hub ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_timm_folder_is_the_same_model_to_the_bit(
    done: Run, local_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    done("export", local_folder(name), "--to", "timm", "--output", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    original = checkpoint_of(local_folder(name))
    assert same_weights(model, original.backbone)
    mean, std = (torch.tensor(model.pretrained_cfg[n]).view(3, 1, 1) for n in ("mean", "std"))
    found = logits_of(model, (images(5) - mean) / std)
    assert torch.equal(found, logits_of(original, images(5)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == ["ants", "bees", "cats"]


def test_timm_folder_of_a_run_is_its_student_with_a_card(
    done: Run, distilled: Path, tmp_path: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    done("export", distilled, "--to", "timm", "--output", tmp_path / "out")
    written = contents(tmp_path / "out")
    assert written.pop("README.md")
    assert written == contents(distilled / "student")


@pytest.mark.parametrize("name", MODELS)
def test_hub_folder_loads_with_torch_hub(
    done: Run, local_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    done("export", local_folder(name), "--to", "hub-folder", "--output", out)
    model = torch.hub.load(str(out), name, source="local")
    assert same_weights(model, checkpoint_of(local_folder(name)).backbone)
    blank = torch.hub.load(str(out), name, source="local", pretrained=False)
    assert not same_weights(blank, model)


def test_hub_folder_needs_only_torch_and_timm(
    done: Run, local_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    done("export", local_folder("test_resnet"), "--to", "hub-folder", "--output", tmp_path / "out")
    text = (tmp_path / "out" / "hubconf.py").read_text()
    assert set(re.findall(r"^ *(?:import|from) (\w+)", text, flags=re.MULTILINE)) == {
        "pathlib",
        "timm",
    }


# --- ONNX -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_file_answers_plain_images_as_torch_does(
    done: Run, local_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "model.onnx"
    result = done("export", local_folder(name), "--to", "onnx", "--output", out)
    original = checkpoint_of(local_folder(name))
    session = onnxruntime.InferenceSession(str(out))
    for num_images in (1, 5):
        expected = logits_of(original, images(num_images))
        (found,) = session.run(["logits"], {"images": images(num_images).numpy()})
        scale = float(expected.abs().max())
        assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-4 * scale
    assert 0 <= result.report["max_difference"] < 1e-4
    assert "largest difference" in result.stderr

    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [3, 32, 32])
    assert isinstance(given.shape[0], str)
    said = session.get_modelmeta().custom_metadata_map
    stored = read_metadata(local_folder(name))
    for key in ("classes", "img_size", "mean", "std"):
        assert json.loads(said[key]) == stored[key]
    assert said["mealv2"]


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_packages_are_one_line(
    run_cli: Run,
    local_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    out = tmp_path / "model.onnx"
    result = run_cli("export", local_folder("test_resnet"), "--to", "onnx", "--output", out)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line == f"mealv2: --to onnx needs {missing}: pip install 'mealv2[export]'"


@pytest.mark.slow
def test_without_onnxruntime_the_file_is_written_and_said_to_be_unchecked(
    done: Run, local_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "model.onnx"
    result = done("export", local_folder("test_resnet"), "--to", "onnx", "--output", out)
    assert "not compared" in result.stderr
    assert "max_difference" not in result.report
    onnx.checker.check_model(onnx.load(out))


# --- TorchScript ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_torchscript_file_answers_without_timm_or_mealv2(
    done: Run, local_folder: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "model.pt"
    report = done("export", local_folder(name), "--to", "torchscript", "--output", out).report
    assert report["max_difference"] <= 1e-6
    torch.save(images(5), tmp_path / "images.pt")
    code = (
        "import json, sys, torch\n"
        "said = {'mealv2.json': ''}\n"
        "model = torch.jit.load('model.pt', _extra_files=said)\n"
        "images = torch.load('images.pt')\n"
        "torch.save([model(images[:1]), model(images)], 'logits.pt')\n"
        "assert json.loads(said['mealv2.json'])['classes'] == '[\"ants\", \"bees\", \"cats\"]'\n"
        "assert not {'timm', 'mealv2'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-W", "ignore", "-P", "-c", code]
    subprocess.run(command, cwd=tmp_path, check=True)
    original = checkpoint_of(local_folder(name))
    for found in torch.load(tmp_path / "logits.pt"):
        expected = logits_of(original, images(5)[: len(found)])
        assert not found.requires_grad
        scale = float(expected.abs().max())
        assert float((found - expected).abs().max()) <= 1e-6 * scale


# --- every kind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", mostly_slow(KINDS, fast=2))
def test_report_says_what_was_written_and_nothing_else_is_there(
    done: Run, distilled: Path, tmp_path: Path, kind: str
) -> None:
    run = Path(shutil.copytree(distilled, tmp_path / "run"))
    report = done("export", run, "--to", kind).report
    out = Path(report["path"])
    assert (out.parent, report["kind"]) == (run / "export", kind)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.mark.parametrize("kind", mostly_slow(KINDS, fast=2))
def test_no_file_names_a_path_of_this_machine(
    done: Run, distilled: Path, tmp_path: Path, kind: str
) -> None:
    """TorchScript and ONNX keep stack traces unless they are taken out."""
    suffix = {"onnx": ".onnx", "torchscript": ".pt"}.get(kind, "")
    out = tmp_path / f"out{suffix}"
    done("export", distilled, "--to", kind, "--output", out)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    if kind == "torchscript":
        shutil.unpack_archive(out, unpacked, "zip")
    found = [path for path in [out, *out.rglob("*"), *unpacked.rglob("*")] if path.is_file()]
    for path in found:
        for part in (export.__file__, sys.prefix, tmp_path.parent, "site-packages"):
            assert str(part).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_is_never_overwritten(
    run_cli: Run, local_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    suffix = {"onnx": ".onnx", "torchscript": ".pt"}.get(kind, "")
    out = tmp_path / f"out{suffix}"
    mine = out if suffix else out / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    result = run_cli("export", local_folder("test_resnet"), "--to", kind, "--output", out)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert f"{out} already exists" in line
    assert mine.read_text() == "mine"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize("kind", ["timm", "onnx"])
def test_an_empty_folder_may_become_a_folder_but_no_file(
    run_cli: Run, local_folder: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out.onnx"
    out.mkdir()
    result = run_cli("export", local_folder("test_resnet"), "--to", kind, "--output", out)
    assert result.code == {"timm": 0, "onnx": 2}[kind]
    assert (out / "model.safetensors").exists() == (kind == "timm")


@pytest.mark.parametrize("kind", mostly_slow(["onnx", "torchscript"]))
def test_file_that_would_answer_otherwise_is_not_written(
    local_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The check sees a normalisation that changed between the file and the comparison."""
    checked = export._checked

    def spoilt(kind: str, subject: export.ExportedModel, forward: Any) -> float:
        subject.model.mean_13.add_(1e-3)
        return checked(kind, subject, forward)

    monkeypatch.setattr(export, "_checked", spoilt)
    suffix = {"onnx": ".onnx", "torchscript": ".pt"}[kind]
    config = ExportConfig(
        run=local_folder("test_resnet"), to=kind, output=tmp_path / f"model{suffix}"
    )
    with pytest.raises(MealError, match="differ from those of the checkpoint"):
        export.run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--to", "timm"], "RUN is required"),
        (["{model}"], "--to is required"),
        (["{model}", "--to", "tim"], "timm"),
        (["/nowhere", "--to", "timm"], "/nowhere"),
        (["{theirs}", "--to", "timm"], "mealv2 did not save"),
        (["{model}", "--to", "onnx", "--output", "x.pt"], "--output must end in .onnx"),
        (["{model}", "--to", "torchscript", "--output", "x"], "--output must end in .pt"),
        (["{model}", "{model}", "--to", "timm"], "extra argument"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    run_cli: Run, local_folder: Callable[[str], Path], tmp_path: Path, words: list[str], named: str
) -> None:
    model = local_folder("test_resnet")
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(checkpoint_of(model).backbone.state_dict(), theirs)
    result = run_cli("export", *(word.format(model=model, theirs=theirs) for word in words))
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert named in line


# --- the model card -------------------------------------------------------------------------------


@pytest.fixture
def card(done: Run, tmp_path: Path) -> Callable[[Path], str]:
    """A function: the card of a run or model folder."""

    def make(run: Path) -> str:
        done("export", run, "--to", "timm", "--output", tmp_path / "card")
        text = (tmp_path / "card" / "README.md").read_text()
        shutil.rmtree(tmp_path / "card")
        return text

    return make


def test_card_says_what_the_run_knows(
    card: Callable[[Path], str],
    distilled: Path,
    labels_dir: Path,
    student_dir: Path,
    events: Callable[..., list[dict[str, Any]]],
) -> None:
    text = card(distilled)
    report = json.loads((distilled / "report.json").read_text())
    manifest = json.loads((labels_dir / "manifest.json").read_text())
    assert f"| top-1 | {report['top1']:.2f} % |" in text
    assert f"| agreement with the ensemble | {report['agreement']:.2f} % |" in text
    assert f"plan\\_sha256 `{manifest['plan_sha256']}`" in text
    assert "| teachers | test\\_resnet, test\\_efficientnet |" in text
    assert "| data | split train, 36 images |" in text
    assert "| views per image | 4 |" in text
    assert re.search(r"On split val \(15 images, 20\d\d-\d\d-\d\d\)", text)
    assert "| lr | 0.02 |" in text
    assert "| epochs | 1 |" in text
    assert f"| initial checkpoint | {escaped(student_dir.name)} |" in text
    assert "momentum" not in text  # has its default
    assert f"torch {torch.__version__.split('+')[0]}" in text


def test_card_holds_no_absolute_path(card: Callable[[Path], str], distilled: Path) -> None:
    text = card(distilled)
    settings = json.loads((distilled / "config.json").read_text())
    paths = [value for value in settings.values() if isinstance(value, str) and value[0] == "/"]
    assert len(paths) >= 3
    assert not any(path in text for path in paths)
    assert re.findall(r"(?<![\w:/}])/\w+", text) == []


def test_card_states_only_what_was_measured(
    card: Callable[[Path], str], distilled: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled, tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    del report["agreement"]
    (run / "report.json").write_text(json.dumps({**report, "top1": 12.5}))
    text = card(run)
    assert "| top-1 | 12.50 % |" in text
    assert "agreement" not in text
    (run / "report.json").unlink()
    text = card(run)
    assert "Not recorded" in text
    assert "top-1" not in text
    assert card(run / "student") == text
    (run / "student").rename(tmp_path / "alone")
    text = card(tmp_path / "alone")
    assert "settings" not in text.lower()
    assert "teachers |" not in text
    assert "plan" not in text


def test_labels_of_another_plan_are_not_named(
    card: Callable[[Path], str], distilled: Path, labels_dir: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled, tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    there = json.loads((labels_dir / "manifest.json").read_text())["plan_sha256"]
    (run / "report.json").write_text(json.dumps({**report, "labels": {"plan_sha256": "ab" * 32}}))
    text = card(run)
    assert "ab" * 32 in text
    assert there not in text
    assert "| teachers |" not in text

    settings = json.loads((run / "config.json").read_text())
    settings["labels"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(settings))
    (run / "report.json").write_text(json.dumps(report))
    text = card(run)
    assert f"`{there}`" in text  # the run noted it
    assert "| teachers |" not in text
    (run / "report.json").write_text(json.dumps({**report, "labels": None}))
    assert f"`{there}`" in card(run)
    (run / "labels.json").unlink()
    assert "plan" not in card(run)


def test_teachers_and_recipe_are_named_without_their_folders(
    card: Callable[[Path], str], distilled: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled, tmp_path / "run"))
    settings = json.loads((run / "config.json").read_text())
    settings |= {"teacher": ["one=/secret/a", "two", "three=/secret/b"], "recipe": "/secret/r.toml"}
    settings["labels"] = None
    (run / "config.json").write_text(json.dumps(settings))
    text = card(run)
    assert "| teachers | one, two, three |" in text
    assert "| recipe | r.toml |" in text
    assert "secret" not in text

    online = {"labels": {"online": True, "teachers": [{"model": "four"}]}}
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(report | online))
    text = card(run)
    assert "| teachers | four |" in text
    assert "plan" not in text


def test_strange_class_names_are_text_wherever_they_stand(
    make_model: Callable[..., Path], card: Callable[[Path], str], tmp_path: Path
) -> None:
    text = card(make_model("test_resnet", classes=STRANGE))
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert "license" not in yaml.safe_load(front)
    assert "| 0 | &lt;b&gt;ants&lt;/b&gt; &amp; \\| co |" in body
    assert "| 1 | \\*bees\\* \\[x\\]\\(http\\://y\\) \\`z\\` |" in body
    assert "| 2 | cats\\: \\{a\\: &#35;1\\} --- \\$x\\$ \\_é\\_ |" in body


def test_many_classes_are_cut_short(
    make_model: Callable[..., Path], card: Callable[[Path], str]
) -> None:
    text = card(make_model("test_resnet", classes=tuple(f"c{n}" for n in range(33))))
    assert "| 19 | c19 |" in text
    assert "c20" not in text
    assert "And 13 more" in text
