"""Real images, small trained teachers, and the command line run in this process."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import cli
import published
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import centre_crop, decode
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import Encoding, read_plan, shard_ranges
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.manifest import write_manifest
from mealv2.labelling.plan import LabelSplit
from mealv2.labelling.shards import find_missing, label_shards
from mealv2.labelling.store import Store
from mealv2.models import Classifier, create_classifier, released, save_classifier
from mealv2.models.discriminator import Discriminator
from mealv2.storage.json_format import json_sha256
from mealv2.views import DrawnViews
from pipeline.labelling import teachers
from pipeline.runtime.device import Runtime

ROOT = Path(cli.__file__).resolve().parent
CLASSES = ("ants", "bees", "cats")
IMG_SIZE = 32
# Every way to keep labels, by the flags that ask for it.
FORMS: dict[str, list[str]] = {
    "rate": ["--rate", "0.02"],
    "curve": ["--topk", "2"],
    "float16": ["--topk", "2", "--label-dtype", "float16"],
    "float32": ["--topk", "2", "--label-dtype", "float32"],
    "all": ["--topk", "all"],
    "all float32": ["--topk", "all", "--label-dtype", "float32"],
}
TEACHERS = {"test_resnet": 8, "test_efficientnet": 28}  # steps of training: good, not perfect

# Networks this small gain nothing from threads, and lose 50-fold where the cores are shared.
torch.set_num_threads(1)

# A shell starts background jobs with Ctrl-C ignored, which the children of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say how much disk is free: models and label sets of the tests take some GB."""
    folder = tempfile.gettempdir()
    return f"free: {shutil.disk_usage(folder).free / 1e9:.1f} GB in {folder}"


# --- images -----------------------------------------------------------------------------------


