"""Settings of `mealv2 precompute`, and how label sets encode labels."""

from typing import Literal

from mealv2 import defaults
from mealv2.storage.urls import Location, is_url
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    DEFAULT_RATE,
    DEFAULT_SHARD_SIZE,
    MAX_VIEWS,
    OWN_SIDE,
    RECIPE,
    SIDE,
    TEACHER,
    TEACHER_SIDE,
    CheckImages,
    ExtraDataConfig,
    HeldOutConfig,
    JobsConfig,
    Settings,
)
from pipeline.config.fields import (
    MAX_SEED,
    REQUIRED,
    frozen,
    in_data,
    in_img_size,
    in_labels,
    in_run,
    in_views,
    require,
    teachers,
    without_effect,
)
from pipeline.config.views import ViewsConfig

RATE = "Loss of the labels (KL, nats) that 12 more bits must save; less keeps more."


@frozen
class EncodingConfig(Settings):
    """Settings of commands that encode labels."""

    rate: float | None = in_labels(None, RATE, shown=f"{DEFAULT_RATE}, without --topk", above=0)
    topk: str | None = in_labels(
        None, "Classes kept per view: this number, or all.", shown="what --rate selects"
    )
    label_dtype: Literal["float16", "float32"] | None = in_labels(
        None,
        "With --topk: store probabilities in this type.",
        shown="a curve of a few bits; float16 with --topk all",
    )
    store_logits: bool = in_labels(False, "Keep mean logits if the label sets have them.")

    def __post_init__(self) -> None:
        super().__post_init__()
        topk = self.topk
        require(self.rate is None or topk is None, "give --rate or --topk, not both")
        is_topk = topk in (None, "all") or (topk.isdecimal() and int(topk) > 0)
        require(is_topk, f"--topk must be a number of classes or 'all', got {topk!r}")
        if topk is None:
            without_effect(self, "without --topk", "label_dtype")


@frozen
class PrecomputeConfig(ViewsConfig, EncodingConfig, ExtraDataConfig, HeldOutConfig, JobsConfig):
    """Label views of a data set with an ensemble of teachers and store the soft labels."""

    example = (
        "mealv2 precompute --data-dir imagenet --num-views 30 --output labels "
        "--teacher senet154.gluon_in1k --teacher resnet152s.gluon_in1k"
    )
    in_ranks = True

    data_dir: Location = in_data(REQUIRED, DATA_DIR, path="data set")
    output: Location = in_labels(
        REQUIRED,
        "Folder or URL of the label set; created if missing, continued if incomplete.",
        alias="out",
        path="new label set",
    )
    teacher: tuple[str, ...] = teachers(REQUIRED, TEACHER)
    train_split: str = in_data(
        "train", "Split of --data-dir to label with --num-views views per image.", alias="split"
    )
    val_split: str = in_data(
        "val", "Split of --data-dir to label once, at the centre crop, for validation; or none."
    )
    check_images: CheckImages = in_data(
        "first",
        "When continuing: compare the images of complete shards (a job: of its own) with those "
        "that were labelled, by content (first, always), or never.",
    )
    num_views: int = in_views(
        defaults.NUM_VIEWS,
        "Random views (crops and flips) to label per image.",
        low=1,
        high=MAX_VIEWS,
    )
    view_seed: int = in_views(0, "Seed of the views.", low=0, high=MAX_SEED)
    img_size: int = in_img_size(DEFAULT_IMG_SIZE, SIDE)
    teacher_img_size: int | None = in_img_size(None, TEACHER_SIDE, shown=OWN_SIDE)
    store_logits: bool = in_labels(
        False, "Also store the mean logits of the kept classes, for the discriminator."
    )
    store: Literal["mean", "per-teacher"] = in_labels(
        "mean",
        "One label set of the teachers' mean probabilities, or one of each teacher, "
        "OUTPUT/teacher-0, OUTPUT/teacher-1, …: `mealv2 labels merge OUTPUT` makes the mean.",
    )
    shard_size: int | None = in_labels(
        None,
        "Images per label shard; with tar shards, each tar file gets one label shard.",
        shown=str(DEFAULT_SHARD_SIZE),
        low=1,
    )
    recipe: str | None = in_run(None, RECIPE, shown="none")
    dry_run: bool = in_run(False, "Estimate rows, bytes and time from a sample; write nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher, "--teacher is required")
        require(
            self.num_views == 1 or self.view_recipe.is_random,
            f"--num-views {self.num_views}: all views of an image are equal with --crop "
            f"{self.view_recipe.crop} and these flips; use --num-views 1",
        )
        is_local = not is_url(self.output)
        require(self.store == "mean" or is_local, "--store per-teacher needs a local --output")
        if self.dry_run:
            names = ("job_index", "num_jobs", "shard_list", "num_procs")
            without_effect(self, "with --dry-run", *names)
