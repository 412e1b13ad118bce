"""Settings of the `mealv2 labels` commands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from pipeline.config.base import (
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    MOST_VIEWS,
    Jobs,
    Machine,
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


@dataclass(frozen=True, kw_only=True)
class LabelsInfoConfig(Settings):
    """What a label set is: views, teachers, encoding, bytes, accuracies."""

    labels: Path = positional("The label set.")


@dataclass(frozen=True, kw_only=True)
class LabelsStatusConfig(Settings):
    """Which shards are whole, missing or damaged, from the files alone, and what to run next.

    Also while jobs are at it. Exit code 0: all are whole and the manifest is there.
    """

    labels: Path = positional("The label set.")
    list_: Path | None = setting(
        None,
        "Write the names of the shards that the next command has to make here, one a line.",
        shown="not written",
    )


@dataclass(frozen=True, kw_only=True)
class LabelsFinishConfig(Settings):
    """Write the manifest of a set whose shards were made by jobs.

    Every shard is checked first; needs neither images nor teachers.
    """

    labels: Path = positional("The label set.")
    batch_size: int | None = setting(
        None, "Views per forward pass that the jobs were given, to be kept.", shown="not said"
    )

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class LabelsVerifyConfig(Machine):
    """Check a label set to its last byte, its images and its teachers.

    Every file and label, and the boxes of all views; --data-dir adds the images, --relabel the
    teachers. Damage is named by file and image, exit code 3.
    """

    labels: Path = positional("The label set.")
    data_dir: Path | None = setting(
        None, "Also check that it labels exactly the images there.", shown="not checked"
    )
    relabel: int = setting(
        0, "Ask the teachers again about so many random views; needs --data-dir."
    )
    teacher: tuple[str, ...] = teachers_setting((), _TEACHERS, shown="those the label set names")
    seed: int = setting(0, "Seed of the choice of views for --relabel.")
    batch_size: int = setting(256, "Views per forward pass of --relabel.")

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
class LabelsAddViewsConfig(Jobs):
    """Label more views of a set's images with its own teachers.

    The new files lie beside the set's, which stay as they are. Files of added views that are
    damaged or lost are made again: give the same --num-views.
    """

    labels: Path = positional("The label set.")
    data_dir: Path = required("Data set it was made from: ROOT/SPLIT/CLASS/IMAGE, or tar shards.")
    num_views: int = setting(32, "Views of each image that the set shall hold in the end.")
    teacher: tuple[str, ...] = teachers_setting((), _TEACHERS, shown="those the label set names")

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 1, MOST_VIEWS, "num_views")


@dataclass(frozen=True, kw_only=True)
class NewEncoding(Settings):
    """How a set that is written keeps its labels."""

    rate: float | None = setting(
        None, "Classes kept per view: as many as bring KL + RATE * classes to its least."
    )
    topk: str | None = setting(
        None, "Classes kept per view: so many of each, or all.", shown="what --rate gives"
    )
    label_dtype: Literal["float16", "float32"] | None = setting(
        None,
        "With --topk: store probabilities in this type.",
        shown="a curve of a few bits, float16 with all",
    )
    store_logits: bool = setting(False, "Keep mean logits, where the sets have them.")

    def __post_init__(self) -> None:
        check_encoding(self)


@dataclass(frozen=True, kw_only=True)
class LabelsConvertConfig(NewEncoding):
    """Write a label set anew, in another encoding or in today's format."""

    labels: Path = positional("The label set.")
    out: Path = required("Folder of the new label set.")
    rate: float | None = setting(
        None,
        "Classes kept per view: as many as bring KL + RATE * classes to its least.",
        shown="without --topk too: as the set has it",
    )


@dataclass(frozen=True, kw_only=True)
class LabelsMergeConfig(NewEncoding):
    """Join sets of different images, or average sets of different teachers.

    Sets of the same teachers are joined and keep their encoding. Sets of different teachers on the
    same views become one ensemble's; those are kept as --rate or --topk say.
    """

    sets: tuple[Path, ...] = positional("The label sets, two or more.")
    out: Path = required("Folder of the new label set.")
    rate: float | None = setting(
        None,
        "Averages keep as many classes as bring KL + RATE * classes to its least.",
        shown=f"{DEFAULT_RATE}, without --topk",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.sets) < 2:
            raise ConfigError("give two label sets or more")


@dataclass(frozen=True, kw_only=True)
class LabelsSplitConfig(Settings):
    """Divide a set into parts of disjoint images.

    Each is a label set of its own, with the whole validation split: OUT/part-0, OUT/part-1, …
    """

    labels: Path = positional("The label set.")
    out: Path = required("Folder of the parts.")
    parts: int = setting(2, "How many, of about as many images each.")

    def __post_init__(self) -> None:
        at_least(self, 2, "parts")


@dataclass(frozen=True, kw_only=True)
class LabelsImportConfig(Settings):
    """Make a label set of labels that other software stored."""

    folder: Path = positional("Folder of the labels.")
    from_: Literal["fkd"] = setting("fkd", "What wrote them: fkd, the FKD and MEAL V2 soft labels.")
    data_dir: Path = required("Data set they label: ROOT/SPLIT/CLASS/IMAGE, or tar shards.")
    out: Path = required("Folder of the new label set.")
    split: str = setting("train", "Part of --data-dir whose images they label.")
    label_type: str | None = setting(
        None,
        "The kind of label, as FKD calls it, such as marginal_smoothing_k5 or marginal_renorm.",
        shown="what the files look like; smoothing, not renorm",
    )
    teacher_name: str = setting("unknown", "What to call the teacher in the manifest.")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels to train at.")
    shard_size: int = setting(2048, "Images per shard file.")

    def __post_init__(self) -> None:
        at_least(self, 1, "img_size", "shard_size")


@dataclass(frozen=True, kw_only=True)
class LabelsExportConfig(Settings):
    """Write a set's labels for other software."""

    labels: Path = positional("The label set.")
    to: Literal["fkd", "webdataset", "parquet"] = setting(
        "parquet", "FKD's files, tar shards of images and labels, or tables."
    )
    out: Path = required("Folder to write to; made if missing, continued if unfinished.")
    data_dir: Path | None = setting(
        None, "Images to put beside the labels, for webdataset.", shown="none"
    )
    label_type: str = setting(
        "marginal_smoothing_k5", "For fkd: the kind of label, as FKD calls it."
    )
    role: Literal["train", "val"] = setting("train", "Which labels.")

    def __post_init__(self) -> None:
        if (self.to == "webdataset") != (self.data_dir is not None):
            raise ConfigError("--data-dir goes with --to webdataset: the images beside the labels")
        if self.to != "fkd":
            without_effect(self, "without --to fkd", "label_type")
        elif self.role == "val":
            raise ConfigError("--to fkd is for views with boxes: --role train")
