"""Stage one as an array on a real Slurm, and what becomes of it when machines fail."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from mealv2.storage.atomic import SCRIPTS_NAME, TEMPORARY_PREFIX

pytestmark = pytest.mark.cluster
NUM_TASKS = 4
SHARD_BYTES = 4000  # fewer than the smallest file of labels here has


@pytest.fixture(scope="module")
def labelling(
    draw_tree: Callable[..., Path],
    teacher_dirs: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """Stage one of some 20 s in one process, in 27 shards; all but --output."""
    data_dir = draw_tree(tmp_path_factory.mktemp("images") / "data", num_train=40)
    settings = {
        "--data-dir": data_dir,
        "--teacher": f"test_resnet={teacher_dirs['test_resnet']}",
        "--img-size": 32,
        "--num-views": 200,
        "--shard-size": 5,
        "--batch-size": 100,
        "--workers": 0,
    }
    return [str(part) for item in settings.items() for part in item]


def whole_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a label set, without what killed jobs left and without scripts."""
    paths = [p for p in sorted(folder.iterdir()) if not p.name.startswith(TEMPORARY_PREFIX)]
    return {path.name: path.read_bytes() for path in paths if path.name != SCRIPTS_NAME}


def written(process: int) -> int:
    """Return how many bytes a process has written."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def test_killed_powered_off_and_cut_off_tasks_leave_a_set_equal_to_one_made_alone(
    cluster: Any, labelling: list[str], done: Callable[..., Result], tmp_path: Path
) -> None:
    if cluster.mode != "net":
        pytest.skip(f"mode {cluster.mode} has no network to cut nodes off from")
    out, alone = tmp_path / "labels", tmp_path / "alone"
    command = ["precompute", "--array", NUM_TASKS, *labelling, "--output", out]
    first = cluster.submit(*command)
    names = Path(out, "slurm", "precompute-1.txt").read_text().split()
    assert first["missing"] == len(names) == 27

    def every_task_has_made_one() -> bool:
        shares = [names[task::NUM_TASKS] for task in range(NUM_TASKS)]
        return all(any((out / name).exists() for name in share) for share in shares)

    # tasks 0 and 1 run on n1, 2 and 3 on n2: one is killed, its node loses power, n2 its network
    cluster.until(every_task_has_made_one)
    assert {t: task.node for t, task in cluster.tasks(first["array"]).items()} == {
        "0": "n1",
        "1": "n1",
        "2": "n2",
        "3": "n2",
    }
    killed = cluster.workers("n1", "precompute")
    os.kill(killed[0], signal.SIGKILL)
    cluster.until(lambda: "FAILED" in {t.state for t in cluster.tasks(first["array"]).values()})
    cluster.node("off", "n1")
    cut_off = cluster.workers("n2", "precompute")
    cluster.node("cut", "n2")
    for process in cut_off:  # held until their twins run: how fast the machine is plays no part
        os.kill(process, signal.SIGSTOP)
    done("precompute", *labelling, "--output", alone)
    cluster.node("lost", "n1", "n2")

    # both copies of a task label the same shards at once
    cluster.until(lambda: len(cluster.workers("n3", "precompute")) == 2)
    twins = cluster.workers("n3", "precompute")
    before = {process: written(process) for process in [*cut_off, *twins]}
    assert len(cut_off) == len(twins) == 2
    for process in cut_off:
        os.kill(process, signal.SIGCONT)
    both = {t for t, task in cluster.tasks(first["array"]).items() if task.node == "n3"}
    assert both & {"2", "3"}
    cluster.until(
        lambda: all(written(process) > before[process] + SHARD_BYTES for process in cut_off)
    )
    cluster.node("on", "n1")
    cluster.node("mend", "n2")
    cluster.node("wait", "n1", "n2", "n3")
    has_stopped = {"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"}
    cluster.until(
        lambda: all(
            task.state in has_stopped or "held" in task.reason
            for task in cluster.tasks(first["array"]).values()
        )
    )
    assert not (out / "manifest.json").exists()

    second = cluster.submit(*command)
    assert 0 < second["missing"] < first["missing"]
    ended = cluster.until_ended(second["finish"])
    assert [task.state for task in ended.values()] == ["COMPLETED"]
    assert done("labels", "verify", out).code == 0
    assert whole_files(out) == whole_files(alone)
    third = cluster.submit(*command)
    assert (third["missing"], third["array"], third["finish"]) == (0, None, None)


@pytest.fixture
def without_grace(cluster: Any) -> Iterator[None]:
    """Preempted jobs are requeued at once.

    When a grace time ends, the controller's look at time limits, every 30 s, may come before its
    scheduler: then it ends the task (TIMEOUT) and requeues nothing.
    """
    cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=0")
    yield
    cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=10")


@pytest.mark.usefixtures("without_grace")
def test_a_preempted_task_comes_back_and_goes_on(
    cluster: Any, labelling: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    jobs = cluster.submit("precompute", "--array", 1, *labelling, "--output", out)
    cluster.until(lambda: len(list(out.glob("train-*.h5"))) > 1)
    whole = {path: path.stat().st_mtime_ns for path in out.glob("*.h5")}
    (task,) = cluster.tasks(jobs["array"]).values()

    wrap = ["sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null"]
    urgent = int(cluster.run(*wrap, "--nodelist", task.node, "--wrap", "true"))
    cluster.until_ended(urgent)
    cluster.until(lambda: cluster.task(jobs["finish"]).state == "COMPLETED")

    (again,) = cluster.tasks(jobs["array"]).values()
    assert (again.state, again.restarts) == ("COMPLETED", 1)
    assert whole == {path: path.stat().st_mtime_ns for path in whole}
