"""What several commands have in common, and the numbers that are the paper's."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from mealv2.errors import ConfigError
from pipeline.config.fields import at_least, plain, setting, spelling, typed

OnBadImage = Literal["fail", "skip"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]
NO_SPLIT = "none"

# The paper: the learning rate falls to a tenth at epoch 100 of 180.
PAPER_EPOCHS = 180
PAPER_MILESTONE = 100

DEFAULT_RATE = 0.001  # of the label codec: about 40 bytes a view of 1,000 classes
DEFAULT_IMG_SIZE = 224
MOST_VIEWS = 1_000_000  # of an image, in a label set
DEFAULT_EMA_DECAY = 0.9998  # timm's

EXACT_PIL = (
    "Resize with Pillow, to its very bits; torch is three times as fast, and within 2 of 255."
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command can do with its settings."""

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, paths absolute."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build a config from JSON values; raises ConfigError for an unknown or missing name."""
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
class Reading(Settings):
    """What every command has that reads images."""

    workers: int = setting(2, "Threads that read and decode images; 0: none beside the main one.")
    device: str = setting("auto", "cpu, cuda, cuda:N or mps; auto: a GPU if there is one.")

    def __post_init__(self) -> None:
        at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class Cutting(Settings):
    """What every command has that says how views are cut."""

    exact_pil: bool = setting(False, EXACT_PIL)

    @property
    def resize(self) -> Literal["torch", "pil"]:
        """Who resizes, unless a label set says."""
        return "pil" if self.exact_pil else "torch"


@dataclass(frozen=True, kw_only=True)
class Machine(Reading):
    """How a stage computes."""

    amp: bool = setting(False, "Mixed precision (autocast).")
    amp_dtype: Literal["bfloat16", "float16"] | None = setting(
        None, "Type that --amp computes in.", shown="bfloat16"
    )
    on_bad_image: OnBadImage = setting(
        "fail", "An image that cannot be read: stop there, or leave it out and say so."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amp_dtype is not None and not self.amp:
            raise ConfigError("--amp-dtype has no effect without --amp")


@dataclass(frozen=True, kw_only=True)
class Labelling(Machine):
    """How teachers answer about many views."""

    batch_size: int | Literal["auto"] = setting(
        256, "Views per forward pass; auto: the size that is fastest on this machine, by trying."
    )
    compile: CompileMode = setting("off", "Compile the teachers with torch.compile, in this mode.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size != "auto":
            at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class Jobs(Labelling):
    """What every command has that several jobs can share."""

    job_index: int | None = setting(
        None,
        "Which of --num-jobs this is, counted from 0.",
        shown="SLURM_ARRAY_TASK_ID in an array, or RANK; else 0",
    )
    num_jobs: int | None = setting(
        None,
        "Jobs that share the work: job I makes the shards I, I + N, and so on, and no manifest "
        "where there is more than one.",
        shown="SLURM_ARRAY_TASK_COUNT, or WORLD_SIZE; else 1",
    )
    shard_list: Path | None = setting(
        None,
        "File of shard names, one a line: the jobs share these alone; `mealv2 labels status "
        "--list` writes it.",
        shown="all shards",
    )
    num_procs: int = setting(1, "Processes that share the work of this job, on this machine.")

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
