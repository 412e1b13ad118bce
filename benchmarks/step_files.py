"""Count the project's files that run from the request for a batch to the loss of its step.

    python benchmarks/step_files.py

It distils from a stored label set, with a discriminator and without reading threads, and looks at
the second step: what only the first step needs is not counted. It prints the number of files, then
each file in the order in which they first run, and how often a call enters it from another file of
the project. A file with 0 calls was entered before and continues: it holds the loop, or a generator
that the batch passes through. Calls between other packages are passed through.
"""

import argparse
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import same_numbers

# Qualified names of functions of the project. Whoever renames them writes the new names here.
START = "BatchReader.__init__"  # is handed the request for one batch, to read its views
END = "DistillTask.forward"  # returns the loss
STEP = 2
FOLDERS = ("mealv2", "pipeline")
RUN = ["--val-split", "none", "--workers", "0", "--epochs", "1"]  # nothing else reads views


class Recorder:
    """A profile function: the files of ``tree`` that run in one step.

    ``entries`` counts the calls that enter a file from another one, by file, in the order in which
    the files first run; 0 where a file is only returned to.
    """

    def __init__(self, tree: Path, *, start: str = START, end: str = END, step: int = STEP) -> None:
        self.entries: Counter[str] = Counter()
        self.is_done = False
        self._prefixes = {str(tree / name) + "/": name for name in FOLDERS}
        self._start, self._end, self._step = start, end, step
        self._num_started = 0
        self._is_on = False
        self._names: dict[str, str | None] = {}

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event not in ("call", "return") or self.is_done:
            return
        name, file = frame.f_code.co_qualname, self._file(frame)
        if event == "call" and name == self._start and file is not None:
            self._num_started += 1
            self._is_on = self._num_started == self._step
        if not self._is_on:
            return
        if event == "call":
            if file is not None and (name == self._start or self._caller(frame) != file):
                self.entries[file] += 1
        elif name == self._end and file is not None:
            self._is_on, self.is_done = False, True
        elif (caller := self._caller(frame)) is not None:
            self.entries[caller] += 0

    def _caller(self, frame: FrameType) -> str | None:
        """Return the file of the nearest caller that is of the project."""
        caller = frame.f_back
        while caller is not None:
            if (file := self._file(caller)) is not None:
                return file
            caller = caller.f_back
        return None

    def _file(self, frame: FrameType) -> str | None:
        """Return the path in the tree of the file that a frame runs; None for other packages."""
        path = frame.f_code.co_filename
        if path not in self._names:
            found = [(prefix, n) for prefix, n in self._prefixes.items() if path.startswith(prefix)]
            self._names[path] = None
            for prefix, name in found:
                self._names[path] = f"{name}/{path.removeprefix(prefix)}"
        return self._names[path]


def record(root: Path, tree: Path, recorder: Recorder) -> None:
    """Distil with a recorder; raises RuntimeError if it saw no whole step."""
    shop = same_numbers.Workshop(root, tree)
    words = [*shop.training_flags(same_numbers.Training(RUN)), "--output", root / "run"]
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        same_numbers.call(*words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if not recorder.is_done:
        raise RuntimeError("no such step: START and END must name functions of the project")


def report(recorder: Recorder) -> str:
    """Return the number of files and the list of them."""
    found = recorder.entries.items()
    called = sum(count > 0 for _, count in found)
    head = (
        f"{len(found)} files run from the request for a batch to its loss; "
        f"{sum(recorder.entries.values())} calls enter {called} of them"
    )
    return "\n".join([head, *(f"{count:5}  {file}" for file, count in found)])


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", default=START, help="function that gets a batch's request")
    parser.add_argument("--end", default=END, help="function that returns its loss")
    parser.add_argument("--step", type=int, default=STEP, help="which step, counted from 1")
    parser.add_argument(
        "--tree", type=Path, default=same_numbers.ROOT, help="checkout whose code runs"
    )
    options = parser.parse_args()
    tree = options.tree.resolve()
    same_numbers.use_tree(tree)
    recorder = Recorder(tree, start=options.start, end=options.end, step=options.step)
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), tree, recorder)
    print(report(recorder))


if __name__ == "__main__":
    main()
