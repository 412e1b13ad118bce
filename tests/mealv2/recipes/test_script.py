"""mealv2.recipes.script: from a folder of ImageNet to the number, on a miniature, with signals."""

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

from conftest import ROOT, Spawned, killed_at_the_end
from mealv2 import recipes
from mealv2.recipes.published import ACCURACIES
from mealv2.recipes.script import script

NAMES = recipes.names()
EVERY = pytest.mark.parametrize("name", NAMES)
WNIDS = ("n01440764", "n01443537", "n01484850")
SIZE = 32
_DEADLINE_S = 900.0  # some 45 s of CPU time each: some six processes import torch


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

    assert not re.search("@[A-Z_]+@", text)
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


# --- the whole script, with programs that only answer -------------------------------------------

# Answers like mealv2 on ImageNet, and keeps the arguments of each call.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> calls.txt
case "$*" in
    *precompute*--dry-run*) echo "38485010 views, about 40 days" >&2; echo '{"images": 1281167}' ;;
    *--checkpoint*) echo '{"num_images": 50000, "top1": 73.3, "top5": 91.0}' ;;
    *senet154*) echo '{"num_images": 50000, "top1": 81.3}' ;;
    *resnet152s*) echo '{"num_images": 50000, "top1": 80.9}' ;;
    *resnet18.tv_in1k*) echo '{"num_images": 50000, "top1": 69.7}' ;;
    *resnet50.ram_in1k*) echo '{"num_images": 50000, "top1": 79.0}' ;;
    *evaluate*) echo '{"num_images": 50000, "top1": 84.1}' ;;
