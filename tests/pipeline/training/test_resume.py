"""A run killed with kill -9, again and again, ends in the bits of one that was left alone."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result, Spawned, same_state
from mealv2.storage.atomic import file_sha256

NUM_KILLS = 20

pytestmark = pytest.mark.slow


def steps_done(run: Path) -> int:
    """Return the last step that the run has logged (half a line counts as none)."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    steps = [0]
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            steps.append(json.loads(line).get("step", 0))
        except ValueError:
            continue
    return max(steps)


def states(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint's state: student, average, discriminator, optimizer, place."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state: dict[str, Any] = torch.load(newest, weights_only=True)
    return state


def test_killed_at_twenty_random_steps_it_ends_in_the_same_bits(
    spawn: Callable[..., Spawned],
    distill_flags: list[str],
    teacher_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left_alone, killed = tmp_path / "left-alone", tmp_path / "killed"
    # half of the epochs are answered by teachers; everything that has a state is on
    flags = [*distill_flags, *teacher_flags, "--missing", "teach", "--epochs", 60]
    flags += ["--log-interval", 1, "--recovery-interval", 3, "--val-split", "none"]
    flags += ["--model-ema", "--model-ema-decay", 0.9, "--sched", "cosine", "--batch-size", 6]
    flags += ["--cutmix-target", "mixed-labels", "--cutmix-prob", 0.5]
    result: Result = spawn(*flags, "--output", left_alone).result(deadline_s=300)
    assert result.code == 0, result.stderr
    total = result.report["steps"]
    assert total == 360

    # the last steps go by before a signal arrives
    targets = sorted(random.Random(2020).sample(range(1, total - 30), NUM_KILLS))
    for target in targets:
        go_on = (
            ["distill", "--resume", killed] if steps_done(killed) else [*flags, "--output", killed]
        )
        process = spawn(*go_on)
        process.until(lambda at=target: steps_done(killed) >= at)  # type: ignore[misc]
        process.signal(signal.SIGKILL)
        assert process.result().code == -signal.SIGKILL
    assert spawn("distill", "--resume", killed).result(deadline_s=300).code == 0

    weights = Path("student") / "model.safetensors"
    sha256 = {run.name: file_sha256(run / weights) for run in (left_alone, killed)}
    with capsys.disabled():
        print(f"\nkilled at steps {targets} of {total}: {sha256}")
    assert sha256["killed"] == sha256["left-alone"]
    one, other = states(left_alone), states(killed)
    for state in (one, other):
        state.pop("args")  # names the run folder
    assert same_state(one, other)
    rows = [(run / "summary.csv").read_text() for run in (left_alone, killed)]
    assert rows[0] == rows[1]
