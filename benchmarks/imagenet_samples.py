"""Real ImageNet weights on real pictures: accuracy, soft labels, and labels made again.

    python benchmarks/efficientnet_lite_weights.py --output weights
    python benchmarks/imagenet_samples.py imagenet-samples --weights weights --output samples-runs

PATH is a folder or a .tar of ImageNet pictures whose paths have the WordNet id of the class, such
as n01440764_tench.JPEG or n01440764/ILSVRC2012_val_00000293.JPEG. The script copies them to
OUTPUT/data/val/WNID/, and some of them to OUTPUT/data/some/WNID/, runs `mealv2 evaluate`,
`precompute`, `labels convert` and `labels verify --relabel`, and prints Markdown tables. Labels of
other threads and processes are those of one view of each of the few pictures. OUTPUT keeps the
report of each command: the same call runs only those that are missing. --rows adds files of softmax
rows to the table of the codec: .npz with an array `probs`, images x views x 1000.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import label_codec
from benchmarks.efficientnet_lite_weights import IMG_SIZES, imagenet_classes, timm_name
from mealv2.codec import encode
from mealv2.data.image_files import kind_of_name
from mealv2.defaults import RATE
from mealv2.errors import ConfigError, MealError
from mealv2.label_set import LabelSet
from mealv2.storage.atomic import write_atomic
from pipeline.bench import hardware

ROOT = Path(__file__).resolve().parents[1]
_WNID = re.compile(r"(?:^|/)(n\d{8})(?=[_/.])")
RATES = (0.005, 0.002, RATE, 0.0005, 0.0003)
_TRUTH = slice(6, 8)  # of the cells of a population: those that need the true classes
SIMULATED_IMAGES, SIMULATED_VIEWS = 500, 4
Report = dict[str, Any]
Table = list[list[str]]


class Model(NamedTuple):
    """A teacher: timm's name, the folder of its weights, the side that it was trained at."""

    name: str
    folder: Path
    img_size: int


class Settings(NamedTuple):
    """What is measured, and where the reports are kept."""

    output: Path
    models: Sequence[Model]
    img_size: int = 224
    num_views: int = 4
    num_some: int = 50  # pictures whose labels are made by other threads and processes
    rows: Sequence[Path] = ()
    in_this_process: bool = False  # all commands, for the tests: threads and processes are not set


