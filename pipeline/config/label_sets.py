"""Settings of the `mealv2 labels` commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location
from pipeline.config.base import (
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    DEFAULT_SHARD_SIZE,
    MOST_VIEWS,
    CacheConfig,
    JobsConfig,
    RuntimeConfig,
    Settings,
)
from pipeline.config.fields import (
    at_least,
    between,
    positional,
    required,
    setting,
    teachers_setting,
    without_effect,
)
from pipeline.config.labels import check_encoding

_TEACHERS = (
    "Teachers that made the set, NAME or NAME=CHECKPOINT; repeat it, or separate several by commas."
)


def _new_set() -> Any:
    return required(
        "Folder of the new label set.", group="Labels", aliases=("out",), path="new label set"
    )


@dataclass(frozen=True, kw_only=True)
class LabelsInfoConfig(CacheConfig):
    """Describe a label set: views, teachers, encoding, bytes, accuracies."""

    example = "mealv2 labels info labels"

    labels: Location = positional("Label set; a path or a URL.", path="label set")


@dataclass(frozen=True, kw_only=True)
class LabelsStatusConfig(CacheConfig):
    """List which shards are complete, missing or damaged, and the command to run next.

    It reads the files alone, also while jobs write them. Exit code 0: all shards are complete and
    the manifest exists.
    """

    example = "mealv2 labels status labels --list missing.txt"

    labels: Location = positional("Label set; a path or a URL.", path="label set")
    list_: Path | None = setting(
        None,
        "Write the names of the shards that are left to make here, one a line.",
        group="Results",
        shown="not written",
        path="new file",
    )


@dataclass(frozen=True, kw_only=True)
class LabelsFinishConfig(CacheConfig):
    """Write the manifest of a label set whose shards were made by jobs.

    It checks every shard first and needs neither images nor teachers.
    """

    example = "mealv2 labels finish labels --batch-size 256"

    labels: Location = positional("Label set; a path or a URL.", path="label set")
    batch_size: int | None = setting(
        None,
        "The jobs' views per forward pass, to record in the manifest.",
        group="Hardware",
        shown="not recorded",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None:
            at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class LabelsVerifyConfig(CacheConfig, RuntimeConfig):
    """Check every file and label of a label set, and the boxes of all views.

    --data-dir also checks the images, --relabel the teachers. Damage is reported by file and
    image, with exit code 3.
    """

    example = "mealv2 labels verify labels --data-dir imagenet --relabel 1000"

    labels: Location = positional("Label set; a path or a URL.", path="label set")
    data_dir: Location | None = setting(
        None,
        "Also check that the set labels exactly the images of this data set.",
        group="Data",
        shown="not checked",
        path="data set",
    )
    relabel: int = setting(
        0,
        "Label this many random views again and compare; needs --data-dir.",
        group="Labels",
    )
    teacher: tuple[str, ...] = teachers_setting((), _TEACHERS, shown="those the label set names")
    seed: int = setting(0, "Seed of the choice of views for --relabel.", group="Labels")
    batch_size: int = setting(256, "Views per forward pass of --relabel.", group="Hardware")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "relabel", "seed")
        at_least(self, 1, "batch_size")
        if self.relabel and self.data_dir is None:
            raise ConfigError("--relabel needs --data-dir: the images to show to the teachers")
        if not self.relabel:
            names = ("teacher", "seed", "batch_size", "amp", "on_bad_image")
            without_effect(self, "without --relabel", *names)


@dataclass(frozen=True, kw_only=True)
class LabelsAddViewsConfig(CacheConfig, JobsConfig):
    """Label more views of a label set's images with its own teachers.

    The command adds new files and leaves the old ones unchanged. It makes damaged or missing files
    of added views again: give the same --num-views.
    """

    example = "mealv2 labels add-views labels --data-dir imagenet --num-views 60"

    labels: Path = positional("Label set.", path="label set")
    data_dir: Location = required(
        "Data set it was made from: ROOT/SPLIT/CLASS/IMAGE, or tar shards.",
        group="Data",
        path="data set",
    )
    num_views: int = setting(32, "Views per image after the command.", group="Views")
    teacher: tuple[str, ...] = teachers_setting((), _TEACHERS, shown="those the label set names")

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, MOST_VIEWS, "num_views")


@dataclass(frozen=True, kw_only=True)
class EncodingConfig(Settings):
    """How a label set that is written encodes its labels."""

    rate: float | None = setting(
        None,
        "Classes kept per view: the number that minimises KL + RATE * classes.",
        group="Labels",
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
        False, "Keep mean logits, where the label sets have them.", group="Labels"
    )

    def __post_init__(self) -> None:
        check_encoding(self)


@dataclass(frozen=True, kw_only=True)
class LabelsConvertConfig(EncodingConfig):
    """Write a label set again, in another encoding or in today's format."""

    example = "mealv2 labels convert labels --rate 0.005 --output smaller"

    labels: Path = positional("Label set.", path="label set")
    output: Path = _new_set()
    rate: float | None = setting(
        None,
        "Classes kept per view: the number that minimises KL + RATE * classes.",
        group="Labels",
        shown="without --topk too: as in the label set",
    )


