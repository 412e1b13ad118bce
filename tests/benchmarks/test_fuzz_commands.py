"""benchmarks/fuzz_commands.py, shortened: damaged files and odd values end in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz_commands

NUM_CASES = len(fuzz_commands.COMMANDS) + 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process, /proc")
def test_commands_survive_damaged_files_and_odd_values(tmp_path: Path) -> None:
    command = [sys.executable, fuzz_commands.__file__, tmp_path, "--cases", NUM_CASES]
    result = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (tmp_path / f"results-{fuzz_commands.SEED}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["case"] for record in records] == list(range(NUM_CASES))
    assert {record["code"] for record in records} >= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("code", "stderr", "wrong"),
    [
        (0, "data: 3 images\n", ""),
        (2, "mealv2: x is wrong\n", ""),
        (1, "note\nmealv2: x is wrong\n", ""),
        (1, "Traceback (most recent call last):\nKeyError: 'x'\n", "traceback"),
        (1, "", "not one line of error"),
        (1, "mealv2: a\nmealv2: b\n", "not one line of error"),
        (1, "mealv2: a\nmore\n", "not one line of error"),
        (0, "mealv2: a\n", "error and exit 0"),
        (5, "mealv2: a\n", "exit 5"),
        (-11, "", "exit -11"),
        (-9, "", "time limit"),
        (0, "/x/y.py:3: UserWarning: odd\n", "warning of Python"),
        (2, f"mealv2: {'x' * 3000}\n", "a long line"),
    ],
)
def test_what_is_wrong_is_found(code: int, stderr: str, wrong: str) -> None:
    outcome = fuzz_commands.Outcome(code, 0.1, 1, stderr)
    assert fuzz_commands.verdict(outcome, is_whole=False) == wrong
