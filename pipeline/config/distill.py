"""Settings of `mealv2 distill`."""

import dataclasses
from typing import Literal, Self

from mealv2.storage.urls import Location, is_url
from pipeline.config.base import (
    CHECK_IMAGES,
    DEFAULT_IMG_SIZE,
    EXACT_PIL,
    INTERPOLATION,
    OWN_SIDE,
    RECIPE,
    TEACHER,
    TEACHER_SIDE,
    CheckImages,
    ExtraDataConfig,
    Interpolation,
)
from pipeline.config.fields import (
    MAX_SEED,
    flag,
    frozen,
    in_data,
    in_img_size,
    in_labels,
    in_loss,
    in_run,
    in_views,
    require,
    split_teachers,
    teachers,
    without_effect,
)
from pipeline.config.meal import MealConfig
from pipeline.config.training import TrainConfig
from pipeline.config.views import ViewsConfig

_NEED = "one of --labels and --online is required"
# With few classes the discriminator wins at the student's rate, which costs accuracy (ADR 0038).
FEW_CLASSES, FEW_CLASSES_LR = 100, 1e-4


@frozen
class DistillConfig(MealConfig, ViewsConfig, ExtraDataConfig, TrainConfig):
    """Train a student on soft labels: from a label set, from teachers online, or both.

    The defaults are the paper's. --method meal trains as the method before MEAL V2.
    """

    example = "mealv2 distill --data-dir imagenet --labels labels --model resnet50.ram_in1k"

    labels: Location | None = in_labels(
        None,
        "Label set that `mealv2 precompute` wrote; a path or a URL.",
        shown="none; then --online",
        path="label set",
        need=_NEED,
    )
    online: bool = in_labels(
        False, "Use no label set: the --teacher models label new views at every step.", need=_NEED
    )
    teacher: tuple[str, ...] = teachers(
        (), f"With --online or --missing teach: {TEACHER}", shown="those of --labels"
    )
    missing: Literal["fail", "skip", "teach"] = in_labels(
        "fail", "Views without a stored label: stop, skip them, or label them with the teachers."
    )
    reuse_views: bool | None = in_views(
        None,
        "Cycle through the stored views; otherwise epoch e uses view e, stored or not.",
        shown="yes, unless --missing teach",
    )
    write_back: bool = in_labels(False, "With --missing teach: add new labels to the label set.")
    train_split: str | None = in_data(
        None, "With --online: split of --data-dir to train on.", shown="train", alias="split"
    )
    check_images: CheckImages = in_data("first", CHECK_IMAGES)
    img_size: int | None = in_img_size(
        None, "With --online: side of a view in pixels.", shown=str(DEFAULT_IMG_SIZE)
    )
    teacher_img_size: int | None = in_img_size(
        None, f"With --online: {TEACHER_SIDE[0].lower()}{TEACHER_SIDE[1:]}", shown=OWN_SIDE
    )
    view_seed: int | None = in_views(
        None, "With --online: seed of the views.", shown="0", low=0, high=MAX_SEED
    )
    exact_pil: bool | None = in_views(  # type: ignore[assignment]  # None: as the label set
        None, EXACT_PIL, shown="as the label set was made, else no"
    )
    interpolation: Interpolation | None = in_views(
        None, INTERPOLATION, shown="as the label set was made, else bilinear"
    )
    discriminator: Literal["paper", "official", "adversarial", "off"] | None = in_loss(
        None,
        "The paper's (one sigmoid), the official code's (two outputs, ReLU last), one with "
        "gradient reversal (two outputs with --method meal, else one), or none.",
        shown="paper; official with --method meal",
    )
    discriminator_lr: float | None = in_loss(
        None,
        "Learning rate of the discriminator, on the student's schedule.",
        shown=f"--lr, the paper's; below {FEW_CLASSES} classes at most {FEW_CLASSES_LR}",
        low=0,
    )
    discriminator_weight: float = in_loss(1.0, "Weight of the discriminator loss.", low=0)
    discriminator_input: Literal["logits", "log-probs", "probs"] | None = in_loss(
        None,
        "Form of the student's and the teachers' outputs that the discriminator sees.",
        shown="logits with --online or stored logits, else log-probs through the set's top-k",
    )
    cutmix_target: Literal["teachers", "mixed-labels"] | None = in_loss(
        None,
        "CutMix targets: the teachers label the mixed image (with --online), or the two labels "
        "are mixed by area.",
        shown="no CutMix; mixed-labels with --cutmix",
    )
    mixup_target: Literal["teachers", "mixed-labels"] | None = in_loss(
        None, "The same of mixup.", shown="mixed-labels"
    )
    label_temperature: float = in_loss(
        1.0, "Replace labels q by q^(1/T); above 1 they are softer. The paper uses 1.", above=0
    )
    student_temperature: float = in_loss(
        1.0, "Divide the student's logits by T in the similarity loss (FKD).", above=0
    )
    hard_label_weight: float = in_loss(
        0.0, "Weight w of the class ids: (1 - w) soft + w hard. The paper uses 0.", low=0, high=1
    )
    recipe: str | None = in_run(None, RECIPE, shown="none")
    dry_run: bool = in_run(False, "Estimate steps, time and memory from a sample; write nothing.")

    def __post_init__(self) -> None:
        if self.discriminator is None:  # known from here on: the run folder names it
            default = "official" if self.method == "meal" else "paper"
            object.__setattr__(self, "discriminator", default)
        super().__post_init__()
        if self.dry_run:
            without_effect(self, "with --dry-run", "resume", "auto_resume")
        self._check_labels()
        self._check_loss()
        if self.method == "meal":
            self._check_meal()

    def _check_labels(self) -> None:
        either = "give --labels DIR, or --online with --teacher; not both"
        require(self.online == (self.labels is None), either)
        if self.online:
            require(self.teacher, "--online needs --teacher")
            names = ("missing", "reuse_views", "write_back", "check_images")
            without_effect(self, "with --online", *names)
        else:
            names = ("train_split", "img_size", "teacher_img_size", "view_seed")
            without_effect(self, "with --labels", *names)
            of_set = "with --labels, whose views are those of the label set"
            without_effect(self, of_set, *self.recipe_fields)
        if not self.online and self.missing != "teach":
            without_effect(self, "without --online or --missing teach", "teacher", "write_back")
        if self.write_back:
            require(not is_url(self.labels), "--write-back needs a local label set, not a URL")
            require(
                self.check_images != "never",
                "--write-back with --check-images never could append labels of other pictures; "
                "leave out one of them",
            )

    def _check_loss(self) -> None:
        message = "--hard-label-weight needs class ids, which pictures of --extra-data do not have"
        require(not (self.extra_data and self.hard_label_weight), message)
        if self.discriminator == "off":
            names = ("discriminator_lr", "discriminator_weight", "discriminator_input")
            without_effect(self, "with --discriminator off", *names)
        if self.discriminator_lr is not None:
            self.check_lr("discriminator_lr", self.discriminator_lr)
        if self.hard_label_weight == 1:
            of_labels = ("label_temperature", "student_temperature")
            without_effect(self, "with --hard-label-weight 1", *of_labels)
        if self.cutmix == 0:
            without_effect(self, "with --cutmix 0", "cutmix_target")
        if not self.mixup:
            without_effect(self, "without --mixup", "mixup_target")
        for name in ("cutmix_target", "mixup_target"):
            require(
                self.online or getattr(self, name) != "teachers",
                f"{flag(name)} teachers needs --online, because stored labels are of unmixed "
                f"images; with a label set, use {flag(name)} mixed-labels",
            )

    def _check_meal(self) -> None:
        if not self.online:
            self._check_stored_meal()
        names = ("discriminator_weight", "discriminator_input", "hard_label_weight")
        temperatures = ("label_temperature", "student_temperature")
        without_effect(self, "with --method meal", *names, *temperatures)
        message = "--discriminator paper is MEAL V2's; MEAL has official, adversarial and off"
        require(self.discriminator != "paper", message)
        if self.discriminator == "off":
            without_effect(self, "with --discriminator off", "eta")
        if len(split_teachers(self.teacher)) == 1:
            without_effect(self, "with one --teacher", "teacher_selection")
        if self.out_layer != (-1,):
            without_effect(self, "with --out-layer of blocks", "torchcompile")

    def _check_stored_meal(self) -> None:
        """Check what the labels of each teacher, stored apart, can do."""
        message = "--method meal needs a local --labels, the --output of `--store per-teacher`"
        require(not is_url(self.labels), message)
        message = (
            f"--out-layer {','.join(map(str, self.out_layer))}: a label set has no features, only "
            "the teachers' outputs; use --out-layer -1, or --online with --teacher"
        )
        require(self.out_layer == (-1,), message)
        message = (
            "--teacher-mode train needs the teachers themselves: --online with --teacher; stored "
            "labels are those of eval mode"
        )
        require(self.teacher_mode == "eval", message)
        message = (
            "--missing teach: with --method meal no teacher adds to stored labels; use --missing "
            "skip, complete the sets with `mealv2 precompute`, or use --online with --teacher"
        )
        require(self.missing != "teach", message)

    @property
    def needs_stored_logits(self) -> bool:
        """Whether MEAL compares the logits of stored labels, not only their probabilities."""
        return self.discriminator != "off" or self.block_loss in ("l1", "l2")

    @property
    def discriminator_variant(self) -> Literal["paper", "official", "adversarial"]:
        """The discriminator; there is one."""
        assert self.discriminator is not None
        assert self.discriminator != "off"
        return self.discriminator

    def resolved(self, num_classes: int) -> Self:
        """Return the settings with the discriminator's default rate for this number of classes.

        Those of a resumed run stay: without a rate, it was made before the default had this rule.
        """
        is_given = self.discriminator_lr is not None or self.discriminator == "off"
        if is_given or self.resume is not None:
            return self
        return dataclasses.replace(
            self, discriminator_lr=self.default_discriminator_lr(num_classes)
        )

    def default_discriminator_lr(self, num_classes: int) -> float:
        """Return the discriminator's learning rate without --discriminator-lr."""
        if num_classes >= FEW_CLASSES:
            return self.lr
        return max(min(self.lr, FEW_CLASSES_LR), self.min_lr)

    @property
    def cutmix_alpha(self) -> float:
        """Alpha of CutMix, 0 without it; 1 with --cutmix-target alone."""
        return self.cutmix or (0.0 if self.cutmix_target is None else 1.0)

    @property
    def reuses_views(self) -> bool:
        """Whether training cycles through the stored views."""
        return self.missing != "teach" if self.reuse_views is None else self.reuse_views