@dataclass(frozen=True, kw_only=True)
class LabelsMergeConfig(EncodingConfig):
    """Join label sets of different images, or average label sets of different teachers.

    Sets of the same teachers are joined and keep their encoding. Sets of different teachers on the
    same views are averaged to one ensemble, encoded as --rate or --topk say.
    """

    example = "mealv2 labels merge labels-a labels-b --output labels"

    sets: tuple[Path, ...] = positional("Label sets, two or more.", path="label set")
    output: Path = _new_set()
    rate: float | None = setting(
        None,
        "Classes kept per view of averages: the number that minimises KL + RATE * classes.",
        group="Labels",
        shown=f"{DEFAULT_RATE}, without --topk",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sets) < 2:
            raise ConfigError("give two label sets or more")


@dataclass(frozen=True, kw_only=True)
class LabelsSplitConfig(Settings):
    """Divide a label set into parts of disjoint images.

    Each part is a label set with the complete validation split: OUTPUT/part-0, OUTPUT/part-1, …
    """

    example = "mealv2 labels split labels --parts 4 --output parts"

    labels: Path = positional("Label set.", path="label set")
    output: Path = required(
        "Folder of the parts.", group="Labels", aliases=("out",), path="new folder"
    )
    parts: int = setting(2, "Number of parts, of about equal size.", group="Labels")

    def __post_init__(self) -> None:
        at_least(self, 2, "parts")


@dataclass(frozen=True, kw_only=True)
class LabelsImportConfig(CacheConfig):
    """Make a label set from labels that other software wrote."""

    example = "mealv2 labels import soft_labels --from fkd --data-dir imagenet --output labels"

    folder: Path = positional("Folder of the labels.", path="folder")
    from_: Literal["fkd"] = setting(
        "fkd", "Format of the labels: fkd, the FKD and MEAL V2 soft labels.", group="Labels"
    )
    data_dir: Location = required(
        "Data set they label: ROOT/SPLIT/CLASS/IMAGE, or tar shards.",
        group="Data",
        path="data set",
    )
    output: Path = _new_set()
    train_split: str = setting(
        "train",
        "Part of --data-dir whose images they label.",
        group="Data",
        aliases=("split",),
    )
    label_type: str | None = setting(
        None,
        "FKD's name of the kind of label, such as marginal_smoothing_k5 or marginal_renorm.",
        group="Labels",
        shown="what the files look like; smoothing, not renorm",
    )
    teacher_name: str = setting("unknown", "Name of the teacher in the manifest.", group="Labels")
    img_size: int = setting(
        DEFAULT_IMG_SIZE, "Side of a view in pixels to train at.", group="Views"
    )
    shard_size: int = setting(DEFAULT_SHARD_SIZE, "Images per shard file.", group="Labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "img_size", "shard_size")


@dataclass(frozen=True, kw_only=True)
class LabelsExportConfig(CacheConfig):
    """Export the labels of a label set to other formats."""

    example = "mealv2 labels export labels --to parquet --output tables"

    labels: Path = positional("Label set.", path="label set")
    to: Literal["fkd", "webdataset", "parquet"] = setting(
        "parquet", "FKD's files, tar shards of images and labels, or tables.", group="Labels"
    )
    output: Path = required(
        "Folder to write; created if missing, continued if unfinished.",
        group="Labels",
        aliases=("out",),
        path="new folder",
    )
    data_dir: Location | None = setting(
        None,
        "With --to webdataset: data set of the images.",
        group="Data",
        shown="none",
        path="data set",
    )
    label_type: str = setting(
        "marginal_smoothing_k5", "With --to fkd: FKD's name of the kind of label.", group="Labels"
    )
    split: Literal["train", "val"] = setting(
        "train", "Part of the label set to export.", group="Labels", aliases=("role",)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.to == "webdataset") != (self.data_dir is not None):
            raise ConfigError("--data-dir goes with --to webdataset: the images beside the labels")
        if self.to != "fkd":
            without_effect(self, "without --to fkd", "label_type")
        elif self.split == "val":
            raise ConfigError("--to fkd is for views with boxes: --split train")