def main(words: Sequence[str] | None = None) -> None:
    """Run the commands that are missing; print the tables."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("path", type=Path, metavar="PATH", help="folder or .tar of pictures")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the model folders")
    parser.add_argument("--output", type=Path, required=True, help="folder to make or continue")
    parser.add_argument("--num-views", type=int, default=4, help="views of a picture to label")
    parser.add_argument("--some", type=int, default=50, help="pictures to label again, each time")
    parser.add_argument("--rows", type=Path, nargs="*", default=(), help=".npz of softmax rows")
    given = parser.parse_args(words)
    settings = Settings(
        output=given.output.resolve(),
        models=[Model(timm_name(n), given.weights / timm_name(n), s) for n, s in IMG_SIZES.items()],
        num_views=given.num_views,
        num_some=given.some,
        rows=given.rows,
    )
    try:
        print(document(given.path, settings))
    except MealError as error:
        sys.exit(f"error: {error}")


def document(path: Path, settings: Settings) -> str:
    """Run what is missing; return the tables. Raises MealError."""
    for model in settings.models:
        if not model.folder.is_dir():
            raise ConfigError(
                f"no folder {model.folder}: benchmarks/efficientnet_lite_weights.py makes it"
            )
    data_dir = settings.output / "data"
    num_images = arrange(path, data_dir, settings.num_some)
    commands = Commands(settings, data_dir)
    parts = [
        f"{num_images} pictures; {about()}",
        label_codec.table(*accuracies(commands)),
        *codec(commands),
        label_codec.table(*agreement(commands)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def about() -> str:
    """Return date, hardware and versions."""
    found = hardware.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = ", ".join(f"{name} {version}" for name, version in hardware.versions().items())
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return f"{datetime.date.today()}; {found['cpu']}, {found['cores']} cores{gpu}; {versions}"


# --- pictures -------------------------------------------------------------------------------------


def arrange(path: Path, data_dir: Path, num_some: int) -> int:
    """Copy pictures to DATA_DIR/val/WNID and list the 1,000 classes; return their number.

    ``num_some`` of them, evenly spaced in the order of their names, are in DATA_DIR/some as well.

    Raises ConfigError for a picture without a WordNet id of ImageNet's 1,000 in its path.
    """
    classes = imagenet_classes()
    known = set(classes)
    found: set[str] = set()
    for name, data in pictures(path):
        match = _WNID.search(name)
        if match is None or match[1] not in known:
            raise ConfigError(
                f"{path}: {name} has no WordNet id of one of ImageNet's 1,000 classes in its path; "
                "expected names such as n01440764_tench.JPEG"
            )
        key = f"{match[1]}/{Path(name).name}"
        if key in found:
            raise ConfigError(f"{path} has two pictures {key}")
        found.add(key)
        _write(data_dir / "val" / key, data)
    if not found:
        raise ConfigError(f"{path} has no pictures")
    keys = sorted(found)
    some = {keys[n * len(keys) // num_some] for n in range(min(num_some, len(keys)))}
    for key in some:
        _write(data_dir / "some" / key, (data_dir / "val" / key).read_bytes())
    for split, wanted in {"val": found, "some": some}.items():
        folder = data_dir / split
        copies = {copy.relative_to(folder).as_posix() for copy in folder.glob("*/*")}
        if copies != wanted:
            raise ConfigError(f"{folder} has pictures of another call; give another --output")
    write_atomic(
        data_dir / "classes.txt", "".join(f"{n}\n" for n in classes).encode(), replace=True
    )
    return len(found)


def _write(path: Path, data: bytes) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)


def pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and bytes of the pictures in a folder or a tar file. Raises ConfigError."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and kind_of_name(file.name):
                yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is not None and kind_of_name(member.name):
                    yield member.name, stream.read()
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{path} is neither a folder nor a tar file: {error}") from None


# --- commands -------------------------------------------------------------------------------------


class Commands:
    """Commands of mealv2 on the pictures, each run once; OUTPUT/reports keeps what they found."""

    def __init__(self, settings: Settings, data_dir: Path) -> None:
        self.settings = settings
        self.data = ["--data-dir", data_dir, "--class-map", data_dir / "classes.txt"]

    def run(self, name: str, *words: object, threads: int = 1) -> Report:
        """Return the report of ``mealv2 WORDS``. Raises MealError with its message."""
        text = [str(word) for word in words]
        path = self.settings.output / "reports" / f"{name}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["words"] == text:
                return dict(kept["report"])
            raise ConfigError(f"{path} is of another command; give another --output")
        print(f"{name}: mealv2 {' '.join(text)}", file=sys.stderr, flush=True)
        report = call_here(text) if self.settings.in_this_process else call(text, threads)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"words": text, "report": report}).encode())
        return report

    def evaluate(self, model: Model, img_size: int) -> Report:
        """Return what `mealv2 evaluate` finds for a model at a size."""
        words = ["evaluate", *self.data, "--checkpoint", model.folder, "--img-size", img_size]
        return self.run(f"evaluate-{model.name}-{img_size}", *words, "--json")

    def precompute(self, name: str, *more: object, threads: int = 1) -> Report:
        """Return the report of stage one; the label set is OUTPUT/NAME."""
        words = ["precompute", *self.data, *self.teachers]
        words += ["--img-size", self.settings.img_size, "--output", self.labels(name)]
        return self.run(name, *words, *more, threads=threads)

    def relabel(self, name: str, label_set: str, *more: object, threads: int) -> Report:
        """Return how labels made again differ from those of OUTPUT/LABEL_SET."""
        words = ["labels", "verify", self.labels(label_set), *self.data, *self.teachers]
        words += ["--relabel", self.settings.num_some, *more]
        return self.run(name, *words, threads=threads)

    @property
    def teachers(self) -> list[str]:
        """The flags of all teachers."""
        models = self.settings.models
        return [word for m in models for word in ("--teacher", f"{m.name}={m.folder}")]

    def labels(self, name: str) -> Path:
        """Return the folder of a label set."""
        return self.settings.output / name


def call(words: Sequence[str], threads: int) -> Report:
    """Run ``mealv2 WORDS`` in a process with so many threads; return its report."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "mealv2", *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return _report(words, done.returncode, done.stdout, done.stderr)


