"""Settings of the `mealv2 labels` commands."""

from pathlib import Path
from typing import Literal

from mealv2.storage.urls import Location
from mealv2.teacher_sets import is_folder_of_sets
from pipeline.config.base import (
    CHECK_IMAGES,
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    DEFAULT_SHARD_SIZE,
    MAX_VIEWS,
    NEW_FOLDER,
    CacheConfig,
    CheckImages,
    ExtraDataConfig,
    JobsConfig,
    RuntimeConfig,
    Settings,
    SourceConfig,
)
from pipeline.config.fields import (
    MAX_SEED,
    MAX_WORKERS,
    REQUIRED,
    argument,
    frozen,
    in_data,
    in_hardware,
    in_img_size,
    in_labels,
    in_results,
    in_views,
    require,
    teachers,
    without_effect,
)
from pipeline.config.labels import RATE, EncodingConfig

_LOCAL_OR_URL = "Label set; a path or a URL."
_TEACHERS = (
    "Teachers that made the set, NAME or NAME=CHECKPOINT; repeat it, or separate several by commas."
)
_SHOWN_TEACHERS = "those of the label set"
_NEW_SET = "Folder of the new label set."


@frozen
class LabelsInfoConfig(CacheConfig):
    """Describe a label set: views, teachers, encoding, bytes, accuracies."""

    example = "mealv2 labels info labels"

    labels: Location = argument(_LOCAL_OR_URL, path="label set")


