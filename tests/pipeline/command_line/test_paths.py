"""pipeline.command_line.paths: a wrong path is found before torch is imported."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from coco import draw_coco

import cli
from conftest import Result
from mealv2.label_set import MANIFEST_NAME, PLAN_NAME
from pipeline.command_line import paths
from pipeline.command_line.paths import check_paths

Run = Callable[..., Result]
ROOT = Path(cli.__file__).resolve().parent

# exit code, command, what the message names
WRONG = [
    (2, "distill --data-dir nowhere --labels {labels} --model resnet18", "nowhere/train"),
    (2, "distill --data-dir {data} --labels {labels} --model m --val-split vla", "data/vla"),
    (3, "distill --data-dir {data} --labels nowhere --model m", "--labels: no label set"),
    (3, "distill --data-dir {data} --labels {data} --model m", "--labels: no label set"),
    (3, "distill --data-dir {data} --labels {above} --model m", "label sets in"),
    (2, "distill --data-dir {data} --online --teacher a=nowhere --model m", "--teacher a: no"),
    (2, "distill --data-dir {data} --online --teacher a --train-split x --model m", "data/x"),
    (2, "finetune --data-dir {data} --model m --train-split trian", "train, val"),
    (2, "finetune --data-dir {data} --model m --initial-checkpoint {data}", "no checkpoint at"),
    (2, "finetune --data-dir {data} --model m --output {file}/run", "cannot be created"),
    (2, "finetune --data-dir {data} --model m --output {file}", "is a file"),
    (2, "finetune --data-dir {data} --model m --device abacus", "--device abacus"),
    (2, "transfer --data-dir {data} --model o/bse", "no run or model o/bse (in "),
    (2, "transfer --data-dir {data} --model {data}", "--model: no checkpoint at"),
    (2, "transfer --data-dir {data} --model a=nowhere", "--model a: no checkpoint at"),
    (2, "transfer --data-dir {data} --model local-dir:nowhere", "nowhere (in "),
    (2, "transfer --data-dir {data} --compare m {data}/vla --output o", "(in {data}: train, val)"),
    (2, "transfer-detection --data-dir {coco} --model o/bse", "--model: no run or model o/bse"),
    (2, "finetune --resume nowhere", "no run at nowhere"),
    (2, "precompute --data-dir nowhere --teacher a --output o", "nowhere/train"),
    (2, "precompute --data-dir {data} --teacher a --output o --train-split x", "data/x"),
    (2, "precompute --data-dir {data} --teacher a=nowhere --output o", "--teacher a: no check"),
    (2, "precompute --data-dir {data} --teacher a --output {file}/o", "cannot be created"),
    (
        2,
        "precompute --data-dir {data} --teacher a --output {data}",
        "not a label set and not empty",
    ),
    (2, "precompute --data-dir {data} --teacher a --output o --shard-list x", "--shard-list"),
    (2, "evaluate --data-dir {data} --checkpoint nowhere", "--checkpoint: no checkpoint"),
    (2, "evaluate --data-dir nowhere --model m", "nowhere/val"),
    (2, "evaluate --data-dir {data} --model m --results-file nowhere/x.csv", "--results-file"),
    (2, "predict nowhere.jpg --model m", "nowhere.jpg"),
    (2, "predict {file} --checkpoint nowhere", "--checkpoint"),
    (2, "export nowhere --to onnx", "nowhere"),
    (2, "pack --data-dir nowhere --output o", "nowhere"),
    (2, "pack --data-dir {data} --split x --output o", "data/x"),
    (2, "pack --data-dir {data} --output {file}", "is a file"),
    (2, "demo --output {file}", "is a file"),
    (2, "bench --data-dir nowhere", "nowhere/train"),
    *(
        (3, f"labels {name}", "LABELS: no label set")
        for name in (
            "info nowhere",
            "status nowhere",
            "finish nowhere",
            "verify {data}",
            "add-views nowhere --data-dir {data}",
            "split nowhere --output o",
            "export nowhere --output o",
            "convert nowhere --output o",
        )
    ),
    (3, "labels merge {labels} nowhere --output o", "SETS: no label set"),
    (2, "labels status {labels} --list nowhere/x", "--list"),
    (2, "labels verify {labels} --data-dir nowhere", "nowhere/train"),
    (2, "labels add-views {labels} --data-dir nowhere", "nowhere/train"),
    (2, "labels export {labels} --to webdataset --data-dir nowhere --output o", "nowhere/train"),
    (2, "labels convert {labels} --output {file}/o", "cannot be created"),
    (2, "labels convert {labels} --output {data}", "not a label set and not empty"),
    (2, "labels import nowhere --data-dir {data} --output o", "FOLDER"),
    (2, "labels import {data} --data-dir nowhere --output o", "nowhere/train"),
    (2, "slurm precompute --data-dir nowhere --teacher a --output o", "nowhere/train"),
    (2, "slurm distill --data-dir nowhere --labels l --model m --output o", "nowhere"),
    (2, "slurm sweep --vary seed=1,2 --data-dir nowhere --labels l --model m --output o", "nowh"),
]

RUN = """
import contextlib, io, json, sys, cli
found = []
for words in json.load(sys.stdin):
    sys.argv, err, code = ["mealv2", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
    found.append([code, err.getvalue(), "torch" in sys.modules])
    assert not found[-1][2], found[-1]
print(json.dumps(found))
"""


def test_a_wrong_path_is_one_line_before_torch_is_imported(
    data_dir: Path, labels_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "file").touch()
    names = {"data": data_dir, "labels": labels_dir, "above": labels_dir.parent}
    names["file"] = tmp_path / "file"
    names["coco"] = draw_coco(tmp_path_factory.mktemp("coco") / "set")
    commands = [shlex.split(command.format(**names)) for _, command, _ in WRONG]
    ran = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(commands),
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for (code, command, named), (found, message, _) in zip(
        WRONG, json.loads(ran.stdout), strict=True
    ):
        assert (found, message.count("\n")) == (code, 1), (command, message)
        assert message.startswith("mealv2: "), command
        assert named.format(**names) in message, (command, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.timing
def test_a_wrong_data_dir_is_reported_in_half_a_second(tmp_path: Path) -> None:
    mealv2 = str(Path(sys.executable).parent / "mealv2")
    words = [mealv2, *shlex.split("distill --data-dir nowhere --labels labels --model resnet18")]
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        assert subprocess.run(words, cwd=tmp_path, capture_output=True, check=False).returncode == 2
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5


def test_names_of_files_are_those_of_a_label_set() -> None:
    assert (paths.PLAN_NAME, paths.MANIFEST_NAME) == (PLAN_NAME, MANIFEST_NAME)


def test_paths_that_are_there_pass_and_urls_are_not_looked_at(
    config_of: Run, data_dir: Path, labels_dir: Path, tmp_path: Path
) -> None:
    rest = ["--model", "m", "--output", tmp_path / "new" / "run"]
    check_paths(config_of("distill", "--data-dir", data_dir, "--labels", labels_dir, *rest))
    check_paths(config_of("distill", "--data-dir", "s3://b/d", "--labels", "s3://b/l", *rest))
    # the label set may name another split than train, and only its plan says which
    (tmp_path / "training" / "ants").mkdir(parents=True)
    remote = ["--data-dir", tmp_path, "--labels", "s3://b/l", "--val-split", "none"]
    check_paths(config_of("distill", *remote, *rest))
    pattern = tmp_path / "training-{000..003}.tar"
    check_paths(config_of("labels", "verify", "s3://b/l", "--data-dir", pattern))


def test_what_is_missing_is_listed(run_cli: Run, data_dir: Path, tmp_path: Path) -> None:
    message = run_cli("predict", data_dir / "tests", "--model", "m").stderr
    assert f"(in {data_dir}: train, val)" in message
