"""Label sets of every sort, made once by the real command line. Not to be changed by a test."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from conftest import Result
from mealv2.label_set import Appender, LabelSet

Make = Callable[..., Path]
DENSE = ("--topk", "all", "--label-dtype", "float32")


@pytest.fixture(scope="session")
def label(
    done: Callable[..., Result], data_dir: Path, teacher_dirs: dict[str, Path]
) -> Callable[..., list[object]]:
    """A function: the words of a precompute on the tree by some teachers, all but --output."""

    def words(*flags: object, teachers: Sequence[str] = tuple(teacher_dirs)) -> list[object]:
        settings: dict[str, object] = {
            "--data-dir": data_dir,
            "--img-size": 32,
            "--num-views": 4,
            "--view-seed": 7,
            "--shard-size": 10,
            "--batch-size": 16,
            "--workers": 0,
            "--teacher": ",".join(f"{name}={teacher_dirs[name]}" for name in teachers),
        }
        return ["precompute", *(part for item in settings.items() for part in item), *flags]

    return words


@pytest.fixture(scope="session")
def make_set(
    done: Callable[..., Result],
    label: Callable[..., list[object]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Make:
    """A function: the folder of the set that precompute makes with some flags, made once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(*flags: object, teachers: Sequence[str] = ()) -> Path:
        name = (*map(str, flags), "by", *teachers)
        if name not in made:
            out = tmp_path_factory.mktemp("labels") / "set"
            given = {"teachers": teachers} if teachers else {}
            done(*label(*flags, **given), "--output", out)
            made[name] = out
        return made[name]

    return make


@pytest.fixture(scope="session")
def dense_sets(make_set: Make, teacher_dirs: dict[str, Path]) -> list[Path]:
    """A dense float32 set by each teacher alone."""
    return [make_set(*DENSE, teachers=[name]) for name in teacher_dirs]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A function: a copy of a set that a test may change."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copied"))


@pytest.fixture
def appended_set(make_set: Make, copied: Callable[[Path], Path]) -> Path:
    """A set with rows that were appended: view 9 of two images, and one of an image it lacks."""
    folder = copied(make_set("--topk", 2))
    labels = LabelSet.open(folder)
    keys = list(labels.keys())
    appender = Appender(labels)
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.25, 0.5, 0.25]])
    appender.add([keys[0], keys[-1], "cats/new.png"], [9, 9, 0], labels.encoding.encode(probs))
    appender.flush()
    return folder


@pytest.fixture(scope="session")
def teach_flags(teacher_flags: list[str]) -> list[object]:
    """Flags of commands that ask the fixtures' teachers again."""
    return [*teacher_flags, "--workers", 0]