def _picture(class_id: int, rng: np.random.Generator) -> Image.Image:
    """Draw stripes, columns or a blob in a colour of the class, with noise, 40x30 to 64x64."""
    width, height = int(rng.integers(40, 65)), int(rng.integers(30, 65))
    y, x = np.mgrid[0:height, 0:width]
    period = rng.uniform(4, 8)
    pattern = (
        np.sin(2 * np.pi * y / period),
        np.sin(2 * np.pi * x / period),
        np.cos(np.hypot(x - width / 2, y - height / 2) / period),
    )[class_id % 3]
    colour = np.roll([90.0, 20.0, -40.0], class_id)
    pixels = 120 + 50 * pattern[..., None] + colour + rng.normal(0, 30, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _draw_tree(
    root: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    num_train: int = 12,
    num_val: int = 5,
    seed: int = 0,
) -> Path:
    """Write ROOT/{train,val}/CLASS/*.{jpg,png}: every third image a PNG."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", num_train), ("val", num_val)):
        for class_id, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                suffix = "png" if number % 3 == 2 else "jpg"
                _picture(class_id, rng).save(folder / f"{number:02d}.{suffix}")
    return root


@pytest.fixture(scope="session")
def draw_tree() -> Callable[..., Path]:
    """The function that draws an ImageFolder tree."""
    return _draw_tree


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree: 3 classes, 12 train and 5 val images each. Not to be changed."""
    return _draw_tree(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def own_data(data_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tree that a test may change."""
    return Path(shutil.copytree(data_dir, tmp_path / "own-data"))


# --- models -----------------------------------------------------------------------------------


def _fit(model: Classifier, source: ImageFolder, *, steps: int) -> None:
    """Teach a model the centre crops, so that its answers differ from image to image."""
    crops = np.stack(
        [centre_crop(decode(source.read(p)), IMG_SIZE) for p in range(len(source.keys))]
    )
    images_BCHW = torch.from_numpy(crops).permute(0, 3, 1, 2)
    labels_B = torch.tensor(source.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images_BCHW), labels_B).backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="session")
def make_model(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves a model folder: random weights, or ``steps`` of training."""

    def make(
        name: str,
        *,
        seed: int = 0,
        steps: int = 0,
        classes: tuple[str, ...] = CLASSES,
        img_size: int = IMG_SIZE,
    ) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = create_classifier(name, num_classes=len(classes), img_size=img_size)
            if steps:
                _fit(model, ImageFolder(data_dir, "train"), steps=steps)
        folder = tmp_path_factory.mktemp("model") / name
        save_classifier(folder, model, classes=classes, img_size=img_size)
        return folder

    return make


@pytest.fixture
def seeded_weights() -> Iterator[None]:
    """New weights are the same in every run of a test, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def linear_layers(discriminator: Discriminator) -> list[nn.Linear]:
    """The layers with weights of a discriminator, in order."""
    return [layer for layer in discriminator.layers if isinstance(layer, nn.Linear)]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[published.Server]:
    """The place the files are published at, on this machine; torch.hub's folder is empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with published.serving() as server:
        monkeypatch.setattr(released, "BASE_URL", server.url)
        yield server


@pytest.fixture(scope="session")
def teacher_dirs(make_model: Callable[..., Path]) -> dict[str, Path]:
    """Two trained teachers of different architecture and normalisation, by timm name."""
    return {
        name: make_model(name, seed=seed, steps=steps)
        for seed, (name, steps) in enumerate(TEACHERS.items(), start=1)
    }


@pytest.fixture(scope="session")
def teacher_flags(teacher_dirs: dict[str, Path]) -> list[str]:
    """``--teacher NAME=FOLDER`` of every teacher."""
    return [part for name, path in teacher_dirs.items() for part in ("--teacher", f"{name}={path}")]


@pytest.fixture(scope="session")
def student_dir(make_model: Callable[..., Path]) -> Path:
    """A test_resnet with random weights, for --initial-checkpoint."""
    return make_model("test_resnet", seed=9)


# --- the command line -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended and what it said; ``data_lines`` are the summaries of its data sets."""

    code: int
    stdout: str
    stderr: str
    data_lines: tuple[str, ...] = ()

    @classmethod
    def of(cls, code: int, stdout: str, stderr: str) -> "Result":
        """Take the summaries of data sets from stderr: each is shown once in a process."""
        lines = stderr.splitlines(keepends=True)
        found = [line for line in lines if re.match(r"data( .*)?: \d+ images?\b", line)]
        rest = "".join(line for line in lines if line not in found)
        return cls(code, stdout, rest, tuple(line.rstrip() for line in found))

    @property
    def report(self) -> dict[str, Any]:
        """The JSON object of the last line on stdout."""
        value = json.loads(self.stdout.strip().splitlines()[-1])
        assert isinstance(value, dict)
        return value


def _run_cli(*args: object) -> Result:
    """Run ``mealv2 ARGS`` in this process: the same entry point, without the 5 s of imports."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    argv = ["mealv2", *map(str, args)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as error:
            code = error.code or 0
    return Result.of(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """Run the command line in this process: ``run_cli("distill", "--labels", path)``."""
    return _run_cli


@pytest.fixture(scope="session")
def done() -> Callable[..., Result]:
    """Run the command line in this process and insist that it ends with 0."""

    def run(*args: object) -> Result:
        result = _run_cli(*args)
        assert result.code == 0, result.stderr
        return result

    return run


@pytest.fixture
def config_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function: the config that ``mealv2 ARGS`` hands to its stage, which does not run.

    Its paths need not exist.
    """

    def run(*args: object) -> Any:
        caught: list[Any] = []
        name = " ".join(map(str, args[: 2 if args[0] == "labels" else 1]))
        monkeypatch.setattr(f"{cli.module_of(name)}.run", caught.append)
        monkeypatch.setattr("pipeline.command_line.paths.check_paths", lambda config, **_: None)
        result = _run_cli(*args)
        assert result.code == 0, result.stderr
        return caught[0]

    return run


@pytest.fixture(scope="session")
def plain_precompute_flags(data_dir: Path, teacher_flags: list[str]) -> list[str]:
    """Stage one on the tree, all but --output and how labels are kept."""
    settings = {
        "--data-dir": data_dir,
        "--img-size": IMG_SIZE,
        "--num-views": 4,
        "--view-seed": 7,
        "--shard-size": 10,
        "--batch-size": 16,
        "--workers": 0,
    }
    flags = [str(part) for item in settings.items() for part in item]
    return ["precompute", *flags, *teacher_flags]


@pytest.fixture(scope="session")
def precompute_flags(plain_precompute_flags: list[str], teacher_flags: list[str]) -> list[str]:
    """The same with values kept as they are, all but --output; flags given after these win."""
    place = len(plain_precompute_flags) - len(teacher_flags)
    return [*plain_precompute_flags[:place], *FORMS["float16"], *teacher_flags]


@pytest.fixture(scope="session")
def labels_dir(
    done: Callable[..., Result],
    precompute_flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished label set of the tree: 4 views, top 2 of 3 classes, float16. Not to be changed."""
    out = tmp_path_factory.mktemp("labels") / "set"
    done(*precompute_flags, "--output", out)
    return out


@pytest.fixture(scope="session")
def labels_of(
    done: Callable[..., Result],
    plain_precompute_flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """A function: the finished set of the tree in one of FORMS. Not to be changed."""

    @functools.cache
    def make(form: str, *, logits: bool = False) -> Path:
        out = tmp_path_factory.mktemp("labels") / "set"
        flags = [*FORMS[form], *(["--store-logits"] if logits else [])]
        done(*plain_precompute_flags, *flags, "--output", out)
        return out

    return make


@pytest.fixture(scope="session")
def add_views(teacher_flags: list[str], data_dir: Path) -> Callable[..., dict[str, Any]]:
    """A function that labels more views of the training split of a set; returns the manifest."""

    def add(labels: Path, views: Sequence[int]) -> dict[str, Any]:
        plan = read_plan(labels)
        runtime = Runtime(torch.device("cpu"), None)
        ensemble, _ = teachers.build(
            teacher_flags[1::2], classes=plan["classes"], img_size=IMG_SIZE, runtime=runtime
        )
        annotator = Annotator(
            ensemble, runtime, Encoding.of_plan(plan), batch_size=16, on_bad_image="fail"
        )
        train = plan["roles"]["train"]
        source = ImageFolder(data_dir, train["split"])
        views_of = DrawnViews(train["views"]["seed"])
        reader = ViewReader(source, img_size=IMG_SIZE, views=views_of)
        shards = shard_ranges(len(source), plan["shard_size"])
        split = LabelSplit("train", reader, tuple(views), list(shards), json_sha256(plan))
        store = Store(labels)
        missing = find_missing(split, store)
        label_shards(split, missing, annotator, store, workers=0)
        return write_manifest(store, plan)

    return add


@pytest.fixture(scope="session")
def distill_flags(data_dir: Path, labels_dir: Path, student_dir: Path) -> list[str]:
    """Stage two on the tree, all but --output; flags given after these win."""
    settings = {
        "--data-dir": data_dir,
        "--labels": labels_dir,
        "--model": "test_resnet",
        "--initial-checkpoint": student_dir,
        "--epochs": 2,
        "--batch-size": 8,
        "--workers": 0,
        "--log-interval": 1,
    }
    return ["distill", *(str(part) for item in settings.items() for part in item)]


@pytest.fixture(scope="session")
def training_flags(data_dir: Path) -> list[str]:
    """Two epochs of a small model on the tree: the flags that finetune and transfer share."""
    settings = {
        "--data-dir": data_dir,
        "--model": "test_resnet",
        "--img-size": IMG_SIZE,
        "--epochs": 2,
        "--batch-size": 12,
        "--workers": 0,
        "--log-interval": 1,
    }
    return [str(part) for item in settings.items() for part in item]


@pytest.fixture(scope="session")
def finetune_flags(training_flags: list[str]) -> list[str]:
    """Hard-label training on the tree from random weights, all but --output."""
    return ["finetune", *training_flags, "--no-pretrained"]


def same_state(a: object, b: object) -> bool:
    """Return whether two states of a training are equal, tensors to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


# --- a process of its own, to signal and to kill ------------------------------------------------


class Spawned:
    """``mealv2 ARGS`` in a process group of its own; stderr goes to a file that can be watched.

    ``program`` calls the command line, after changes of its own.
    """

    def __init__(
        self, args: tuple[object, ...], folder: Path, *, program: Path = ROOT / "cli.py"
    ) -> None:
        self.folder = folder  # TMPDIR
        self._err = folder / "stderr.txt"
        self._out = folder / "stdout.txt"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(program), *map(str, args)],
                stdout=out,
                stderr=err,
                start_new_session=True,
                # what a killed process leaves in its temporary folder is removed with the test's
                env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            )

    @property
    def stderr(self) -> str:
        """What it has said so far."""
        return self._err.read_text()

    def until(self, condition: Callable[[], object], *, deadline_s: float = 90.0) -> None:
        """Look at ``condition`` until it holds; fail when the process ends or time runs out."""
        began = time.monotonic()
        while not condition():
            assert self.process.poll() is None, f"ended too early: {self.stderr}"
            assert time.monotonic() - began < deadline_s, f"waited in vain: {self.stderr}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.005)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def result(self, *, deadline_s: float = 60.0) -> Result:
        """Wait for the end."""
        code = self.process.wait(timeout=deadline_s)
        return Result.of(code, self._out.read_text(), self.stderr)


@contextlib.contextmanager
def killed_at_the_end(started: Sequence[Spawned]) -> Iterator[None]:
    """Kill the processes that still run at the end of the block."""
    try:
        yield
    finally:
        for spawned in started:
            with contextlib.suppress(ProcessLookupError):
                spawned.signal(signal.SIGKILL)
            spawned.process.wait()


@pytest.fixture
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Spawned]]:
    """Start ``mealv2 ARGS`` as a real process; what still runs at the end is killed."""
    started: list[Spawned] = []

    def start(*args: object, **options: Any) -> Spawned:
        started.append(Spawned(args, tmp_path_factory.mktemp("process"), **options))
        return started[-1]

    with killed_at_the_end(started):
        yield start


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that is not there yet."""
    return tmp_path / "run"


# --- looking at files ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def contents() -> Callable[..., dict[str, bytes]]:
    """A function: bytes of every file under a folder that matches a pattern, by relative path."""

    def read(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.glob(pattern))
            if path.is_file()
        }

    return read


@pytest.fixture(scope="session")
def events() -> Callable[..., list[dict[str, Any]]]:
    """A function: the events of a kind in a run folder's metrics.jsonl."""

    def read(run: Path, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == kind]

    return read


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, bytes]]:
    """A function: the student that a run folder holds, tensor by tensor, to the bit."""

    def read(run: Path) -> dict[str, bytes]:
        state = safetensors.torch.load_file(run / "student" / "model.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in state.items()}

    return read


@pytest.fixture(scope="session")
def flipped_bit() -> Callable[..., None]:
    """A function that flips one bit in the middle of a file (or at ``offset``)."""

    def flip(path: Path, offset: int | None = None) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if offset is None else offset] ^= 0x10
        path.write_bytes(bytes(data))

    return flip
