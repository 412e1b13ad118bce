"""Ten thousand damaged and forged label sets: each is refused with a reason, or read right.

tests/fuzz.py makes and reads them, in a process of its own, which may neither crash nor hang.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import fuzz

SEED = 2026
NUM_CASES = 10_000
NUM_PROCESSES = 2


@pytest.mark.slow
def test_damaged_and_forged_sets_are_refused_with_a_reason_or_read_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = NUM_CASES // NUM_PROCESSES
    processes = []
    for number in range(NUM_PROCESSES):
        folder = tmp_path / str(number)
        folder.mkdir()
        with (folder / "stderr.txt").open("wb") as errors:
            command = [sys.executable, fuzz.__file__, folder, SEED, number * share, share]
            process = subprocess.Popen(
                [*map(str, command)],
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        processes.append((folder, process))
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong: list[str] = []
    most = 0.0
    try:
        for folder, process in processes:
            out, _ = process.communicate(timeout=1800)
            at = folder / "at.txt"
            case = at.read_text() if at.exists() else "none"
            said = (folder / "stderr.txt").read_text()
            assert process.returncode == 0, f"case {case} of seed {SEED}: {said}"
            told = json.loads(out)
            kinds.update(told["kinds"])
            reasons.update(told["reasons"])
            wrong += told["wrong"]
            most = max(most, told["most"])
    finally:
        for _, process in processes:
            process.kill()
            process.communicate()
    assert not wrong, "\n".join(wrong[:3])
    assert kinds.total() == NUM_CASES
    refused = sum(count for kind, count in kinds.items() if kind.endswith("refused"))
    assert NUM_CASES // 2 < refused < NUM_CASES, "damage that shows, and damage that does not"
    with capsys.disabled():
        print(f"\n{NUM_CASES} cases, {refused} refused, at most {most} bytes for each of a set")
        print(f"{dict(kinds.most_common())}\n{dict(reasons.most_common(30))}")
