"""pipeline.runtime.processes: who runs, and children that end with their parent."""

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.runtime.processes import is_running, this_process


def test_this_process_runs_and_one_with_its_pid_that_started_earlier_does_not() -> None:
    process = this_process()
    assert is_running(process) is True
    assert is_running(replace(process, start="1")) is False


def test_a_process_that_was_killed_does_not_run_even_before_its_parent_asks() -> None:
    code = "import sys, time; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        process = replace(this_process(), pid=child.pid, start=_start(child.pid))
        assert is_running(process) is True
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        assert is_running(process) is False


def _start(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_nothing_is_known_of_processes_of_another_machine_or_container() -> None:
    assert is_running(replace(this_process(), host="elsewhere")) is None
    assert is_running(replace(this_process(), boot="earlier")) is None


PARENT = """
import subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
print(child.pid, flush=True)
child.stdout.readline()
print("ready", flush=True)
time.sleep(600)
"""
CHILD = """
import time
from pipeline.runtime.processes import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent_however_that_ends(number: signal.Signals) -> None:
    code = PARENT.format(child=CHILD)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == b"ready\n"
        child = os.pidfd_open(pid)
        parent.send_signal(number)
        assert _has_ended(child)
        os.close(child)


def _has_ended(process: int, *, deadline_s: float = 60.0) -> bool:
    return bool(select.select([process], [], [], deadline_s)[0])
