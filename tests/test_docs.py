"""Every example in README.md and docs/ runs, with small models instead of large ones."""

import doctest
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
import timm
import torch
from coco import draw_coco
from layouts import draw_birdsnap, draw_cub, draw_lists, draw_voc
from range_server import range_server
from written_runs import write_run

import cli
from benchmarks.speed import document
from mealv2.label_set import LabelSet
from mealv2.report.run import open_run
from pipeline.config import CHANGEABLE_ON_RESUME, FREE_ON_RESUME, flag
from pipeline.config.bench import LINES
from pipeline.report import weights
from pipeline.report.sections import Inputs
from pipeline.training import run_lock
from stores import Store, s3_server
from tars import tar_tree

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("docs/_build/", "docs/reference/api/", "docs/reference/cli/")

# Pages whose examples another module runs.
ELSEWHERE = {
    "docs/how-to/released-models.md": "tests/mealv2/models/test_released.py",
    "docs/how-to/push.md": "tests/pipeline/test_push.py",
    "docs/how-to/look-at-labels.md": "tests/pipeline/label_sets/test_show.py",
    "docs/benchmarks/small-images.md": "tests/benchmarks/test_small_images.py",
}

# Small models instead of those whose weights need a download or are too big for a test.
STAND_INS = {
    "resnet50.a1_in1k": "test_resnet.r160_in1k",
    "convnext_tiny.in12k_ft_in1k": "test_efficientnet.r160_in1k",
    "resnet18.tv_in1k": "test_byobnet.r160_in1k",
    "vit_tiny_patch16_224": "test_vit",
    "resnet50": "test_resnet",
    "convnext_tiny": "test_efficientnet",
    "resnet18": "test_byobnet",
    "marginal_smoothing_k5": "marginal_smoothing_k2",  # of 3 classes
}
# Flags that make an example quick; the rest of the line is unchanged.
QUICK = {
    "pack": [],
    "finetune": ["--epochs", "1", "--img-size", "32", "--workers", "0"],
    "transfer": ["--epochs", "1", "--img-size", "32", "--workers", "0"],
    "transfer-detection": [
        *("--iterations", "2", "--batch-size", "3", "--img-size", "48"),
        *("--pyramid-channels", "8", "--workers", "0"),
    ],
    "precompute": ["--img-size", "32", "--num-views", "2", "--workers", "0"],
    "distill": ["--epochs", "1", "--workers", "0"],
    "evaluate": ["--workers", "0", "--json"],
    "predict": ["--workers", "0", "--json"],
    "export": [],
    "report": [],
    "compare": [],
    "curves": [],
    "push": [],
    "bench": [
        "--img-size",
        "32",
        "--num-images",
        "8",
        "--batch-size",
        "4",
        "--rounds",
        "1",
        "--workers",
        "0",
        "--teacher",
        "test_resnet",
        "--model",
        "test_resnet",
    ],
    "labels info": [],
    "labels status": [],
    "labels finish": [],
    "labels verify": ["--workers", "0"],
    "labels merge": [],
    "labels split": [],
    "labels convert": [],
    "labels add-views": ["--num-views", "3", "--workers", "0"],
    "labels import": ["--img-size", "32"],
    "labels export": [],
    "slurm precompute": ["--img-size", "32", "--num-views", "2", "--print"],
    "slurm distill": ["--print"],
    "slurm sweep": ["--print"],
}
GROUPS = {name.split()[0] for name in QUICK if " " in name}


def make_runs(folder: Path, **runs: Path) -> None:
    """Create runs/NAME for each name, with a copy of a student, as the documents expect."""
    for name, student in runs.items():
        shutil.copytree(student, folder / "runs" / name.replace("_", "-") / "student")


def pages() -> list[str]:
    """Return README.md and the pages of docs/, without the generated ones."""
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return ["README.md", *(path for path in found if not path.startswith(GENERATED))]


