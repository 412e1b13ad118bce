"""The line on the command line: the time until `mealv2 --help` is printed."""

import subprocess
import sys
from pathlib import Path

import torch

import mealv2
from pipeline.bench.context import BenchContext
from pipeline.bench.lines import Line
from pipeline.timing import take_turns


def measure(bench: BenchContext) -> list[Line]:
    """Return the line on `mealv2 --help`; the time includes the start of the interpreter."""

    def help_text() -> int:
        command = [sys.executable, "-m", "cli", "--help"]
        project_dir = Path(mealv2.__file__).resolve().parent.parent
        subprocess.run(command, cwd=project_dir, check=True, capture_output=True)
        return 1

    rounds = max(5, bench.config.rounds)
    turns = take_turns({"help": help_text}, rounds=rounds, device=torch.device("cpu"))
    return [Line("help", [turn.seconds for turn in turns["help"]], turns)]
