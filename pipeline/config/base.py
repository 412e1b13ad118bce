"""What several commands have in common, and the numbers that are the paper's."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from mealv2.errors import ConfigError
from mealv2.storage.urls import is_url
from pipeline.config.fields import (
    at_least,
    current_names,
    num_bytes_of,
    plain,
    setting,
    spelling,
    typed,
    without_effect,
)

OnBadImage = Literal["fail", "skip"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]
NO_SPLIT = "none"

# The paper: the learning rate falls to a tenth at epoch 100 of 180.
PAPER_EPOCHS = 180
PAPER_MILESTONE = 100

DEFAULT_RATE = 0.001  # of the label codec: about 40 bytes a view of 1,000 classes
DEFAULT_IMG_SIZE = 224
DEFAULT_SHARD_SIZE = 2048  # images, in a file of labels or of images; of ImageNet 225 MB
MOST_VIEWS = 1_000_000  # of an image, in a label set
DEFAULT_EMA_DECAY = 0.9998  # timm's

DATA_DIR = "Data set: ROOT/SPLIT/CLASS/IMAGE, or tar shards; a path or a URL."
EXACT_PIL = (
    "Resize with Pillow, bit for bit; torch is three times as fast and differs by at most 2 of 255."
)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command can do with its settings.

    The docstring of a command's config is the description in its ``--help``.
    """

    example: ClassVar[str] = ""  # a command line for --help
    in_ranks: ClassVar[bool] = False  # whether torchrun may start several processes of it

    def __post_init__(self) -> None:
        """Check the settings; raises ConfigError naming the flag at fault."""

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, paths absolute."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build a config from JSON values; old names of settings are accepted too.

        Raises ConfigError for an unknown or missing name.
        """
        values = current_names(cls, values)
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        missing = [
            f.name
            for f in known.values()
            if f.default is dataclasses.MISSING and values.get(f.name) in (None, [], ())
        ]
        if missing:
            raise ConfigError(f"{spelling(known[missing[0]])} is required")
        return cls(**{name: typed(known[name], value) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """What every command has that reads from URLs."""

    cache_dir: Path | None = setting(
        None,
        "Folder for copies of remote files.",
        group="Data",
        shown="$MEALV2_CACHE, else ~/.cache/mealv2",
        path="new folder",
    )
    cache_size: str = setting(
        "100GB",
        "Size limit of the copies; those used longest ago are removed first.",
        group="Data",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        num_bytes_of("cache_size", self.cache_size)
        if not any(is_url(getattr(self, f.name)) for f in dataclasses.fields(self)):
            without_effect(self, "without a URL", "cache_dir", "cache_size")

    @property
    def cache_bytes(self) -> int:
        """How many bytes the copies may take."""
        return num_bytes_of("cache_size", self.cache_size)


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(Settings):
    """What every command has that reads images."""

    workers: int = setting(
        2, "Threads that read and decode images; 0: only the main thread.", group="Hardware"
    )
    device: str = setting(
        "auto", "cpu, cuda, cuda:N or mps; auto: a GPU if there is one.", group="Hardware"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "workers")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(
                f"--device {self.device}: no such device; use auto, cpu, cuda, cuda:N or mps"
            )


@dataclass(frozen=True, kw_only=True)
class CropConfig(Settings):
    """What every command has that says how views are cut."""

    exact_pil: bool = setting(False, EXACT_PIL, group="Views")

    @property
    def resize(self) -> Literal["torch", "pil"]:
        """Who resizes, unless a label set says."""
        return "pil" if self.exact_pil else "torch"


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(ReaderConfig):
    """How a stage computes."""

    amp: bool = setting(False, "Mixed precision (autocast).", group="Hardware")
    amp_dtype: Literal["bfloat16", "float16"] | None = setting(
        None, "Data type of --amp.", group="Hardware", shown="bfloat16"
    )
    on_bad_image: OnBadImage = setting(
        "fail", "What to do about an unreadable image: stop, or skip it.", group="Data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amp_dtype is not None and not self.amp:
            raise ConfigError("--amp-dtype has no effect without --amp")


@dataclass(frozen=True, kw_only=True)
class LabellingConfig(RuntimeConfig):
    """How teachers answer about many views."""

    batch_size: int | Literal["auto"] = setting(
        256,
        "Views per forward pass; auto: try sizes and take the fastest.",
        group="Hardware",
    )
    torchcompile: CompileMode = setting(
        "off",
        "Compile the teachers with torch.compile, in this mode.",
        group="Hardware",
        aliases=("compile",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto":
            at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class JobsConfig(LabellingConfig):
    """What every command has that several jobs can share."""

    job_index: int | None = setting(
        None,
        "Index of this job among --num-jobs, counted from 0.",
        group="Jobs",
        shown="SLURM_ARRAY_TASK_ID in an array, or RANK; else 0",
    )
    num_jobs: int | None = setting(
        None,
        "Number of jobs that share the work: job I of N makes shards I, I + N, …; with more than "
        "one job, `mealv2 labels finish` writes the manifest.",
        group="Jobs",
        shown="SLURM_ARRAY_TASK_COUNT, or WORLD_SIZE; else 1",
    )
    shard_list: Path | None = setting(
        None,
        "File of shard names, one a line: the jobs make only these; `mealv2 labels status --list` "
        "writes it.",
        group="Jobs",
        shown="all shards",
        path="file",
    )
    num_procs: int = setting(
        1, "Processes on this machine that share the work of this job.", group="Jobs"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_procs")
        if (self.job_index is None) != (self.num_jobs is None):
            raise ConfigError("--job-index and --num-jobs go together")
        if self.job_index is None or self.num_jobs is None:
            return
        at_least(self, 1, "num_jobs")
        if not 0 <= self.job_index < self.num_jobs:
            raise ConfigError(
                f"--job-index {self.job_index}: of {self.num_jobs} jobs the first is 0 and the "
                f"last {self.num_jobs - 1}"
            )