def call_here(words: Sequence[str]) -> Report:
    """Run ``mealv2 WORDS`` in this process; return its report."""
    import cli

    output, messages, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["mealv2", *words]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(messages),
    ):
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
    return _report(words, code, output.getvalue(), messages.getvalue())


def _report(words: Sequence[str], code: int, output: str, messages: str) -> Report:
    if code != 0:
        last = (messages.strip() or "no message").splitlines()[-1]
        raise MealError(f"mealv2 {' '.join(words)} ended with exit code {code}: {last}")
    return dict(json.loads(output.strip().splitlines()[-1]))


# --- tables ---------------------------------------------------------------------------------------


def accuracies(commands: Commands) -> tuple[list[str], Table]:
    """Return head and rows: top-1 and top-5 of each model and of all, at one size and at its own.

    The figures of the ensemble are those that `precompute` prints of the validation split.
    """
    size = commands.settings.img_size
    rows = []
    for model in commands.settings.models:
        at_size = commands.evaluate(model, size)
        own = commands.evaluate(model, model.img_size)
        rows.append([model.name, _percent(at_size), str(model.img_size), _percent(own)])
    at_size = dense(commands)["accuracy"]["ensemble"]
    some = ["--train-split", "some", "--num-views", 1]
    own = commands.precompute("labels-own-sizes", *some)["accuracy"]["ensemble"]
    rows.append(["ensemble", _percent(at_size), "each its own", _percent(own)])
    head = ["model", f"top-1 / top-5 % at {size}", "own size", "top-1 / top-5 %"]
    return head, rows


def _percent(found: Report) -> str:
    return f"{found['top1']:.1f} / {found['top5']:.1f}"


def dense(commands: Commands) -> Report:
    """Return the report of a label set that has all probabilities, in float32."""
    settings = commands.settings
    flags = ["--train-split", "val", "--num-views", settings.num_views]
    flags += ["--teacher-img-size", settings.img_size, "--topk", "all", "--label-dtype", "float32"]
    return commands.precompute("labels-dense", *flags)


def codec(commands: Commands) -> list[str]:
    """Return two tables: what the rows are like, and bytes and KL of their encodings."""
    described, encoded = [], []
    for name, probs_NC, truth_N, num_views in populations(commands):
        labels_N = torch.zeros(len(probs_NC), dtype=torch.long) if truth_N is None else truth_N
        cells = label_codec.describe(probs_NC, labels_N)
        if truth_N is None:
            cells[_TRUTH] = ["", ""]
        described.append([name, str(len(probs_NC)), *cells])
        encoded += [[name, *cells] for cells in encodings(probs_NC, num_views)]
    masses = ["top-1", "median top-1", "top-5", "top-10", "top-50", "top-100"]
    masses += ["true class", "right", "entropy", "p at rank 100"]
    stored = stored_bytes(commands)
    return [
        label_codec.table(["rows", "number", *masses], described),
        label_codec.table(["rows", "rate", "classes kept", "bytes a view", "KL", "p99"], encoded),
        f"In the label set at rate {RATE:g}: {stored:.2f} bytes a view.",
    ]


