"""Settings of `mealv2 transfer-detection`: those of detectron2's retinanet_R_50_FPN_1x."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

from pipeline.config.comparison import ComparisonConfig
from pipeline.config.fields import (
    MAX_IMG_SIZE,
    REQUIRED,
    frozen,
    in_data,
    in_model,
    in_optimisation,
    in_results,
    in_run,
    in_views,
    require,
    without_effect,
)
from pipeline.config.optimisation import WEIGHT_DECAY
from pipeline.config.training import TrainConfig

DetectionMode = Literal["fine-tune", "freeze-first-stage", "all"]
DETECTION_MODES: tuple[DetectionMode, ...] = ("fine-tune", "freeze-first-stage")

# detectron2: 90,000 iterations, the learning rate falls at 60,000 and 80,000
ITERATIONS = 90_000
WARMUP_ITERATIONS = 1000
# detectron2: shorter sides of 640, 672, …, 800, a longer side of at most 1333
IMG_SIZE, MAX_SIZE = 800, 1333
_SMALLEST, _OF = 20, 25  # 640 of 800


@frozen
class TransferDetectionConfig(ComparisonConfig, TrainConfig):
    """Train RetinaNet on a backbone and measure its average precision: the paper's Table 7.

    The data set has COCO's format. The defaults are those of detectron2's retinanet_R_50_FPN_1x;
    the model is torchvision's. Needs pycocotools.
    """

    example = "mealv2 transfer-detection --data-dir coco --model resnet50.a1_in1k"

    # of other trainings: there are no crops, mixtures, epochs, classes of images, remote images
    fixed = frozenset(
        {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_off_epoch"}
        | {"val_fraction", "split_seed", "class_map", "download", "cache_dir", "cache_size"}
        | {"views_per_image", "cache_images", "torchcompile", "sync_bn", "drop", "drop_path"}
        | {"epochs", "sched", "decay_milestones", "decay_epochs", "sched_on_updates", "min_lr"}
        | {"warmup_epochs", "cooldown_epochs", "warmup_lr", "layer_decay", "clip_mode"}
    )

    data_dir: Path = in_data(
        REQUIRED,
        "Folder in COCO's format: annotations/instances_SPLIT.json (SPLIT2017, SPLIT2014) with "
        "images in SPLIT or images/SPLIT, or SPLIT/_annotations.coco.json. coco:FOLDER: the "
        "published one, whose sizes are compared.",
        path="coco",
    )
    train_split: str = in_data("train", "Split of --data-dir to train on.")
    mode: DetectionMode = in_model(
        "freeze-first-stage",
        "fine-tune: train all layers. freeze-first-stage: the stem and the first stage keep their "
        "weights (detectron2: FREEZE_AT 2). all: both, one after another.",
    )
    pyramid_channels: int = in_model(
        256, "Channels of the feature pyramid and of the heads.", low=1, high=4096
    )
    select: Literal["last", "best"] | None = in_run(
        None,
        "Epoch whose model is the result: the last, or that of the best AP on --val-split.",
        shown="last",
    )
    img_size: int = in_views(
        IMG_SIZE,
        "Length of the shorter side of an image; the largest in training.",
        low=32,
        high=MAX_IMG_SIZE,
    )
    train_size: tuple[int, ...] | None = in_views(
        None,
        "Length of the shorter side in training, drawn for each image and epoch; repeat it for "
        "several.",
        shown="640, 672, …, 800; of another --img-size in proportion",
    )
    max_size: int | None = in_views(
        None,
        "Limit of the longer side.",
        shown=f"{MAX_SIZE}; of another --img-size in proportion",
        low=32,
        high=MAX_IMG_SIZE,
    )
    hflip: float = in_views(0.5, "Probability of a left-right flip.", low=0, high=1)
    iterations: int = in_optimisation(
        ITERATIONS, "Training steps, of one batch each.", low=1, high=100_000_000
    )
    batch_size: int = in_optimisation(16, "Images per step, over all processes.", low=1)
    weight_decay: float = in_optimisation(1e-4, WEIGHT_DECAY, low=0)
    decay_iterations: tuple[int, ...] | None = in_optimisation(
        None,
        "Step after which the learning rate is multiplied by --decay-rate; repeat it for several.",
        shown="60000 and 80000 of 90000; of other --iterations in proportion",
    )
    warmup_iterations: int | None = in_optimisation(
        None,
        "Steps in which the learning rate rises from --warmup-factor of --lr to --lr.",
        shown=f"{WARMUP_ITERATIONS}, at most a tenth of --iterations",
        low=0,
    )
    warmup_factor: float = in_optimisation(
        0.001, "First learning rate, as a fraction of --lr.", low=0, high=1
    )
    score_threshold: float = in_results(
        0.05, "Least score of a detection that is evaluated.", low=0, high=1
    )
    nms_threshold: float = in_results(
        0.5, "Overlap above which the detection of lower score is dropped.", low=0, high=1
    )
    max_detections: int = in_results(100, "Most detections of an image.", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_grid("--compare, --seeds or --mode all")
        if self.mode != "fine-tune":
            require(
                self.pretrained is not False or self.initial_checkpoint is not None,
                f"--mode {self.mode} freezes trained weights: leave out --no-pretrained, or use "
                "--mode fine-tune",
            )
        for step in self.decay_iterations or ():
            message = f"--decay-iterations {step} has no effect in {self.iterations} iterations"
            require(0 < step < self.iterations, message)
        warmup = self.warmup_steps
        message = f"--warmup-iterations {warmup} leaves nothing of --iterations {self.iterations}"
        require(warmup < self.iterations, message)
        if not warmup:
            without_effect(self, "without --warmup-iterations", "warmup_factor")
        for size in self.train_size or ():
            message = f"--train-size must be from 1 to --max-size {self.longest}: {size}"
            require(0 < size <= self.longest, message)
        message = f"--max-size {self.longest} is below --img-size {self.img_size}"
        require(self.longest >= self.img_size, message)

    @property
    def max_steps(self) -> int:
        """The steps of the run."""
        return self.iterations

    @property
    def decay_steps(self) -> tuple[int, ...]:
        """The steps, ascending, after which the learning rate falls."""
        default = self.iterations * 2 // 3, self.iterations * 8 // 9
        return tuple(sorted(set(self.decay_iterations or default) - {0}))

    @property
    def warmup_steps(self) -> int:
        """The steps in which the learning rate rises."""
        if self.warmup_iterations is not None:
            return self.warmup_iterations
        return min(WARMUP_ITERATIONS, self.iterations // 10)

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """The lengths of the shorter side in training."""
        parts = range(_SMALLEST, _OF + 1)
        return self.train_size or tuple(round(self.img_size * part / _OF) for part in parts)

    @property
    def longest(self) -> int:
        """The limit of the longer side."""
        return self.max_size or round(self.img_size * MAX_SIZE / IMG_SIZE)

    @property
    def all_modes(self) -> tuple[str, ...]:
        """The modes of the runs."""
        return DETECTION_MODES if self.mode == "all" else (self.mode,)

    def cell(self, *, model: str, mode: Any, **changes: Any) -> Self:
        """Return the settings of one of several runs; its seed and folder are still to be set."""
        return dataclasses.replace(self, model=model, mode=mode, compare=None, seeds=1, **changes)
