"""Open the images of a distillation: the splits of its label set, or those of the flags."""

from functools import partial
from pathlib import Path

from mealv2.data.held_out import HeldOut
from mealv2.data.source import UNLABELLED, ClassNames, ImageSource
from mealv2.errors import ConfigError
from mealv2.label_set import read_manifest
from pipeline.config import DistillConfig
from pipeline.labelling import teachers
from pipeline.loading.sources import (
    check_extra,
    held_out_of,
    open_images,
    open_split,
    with_extra,
)
from pipeline.training.image_list import with_deleted


def open_splits(
    config: DistillConfig, folder: Path | None
) -> tuple[ImageSource, ImageSource | None]:
    """Open the images to train on and to validate on.

    They are the splits, or the parts of one, that the label set names; without one, those of the
    flags. Raises ConfigError where flags contradict the label set.
    """
    held_out = held_out_of(config, train_split=config.train_split or "train")
    if folder is None:
        split, extra = config.train_split or "train", config.extra_data
        names: ClassNames = partial(teachers.classes_of, config.teacher)
    else:
        plan = read_manifest(folder)["plan"]
        entry, names = plan["roles"]["train"], lambda: plan["classes"]
        split, kept = entry["split"], HeldOut.from_json(entry.get("held_out"))
        if held_out is not None and (held_out.fraction, held_out.seed) != (
            kept and (kept.fraction, kept.seed)
        ):
            made = f"with {kept}" if kept else "without --val-fraction"
            raise ConfigError(
                f"{held_out} contradicts {folder}, which was made {made}; leave it out, or make "
                "another label set"
            )
        held_out = kept
        extra = check_extra(entry, config.extra_data)
        if len(extra) < len(config.extra_data) and config.missing == "fail":
            raise ConfigError(
                f"{folder} has no labels of --extra-data; precompute with --extra-data, or let the "
                "teachers label it: --missing teach"
            )
        extra = config.extra_data
    source = open_images(config, config.data_dir, split, held_out=held_out, names=names)
    if config.hard_label_weight and UNLABELLED in source.labels:
        raise ConfigError("--hard-label-weight needs class ids, which these pictures do not have")
    val = open_split(config, config.data_dir, config.val_split, train=source, held_out=held_out)
    return with_deleted(config, with_extra(config, source, extra, val=val)), val
