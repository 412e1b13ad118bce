"""Settings of `mealv2 bench`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mealv2.errors import ConfigError
from pipeline.config.base import DEFAULT_IMG_SIZE, RuntimeConfig
from pipeline.config.fields import at_least, setting, teachers_setting, without_effect

# In the order in which they are measured and shown.
LINES = (
    "loader-1",
    "loader-packed",
    "loader-4",
    "loader-16",
    "loader-tar",
    "labels",
    "step-hard",
    "step-online",
    "stage-one",
    "help",
    "memory",
)


def split_names(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the names in texts that may be comma lists."""
    return tuple(part.strip() for text in texts for part in text.split(","))


@dataclass(frozen=True, kw_only=True)
class BenchConfig(RuntimeConfig):
    """Measure how fast this machine reads, labels and trains, and compare with its limits."""

    example = "mealv2 bench --lines loader-1,loader-4,labels --results-file speed.json"

    lines: tuple[str, ...] = setting(
        (),
        f"Lines to measure, a comma list of {', '.join(LINES)}.",
        group="Results",
        shown="all; none with --profile",
        convert=split_names,
    )
    rounds: int = setting(5, "Repetitions of each measurement.", group="Results")
    profile: bool = setting(False, "Show where the time of both stages goes.", group="Results")
    teacher: tuple[str, ...] = teachers_setting(
        ("senet154.gluon_in1k", "resnet152s.gluon_in1k"),
        "timm model, with random weights; repeat it, or separate several by commas.",
        shown="senet154.gluon_in1k,resnet152s.gluon_in1k",
        path=None,
    )
    model: str = setting(
        "resnet50", "Student: a timm model name; its weights are random.", group="Model"
    )
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.", group="Views")
    batch_size: int | None = setting(
        None,
        "Views per step and per forward pass.",
        group="Hardware",
        shown="8 on a CPU, 128 or 256 on a GPU",
    )
    data_dir: Path | None = setting(
        None,
        "Images to read: ROOT/SPLIT/CLASS/IMAGE.",
        group="Data",
        shown="images drawn for the benchmark",
        path="data set",
    )
    train_split: str = setting(
        "train", "With --data-dir: split to read.", group="Data", aliases=("split",)
    )
    num_images: int = setting(500, "Images to draw, or to read from --data-dir.", group="Data")
    memory_images: int = setting(
        10_000, "Images of the line on memory; fewer on slow machines.", group="Data"
    )
    results_file: Path | None = setting(
        None,
        "Write the numbers of every repetition here, as .json.",
        group="Results",
        shown="not written",
        aliases=("json",),
        path="new file",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.lines:
            if name not in LINES:
                raise ConfigError(f"--lines {name!r}: no such line; known: {', '.join(LINES)}")
        at_least(self, 1, "rounds", "img_size", "num_images", "memory_images")
        if self.batch_size is not None:
            at_least(self, 2, "batch_size")
        if not self.teacher:
            raise ConfigError("--teacher is required")
        for name in self.teacher:
            if "=" in name:
                raise ConfigError(f"--teacher {name}: weights are random here; give the name alone")
        if "memory" not in self.chosen:
            without_effect(self, "without the line memory", "memory_images")
        if self.data_dir is None:
            without_effect(self, "without --data-dir", "train_split")
        if self.results_file is not None and not self.results_file.absolute().parent.is_dir():
            raise ConfigError(
                f"--results-file: there is no folder {self.results_file.absolute().parent}"
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The lines to measure, in their order."""
        if not self.lines:
            return () if self.profile else LINES
        return tuple(name for name in LINES if name in self.lines)
