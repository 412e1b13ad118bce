"""mealv2.recipes.script: from a folder of ImageNet to the number, on a miniature, with signals."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Spawned
from mealv2 import recipes
from mealv2.recipes.published import ACCURACIES
from mealv2.recipes.script import script

NAMES = recipes.names()
EVERY = pytest.mark.parametrize("name", NAMES)
WNIDS = ("n01440764", "n01443537", "n01484850")
SIZE = 32
_DEADLINE_S = 900.0  # some 45 s of CPU time each: eight processes or more import torch


# --- the text -----------------------------------------------------------------------------------


@EVERY
def test_a_script_is_bash_and_names_its_recipe_and_numbers(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    text = script(recipe)
    path = tmp_path / "script.sh"
    path.write_text(text)
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck") and name in ("resnet18", "resnet50-cutmix", NAMES[-1]):
        subprocess.run(["shellcheck", path], check=True)

    assert not re.search("@[A-Z]+@", text)
    assert text.count(f"--recipe {name} ") == 2
    assert f"STUDENT=${{STUDENT:-{recipe.distill['model']}}}" in text
    assert f"TEACHERS=${{TEACHERS:-{','.join(recipe.teachers['teacher'])}}}" in text
    assert f"IMG_SIZE=${{IMG_SIZE:-{recipe.teachers['img_size']}}}" in text
    assert ("evaluate student-start" in text) == recipe.distill["pretrained"]
    assert ("--cutmix-target mixed-labels" in text) == (name == "resnet50-cutmix")
    if recipe.top1 is not None:
        assert (
            f"# From a folder of ImageNet to the published number: top-1 {recipe.top1:.2f}" in text
        )


@EVERY
def test_published_weights_have_a_published_accuracy(name: str) -> None:
    recipe = recipes.load(name)
    teachers = [ACCURACIES[teacher] for teacher in recipe.teachers["teacher"]]
    assert {known.img_size for known in teachers} == {recipe.teachers["img_size"]}
    for model in (recipe.distill["model"], *recipe.teachers["teacher"]):
        assert f"{model}) echo {ACCURACIES[model].top1} ;;" in script(recipe)
    assert (
        recipe.top1 is None
        or not recipe.distill["pretrained"]
        or (recipe.top1 > ACCURACIES[recipe.distill["model"]].top1)
    )


# --- on a miniature of ImageNet -----------------------------------------------------------------


class ScriptRun(Spawned):
    """``bash SCRIPT`` in a session of its own; looked at and ended as Spawned is."""

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        folder = path.parent
        self._err, self._out = folder / "stderr.txt", folder / "stdout.txt"
        commands = {"mealv2": "-m mealv2", "torchrun": "-m torch.distributed.run"}
        bin_dir = folder / "bin"
        bin_dir.mkdir(exist_ok=True)
        for name, words in commands.items():
            (bin_dir / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            (bin_dir / name).chmod(0o755)
        own = {"PATH": f"{bin_dir}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        own |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        own |= {name: str(value) for name, value in settings.items()}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                ["bash", path],
                stdout=out,
                stderr=err,
                cwd=folder,
                start_new_session=True,
                env={**os.environ, **own},
            )


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ScriptRun]]:
    """Start the script of a recipe with settings; what still runs at the end is killed."""
    started: list[ScriptRun] = []

    def run(name: str, settings: dict[str, object]) -> ScriptRun:
        path = tmp_path / "script.sh"
        path.write_text(script(recipes.load(name)))
        started.append(ScriptRun(path, settings))
        return started[-1]

    yield run
    for each in started:
        with contextlib.suppress(ProcessLookupError):
            each.signal(signal.SIGKILL)
        each.process.wait()


@pytest.fixture
def miniature(
    draw_tree: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> dict[str, object]:
    """The settings of a miniature: ImageNet's layout, three classes, tiny models, no download."""
    data = draw_tree(tmp_path / "my data", classes=WNIDS, num_train=8, num_val=4)
    teachers = [make_model("test_resnet", seed=seed, classes=WNIDS) for seed in (1, 2)]
    return {
        "DATA": data,
        "OUT": tmp_path / "out of it",
        "TEACHERS": ",".join(f"test_resnet={path}" for path in teachers),
        "STUDENT": "test_efficientnet",
        "START": make_model("test_efficientnet", seed=3, classes=WNIDS),
        "IMG_SIZE": SIZE,
        "START_SIZE": SIZE,
        "IMAGES": 24,
        "VAL_IMAGES": 12,
        "NUM_VIEWS": 2,
        "LABELS": tmp_path / "label set",
        "RESULTS": tmp_path / "results.json",
        "WORKERS": 0,
        "GPUS": 1,
        "DISTILL_ARGS": "--epochs 30 --batch-size 8 --log-interval 1 --val-interval 30",
        "RECORD_ARGS": "--variant",
    }


