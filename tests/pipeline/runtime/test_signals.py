"""Ctrl-C at a moment when Python itself would lose it."""

import subprocess
import sys

PROGRAM = """
import signal, time, weakref
from pipeline.runtime.signals import interrupts_kept

class Thing:
    pass

def interrupted(_):
    signal.raise_signal(signal.SIGINT)

with interrupts_kept():
    try:
        for _ in range(2):
            thing = Thing()
            reference = weakref.ref(thing, interrupted)
            del thing
        time.sleep(20)
        print("lost")
    except KeyboardInterrupt:
        print("raised again")
    thing = Thing()
    reference = weakref.ref(thing, lambda _: 1 / 0)
    del thing  # other errors are printed as ever
"""


def test_ctrl_c_in_a_callback_is_raised_again_without_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["raised again"]
    assert done.stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in done.stderr
