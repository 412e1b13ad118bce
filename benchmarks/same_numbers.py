"""Hash the label sets and the weights that short runs make: the gate for a refactoring.

    python benchmarks/same_numbers.py > before.txt
    python benchmarks/same_numbers.py | diff before.txt -

The first command runs before the change, the second one after it, on the same machine. Each case
prints one line: its name and the first 16 hex digits of some SHA-256 sums. A line has no time and
no path: two runs of the same code print the same lines. Equal lines mean equal bits.

    shards       names and bytes of all files of a label set but its manifest
    manifest     the manifest
    columns      every column of the shards but NEW_COLUMNS: a change of the format that adds one
                 changes the two lines above and leaves this one equal
    weights      the student: names, shapes and bits of its tensors
    figures      the cells of summary.csv (losses, accuracies), whatever the columns are called, but
                 those of NEW_FIGURES
    checkpoint   the floating-point tensors of the last checkpoint (student, discriminator,
                 momentum, moving average), whatever they are called

The script draws its own JPEGs, trains two small teachers from random weights and uses the product
by its command line only. ``--tree DIR`` runs the code of another checkout.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the order of a sum depends on the threads

import h5py
import numpy as np
import safetensors.torch
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CLASSES = tuple("abcdefgh")
IMAGES = {"train": 6, "val": 2}  # of a class
IMG_SIZE = 48
IMAGES_PER_TAR = 20
NEW_COLUMNS = {"content_hashes"}  # since 2026-11-29
NEW_FIGURES = {"train_top1", "train_top5", "val_ece"}  # since 2026-11-30
Digests = dict[str, str]

# --- the flags, all of them -----------------------------------------------------------------------

TEACHERS = {"test_resnet": "1", "test_efficientnet": "2"}  # name and seed
RUN = ["--workers", "0", "--device", "cpu"]
TRAIN = [*RUN, "--no-pretrained", "--batch-size", "16", "--log-interval", "2", "--lr", "0.05"]
FINETUNE = ["finetune", *TRAIN, "--img-size", str(IMG_SIZE), "--epochs", "2"]
PRECOMPUTE = ["precompute", *RUN, "--img-size", str(IMG_SIZE), "--view-seed", "7"]
PRECOMPUTE += ["--batch-size", "16", "--shard-size", "20"]
DISCRIMINATOR = ["--discriminator-lr", "0.05"]  # as --lr, the paper's rule
DISTILL = ["distill", *TRAIN, "--model", "test_resnet", "--epochs", "3", "--seed", "5"]
LABELS_OUTPUT = "--out"  # of precompute
ONLINE = ["--online", "--img-size", str(IMG_SIZE), "--view-seed", "7"]
TEACH = ["--missing", "teach"]
MIXED_LABELS = ["--cutmix-target", "mixed-labels"]


@dataclass(frozen=True)
class LabelSet:
    """A label set to make: its flags beside PRECOMPUTE's."""

    flags: Sequence[str] = ()
    num_views: int = 3
    data: str = "folder"


@dataclass(frozen=True)
class Training:
    """A run to do: its flags beside those of its command.

    ``labels`` is the label set that it is made from; None: the teachers at every step.
    """

    flags: Sequence[str] = ()
    labels: str | None = "labels-codec"
    has_teachers: bool = False
    data: str = "folder"
    num_ranks: int = 1
    is_resumed: bool = False


LABEL_SETS = {
    "labels-codec": LabelSet(),
    "labels-rate": LabelSet(["--rate", "0.0001"]),
    "labels-topk": LabelSet(["--topk", "3"]),
    "labels-topk-float16": LabelSet(["--topk", "3", "--label-dtype", "float16"]),
    "labels-topk-logits": LabelSet(["--topk", "3", "--store-logits"]),
    "labels-dense": LabelSet(["--topk", "all"]),
    "labels-dense-float32": LabelSet(["--topk", "all", "--label-dtype", "float32"]),
    "labels-tars": LabelSet(data="tars"),
    "labels-pil": LabelSet(["--exact-pil"]),
    "labels-one-view": LabelSet(num_views=1),
}
FINETUNES = {f"finetune-{name}": name for name in TEACHERS}
TRAININGS = {
    "stored": Training(),
    "stored-threads": Training(["--workers", "2"]),
    "stored-resumed": Training(is_resumed=True),
    "stored-topk-logits": Training(labels="labels-topk-logits"),
    "stored-dense": Training(labels="labels-dense"),
    "stored-tars": Training(labels="labels-tars", data="tars"),
    "stored-vit": Training(["--model", "test_vit", "--sched", "cosine"]),
    "online": Training(ONLINE, labels=None, has_teachers=True),
    "mixed": Training(TEACH, labels="labels-one-view", has_teachers=True),
    "cutmix-labels": Training(MIXED_LABELS),
    "cutmix-teachers": Training(
        [*ONLINE, "--cutmix-target", "teachers"], labels=None, has_teachers=True
    ),
    "ema": Training(["--model-ema", "--model-ema-decay", "0.9"]),
    "accumulated": Training(["--grad-accum-steps", "4"]),
    "accumulated-cutmix": Training(["--grad-accum-steps", "4", *MIXED_LABELS]),
    "views-per-image": Training(["--views-per-image", "2"]),
    "official": Training(["--discriminator", "official", "--discriminator-input", "probs"]),
    "adversarial": Training(["--discriminator", "adversarial", "--discriminator-lr", "0.01"]),
    "no-discriminator": Training(["--discriminator", "off"]),
    "hard-labels": Training(["--hard-label-weight", "0.3", "--label-temperature", "2"]),
    "two-ranks": Training(num_ranks=2),
}
CASES = (*LABEL_SETS, *FINETUNES, *TRAININGS)
WIDTH = max(map(len, CASES))