def num_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def results(settings: dict[str, object]) -> dict[str, Any]:
    (record,) = json.loads(Path(str(settings["RESULTS"])).read_text())["results"]
    return dict(record)


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        (
            {"data": {"images": 1_281_166}},
            "data: images is 1281166, expected 1281167 +- 0: other data or other weights?",
        ),
        (
            {"teacher-1": {"num_images": 49_999, "top1": 81.4}},
            "teacher-1: num_images is 49999, expected 50000 +- 0: ",
        ),
        ({"teacher-2": {"top1": 79.85}}, "teacher-2: top1 is 79.85, expected 80.86 +- 1: "),
        ({"teacher-2": {"top1": 81.87}}, "teacher-2: top1 is 81.87, expected 80.86 +- 1: "),
        ({"student-start": {"top1": 71.5}}, "student-start: top1 is 71.5, expected 69.75 +- 1: "),
        ({"student-start": {}}, "out/student-start.json has no num_images"),
    ],
)
def test_a_script_stops_at_other_data_or_weights(
    start: Callable[..., ScriptRun], tmp_path: Path, reports: dict[str, Any], said: str
) -> None:
    """All measurements are there already, so no command runs."""
    out = tmp_path / "out"
    out.mkdir()
    good: dict[str, dict[str, Any]] = {
        "data": {"dry_run": True, "images": 1_281_167, "views": 38_485_010},
        "teacher-1": {"model": "x", "num_images": 50_000, "top1": 81.3, "top5": 95.4},
        "teacher-2": {"model": "x", "num_images": 50_000, "top1": 80.9, "top5": 95.3},
        "student-start": {"model": "x", "num_images": 50_000, "top1": 69.7, "top5": 89.1},
    }
    for name, report in good.items():
        changed = reports.get(name)
        kept = changed if changed == {} else report | (changed or {})
        (out / f"{name}.json").write_text(json.dumps(kept) + "\n")
    process = start("resnet18", {"OUT": "out", "GPUS": 1})
    result = process.result()
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith(f"== {said}")
    (spoilt,) = reports
    for name in good:
        is_before = list(good).index(name) < list(good).index(spoilt)
        assert (f"== done: out/{name}.json" in result.stderr) == (is_before or name == spoilt)


@pytest.mark.slow
def test_a_stopped_script_continues_to_the_row_of_the_table(
    start: Callable[..., ScriptRun], miniature: dict[str, object], tmp_path: Path
) -> None:
    out = tmp_path / "out of it"
    process = start("resnet18", miniature)
    process.until(lambda: num_steps(out / "run") >= 5, deadline_s=_DEADLINE_S)
    os.kill(process.process.pid, signal.SIGTERM)  # the script alone: it stops its command
    stopped = process.result()
    assert stopped.code == 4, stopped.stderr
    assert stopped.stderr.count("mealv2: stopped by SIGTERM in epoch") == 1
    assert stopped.stderr.endswith("== stopped; the same command continues\n")
    steps = num_steps(out / "run")
    assert 5 <= steps < 90
    assert not (out / "run" / "report.json").exists()

    process = start("resnet18", miniature)
    finished = process.result(deadline_s=_DEADLINE_S)
    assert finished.code == 0, finished.stderr
    names = ["data", "teacher-1", "teacher-2", "student-start"]
    for name in names:
        assert f"== done: {out}/{name}.json" in finished.stderr
    assert "(90 in all)" not in finished.stderr
    assert f"steps ({steps} in all)" in finished.stderr, "it continues where it stopped"
    assert num_steps(out / "run") == 90
    record = results(miniature)
    assert (record["recipe"], record["labels"], record["epoch"]) == ("resnet18", "online", 30)
    assert record["top1"] == pytest.approx(json.loads((out / "result.json").read_text())["top1"])
    assert "--epochs 30 (recipe: 180)" in record["differs"]
    assert "validation images 12 (recipe: 50000)" in record["differs"]
    assert "| `resnet18` | 73.19 | – |  |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_stored_labels_and_torchrun_continue_after_ctrl_c(
    start: Callable[..., ScriptRun], miniature: dict[str, object], tmp_path: Path
) -> None:
    out, labels = tmp_path / "out of it", tmp_path / "label set"
    out.mkdir()
    for name in ("data", "teacher-1", "teacher-2", "student-start"):  # the other test measures them
        figures = {"images": 24, "num_images": 12, "top1": 50.0}
        (out / f"{name}.json").write_text(json.dumps(figures))
    settings = miniature | {"MODE": "stored", "GPUS": 2}
    process = start("resnet50-cutmix", settings)
    process.until(lambda: (labels / "plan.json").exists(), deadline_s=_DEADLINE_S)
    process.signal(signal.SIGINT)  # to the group of the terminal
    stopped = process.result(deadline_s=_DEADLINE_S)
    assert stopped.code == 4, stopped.stderr
    assert not (out / "run").exists()

    finished = start("resnet50-cutmix", settings).result(deadline_s=_DEADLINE_S)
    assert finished.code == 0, finished.stderr
    assert num_steps(out / "run") == 90
    record = results(settings)
    assert record["hardware"] == "2 x cpu, float32"
    assert record["labels"].startswith("2 views, ")
    assert "--cutmix-target mixed-labels (recipe: teachers)" in record["differs"]