@frozen
class LabelsShowConfig(ExtraDataConfig):
    """Show what the teachers said about the views of one image: classes, bars, boxes.

    --pictures draws the image with the boxes of its views, and each view with its label.
    """

    example = "mealv2 labels show labels n01440764/n01440764_10026.JPEG"

    labels: Location = argument(
        "Label set: a folder or URL, or a folder with a set of each teacher.",
        path="label set or sets",
    )
    key: str = argument("Key of the image: CLASS/NAME in a folder of classes.")
    split: Literal["train", "val"] = in_labels("train", "Split of the label set.")
    topk: int = in_results(5, "Number of most probable classes to show.", low=1)
    max_views: int = in_results(8, "Views to show, spread over their certainty.", low=1)
    data_dir: Location | None = in_data(
        None, "Data set of the images, for --pictures.", shown="none", path="data set"
    )
    pictures: Path | None = in_results(
        None,
        "File for a drawing of the views, .png, .svg or .pdf; needs --data-dir.",
        shown="not drawn",
        path="new file",
    )
    json: bool = in_results(False, "Print the results as one line of JSON instead of text.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures is None:
            without_effect(self, "without --pictures", "data_dir", "extra_data", "class_map")
            return
        require(self.data_dir is not None, "--pictures needs --data-dir, the images to draw")
        suffixes = (".png", ".svg", ".pdf")
        message = f"--pictures must end in .png, .svg or .pdf, got {self.pictures}"
        require(self.pictures.suffix in suffixes, message)


@frozen
class LabelsStatusConfig(CacheConfig):
    """List the complete, missing and damaged shards, and the command to run next.

    The command only reads files, so it can run while jobs write them. Exit code 0 means that all
    shards are complete and the manifest exists.
    """

    example = "mealv2 labels status labels --list missing.txt"

    labels: Location = argument(_LOCAL_OR_URL, path="label set")
    list_: Path | None = in_results(
        None,
        "File for the shards to make, one name per line.",
        shown="not written",
        path="new file",
    )


@frozen
class LabelsFinishConfig(CacheConfig):
    """Write the manifest of a label set whose shards were made by jobs.

    The command checks every shard first. It needs no images and no teachers.
    """

    example = "mealv2 labels finish labels --batch-size 256"

    labels: Location = argument(_LOCAL_OR_URL, path="label set")
    batch_size: int | None = in_hardware(
        None, "The jobs' views per forward pass, for the manifest.", shown="not recorded", low=1
    )


@frozen
class LabelsVerifyConfig(ExtraDataConfig, RuntimeConfig):
    """Check every file and label of a label set, and the boxes of all views.

    --data-dir also checks the images, --relabel the teachers. The command reports damage by file
    and image, with exit code 3.
    """

    example = "mealv2 labels verify labels --data-dir imagenet --relabel 1000"

    labels: Location = argument(_LOCAL_OR_URL, path="label set")
    data_dir: Location | None = in_data(
        None,
        "Also check that the set labels exactly these images, by their content.",
        shown="none",
        path="data set",
    )
    quick: bool = in_data(
        False, "With --data-dir: compare names and sizes of the images only, not their content."
    )
    relabel: int = in_labels(
        0,
        "Label all views of random images again, at least this many; needs --data-dir. Labels "
        "that differ by more than another machine explains are an error.",
        low=0,
    )
    teacher: tuple[str, ...] = teachers((), _TEACHERS, shown=_SHOWN_TEACHERS)
    seed: int = in_labels(0, "Seed of the choice of images for --relabel.", low=0, high=MAX_SEED)
    batch_size: int = in_hardware(256, "Views per forward pass of --relabel.", low=1)
    workers: int = in_hardware(
        2,
        "Threads that read and check files and images; 0: only the main thread.",
        low=0,
        high=MAX_WORKERS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is None:
            without_effect(self, "without --data-dir", "quick", "strict", "extra_data", "class_map")
        if self.relabel:
            require(self.data_dir is not None, "--relabel needs --data-dir, the images to label")
        else:
            names = ("teacher", "seed", "batch_size", "amp", "on_bad_image")
            without_effect(self, "without --relabel", *names)


@frozen
class LabelsAddViewsConfig(ExtraDataConfig, JobsConfig):
    """Label more views of a label set's images with its own teachers.

    The command adds new files and leaves the old ones unchanged. To replace damaged or missing
    files of added views, run it again with the same --num-views.
    """

    example = "mealv2 labels add-views labels --data-dir imagenet --num-views 60"

    labels: Path = argument("Label set.", path="label set")
    data_dir: Location = in_data(REQUIRED, DATA_DIR, path="data set")
    check_images: CheckImages = in_data("first", CHECK_IMAGES)
    num_views: int = in_views(32, "Views per image after the command.", low=1, high=MAX_VIEWS)
    teacher: tuple[str, ...] = teachers((), _TEACHERS, shown=_SHOWN_TEACHERS)


@frozen
class LabelsConvertConfig(EncodingConfig):
    """Copy a label set to another encoding or to the current format."""

    example = "mealv2 labels convert labels --rate 0.005 --output smaller"

    labels: Path = argument("Label set.", path="label set")
    output: Path = in_labels(REQUIRED, _NEW_SET, alias="out", path="new label set")
    rate: float | None = in_labels(
        None, RATE, shown="without --topk either: as in the label set", above=0
    )


@frozen
class LabelsMergeConfig(EncodingConfig):
    """Join label sets of different images, or average label sets of different teachers.

    Sets of the same teachers are joined and keep their encoding. Sets of different teachers on the
    same views are averaged to one ensemble, encoded by --rate or --topk. A folder of `mealv2
    precompute --store per-teacher` stands for its sets.
    """

    example = "mealv2 labels merge labels-a labels-b --output labels"

    sets: tuple[Path, ...] = argument(
        "Label sets, two or more, or a folder with one of each teacher.", path="label sets"
    )
    output: Path = in_labels(REQUIRED, _NEW_SET, alias="out", path="new label set")
    rate: float | None = in_labels(
        None,
        "For averages: loss of the labels (KL, nats) that 12 more bits must save.",
        shown=f"{DEFAULT_RATE}, without --topk",
        above=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_enough = len(self.sets) > 1 or any(map(is_folder_of_sets, self.sets))
        require(is_enough, "give two label sets or more, or a folder of --store per-teacher")


@frozen
class LabelsSplitConfig(Settings):
    """Divide a label set into parts of disjoint images.

    Each part is a label set with the complete validation split: OUTPUT/part-0, OUTPUT/part-1, …
    """

    example = "mealv2 labels split labels --parts 4 --output parts"

    labels: Path = argument("Label set.", path="label set")
    output: Path = in_labels(REQUIRED, "Folder of the parts.", alias="out", path="new folder")
    parts: int = in_labels(2, "Number of parts, of about equal size.", low=2, high=100_000)


@frozen
class LabelsImportConfig(SourceConfig, EncodingConfig):
    """Make a label set from labels that other software wrote."""

    example = "mealv2 labels import soft_labels --from fkd --data-dir imagenet --output labels"

    folder: Path = argument("Folder of the labels.", path="folder")
    from_: Literal["fkd", "sre2l"] = in_labels(
        "fkd", "Format: fkd, the soft labels of FKD and MEAL V2; sre2l, those of SRe2L and LPLD."
    )
    data_dir: Location = in_data(REQUIRED, DATA_DIR, path="data set")
    output: Path = in_labels(REQUIRED, _NEW_SET, alias="out", path="new label set")
    train_split: str = in_data("train", "Labelled split of --data-dir.", alias="split")
    label_type: str | None = in_labels(
        None,
        "FKD's kind of label, e.g. marginal_smoothing_k5 or marginal_renorm.",
        shown="as found in the files; smoothing, not renorm",
    )
    rate: float | None = in_labels(
        None,
        "With --from sre2l: loss of the labels (KL, nats) that 12 more bits must save.",
        shown="without --topk: all classes in float32",
        above=0,
    )
    topk: str | None = in_labels(
        None, "With --from sre2l: classes kept per view, this number, or all.", shown="as --rate"
    )
    store_logits: bool = in_labels(False, "With --from sre2l: also keep the logits, in float16.")
    teacher_name: str = in_labels("unknown", "Name of the teacher in the manifest.")
    img_size: int = in_img_size(DEFAULT_IMG_SIZE, "Side of a view in pixels to train at.")
    shard_size: int = in_labels(DEFAULT_SHARD_SIZE, "Images per label shard.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_ == "sre2l":
            without_effect(self, "with --from sre2l", "label_type")
        else:
            names = ("rate", "topk", "label_dtype", "store_logits")
            without_effect(self, "without --from sre2l", *names)


@frozen
class LabelsExportConfig(SourceConfig):
    """Export the labels of a label set to other formats."""

    example = "mealv2 labels export labels --to parquet --output tables"

    labels: Path = argument("Label set.", path="label set")
    to: Literal["fkd", "sre2l", "webdataset", "parquet"] = in_labels(
        "parquet", "FKD's files, SRe2L's files, tar shards of images and labels, or tables."
    )
    output: Path = in_labels(REQUIRED, NEW_FOLDER, alias="out", path="new folder")
    data_dir: Location | None = in_data(
        None,
        "With --to webdataset and sre2l: data set of the images; with --layout mealv2: its name is "
        "used.",
        shown="none",
        path="data set",
    )
    label_type: str = in_labels("marginal_smoothing_k5", "With --to fkd: FKD's kind of label.")
    layout: Literal["fkd", "mealv2"] = in_labels(
        "fkd",
        "With --to fkd: files in train/… as FKD's training looks for them, or in DATASET/train/… "
        "as MEAL V2's does.",
    )
    batch_size: int = in_labels(
        1024, "With --to sre2l: images per file, the --batch-size of SRe2L's training.", low=1
    )
    split: Literal["train", "val"] = in_labels("train", "Split to export.", alias="role")

    def __post_init__(self) -> None:
        super().__post_init__()
        needs_images = self.to in ("webdataset", "sre2l") or self.layout == "mealv2"
        kinds = "--to webdataset, --to sre2l and with --layout mealv2"
        message = f"--data-dir is required with {kinds}, and has no effect without them"
        require(needs_images == (self.data_dir is not None), message)
        if not needs_images:
            without_effect(self, "without --to webdataset or sre2l", "strict")
        if self.to != "fkd":
            without_effect(self, "without --to fkd", "label_type", "layout")
        if self.to != "sre2l":
            without_effect(self, "without --to sre2l", "batch_size")
        if self.to in ("fkd", "sre2l"):
            exports = f"--to {self.to} exports views with boxes: use --split train"
            require(self.split == "train", exports)