# --- images ---------------------------------------------------------------------------------------


def draw_folder(root: Path) -> Path:
    """Write ROOT/{train,val}/CLASS/NN.jpg: stripes in a direction and a colour of the class."""
    rng = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for class_id, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(_draw(class_id, rng))
                image.save(root / split / name / f"{number:02d}.jpg", quality=90)
    return root


def _draw(class_id: int, rng: np.random.Generator) -> np.ndarray:
    width, height = rng.integers(48, 81, 2).tolist()
    y, x = np.mgrid[0:height, 0:width]
    angle = np.pi * class_id / len(CLASSES)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(1, 2))
    colour = np.roll([70.0, 10.0, -40.0], class_id)
    noise = rng.normal(0, 25, (height, width, 3))
    pixels: np.ndarray = 120 + 50 * stripes[..., None] + colour + noise
    return pixels.clip(0, 255).astype(np.uint8)


def write_tars(folder: Path, root: Path) -> Path:
    """Write ROOT/SPLIT-NNNNNN.tar with the images of ``folder`` and their class numbers."""
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    for split in IMAGES:
        paths = sorted((folder / split).glob("*/*.jpg"))
        for number, first in enumerate(range(0, len(paths), IMAGES_PER_TAR)):
            with tarfile.open(root / f"{split}-{number:06d}.tar", "w") as tar:
                for path in paths[first : first + IMAGES_PER_TAR]:
                    stem = f"{path.parent.name}/{path.stem}"
                    class_id = CLASSES.index(path.parent.name)
                    _add(tar, f"{stem}.cls", str(class_id).encode())
                    _add(tar, f"{stem}.jpg", path.read_bytes())
    return root


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


# --- digests --------------------------------------------------------------------------------------


def label_set_digests(folder: Path) -> Digests:
    """Return the digests of a label set: of its shards and of its manifest."""
    manifest = hashlib.sha256((folder / "manifest.json").read_bytes())
    shards = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            _update(shards, path.relative_to(folder).as_posix().encode())
            _update(shards, path.read_bytes())
    return {
        "shards": shards.hexdigest(),
        "manifest": manifest.hexdigest(),
        "columns": _columns_digest(folder),
    }


def _columns_digest(folder: Path) -> str:
    """Return the digest of names, types and values of the shards' columns."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.h5")):
        with h5py.File(path) as file:
            for name in sorted(file.keys() - {"header", *NEW_COLUMNS}):
                column = file[name][()]
                _update(digest, f"{path.name} {name} {column.dtype} {column.shape}".encode())
                _update(digest, column.tobytes())
    return digest.hexdigest()


def run_digests(folder: Path) -> Digests:
    """Return the digests of a run folder: of its weights, its figures and its last checkpoint."""
    (weights,) = folder.rglob("model.safetensors")
    last = max((folder / "checkpoints").glob("step-*.pt"))
    state = torch.load(last, map_location="cpu", weights_only=True)
    return {
        "weights": weights_digest(safetensors.torch.load_file(weights)),
        "figures": figures_digest((folder / "summary.csv").read_text()),
        "checkpoint": nameless_digest(state),
    }


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _update(digest, name.encode())
        _update(digest, _bytes_of(tensor))
    return digest.hexdigest()


def figures_digest(text: str) -> str:
    """Return the SHA-256 of the cells of a CSV file, in no order within a row, without its head.

    Cells of NEW_FIGURES are left out.
    """
    table = csv.DictReader(io.StringIO(text))
    rows = [[cell for name, cell in row.items() if name not in NEW_FIGURES] for row in table]
    return hashlib.sha256(repr([sorted(filter(None, row)) for row in rows]).encode()).hexdigest()


def nameless_digest(state: object) -> str:
    """Return the SHA-256 of the floating-point tensors anywhere in ``state``, in no order."""
    found = sorted(
        hashlib.sha256(_bytes_of(tensor)).hexdigest()
        for tensor in _tensors(state)
        if tensor.is_floating_point() and tensor.ndim
    )
    return hashlib.sha256("".join(found).encode()).hexdigest()


def _tensors(state: object) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    head = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return head + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _update(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little") + data)


# --- the command line -----------------------------------------------------------------------------


def call(*words: object) -> None:
    """Run ``mealv2 WORDS`` in this process; raises RuntimeError with its messages if it fails."""
    import cli

    output = io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["mealv2", *map(str, words)]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
    if code != 0:
        raise RuntimeError(f"mealv2 {' '.join(map(str, words))}\n{output.getvalue()}")


def call_in_ranks(num_ranks: int, tree: Path, *words: object) -> None:
    """Run ``mealv2 WORDS`` under torchrun, on gloo."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    done = subprocess.run(
        [sys.executable, *map(str, [*torchrun, "-m", "mealv2", *words])],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


