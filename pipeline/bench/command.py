"""The line on the command itself: how long a person waits for its help."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import mealv2
from pipeline.bench.lines import Line
from pipeline.bench.room import Room
from pipeline.timing import take_turns


def measure(room: Room, wanted: Sequence[str]) -> list[Line]:
    """Return the line on `mealv2 --help`, the interpreter's own start included."""

    def help_text() -> int:
        words = [sys.executable, "-m", "cli", "--help"]
        place = Path(mealv2.__file__).resolve().parent.parent
        subprocess.run(words, cwd=place, check=True, capture_output=True)
        return 1

    turns = take_turns(
        {"help": help_text}, rounds=max(5, room.config.rounds), device=torch.device("cpu")
    )
    return [Line("help", [turn.seconds for turn in turns["help"]], turns)]
