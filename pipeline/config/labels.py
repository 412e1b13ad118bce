"""Settings of stage one."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from pipeline.config.base import DEFAULT_IMG_SIZE, DEFAULT_TOPK, Machine
from pipeline.config.fields import (
    at_least,
    check_seed,
    recipe_setting,
    required,
    setting,
    teachers_setting,
)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(Machine):
    """Stage one: label views of a data set with an ensemble of teachers."""

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE.")
    out: Path = required("Folder of the label set; made if missing, continued if unfinished.")
    teacher: tuple[str, ...] = teachers_setting(
        dataclasses.MISSING,
        "timm model, NAME or NAME=CHECKPOINT; repeat it, or separate several by commas.",
    )
    split: str = setting("train", "Folder under --data-dir whose images get --num-views labels.")
    val_split: str = setting(
        "val", "Folder under --data-dir labelled once at the centre crop, for validation; or none."
    )
    num_views: int = setting(16, "Random views (crops and flips) labelled of each image.")
    view_seed: int = setting(0, "Seed of the views.")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.")
    topk: str | None = setting(
        None, "Classes kept per view: a number, or all.", shown="10, or all of fewer classes"
    )
    label_dtype: Literal["float16", "float32"] = setting(
        "float16", "Type the probabilities are stored in."
    )
    shard_size: int = setting(2048, "Images per shard file.")
    batch_size: int = setting(256, "Views per forward pass.")
    recipe: str | None = recipe_setting()
    dry_run: bool = setting(False, "Say rows, bytes and time from a short sample; write nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "num_views", "img_size", "shard_size", "batch_size")
        check_seed(self, "view_seed")
        if not self.teacher:
            raise ConfigError("--teacher is required")
        if self.topk not in (None, "all") and not (self.topk.isdecimal() and int(self.topk) > 0):
            raise ConfigError(f"--topk must be a number of classes or 'all', got {self.topk!r}")

    def kept_classes(self, num_classes: int) -> int:
        """Return how many classes a label keeps; raises ConfigError above the class count."""
        if self.topk is None:
            return min(DEFAULT_TOPK, num_classes)
        k = num_classes if self.topk == "all" else int(self.topk)
        if k > num_classes:
            raise ConfigError(
                f"--topk {k}: the data has only {num_classes} classes; use less, or all"
            )
        return k
