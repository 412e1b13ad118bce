"""Settings of stage one."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mealv2.errors import ConfigError
from pipeline.config.base import (
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    MOST_VIEWS,
    Cutting,
    Jobs,
)
from pipeline.config.fields import (
    at_least,
    between,
    check_seed,
    recipe_setting,
    required,
    setting,
    teachers_setting,
    without_effect,
)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(Cutting, Jobs):
    """Stage one: label views of a data set with an ensemble of teachers."""

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE, or tar shards.")
    out: Path = required("Folder of the label set; made if missing, continued if unfinished.")
    teacher: tuple[str, ...] = teachers_setting(
        dataclasses.MISSING,
        "timm model, NAME or NAME=CHECKPOINT; repeat it, or separate several by commas.",
    )
    split: str = setting("train", "Part of --data-dir whose images get --num-views labels.")
    val_split: str = setting(
        "val", "Part of --data-dir labelled once at the centre crop, for validation; or none."
    )
    num_views: int = setting(16, "Random views (crops and flips) labelled of each image.")
    view_seed: int = setting(0, "Seed of the views.")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.")
    rate: float | None = setting(
        None,
        "Classes kept per view: as many as bring KL + RATE * classes to its least; a smaller rate "
        "keeps more.",
        shown=f"{DEFAULT_RATE}, without --topk",
    )
    topk: str | None = setting(
        None, "Classes kept per view: so many of each, or all.", shown="what --rate gives"
    )
    label_dtype: Literal["float16", "float32"] | None = setting(
        None,
        "With --topk: store probabilities in this type.",
        shown="a curve of a few bits, float16 with all",
    )
    store_logits: bool = setting(
        False, "Store the mean logits of the kept classes too, for the discriminator."
    )
    shard_size: int = setting(2048, "Images per shard file.")
    recipe: str | None = recipe_setting()
    dry_run: bool = setting(False, "Say rows, bytes and time from a short sample; write nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "img_size", "shard_size")
        between(self, 1, MOST_VIEWS, "num_views")
        check_seed(self, "view_seed")
        if not self.teacher:
            raise ConfigError("--teacher is required")
        check_encoding(self)
        if self.dry_run:
            names = ("job_index", "num_jobs", "shard_list", "num_procs")
            without_effect(self, "with --dry-run", *names)


def check_encoding(config: Any) -> None:
    """Check --rate, --topk and --label-dtype."""
    topk = config.topk
    if config.rate is not None and topk is not None:
        raise ConfigError(
            "--rate and --topk exclude each other: the one varies what the other fixes"
        )
    if config.rate is not None and not 0 < config.rate < math.inf:
        raise ConfigError(f"--rate must be positive and finite, got {config.rate}")
    if topk not in (None, "all") and not (topk.isdecimal() and int(topk) > 0):
        raise ConfigError(f"--topk must be a number of classes or 'all', got {topk!r}")
    if topk is None:
        without_effect(config, "without --topk", "label_dtype")
