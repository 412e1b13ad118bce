"""Settings that several commands share, and the paper's constants."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from mealv2 import defaults
from mealv2.errors import OnBadImage
from mealv2.storage.urls import is_url
from pipeline.config.fields import (
    MAX_SEED,
    MAX_WORKERS,
    REQUIRED,
    check_bounds,
    current_names,
    frozen,
    in_data,
    in_hardware,
    in_jobs,
    in_model,
    in_views,
    num_bytes_of,
    plain,
    require,
    spelling,
    typed,
    without_effect,
)

Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["torch", "pil", "torch-bicubic", "pil-bicubic"]  # of mealv2.data.pixels
CheckImages = Literal["first", "always", "never"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]
Triple = tuple[float, float, float]
NO_SPLIT = "none"

# The paper: the learning rate falls to a tenth at epoch 100 of 180.
PAPER_EPOCHS = 180
PAPER_MILESTONE = 100

DEFAULT_RATE = defaults.RATE
DEFAULT_IMG_SIZE = defaults.IMG_SIZE
DEFAULT_SHARD_SIZE = defaults.SHARD_SIZE
MAX_VIEWS = 1_000_000  # per image of a label set
MAX_EPOCHS = 1_000_000
DEFAULT_EMA_DECAY = 0.9998  # timm's

# Help texts of several commands.
CHECK_IMAGES = (
    "Compare the content of each image with that of the labelled one: the first time that the run "
    "reads it, each time, or never."
)
DATA_DIR = (
    "Data set: ROOT/SPLIT/CLASS/IMAGE, ROOT/CLASS/IMAGE, a table (.csv, .tsv, .parquet) of images, "
    "torch/NAME:FOLDER, hfds/NAME, voc2007:, cub200: or birdsnap:FOLDER, list:FOLDER of lists of "
    "images, your own code PACKAGE.MODULE:FUNCTION, or tar shards; a path or a URL."
)
EXACT_PIL = "Resize exactly like Pillow; torch is 3 times as fast and differs by at most 2 of 255."
INTERPOLATION = "Filter of the resize, antialiased; the paper uses bilinear."
RECIPE = "Published recipe to take settings from; flags override it. `mealv2 recipes` lists them."
NEW_FOLDER = "Folder to write; created if missing, continued if incomplete."
SIDE = "Side of a view in pixels."
TEACHER_SIDE = "Side of the views that the teachers see; each view is cut in both sizes."
OWN_SIDE = "of a checkpoint, the size it was trained at; else --img-size"
TEACHER = (
    "timm model, NAME or NAME=CHECKPOINT, or FILE.onnx; repeat it, or separate several by commas."
)
_OWN = "the model's own"


@frozen
class Settings:
    """The config of a command. Its docstring is the description in ``--help``."""

    example: ClassVar[str] = ""  # a command line for --help
    in_ranks: ClassVar[bool] = False  # whether torchrun may start several processes
    fixed: ClassVar[frozenset[str]] = frozenset()  # inherited settings that it does not have

    @property
    def first_line(self) -> str:
        """What the command prints before it imports torch, if anything."""
        return ""

    def __post_init__(self) -> None:
        """Check the settings; raises ConfigError that names the flag."""
        check_bounds(self)

    def __eq__(self, other: object) -> bool:
        """Return whether both are of one class and all settings are equal."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        """Return the hash of all settings."""
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        """Return the call that makes the config."""
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({given})"

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, with absolute paths."""
        return {f.name: plain(getattr(self, f.name)) for f in settings_of(type(self))}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build a config from JSON values under current or old names.

        Raises ConfigError for an unknown name or a missing setting.
        """
        values = current_names(cls, values)
        known = {f.name: f for f in settings_of(cls)}
        for name in sorted(values.keys() - known.keys()):
            require(False, f"unknown setting {name!r}; known: {', '.join(sorted(known))}")
        for name, field in known.items():
            is_missing = field.default is REQUIRED and values.get(name) in (None, [], ())
            require(not is_missing, f"{spelling(field)} is required")
        return cls(**{name: typed(known[name], value) for name, value in values.items()})


def settings_of(config: type[Settings]) -> "list[dataclasses.Field[Any]]":
    """Return the fields of a config that can be set."""
    return [field for field in dataclasses.fields(config) if field.name not in config.fixed]


@frozen
class CacheConfig(Settings):
    """Settings of commands that can read from URLs."""

    cache_dir: Path | None = in_data(
        None,
        "Folder for remote files.",
        shown="$MEALV2_CACHE, else ~/.cache/mealv2",
        path="new folder",
    )
    cache_size: str = in_data("100GB", "Limit of --cache-dir; least recently used files go first.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.cache_bytes
        if not any(is_url(getattr(self, f.name)) for f in dataclasses.fields(self)):
            without_effect(self, "without a URL", "cache_dir", "cache_size")

    @property
    def cache_bytes(self) -> int:
        """Size limit of the copies in bytes."""
        return num_bytes_of("cache_size", self.cache_size)


@frozen
class StrictConfig(Settings):
    """Settings of commands that list images."""

    strict: bool = in_data(False, "Stop if a file of the data set is left out or found twice.")


@frozen
class SourceConfig(StrictConfig, CacheConfig):
    """Settings of commands that list images, also behind URLs."""

    class_map: Path | None = in_data(
        None,
        "File of class names by class id: .txt, one a line, or .json.",
        shown="the data's own order",
        path="file",
    )
    download: bool = in_data(
        False, "Download --data-dir torch/NAME:FOLDER or hfds/NAME if it is missing."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.search("(^|/)(torch|hfds)/", str(getattr(self, "data_dir", None))):
            without_effect(self, "without --data-dir torch/… or hfds/…", "download")


@frozen
class HeldOutConfig(SourceConfig):
    """Settings of commands that can hold out a part of the training images."""

    trains: ClassVar[bool] = True  # on the other part

    val_split: str = in_data("val", "Split of --data-dir to validate on, or none.")
    val_fraction: float | None = in_data(
        None,
        "Hold out this fraction of the training images of each class for validation, in a data set "
        "without --val-split.",
        shown="none",
        above=0,
    )
    split_seed: int = in_data(0, "With --val-fraction: seed of the choice.", low=0, high=MAX_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction is None:
            without_effect(self, "without --val-fraction", "split_seed")
            return
        require(self.val_fraction < 1, f"--val-fraction must be below 1, got {self.val_fraction}")
        message = "--val-fraction makes a split to validate on: leave out --val-split none"
        require(self.val_split != NO_SPLIT, message)
        of = getattr(self, "train_split", None) or "train"
        require(
            not self.trains or self.val_split != of,
            f"--val-fraction: --val-split {of} is the split that the images are held out of, which "
            "is trained on; leave --val-split out, or give another name",
        )


@frozen
class ExtraDataConfig(SourceConfig):
    """Settings of commands that read unlabelled pictures too."""

    extra_data: tuple[Path, ...] = in_data(
        (),
        "Folder of unlabelled pictures, at any depth or in tar files without .cls, for training "
        "besides those of --data-dir; repeat it for several.",
        shown="none",
        path="folder",
    )


@frozen
class ReaderConfig(Settings):
    """Settings of commands that read images."""

    workers: int = in_hardware(
        2, "Threads that read images; 0: only the main thread.", low=0, high=MAX_WORKERS
    )
    device: str = in_hardware("auto", "cpu, cuda, cuda:N or mps; auto: a GPU if there is one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_known = re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", self.device)
        require(is_known, f"--device {self.device} is unknown; use auto, cpu, cuda, cuda:N or mps")


def resize_name(exact_pil: bool | None, interpolation: Interpolation | None) -> Resize:
    """Return the name of a resize in mealv2.data.pixels."""
    if interpolation == "bicubic":
        return "pil-bicubic" if exact_pil else "torch-bicubic"
    return "pil" if exact_pil else "torch"


@frozen
class CropConfig(Settings):
    """Settings of commands that resize images."""

    exact_pil: bool = in_views(False, EXACT_PIL)
    interpolation: Interpolation | None = in_views(None, INTERPOLATION, shown="bilinear")

    @property
    def resize(self) -> Resize:
        """How images are resized, unless a label set says it."""
        return resize_name(self.exact_pil, self.interpolation)


@frozen
class NormalisationConfig(Settings):
    """Settings of commands that normalise the images for one model."""

    mean: Triple | None = in_model(None, "Per-channel mean for normalising images.", shown=_OWN)
    std: Triple | None = in_model(None, "Per-channel std for normalising images.", shown=_OWN)

    def __post_init__(self) -> None:
        super().__post_init__()
        require((self.mean is None) == (self.std is None), "give both --mean and --std, or neither")
        is_finite = all(map(math.isfinite, self.mean or ()))
        require(is_finite, f"--mean must be finite, got {self.mean}")
        is_positive = all(0 < value < math.inf for value in self.std or ())
        require(is_positive, f"--std must be positive and finite, got {self.std}")


@frozen
class RuntimeConfig(ReaderConfig):
    """Settings of commands that run a model."""

    amp: bool = in_hardware(False, "Mixed precision (autocast).")
    amp_dtype: Literal["bfloat16", "float16"] | None = in_hardware(
        None, "Data type of --amp.", shown="bfloat16"
    )
    on_bad_image: OnBadImage = in_data("fail", "If an image cannot be read: stop, or skip it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.amp:
            without_effect(self, "without --amp", "amp_dtype")


@frozen
class LabellingConfig(RuntimeConfig):
    """Settings of commands that label many views."""

    batch_size: int | Literal["auto"] = in_hardware(
        256, "Views per forward pass; auto: try sizes and use the fastest.", low=1
    )
    torchcompile: CompileMode = in_hardware(
        "off", "Compile the teachers with torch.compile, in this mode.", alias="compile"
    )


@frozen
class JobsConfig(LabellingConfig):
    """Settings of commands that several jobs can share."""

    job_index: int | None = in_jobs(
        None,
        "Index of this job among --num-jobs, counted from 0.",
        shown="SLURM_ARRAY_TASK_ID in an array, or RANK; else 0",
    )
    num_jobs: int | None = in_jobs(
        None,
        "Number of jobs N that share the work: job I makes shards I, I + N, …; if N > 1, "
        "`mealv2 labels finish` writes the manifest.",
        shown="SLURM_ARRAY_TASK_COUNT, or WORLD_SIZE; else 1",
        low=1,
    )
    shard_list: Path | None = in_jobs(
        None,
        "File with the names of the shards to make, one per line, as `mealv2 labels status --list` "
        "writes it.",
        shown="all shards",
        path="file",
    )
    num_procs: int = in_jobs(1, "Processes on this machine that share this job's work.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        index, num_jobs = self.job_index, self.num_jobs
        is_alone = (index is None) != (num_jobs is None)
        require(not is_alone, "give both --job-index and --num-jobs, or neither")
        if index is not None and num_jobs is not None:
            last = f"the last of {num_jobs} jobs has index {num_jobs - 1}"
            require(0 <= index < num_jobs, f"--job-index {index} is out of range: {last}")
