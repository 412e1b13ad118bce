"""Which process this is, whether another one still runs, and how a child ends with its parent."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessId:
    """A process of a machine: its pid, and when it started, because pids are used again.

    ``boot`` identifies the machine's current boot and the namespace of its pids.
    """

    host: str
    boot: str
    pid: int
    start: str


def this_process() -> ProcessId:
    """Return the identity of this process."""
    found = ProcessId(socket.gethostname(), _boot(), os.getpid(), "")
    return replace(found, start=_start_of(found.pid) or "")


def is_running(process: ProcessId) -> bool | None:
    """Return whether a process runs; None for one of another machine, boot or container."""
    if (process.host, process.boot) != (socket.gethostname(), _boot()):
        return None
    return _start_of(process.pid) == process.start


def _boot() -> str:
    parts = []
    with suppress(OSError):
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _start_of(pid: int) -> str | None:
    """Return when a process started, in the system's own unit; None if it has ended."""
    if (_PROC / "self/stat").exists():
        try:
            text = (_PROC / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        state, *fields = text.rpartition(")")[2].split()  # the name may contain spaces
        return None if state in "ZX" else fields[18]  # a zombie has ended
    words = ["ps", "-o", "lstart=", "-p", str(pid)]
    found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return found or None


def end_with_parent() -> None:
    """End this process when its parent ends, however that ends.

    A process of ``multiprocessing`` watches its parent's sentinel, another one its standard input:
    a pipe that its parent alone holds open. This works on every system, and also if the parent
    ended before this call.
    """
    threading.Thread(target=_wait_for_parent, name="parent", daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing = sys.modules.get("multiprocessing")  # its processes have imported it
    parent = multiprocessing.parent_process() if multiprocessing else None
    if parent is not None:
        parent.join()
    else:
        try:
            while os.read(0, 1):
                continue
        except OSError:  # it was started without the pipe
            return
    os.kill(os.getpid(), signal.SIGKILL)
