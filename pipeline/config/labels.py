"""Settings of stage one."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    DEFAULT_SHARD_SIZE,
    MOST_VIEWS,
    CacheConfig,
    CropConfig,
    JobsConfig,
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
class PrecomputeConfig(CropConfig, CacheConfig, JobsConfig):
    """Stage one: label views of a data set with an ensemble of teachers."""

    example = (
        "mealv2 precompute --data-dir imagenet --num-views 30 --output labels "
        "--teacher senet154.gluon_in1k --teacher resnet152s.gluon_in1k"
    )
    in_ranks = True

    data_dir: Location = required(DATA_DIR, group="Data", path="data set")
    output: Location = required(
        "Folder or URL of the label set; created if missing, continued if unfinished.",
        group="Labels",
        aliases=("out",),
        path="new label set",
    )
    teacher: tuple[str, ...] = teachers_setting(
        dataclasses.MISSING,
        "timm model, NAME or NAME=CHECKPOINT; repeat it, or separate several by commas.",
    )
    train_split: str = setting(
        "train",
        "Part of --data-dir to label with --num-views views per image.",
        group="Data",
        aliases=("split",),
    )
    val_split: str = setting(
        "val",
        "Part of --data-dir to label once, at the centre crop, for validation; or none.",
        group="Data",
    )
    num_views: int = setting(
        16, "Random views (crops and flips) to label per image.", group="Views"
    )
    view_seed: int = setting(0, "Seed of the views.", group="Views")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.", group="Views")
    rate: float | None = setting(
        None,
        "Classes kept per view: the number that minimises KL + RATE * classes; a smaller rate "
        "keeps more.",
        group="Labels",
        shown=f"{DEFAULT_RATE}, without --topk",
    )
    topk: str | None = setting(
        None,
        "Classes kept per view: this number, or all.",
        group="Labels",
        shown="what --rate gives",
    )
    label_dtype: Literal["float16", "float32"] | None = setting(
        None,
        "With --topk: store probabilities in this type.",
        group="Labels",
        shown="a curve of a few bits, float16 with all",
    )
    store_logits: bool = setting(
        False,
        "Also store the mean logits of the kept classes, for the discriminator.",
        group="Labels",
    )
    shard_size: int | None = setting(
        None,
        "Images per label shard; with tar shards, each tar file gets one label shard.",
        group="Labels",
        shown=str(DEFAULT_SHARD_SIZE),
    )
    recipe: str | None = recipe_setting()
    dry_run: bool = setting(
        False,
        "Estimate rows, bytes and time from a short sample; write nothing.",
        group="Run and checkpoints",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "img_size")
        if self.shard_size is not None:
            at_least(self, 1, "shard_size")
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