class Workshop:
    """A folder in which data, teachers, label sets and runs are made once, when first needed."""

    def __init__(self, root: Path, tree: Path) -> None:
        self.root = root
        self.tree = tree
        self._made: dict[str, Path] = {}

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        if name not in self._made:
            make(self.root / name)
            self._made[name] = self.root / name
        return self._made[name]

    def data(self, kind: str) -> Path:
        """Return the images as a folder tree or as tars."""
        if kind == "folder":
            return self._once("folder", draw_folder)
        return self._once(kind, lambda path: write_tars(self.data("folder"), path))

    def teacher(self, name: str) -> Path:
        """Return the run folder of a teacher."""
        flags = [*FINETUNE, "--data-dir", self.data("folder"), "--model", name]
        flags += ["--seed", TEACHERS[name]]
        return self._once(f"finetune-{name}", lambda path: call(*flags, "--output", path))

    def teacher_flags(self) -> list[str]:
        """Return the flags that name all teachers."""
        return [f"--teacher={name}={self.teacher(name)}" for name in TEACHERS]

    def label_set(self, name: str) -> Path:
        """Return a finished label set."""
        wanted = LABEL_SETS[name]
        flags = [*PRECOMPUTE, "--data-dir", self.data(wanted.data), *self.teacher_flags()]
        if wanted.data == "tars":  # a tar has a shard of its own
            place = flags.index("--shard-size")
            del flags[place : place + 2]
        flags += ["--num-views", wanted.num_views, *wanted.flags, LABELS_OUTPUT]
        return self._once(name, lambda path: call(*flags, path))

    def training(self, name: str) -> Path:
        """Return the run folder of a student."""
        return self._once(name, lambda path: self._train(TRAININGS[name], path))

    def training_flags(self, wanted: Training) -> list[object]:
        """Return the command of a student, all but --output."""
        flags: list[object] = [*DISTILL, "--data-dir", self.data(wanted.data)]
        flags += [] if "off" in wanted.flags else DISCRIMINATOR
        if wanted.labels is not None:
            flags += ["--labels", self.label_set(wanted.labels)]
        if wanted.has_teachers:
            flags += self.teacher_flags()
        return [*flags, *wanted.flags]

    def _train(self, wanted: Training, path: Path) -> None:
        flags = self.training_flags(wanted)
        if wanted.num_ranks > 1:
            call_in_ranks(wanted.num_ranks, self.tree, *flags, "--output", path)
            return
        if not wanted.is_resumed:
            call(*flags, "--output", path)
            return
        # as after a kill: a checkpoint in the middle of an epoch is the last one that is there
        call(*flags, "--checkpoint-every", 2, "--checkpoint-hist", 99, "--output", path)
        for late in sorted((path / "checkpoints").glob("step-*.pt"))[2:]:
            late.unlink()
        (path / "report.json").unlink()
        for weights in list(path.rglob("model.safetensors")):
            shutil.rmtree(weights.parent)
        call("distill", "--resume", path)

    def digests(self, case: str) -> Digests:
        """Return the digests of a case."""
        if case in LABEL_SETS:
            return label_set_digests(self.label_set(case))
        if case in FINETUNES:
            return run_digests(self.teacher(FINETUNES[case]))
        return run_digests(self.training(case))


def lines(root: Path, tree: Path, cases: Sequence[str]) -> Iterator[str]:
    """Yield the line of each case; runs of several processes go on beside the others."""
    shop = Workshop(root, tree)
    beside: dict[str, Future[Digests]] = {}
    with ThreadPoolExecutor(1) as pool:
        for case in cases:
            if case in TRAININGS and TRAININGS[case].num_ranks > 1:
                shop.training_flags(TRAININGS[case])  # what it needs is made here
                beside[case] = pool.submit(shop.digests, case)
        for case in cases:
            digests = beside[case].result() if case in beside else shop.digests(case)
            yield "  ".join([f"{case:{WIDTH}}", *(f"{n} {d[:16]}" for n, d in digests.items())])


def use_tree(tree: Path) -> None:
    """Import mealv2, pipeline and cli from ``tree``, with one thread for torch."""
    sys.path.insert(0, str(tree))
    torch.set_num_threads(1)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose code runs")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    use_tree(options.tree.resolve())
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(Path(folder), options.tree.resolve(), options.only):
            print(line, flush=True)


if __name__ == "__main__":
    main()
