"""Stage two under a real torchrun: restarts, signals, docs/how-to/several-gpus.md's commands."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from coco import draw_coco

from conftest import Result, Spawned, killed_at_the_end
from mealv2.storage.atomic import file_sha256

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


class TorchRun(Spawned):
    """``torchrun FLAGS -m mealv2 ARGS`` on loopback; looked at and ended as Spawned is."""

    def __init__(self, words: tuple[object, ...], folder: Path) -> None:
        self._err, self._out = folder / "stderr.txt", folder / "stdout.txt"
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
                stdout=out,
                stderr=err,
                cwd=folder,
                start_new_session=True,
                env={**os.environ, **own, "TMPDIR": str(folder)},
            )

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks that run now."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


@pytest.fixture
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TorchRun]]:
    """Start ``torchrun FLAGS``; what still runs at the end is killed."""
    started: list[TorchRun] = []

    def start(*words: object, folder: Path | None = None) -> TorchRun:
        started.append(TorchRun(words, folder or tmp_path_factory.mktemp("torchrun")))
        return started[-1]

    with killed_at_the_end(started):
        yield start


@pytest.fixture
def flags(finetune_flags: list[str]) -> list[object]:
    """A run of 60 steps with a checkpoint of every fifth, in two ranks."""
    own = ["--epochs", 20, "--recovery-interval", 5, "--val-split", "none", "--auto-resume"]
    return ["-m", "mealv2", *finetune_flags, *own]


def sha256(run: Path) -> str:
    return file_sha256(run / "student" / "model.safetensors")


def num_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def test_after_a_kill_torchrun_starts_again_and_it_ends_in_the_same_bits(
    torchrun: Callable[..., TorchRun], flags: list[object], tmp_path: Path
) -> None:
    two = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 1]
    alone, run = tmp_path / "alone", tmp_path / "run"
    left_alone = torchrun(*two, *flags, "--output", alone).result(deadline_s=120)
    assert left_alone.code == 0, left_alone.stderr
    assert left_alone.report["steps"] == 60

    process = torchrun(*two, *flags, "--output", run)
    process.until(lambda: num_logged(run) >= 12)
    os.kill(process.ranks()[-1], signal.SIGKILL)
    killed = process.result(deadline_s=120)
    assert killed.code == 0, killed.stderr
    assert killed.stderr.count(f"run folder {run}") == 2, "it was to be started twice"
    assert killed.report["steps"] == 60
    assert sha256(run) == sha256(alone)


def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(
    torchrun: Callable[..., TorchRun], flags: list[object], tmp_path: Path
) -> None:
    two = ["--standalone", "--nproc-per-node", 2]
    run = tmp_path / "run"
    process = torchrun(*two, *flags, "--output", run)
    process.until(lambda: num_logged(run) >= 12)
    os.kill(process.process.pid, signal.SIGTERM)
    stopped = process.result()
    assert stopped.code == 1  # torchrun's own: it does not hand on that of the ranks
    assert stopped.stderr.count("stopped by SIGTERM in epoch") == 1
    assert stopped.stdout == ""
    last = max(path.stem for path in (run / "checkpoints").iterdir())
    assert int(last.split("-")[1]) == num_logged(run)

    went_on = torchrun(*two, *flags, "--output", run).result(deadline_s=120)
    assert went_on.code == 0, went_on.stderr
    assert went_on.report["steps"] == num_logged(run) == 60


def test_ranks_share_the_features_of_a_frozen_backbone(
    torchrun: Callable[..., TorchRun],
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:
    words = ["--data-dir", data_dir, "--model", teacher_dirs["test_resnet"], "--mode", "frozen"]
    words += ["--img-size", 32, "--epochs", 2, "--batch-size", 12, "--num-views", 2, "--workers", 0]
    two = ["--standalone", "--nproc-per-node", 2, "-m", "mealv2", "transfer", *words]
    for cache in ("auto", "off"):
        run = torchrun(*two, "--cache-features", cache, "--output", tmp_path / cache)
        result = run.result(deadline_s=120)
        assert result.code == 0, result.stderr
        assert result.report["num_images"] == 15
    assert sha256(tmp_path / "auto") == sha256(tmp_path / "off")


def test_ranks_detect_on_parts_of_the_images_and_have_the_figures_of_one(
    torchrun: Callable[..., TorchRun],
    done: Callable[..., Result],
    teacher_dirs: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = draw_coco(tmp_path / "coco", splits={"train": 4, "val": 3})
    words = ["transfer-detection", "--data-dir", folder, "--model", teacher_dirs["test_resnet"]]
    words += ["--batch-size", "4", "--img-size", "48", "--pyramid-channels", "8", "--workers", "0"]
    words += ["--iterations", "3", "--lr", "0.1", "--score-threshold", "0.001"]
    one = done(*words, "--output", tmp_path / "one").report
    two = ["--standalone", "--nproc-per-node", 2, "-m", "mealv2", *words]
    result = torchrun(*two, "--output", tmp_path / "two").result(deadline_s=120)
    assert result.code == 0, result.stderr
    assert result.report["num_images"] == one["num_images"] == 3
    assert result.report["ap50"] == pytest.approx(one["ap50"], abs=0.1)


@pytest.mark.parametrize("wrong", [["--model", "resnet5"], ["--no-such-flag"]])
def test_one_word_of_a_rank_that_failed(
    torchrun: Callable[..., TorchRun], flags: list[object], tmp_path: Path, wrong: list[object]
) -> None:
    two = ["--standalone", "--nproc-per-node", 2]
    failed = torchrun(*two, *flags, *wrong, "--output", tmp_path / "r").result()
    assert failed.code == 1
    assert failed.stderr.count("mealv2: ") == 1
    assert failed.stdout == ""


# Slurm as a batch script sees it, on a node of its own.
_SLURM = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" >> scontrol.txt',
    "sleep": ":",
}


@pytest.mark.parametrize(
    ("flags", "code", "requeues"),
    [
        (["--initial-checkpoint", "not-there"], 2, 0),
        (["--labels", "not-there"], 3, 0),
        (["--lr", "1e30"], 1, 1),
    ],
)
def test_a_job_that_refuses_is_not_begun_again_and_one_that_fails_is(
    done: Callable[..., Result],
    distill_flags: list[str],
    tmp_path: Path,
    flags: list[str],
    code: int,
    requeues: int,
) -> None:
    folder = tmp_path / "it's a run"
    command = ["--nproc-per-node", 2, *distill_flags[1:], *flags, "--output", folder]
    script = done("slurm", "distill", *command, "--print").stdout
    folder.joinpath("slurm").mkdir(parents=True)  # where the script would be kept
    if requeues:
        script = script.replace("--max-restarts=3", "--max-restarts=0")  # which take their time
    (tmp_path / "bin").mkdir()
    for name, text in _SLURM.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    own |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **own, "SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == code, ran.stderr
    assert ran.stderr.count("mealv2: ") == 1, "also where torchrun starts the ranks again"
    calls = tmp_path / "scontrol.txt"
    assert (calls.read_text() if calls.exists() else "") == "requeue 4711\n" * requeues
    assert (folder / "slurm" / "refused-4711.1").exists() == (not requeues)


def _commands() -> list[list[str]]:
    text = (ROOT / "docs" / "how-to" / "several-gpus.md").read_text(encoding="utf-8")
    found = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in found for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("torchrun ")]


def test_commands_of_the_document_run_with_fewer_ranks(
    torchrun: Callable[..., TorchRun],
    data_dir: Path,
    labels_dir: Path,
    student_dir: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "pictures").symlink_to(data_dir)
    (tmp_path / "labels").symlink_to(labels_dir)
    shutil.copytree(student_dir, tmp_path / "runs" / "start")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    here = {"8": "1", "10.0.0.1": "127.0.0.1", "29500": port, "resnet18": "test_resnet"}
    quick = ["--epochs", "1", "--workers", "0"]
    running: list[TorchRun] = []
    commands = _commands()
    assert len(commands) == 4
    for words in commands:
        own = [here.get(word, word) for word in words[1:]]
        running.append(torchrun(*own, *quick, folder=_beside(tmp_path, len(running))))
        if "--standalone" in words or words[words.index("--node-rank") + 1] == "1":
            results = [process.result(deadline_s=120) for process in running]
            assert [result.code for result in results] == [0] * len(running), results
            assert sum(len(result.stdout.splitlines()) for result in results) == 1
            running = []
            shutil.rmtree(tmp_path / "runs" / "cached")


def _beside(folder: Path, number: int) -> Path:
    """Return a folder of a machine, with what all of them see."""
    runtime = folder / f"machine-{number}-{time.monotonic_ns()}"
    runtime.mkdir()
    for name in ("pictures", "labels", "runs"):
        (runtime / name).symlink_to(folder / name)
    return runtime


def test_all_ranks_have_meal_s_teacher_of_the_step(
    torchrun: Callable[..., TorchRun],
    done: Callable[..., Result],
    data_dir: Path,
    teacher_flags: list[str],
    tmp_path: Path,
) -> None:
    """The student has no batch normalisation: two ranks have the losses of one process."""
    flags = ["distill", "--method", "meal", "--online", "--data-dir", data_dir, *teacher_flags]
    flags += ["--model", "test_convnext", "--no-pretrained", "--img-size", 32, "--epochs", 2]
    flags += ["--batch-size", 9, "--workers", 0, "--val-split", "none", "--log-interval", 1]
    flags += ["--out-layer", "-2,-1", "--out-dims", 16]
    runs = [tmp_path / "one", tmp_path / "two"]
    done(*flags, "--output", runs[0])
    two = ["--standalone", "--nproc-per-node", 2, "-m", "mealv2"]
    result = torchrun(*two, *flags, "--output", runs[1]).result(deadline_s=300)
    assert result.code == 0, result.stderr
    one, other = (
        [
            event["similarity_loss"]
            for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if event["event"] == "train"
        ]
        for run in runs
    )
    assert len(one) == 8
    assert other == pytest.approx(one, rel=1e-4)
