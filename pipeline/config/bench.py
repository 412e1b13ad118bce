"""Settings of `mealv2 bench`."""

from pathlib import Path

from pipeline.config.base import DEFAULT_IMG_SIZE, SIDE, RuntimeConfig, StrictConfig
from pipeline.config.fields import (
    frozen,
    in_data,
    in_hardware,
    in_img_size,
    in_model,
    in_results,
    require,
    split_commas,
    teachers,
    without_effect,
)

# In the order in which they are measured and shown.
LINES = (
    *("loader-1", "loader-packed", "loader-4", "loader-16", "loader-tar", "labels"),
    *("step-hard", "step-online", "stage-one", "help", "memory"),
)


@frozen
class BenchConfig(StrictConfig, RuntimeConfig):
    """Measure how fast this machine reads, labels and trains, and compare with its limits."""

    example = "mealv2 bench --lines loader-1,loader-4,labels --results-file speed.json"

    lines: tuple[str, ...] = in_results(
        (),
        f"Lines to measure, a comma-separated list of {', '.join(LINES)}.",
        shown="all; none with --profile",
        convert=split_commas,
    )
    rounds: int = in_results(5, "Repetitions of each measurement.", low=1)
    profile: bool = in_results(False, "Show where labelling and training spend their time.")
    teacher: tuple[str, ...] = teachers(
        ("senet154.gluon_in1k", "resnet152s.gluon_in1k"),
        "timm model, with random weights; repeat it, or separate several by commas.",
        shown="senet154.gluon_in1k,resnet152s.gluon_in1k",
        path=None,
    )
    model: str = in_model("resnet50", "Student: a timm model name; its weights are random.")
    img_size: int = in_img_size(DEFAULT_IMG_SIZE, SIDE)
    batch_size: int | None = in_hardware(
        None, "Views per step and per forward pass.", shown="8 on a CPU, 128 or 256 on a GPU", low=2
    )
    data_dir: Path | None = in_data(
        None,
        "Images to read: ROOT/SPLIT/CLASS/IMAGE. The loader lines measure drawn ones beside them.",
        shown="drawn images",
        path="data set",
    )
    train_split: str = in_data("train", "With --data-dir: split to read.", alias="split")
    num_images: int = in_data(
        500, "Images to draw, or to read from --data-dir, beside as many drawn ones.", low=1
    )
    memory_images: int = in_data(10_000, "Images of line `memory`; fewer on slow machines.", low=1)
    results_file: Path | None = in_results(
        None,
        "File for all measurements, .json.",
        shown="not written",
        alias="json",
        path="new file",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.lines:
            require(name in LINES, f"--lines {name!r} is unknown; known: {', '.join(LINES)}")
        require(self.teacher, "--teacher is required")
        for name in self.teacher:
            message = f"--teacher {name}: bench uses random weights; give the name alone"
            require("=" not in name, message)
        if "memory" not in self.chosen:
            without_effect(self, "without the line memory", "memory_images")
        if self.data_dir is None:
            without_effect(self, "without --data-dir", "train_split", "strict")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The lines to measure, in their order."""
        if not self.lines:
            return () if self.profile else LINES
        return tuple(name for name in LINES if name in self.lines)
