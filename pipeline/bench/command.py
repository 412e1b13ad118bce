"""The line on the command itself: how long a person waits for its help."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import mealv2
from pipeline.bench.lines import Line
from pipeline.bench.room import BenchContext
from pipeline.timing import take_turns


def measure(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line on `mealv2 --help`, the interpreter's own start included."""

    def help_text() -> int:
        words = [sys.executable, "-m", "cli", "--help"]
        project_dir = Path(mealv2.__file__).resolve().parent.parent
        subprocess.run(words, cwd=project_dir, check=True, capture_output=True)
        return 1

    turns = take_turns(
        {"help": help_text}, rounds=max(5, bench.config.rounds), device=torch.device("cpu")
    )
    return [Line("help", [turn.seconds for turn in turns["help"]], turns)]