def populations(commands: Commands) -> Iterator[tuple[str, Tensor, Tensor | None, int]]:
    """Yield name, probabilities N x C, true classes N, of files None, and the views of an image.

    These labels come first, then files, then simulated populations.
    """
    dense(commands)
    labels = LabelSet.open(commands.labels("labels-dense"))
    class_of = {name: n for n, name in enumerate(labels.manifest["plan"]["classes"])}
    keys = [key for key in labels.keys() for _ in range(labels.num_views)]  # noqa: SIM118
    views = list(range(labels.num_views)) * len(labels)
    truth_N = torch.tensor([class_of[key.partition("/")[0]] for key in keys])
    yield (
        "**these pictures**",
        labels.soft_labels(keys, views).to_dense(),
        truth_N,
        len(views) // len(labels),
    )
    for path in commands.settings.rows:
        with np.load(path) as arrays:
            probs_NVC = torch.from_numpy(arrays["probs"])
        yield path.stem, probs_NVC.flatten(0, 1), None, probs_NVC.shape[1]
    for name in label_codec.POPULATIONS:
        probs_NC, truth_N = label_codec.population(name, SIMULATED_IMAGES, SIMULATED_VIEWS)
        yield f"simulated {name}", probs_NC, truth_N, SIMULATED_VIEWS


def encodings(probs_NC: Tensor, num_views: int) -> Iterator[list[str]]:
    """Yield rate, classes with a value, bytes a view, mean KL and its 99th percentile."""
    for rate in RATES:
        labels = encode(probs_NC, rate=rate, num_views=num_views)

        def recovered(part: Tensor, first: int, labels: Any = labels) -> Tensor:
            dense_NC: Tensor = labels[first : first + len(part)].to_dense()
            return dense_NC

        lost_N = label_codec.divergence(probs_NC, recovered)
        kept = float(labels.kept().is_kept_NK.sum(1).float().mean())
        size = labels.nbytes / len(labels)
        title = f"**{rate:g}**" if rate == RATE else f"{rate:g}"
        yield [title, f"{kept:.1f}", f"{size:.1f}", *label_codec.losses(lost_N)]


def stored_bytes(commands: Commands) -> float:
    """Return the bytes a view of the set at the default rate, made from the dense one."""
    dense(commands)
    words = ["labels", "convert", commands.labels("labels-dense"), "--rate", RATE]
    commands.run("labels", *words, "--output", commands.labels("labels"))
    info = commands.run("info", "labels", "info", commands.labels("labels"))
    return float(info["roles"]["train"]["bytes_per_view"])


def agreement(commands: Commands) -> tuple[list[str], Table]:
    """Return head and rows: labels made by some threads and processes, and made again by others."""
    flags = ["--train-split", "some", "--val-split", "none", "--num-views", 1, "--shard-size", 16]
    flags += ["--teacher-img-size", commands.settings.img_size]
    commands.precompute("labels-1-thread", *flags)
    commands.precompute("labels-2-threads", *flags, threads=2)
    commands.precompute("labels-2-processes", *flags, "--num-procs", 2)
    made = {
        "1 process, 1 thread": "labels-1-thread",
        "1 process, 2 threads": "labels-2-threads",
        "2 processes, 1 thread each": "labels-2-processes",
    }
    rows = []
    for by, name in made.items():
        for threads in (1, 2):
            again = commands.relabel(f"{name}-again-{threads}", name, threads=threads)
            number = "1 thread" if threads == 1 else f"{threads} threads"
            rows.append([by, f"another process, {number}", *_cells(again)])
    if torch.cuda.is_available():
        again = commands.relabel(
            "labels-again-cuda", "labels-1-thread", "--device", "cuda", threads=1
        )
        rows.append(["1 process, 1 thread", torch.cuda.get_device_name(), *_cells(again)])
    head = ["labels made by", "made again by", "views", "KL, nats", "beyond the encoding"]
    return [*head, "same top-1 %", "identical labels %"], rows


def _cells(report: Report) -> list[str]:
    found = report["relabelled"]
    extra = found["kl"] - found["kl_of_encoding"]
    agrees, identical = found["top1_agreement"], 100 * found["identical"]
    return [
        str(found["views"]),
        f"{found['kl']:.4f}",
        f"{extra:.1e}",
        f"{agrees:.1f}",
        f"{identical:.1f}",
    ]


if __name__ == "__main__":
    main()