esac
case "$*" in *--dry-run*) exit "${DRY_RUN_CODE:-0}" ;; esac
"""


@pytest.fixture
def answered(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the script of a recipe with settings; mealv2, torchrun and nvidia-smi are stand-ins."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("mealv2", "torchrun"):
        (bin_dir / name).write_text(STAND_IN)
    (bin_dir / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    for path in bin_dir.iterdir():
        path.chmod(0o755)

    def run(name: str, **settings: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "script.sh").write_text(script(recipes.load(name)))
        env = {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
        env |= {key: str(value) for key, value in settings.items()}
        words = ["bash", "script.sh"]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", ["resnet18", "resnet50-380", "ablation-random-start"])
def test_a_script_needs_no_setting(
    answered: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, name: str
) -> None:
    done = answered(name)
    assert done.returncode == 0, done.stderr
    recipe, out = recipes.load(name), f"reproduce/{name}"
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    size = recipe.teachers["img_size"]
    sizes = [size, size, *([224] if recipe.distill["pretrained"] else [])]
    evaluated = [call for call in calls if "--model" in call and call.startswith("mealv2 evaluate")]
    assert [re.findall(r"--img-size (\S*)", call) for call in evaluated] == [
        [str(n)] for n in sizes
    ]
    assert f"mealv2 distill --recipe {name} --data-dir imagenet" in calls[len(evaluated) + 1]
    assert f"--output {out}/run --online --teacher" in calls[len(evaluated) + 1]
    assert calls[-2].startswith(f"mealv2 evaluate --data-dir imagenet --checkpoint {out}/run ")
    assert calls[-1] == f"mealv2 recipes record {out}/run --output reproduced.json"
    assert "days" not in done.stderr, "online there is no stage one"
    assert "days" in answered(name, MODE="stored", OUT="stored").stderr


def test_messages_of_a_hidden_estimate_are_shown_if_it_fails(
    answered: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    failed = answered("resnet18", DRY_RUN_CODE=3)
    assert failed.returncode == 3
    assert "days" in failed.stderr


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("resnet50-cutmix", {}, "recipe=resnet50-224; now it is recipe=resnet50-cutmix"),
        (
            "resnet50-224",
            {"MODE": "stored"},
            "made with MODE=online; now it is MODE=stored LABELS=",
        ),
        ("resnet50-224", {"DATA": "my data"}, "DATA=imagenet; now it is DATA=my\\ data"),
        (
            "resnet50-224",
            {"DISTILL_ARGS": "--amp"},
            "DISTILL_ARGS=''; now it is DISTILL_ARGS=--amp",
        ),
    ],
)
def test_a_folder_of_other_settings_is_not_done(
    answered: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    name: str,
    settings: dict[str, str],
    said: str,
) -> None:
    assert answered("resnet50-224", OUT="q").returncode == 0
    calls = (tmp_path / "calls.txt").read_text()
    refused = answered(name, OUT="q", **settings)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("== q was made with ")
    assert said in line
    assert (tmp_path / "calls.txt").read_text() == calls
    again = answered("resnet50-224", OUT="q", RECORD_ARGS="--variant", GPUS=8, WORKERS=2)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"MODE": "wrong"}, "== MODE is online or stored, not wrong\n"),
        ({"GPUS": "x"}, "== GPUS is a number of processes, not 'x'\n"),
        ({"GPUS": "-1"}, "== GPUS is a number of processes, not '-1'\n"),
    ],
)
def test_a_wrong_setting_is_one_line(
    answered: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    settings: dict[str, str],
    said: str,
) -> None:
    refused = answered("resnet18", **settings)
    assert (refused.returncode, refused.stderr) == (2, said)
    assert not (tmp_path / "reproduce").exists()


def test_names_that_begin_with_a_dash_are_no_flags(
    answered: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = answered("resnet18", OUT="-o", DATA="-d", LABELS="-l", MODE="stored", GPUS=2)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls.txt").read_text()
    assert "mealv2 labels status ./-l\n" in calls
    assert "--num-procs 2 " in calls
    assert "torchrun --standalone --nproc-per-node 2 -m mealv2 distill" in calls
    assert "recipes record ./-o/run " in calls
    assert not re.search(" -[dlo]", calls)
    assert (tmp_path / "-o" / "settings").exists()


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

    with killed_at_the_end(started):
        yield run


@pytest.fixture
def miniature(
    draw_tree: Callable[..., Path], make_model: Callable[..., Path], tmp_path: Path
) -> dict[str, object]:
    """The settings of a miniature: ImageNet's layout, three classes, tiny models, no download."""
    data = draw_tree(tmp_path / "my data", classes=WNIDS, num_train=8, num_val=4)
    teacher = make_model("test_resnet", seed=1, classes=WNIDS)
    return {
        "DATA": data,
        "OUT": tmp_path / "out of it",
        "TEACHERS": f"test_resnet={teacher}",
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
        "DISTILL_ARGS": "--epochs 20 --batch-size 8 --log-interval 1 --val-interval 20",
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
    out.mkdir()
    # measured as the teacher is
    (out / "student-start.json").write_text('{"num_images": 12, "top1": 50.0}')
    process = start("resnet18", miniature)
    process.until(lambda: num_steps(out / "run") >= 5, deadline_s=_DEADLINE_S)
    os.kill(process.process.pid, signal.SIGTERM)  # the script alone: it stops its command
    stopped = process.result()
    assert stopped.code == 4, stopped.stderr
    assert stopped.stderr.count("mealv2: stopped by SIGTERM in epoch") == 1
    assert stopped.stderr.endswith("== stopped; the same command continues\n")
    steps = num_steps(out / "run")
    assert 5 <= steps < 60
    assert not (out / "run" / "report.json").exists()

    process = start("resnet18", miniature)
    finished = process.result(deadline_s=_DEADLINE_S)
    assert finished.code == 0, finished.stderr
    names = ["data", "teacher-1", "student-start"]
    for name in names:
        assert f"== done: {out}/{name}.json" in finished.stderr
    assert "(60 in all)" not in finished.stderr
    assert f"steps ({steps} in all)" in finished.stderr, "it continues where it stopped"
    assert num_steps(out / "run") == 60
    record = results(miniature)
    assert (record["recipe"], record["labels"], record["epoch"]) == ("resnet18", "online", 20)
    assert record["top1"] == pytest.approx(json.loads((out / "result.json").read_text())["top1"])
    assert "--epochs 20 (recipe: 180)" in record["differs"]
    assert "validation images 12 (recipe: 50000)" in record["differs"]
    assert "| `resnet18` | 73.19 | – |  |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_stored_labels_and_torchrun_continue_after_ctrl_c(
    start: Callable[..., ScriptRun], miniature: dict[str, object], tmp_path: Path
) -> None:
    out, labels = tmp_path / "out of it", tmp_path / "label set"
    out.mkdir()
    for name in ("data", "teacher-1", "student-start", "result"):  # the other test measures them
        figures = {"images": 24, "num_images": 12, "top1": 50.0}
        (out / f"{name}.json").write_text(json.dumps(figures))
    settings = miniature | {"MODE": "stored", "GPUS": 2}
    process = start("resnet50-cutmix", settings | {"GPUS": 1})  # it may continue on others
    process.until(lambda: (labels / "plan.json").exists(), deadline_s=_DEADLINE_S)
    process.signal(signal.SIGINT)  # to the group of the terminal
    stopped = process.result(deadline_s=_DEADLINE_S)
    assert stopped.code == 4, stopped.stderr
    assert not (out / "run").exists()

    finished = start("resnet50-cutmix", settings).result(deadline_s=_DEADLINE_S)
    assert finished.code == 0, finished.stderr
    assert num_steps(out / "run") == 60
    record = results(settings)
    assert record["hardware"] == "2 x cpu, float32"
    assert record["labels"].startswith("2 views, ")
    assert "--cutmix-target mixed-labels (recipe: teachers)" in record["differs"]