def blocks(path: str, language: str) -> list[str]:
    """Return the fenced blocks of a language in a document."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face cache with random weights of the stand-ins, laid out as the hub does."""
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    for name in (n for n in STAND_INS.values() if "." in n):
        repository = hub / f"models--timm--{name}"
        commit = "0" * 40
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        state = timm.create_model(name.split(".")[0]).state_dict()
        safetensors.torch.save_file(state, snapshot / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def commands(path: str) -> list[list[str]]:
    """Return the ``mealv2`` commands of a document's sh blocks, with stand-ins and quick flags."""
    found = []
    for line in "".join(blocks(path, "sh")).splitlines():
        words = shlex.split(line)
        assert words[0] == "mealv2", f"{path}: only mealv2 commands can be tested, not {line!r}"
        words = ["=".join(STAND_INS.get(p, p) for p in word.split("=")) for word in words[1:]]
        found.append([*words, *QUICK[" ".join(words[: 2 if words[0] in GROUPS else 1])]])
    return found


def test_commands_and_python_of_the_documents_run_one_after_another(
    data_dir: Path,
    run_cli: Callable[..., Any],
    hub_cache: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    shutil.copytree(data_dir / "val", tmp_path / "unlabelled")

    tutorial = commands("docs/tutorial/own-pictures.md")
    assert [words for words in commands("README.md") if words not in tutorial] == []
    others = [*commands("docs/how-to/train-students.md"), *commands("docs/how-to/monitor.md")]
    for words in [*tutorial, *others]:
        result = run_cli(*words)
        assert result.code == 0, (words, result.stderr)
    names: dict[str, Any] = {}
    for code in blocks("docs/tutorial/own-pictures.md", "python"):
        exec(compile(code, "docs/tutorial/own-pictures.md", "exec"), names)

    assert names["model"].num_classes == 3
    assert (tmp_path / "per-class.csv").read_text().startswith("class,")
    assert (tmp_path / "runs/student/evaluation/confusion-matrix.csv").is_file()


@pytest.mark.parametrize(
    "path",
    [
        "docs/how-to/choose-teachers.md",
        "docs/how-to/choose-views.md",
        "docs/how-to/time-and-disk.md",
    ],
)
def test_guides_to_choices_run_on_a_small_set(
    path: str,
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    models = [*teacher_dirs.values(), make_model("test_byobnet", seed=4)]
    make_runs(tmp_path, **dict(zip(("teacher_1", "teacher_2", "start"), models, strict=True)))

    reports = [done(*words).report for words in commands(path)]

    assert all(reports)
    assert not (tmp_path / "runs" / "student").exists()


@pytest.mark.slow
def test_guide_to_transfer_runs_on_small_sets(
    data_dir: Path,
    student_dir: Path,
    done: Callable[..., Any],
    hub_cache: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    draw_voc(tmp_path / "VOC2007")
    draw_cub(tmp_path / "CUB_200_2011")
    draw_birdsnap(tmp_path / "birdsnap")
    for name in ("bird", "car"):
        draw_lists(tmp_path / name)
    (example,) = blocks("docs/how-to/transfer.md", "text")
    (tmp_path / "sets.txt").write_text(example)
    make_runs(tmp_path, student=student_dir)
    reports = [done(*words).report for words in commands("docs/how-to/transfer.md")]
    assert {row["mode"] for row in reports[-2]["results"]} == {"scratch", "fine-tune", "frozen"}
    assert len(reports[-1]["results"]) == 2


@pytest.mark.slow
def test_guide_to_detection_runs_on_drawn_shapes(
    student_dir: Path,
    done: Callable[..., Any],
    hub_cache: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_coco(tmp_path / "coco")
    make_runs(tmp_path, student=student_dir)
    reports = [done(*words).report for words in commands("docs/how-to/detection.md")]
    assert {row["mode"] for row in reports[-1]["results"]} == {"fine-tune", "freeze-first-stage"}
    (code,) = blocks("docs/how-to/detection.md", "python")
    names: dict[str, Any] = {}
    exec(compile(code, "docs/how-to/detection.md", "exec"), names)
    assert names["model"].num_classes == 3


def test_guide_to_optimizers_runs_on_a_small_set(
    data_dir: Path,
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    make_runs(tmp_path, start_vit=make_model("test_vit"))
    for words in commands("docs/how-to/optimisation.md"):
        assert done(*words, "--epochs", "3").report["epochs"] == 3


def test_guide_to_meal_runs_on_a_small_set(
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    make_runs(tmp_path, **dict(zip(("teacher_1", "teacher_2"), teacher_dirs.values(), strict=True)))
    online, label, stored = commands("docs/how-to/meal-v1.md")
    assert done(*online, "--img-size", "32").report["epochs"] == 1
    done(*label, "--img-size", "32")
    assert done(*stored).report["epochs"] == 1


def test_the_guide_to_own_data_runs(
    labels_dir: Path,
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    done: Callable[..., Any],
    hub_cache: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").symlink_to(labels_dir)
    names: dict[str, Any] = {}
    (tmp_path / "pictures").symlink_to(data_dir)
    shutil.copytree(data_dir / "val" / "ants", tmp_path / "unlabelled")
    make_runs(tmp_path, teacher_1=teacher_dirs["test_resnet"])
    for words in commands("docs/how-to/own-data.md"):
        done(*words)

    for code in blocks("docs/how-to/own-data.md", "python"):
        exec(compile(code, "docs/how-to/own-data.md", "exec"), names)

    assert names["loss"].isfinite()
    assert names["probs"].sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_loops_of_the_guide_train_from_a_label_set(
    data_dir: Path, labels_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    (tmp_path / "labels").symlink_to(labels_dir)
    path = "docs/how-to/own-loop.md"
    annotating, plain, lightning, of_timm = blocks(path, "python")
    names: dict[str, Any] = {}

    def run(code: str) -> None:
        code = re.sub(r"resnet\d+\.a1_in1k", "test_resnet", code).replace("pretrained=True", "")
        exec(compile(code, path, "exec"), names)

    run(annotating)
    assert names["label_set"].num_views == 4
    assert len(names["label_set"]) == 36

    run(plain)
    assert len(plain.splitlines()) <= 30
    assert names["loss"].isfinite()
    assert (tmp_path / "runs" / "own" / "model.safetensors").exists()
    before = [p.clone() for p in names["student"].parameters()]

    names["dataset"].set_epoch(7)
    run(lightning)
    assert names["dataset"].epoch == 1, "the Trainer sets the epoch"
    assert names["trainer"].callback_metrics["loss"].isfinite()
    after = [p.cpu() for p in names["student"].parameters()]
    assert not all(map(torch.equal, before, after))

    run(of_timm)
    assert set(names["result"]["parts"]) >= {"similarity_loss", "discriminator_loss"}
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    timm.create_model("test_resnet", num_classes=3).load_state_dict(saved["state_dict"])


def test_report_doc_runs_on_run_folders(
    data_dir: Path,
    labels_dir: Path,
    run_cli: Callable[..., Any],
    hub_cache: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    (tmp_path / "labels").symlink_to(labels_dir)
    for seed in (0, 1):
        write_run(Path(f"runs/soft-{seed}"), seed=seed)
        write_run(Path(f"runs/hard-{seed}"), seed=seed, top1=66.0, is_soft=False)
    for words in commands("docs/how-to/report.md"):
        result = run_cli(*words)
        assert result.code == 0, (words, result.stderr)
    assert (tmp_path / "report/index.html").is_file()
    found = weights.section(Inputs((open_run("runs/weights"),), (), None, None, tmp_path))
    lines = {figure.name: {row["model"] for row in figure.data} for figure in found.figures}
    assert lines["weights-first"] == {"start", "weights"}  # the start is in the hub's cache
    assert lines["weight-percentiles-1"] == {"weights"}
    capsys.readouterr()
    for code in blocks("docs/how-to/report.md", "python"):
        exec(compile(code, "docs/how-to/report.md", "exec"), {})
    printed = "finished after 6 epochs\n70.0\n['loss', 'similarity-loss']\n"
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_export_doc_runs_on_a_run_folder(
    data_dir: Path,
    make_model: Callable[..., Path],
    run_cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    make_runs(tmp_path, student=make_model("test_byobnet"))

    for words in commands("docs/how-to/export.md"):
        result = run_cli(*words)
        assert result.code == 0, (words, result.stderr)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.load. is deprecated")
        for code in blocks("docs/how-to/export.md", "python"):
            exec(compile(code, "docs/how-to/export.md", "exec"), names)

    assert (tmp_path / "predictions.csv").read_text().startswith("image,")
    assert names["same"].num_classes == names["model"].num_classes == len(names["classes"]) == 3
    assert len(names["names"]) == 2


def test_label_sets_doc_runs_on_a_small_set(
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    precompute_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    for number, path in enumerate(sorted(data_dir.glob("*/*/*"))):
        for part in ("a", "b") if "val" in path.parts else ("ab"[number % 2],):
            copy = tmp_path / f"pictures-{part}" / path.relative_to(data_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    models = [*teacher_dirs.values(), make_model("test_byobnet", seed=4)]
    make_runs(tmp_path, **dict(zip(("teacher_1", "teacher_2", "start"), models, strict=True)))
    done(*precompute_flags, "--topk", "all", "--output", "before")
    flags = ["--to", "fkd", "--label-type", "marginal_smoothing_k2", "--output", "soft_labels"]
    done("labels", "export", "before", *flags)
    flags = ["--to", "sre2l", "--data-dir", "pictures", "--batch-size", 8]
    done("labels", "export", "before", *flags, "--output", "before-sre2l")
    Path("fkd_labels").symlink_to("before-sre2l/labels")

    reports = {}
    for words in commands("docs/how-to/label-sets.md"):
        reports[" ".join(words)] = done(*words).report
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        for code in blocks("docs/how-to/label-sets.md", "python"):
            exec(compile(code, "docs/how-to/label-sets.md", "exec"), names)

    relabelled = next(report for words, report in reports.items() if "--relabel" in words)
    assert relabelled["relabelled"]["views"] == 72
    assert names["table"].num_rows == 72
    assert names["probs"].sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert {words.split()[1] for words in reports if words.startswith("labels ")} == {
        name.split()[1] for name in QUICK if name.startswith("labels ")
    }


@pytest.mark.slow
def test_guides_to_several_machines_and_slurm_run_on_a_small_set(
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    run_cli: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    make_runs(tmp_path, teacher_1=teacher_dirs["test_resnet"])

    codes = []
    for words in [
        *commands("docs/how-to/several-machines.md"),
        *commands("docs/how-to/slurm.md"),
    ]:
        codes.append((" ".join(words[:2]), run_cli(*words).code))

    # exit code 1: the set is not finished
    assert [code for name, code in codes if name == "labels status"] == [1, 0]
    assert {code for name, code in codes if name != "labels status"} == {0}
    assert LabelSet.open(tmp_path / "labels").num_views == 2
    assert LabelSet.open(tmp_path / "labels-2").num_views == 2


@pytest.mark.slow
def test_cluster_doc_runs_under_xargs(
    data_dir: Path, teacher_dirs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "pictures").symlink_to(data_dir)
    make_runs(tmp_path, teacher_1=teacher_dirs["test_resnet"])
    script, xargs = (
        next(t for t in blocks("docs/how-to/several-machines.md", "bash") if word in t)
        for word in ("#!/bin/sh", "xargs")
    )
    quick = " ".join(QUICK["precompute"])
    script = script.replace("resnet50=", f"{STAND_INS['resnet50']}=")
    (tmp_path / "label.sh").write_text(script.replace('"$@"', f'{quick} "$@"'))
    (tmp_path / "mealv2").write_text(f'#!/bin/sh\nexec {sys.executable} -m mealv2 "$@"\n')
    (tmp_path / "mealv2").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "-e", "-c", xargs.replace("seq 0 7", "seq 0 1").replace("-jobs 8", "-jobs 2")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert LabelSet.open(tmp_path / "labels").num_views == 2


def test_tar_shards_doc_runs_on_its_own_shards(
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    start = make_model("test_byobnet", seed=4)
    make_runs(tmp_path, teacher_1=teacher_dirs["test_resnet"], start=start)

    reports = [done(*words).report for words in commands("docs/how-to/tar-shards.md")]

    assert reports[-1]["data"] == "the same"
    text = (ROOT / "docs" / "how-to" / "tar-shards.md").read_text()
    paragraph = text.partition("The report, one JSON object")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", paragraph))
    assert named == reports[0].keys() - {"data_dir", "output", "splits"}
    index = json.loads((tmp_path / "shards" / "train-000000.tar.index").read_text())
    table = text.partition("| field | what |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == index.keys()


def test_object_storage_doc_runs_on_a_bucket_and_a_web_server(
    data_dir: Path,
    labels_dir: Path,
    teacher_dirs: dict[str, Path],
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEALV2_CACHE", str(tmp_path / "cache"))
    start = make_model("test_byobnet", seed=4)
    make_runs(tmp_path, teacher_1=teacher_dirs["test_resnet"], start=start)
    shards = tar_tree(data_dir, tmp_path / "shards")
    last = {s: sorted(shards.glob(f"{s}-*.tar"))[-1].stem[-6:] for s in ("train", "val")}
    (tmp_path / "imagenet").symlink_to(data_dir)
    path, host = "docs/how-to/object-storage.md", "https://labels.example.org/imagenet"
    with s3_server() as port, range_server(labels_dir) as server:
        Store(port, "bucket", monkeypatch).upload(shards, "shards")

        for words in commands(path):
            words = [w.replace("000146", last["train"]).replace(host, server.url) for w in words]
            done(*(w.replace("val-{000000..000006", f"val-{{000000..{last['val']}") for w in words))

        monkeypatch.setenv("HOME", str(tmp_path))
        names: dict[str, Any] = {}
        for code in blocks(path, "python"):
            exec(compile(code.replace(host, server.url), path, "exec"), names)
    assert names["probs_NC"].sum(dim=1).tolist() == pytest.approx([1.0] * len(names["keys"]))
    assert list((tmp_path / ".cache" / "mealv2").rglob("train-00000.h5"))
    assert names["labels"].folder.is_relative_to("scratch")


def test_resume_doc_runs_and_names_the_settings_that_may_change(
    data_dir: Path,
    hub_cache: None,
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    start, lengthen = commands("docs/how-to/resume.md")
    report = done(*start).report
    again = done(*start)  # "A finished run is not trained again: the command prints its report."
    assert again.report == report
    longer = done(*lengthen[: -len(QUICK["finetune"])], "--epochs", 3).report
    assert (report["epochs"], longer["epochs"]) == (1, 3)

    text = (ROOT / "docs" / "how-to" / "resume.md").read_text()
    table = text.partition("| flags | on resume |")[2].partition("\n\n")[0]
    first_cells = " ".join(line.split("|")[1] for line in table.strip().splitlines()[1:])
    settings = FREE_ON_RESUME | CHANGEABLE_ON_RESUME
    of_the_folder = {"resume", "output", "auto_resume", "dry_run"}
    assert set(re.findall(r"`(--[a-z-]+)`", first_cells)) == {
        flag(name) for name in settings - of_the_folder
    }
    for seconds in (run_lock.STALE_S, run_lock.HEARTBEAT_S):
        assert f" {seconds:.0f} s" in text


def test_speed_doc_runs_on_a_small_set(
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    models = [*teacher_dirs.values(), make_model("test_byobnet", seed=4)]
    make_runs(tmp_path, **dict(zip(("teacher_1", "teacher_2", "start"), models, strict=True)))

    results = [done(*words) for words in commands("docs/how-to/speed.md")]

    assert "--batch-size auto: " in results[0].stderr
    assert results[1].report["epochs"] == 1


@pytest.mark.slow
def test_bench_doc_runs(
    data_dir: Path, run_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    monkeypatch.setattr("pipeline.bench.labelling._NUM_LOOKUPS", 1)
    for words in commands("docs/how-to/bench.md"):
        result = run_cli(*words)
        assert result.code == 0, (words, result.stderr)
    text = document([json.loads((tmp_path / "speed.json").read_text())])
    assert "| loader-4 |" in text


def test_bench_doc_has_every_line() -> None:
    text = (ROOT / "docs" / "how-to" / "bench.md").read_text(encoding="utf-8")
    assert [name for name in LINES if f"`{name}`" not in text] == []


@pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="needs jpegtran (Debian: libjpeg-turbo-progs)"
)
def test_pack_doc_runs_on_a_small_set(
    data_dir: Path,
    labels_dir: Path,
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(data_dir)
    (tmp_path / "labels").symlink_to(labels_dir)
    make_runs(tmp_path, start=make_model("test_byobnet", seed=4))

    reports = [done(*words).report for words in commands("docs/how-to/pack.md")]

    text = (ROOT / "docs" / "how-to" / "pack.md").read_text()
    paragraph = text.partition("The report of a folder, one JSON object")[2].partition("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", paragraph))
    assert named == reports[0].keys() - {"data_dir", "output", "splits"}
    index = json.loads((tmp_path / "packed" / "train" / "pack.json").read_text())
    table = text.partition("| field | what |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == index.keys()


@pytest.mark.parametrize(
    "path",
    [
        "docs/reference/views.md",
        "docs/reference/label-set-format.md",
        "docs/reference/label-codec.md",
        "docs/reference/fkd-files.md",
        "docs/reference/sre2l-files.md",
        "docs/reference/cifar-networks.md",  # its commands: tests/pipeline/test_cifar_networks.py
        "docs/how-to/time-and-disk.md",
        "docs/how-to/reproduce.md",
        "docs/benchmarks/imagenet-64-gpus.md",
    ],
)
def test_python_examples_print_what_the_page_shows(
    path: str, labels_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").symlink_to(labels_dir)
    code = "\n".join(blocks(path, "python"))
    assert ">>>" in code

    failures: list[str] = []
    test = doctest.DocTestParser().get_doctest(code, {}, path, path, 0)
    doctest.DocTestRunner().run(test, out=failures.append)

    assert not failures, "".join(failures)


def test_a_test_runs_the_examples_of_every_page() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    with_examples = [path for path in pages() if blocks(path, "sh") or blocks(path, "python")]
    assert "docs/how-to/pack.md" in with_examples
    assert [path for path in with_examples if f'"{path}"' not in tests] == []
    for path, module in ELSEWHERE.items():
        assert Path(path).name in (ROOT / module).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", pages())
def test_the_command_line_accepts_every_line_of_the_documents(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks(path, r"\w*")).replace("\\\n", "").splitlines():
        if not line.startswith("mealv2 ") or "…" in line:
            continue
        name, *words = shlex.split(re.split(r"[|>]", line)[0], comments=True)[1:]
        command, above = cli.cli.commands[name], click.Context(cli.cli, info_name="mealv2")
        if isinstance(command, click.Group) and words:
            above = click.Context(command, info_name=name, parent=above)
            command, words = command.commands[words[0]], words[1:]
        if "--config" in words:  # of a run that comes before
            settings = Path(words[words.index("--config") + 1])
            settings.parent.mkdir(parents=True)
            settings.write_text("{}")
        with command.make_context(name, words, parent=above):
            pass


def test_links_between_documents_resolve() -> None:
    for path in map(ROOT.joinpath, pages()):
        text = path.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", text):
            page = path.parent / target if target else path
            if target.startswith(("cli/", "api/")):
                continue  # generated
            assert page.exists(), f"{path}: {target}"
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings]
            assert not anchor or anchor in slugs, f"{path}: {target}#{anchor}"


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)
    assert targets is not None
    for name in targets[1].split():
        assert re.search(rf"^{name}: .*## \S|^{name}:  ## \S", text, flags=re.MULTILINE), name
