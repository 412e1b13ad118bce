"""A real Slurm with virtual nodes on this machine, and jobs of `mealv2 slurm` on it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cli

HERE = Path(__file__).resolve().parent
ROOT = Path(cli.__file__).resolve().parent
CANNOT = 77  # what up.sh ends with on a machine that cannot have virtual nodes
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


class Task(NamedTuple):
    """A job, or a task of an array, as the controller sees it."""

    state: str
    node: str
    reason: str
    restarts: int


class Cluster:
    """The nodes, and what the queue says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mode = (folder / "mode").read_text().strip()
        self.env = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *words: object) -> str:
        """Run a command that must end well; return what it prints."""
        text = [str(word) for word in words]
        ran = subprocess.run(text, env=self.env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (text, ran.stdout, ran.stderr)
        return ran.stdout

    def node(self, what: str, *names: str) -> None:
        """Switch nodes: on, off, cut, mend, lost, wait (see node.sh)."""
        self.run(HERE / "node.sh", what, *names)

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run ``mealv2 WORDS`` as a user of the cluster does."""
        text = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
        return subprocess.run(text, env=self.env, capture_output=True, text=True, check=False)

    def submit(self, *words: object) -> dict[str, Any]:
        """Run ``mealv2 slurm WORDS``; return its report."""
        ran = self.command("slurm", *words)
        assert ran.returncode == 0, ran.stderr
        report = json.loads(ran.stdout.splitlines()[-1])
        assert isinstance(report, dict)
        return report

    def tasks(self, job: int) -> dict[str, Task]:
        """Return a job, or the tasks of an array by number; ended ones too."""
        said = self.run("scontrol", "-o", "show", "job", job)
        found = {}
        for line in said.splitlines():
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            name = fields.get("ArrayTaskId", "")
            found[name] = Task(
                fields["JobState"],
                fields.get("NodeList", ""),
                fields["Reason"],
                int(fields["Restarts"]),
            )
        return found

    def task(self, job: int) -> Task:
        """Return a job that is no array."""
        (task,) = self.tasks(job).values()
        return task

    def until(self, condition: Callable[[], object], *, deadline_s: float = 300.0) -> None:
        """Look at ``condition`` until it holds; fail with the queue when time runs out."""
        ends = time.monotonic() + deadline_s
        while not condition():
            if time.monotonic() > ends:
                pytest.fail("waited in vain:\n" + self.run("scontrol", "-o", "show", "job"))
            threading.Event().wait(0.1)

    def until_ended(self, job: int, *, deadline_s: float = 300.0) -> dict[str, Task]:
        """Wait until a job, or every task of an array, has ended; return how."""

        def has_ended() -> bool:
            return all(task.state in ENDED for task in self.tasks(job).values())

        self.until(has_ended, deadline_s=deadline_s)
        return self.tasks(job)

    def workers(self, node: str, word: str) -> list[int]:
        """Return the processes on a node with a word in their command, whoever sees them."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (path / "cmdline").read_bytes().split(b"\0")
                there = f"SLURMD_NODENAME={node}".encode()
                if word.encode() in words and there in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    up = subprocess.run([HERE / "up.sh"], capture_output=True, text=True, check=False)
    if up.returncode == CANNOT:
        pytest.skip(up.stderr.strip().splitlines()[-1])
    try:
        assert up.returncode == 0, up.stderr
        folder = os.environ.get("MEALV2_CLUSTER_DIR", "/var/tmp/mealv2-cluster")
        yield Cluster(Path(folder))
    finally:
        subprocess.run([HERE / "down.sh"], check=True)


@pytest.fixture
def cluster(_cluster: Cluster) -> Iterator[Cluster]:
    """Three nodes that are up, n1 to n3, of two CPUs; nothing else runs there."""
    _cluster.node("on", "n1", "n2", "n3")
    _cluster.node("wait", "n1", "n2", "n3")
    yield _cluster
    _cluster.run("scancel", "--user=root")
