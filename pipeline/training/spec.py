"""What a run trains and on what: the parts that a command puts together for the one loop."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import nn

from mealv2.cutmix import Blend, Mix, MixTarget, draw_mix
from mealv2.data.content_hash import ImageCheck
from mealv2.data.image_cache import ImageCache
from mealv2.data.loader import read_views
from mealv2.data.pixels import Resize
from mealv2.data.requests import Batch, BatchRequest
from mealv2.data.source import ImageSource, fingerprint
from mealv2.data.subset import Subset
from mealv2.data.view_reader import ViewReader
from mealv2.models import Classifier, Preprocessing, create_classifier
from mealv2.targets import Targets
from mealv2.task import Task
from mealv2.views import Views
from pipeline import console
from pipeline.config import TrainConfig
from pipeline.training.evaluator import Validation


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed: alphas of mixup and CutMix, 0 for none, and who labels a mixture.

    From ``off_epoch`` on they are not, unless it is 0.
    """

    mixup: float
    cutmix: float
    probability: float = 1.0
    switch_probability: float = 0.5
    off_epoch: int = 0
    mixup_target: MixTarget = "mixed-labels"
    cutmix_target: MixTarget = "mixed-labels"

    def draw(self, batch_size: int, img_size: int, *, seed: tuple[int, ...]) -> Mix | Blend | None:
        """Draw how to mix a batch; ``seed`` is (seed, epoch, step, ...)."""
        if self.off_epoch and seed[1] >= self.off_epoch:
            return None
        return draw_mix(
            batch_size,
            img_size,
            cutmix=self.cutmix,
            mixup=self.mixup,
            probability=self.probability,
            switch_probability=self.switch_probability,
            seed=seed,
        )

    def target(self, mix: Mix | Blend) -> MixTarget:
        """Return who labels the images of a mix."""
        return self.mixup_target if isinstance(mix, Blend) else self.cutmix_target


class BatchSource(Protocol):
    """Makes batches that are not views of a ViewReader."""

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batch of each request, in order."""


@dataclass(frozen=True)
class TrainingSpec:
    """What a run trains and on what: everything the loop does not decide itself.

    An epoch uses the images of ``source`` at ``positions``, each with the view that ``targets``
    names, cut as ``views`` say and resized by ``resize``. ``extra`` are modules beside the student
    that are trained too, each with its initial learning rate. ``teachers`` are accuracies to print
    before the first step, ``teacher_forwards`` the views that teachers saw to measure them,
    ``notes`` lines to print there, ``labels`` what the run folder keeps of the labels it is made
    from, ``check`` what compares the images with the labelled ones. A ``batch_source`` makes the
    batches in place of the views: features of a frozen backbone, whole images. ``metric`` chooses
    the best epoch; ``validates_start``: the initial weights are validated too.
    """

    command: str
    task: Task
    student: Classifier
    source: ImageSource
    positions: list[int]
    targets: Targets
    img_size: int
    views: Views | None
    resize: Resize
    evaluator: Validation | None
    extra: dict[str, tuple[nn.Module, float]] = field(default_factory=dict)
    mixing: Mixing | None = None
    teachers: dict[str, dict[str, float]] = field(default_factory=dict)
    teacher_forwards: int = 0
    notes: tuple[str, ...] = ()
    labels: dict[str, Any] | None = None
    check: ImageCheck | None = None
    batch_source: BatchSource | None = None
    metric: str = "top1"
    validates_start: bool = True

    @cached_property
    def data_sha256(self) -> str:
        """The fingerprint of the images; seconds for a million of them."""
        return fingerprint(self.source)

    @property
    def held_out_flags(self) -> Sequence[str]:
        """The flags that hold out the validation images; none if they are a split of their own."""
        val = self.evaluator.source if self.evaluator is not None else None
        return val.flags if isinstance(val, Subset) else ()

    def reader(self, cache: ImageCache | None) -> ViewReader:
        """Return what reads the views of the images, decoded ones from ``cache``."""
        return ViewReader(
            self.source,
            img_size=self.img_size,
            views=self.views,
            resize=self.resize,
            check=self.check,
            other_sizes=self.targets.other_sizes,
            cache=cache,
        )

    def load(
        self,
        requests: Iterable[BatchRequest],
        *,
        cache: ImageCache | None,
        workers: int,
        pin_memory: bool,
    ) -> Iterable[Batch]:
        """Return the batch of each request, in order, read ahead by threads."""
        if self.batch_source is not None:
            return self.batch_source.batches(requests)
        return read_views(self.reader(cache), requests, workers=workers, pin_memory=pin_memory)


def mixing_of(
    config: TrainConfig,
    *,
    mixup_target: MixTarget | None = None,
    cutmix_target: MixTarget | None = None,
) -> Mixing | None:
    """Return how the batches of a run are mixed; None for a run without mixup and CutMix."""
    if not config.mixes:
        return None
    return Mixing(
        **config.mixing,
        mixup_target=mixup_target or "mixed-labels",
        cutmix_target=cutmix_target or "mixed-labels",
    )


def create_student(config: TrainConfig, *, classes: list[str], img_size: int) -> Classifier:
    """Build the student from timm's weights, a checkpoint, or at random."""
    student = build_student(
        config,
        config.model,
        classes=classes,
        img_size=img_size,
        preprocessing=Preprocessing(config.mean, config.std)
        if config.mean and config.std
        else None,
        model_args=config.model_args,
        pretrained=config.from_pretrained,
        checkpoint=config.initial_checkpoint,
        new_head=True,
    )
    for note in student.notes:
        console.info(note)
    return student


def build_student(
    config: TrainConfig, name: str, *, classes: list[str], img_size: int, **start: Any
) -> Classifier:
    """Build a model with the rates of the settings; ``start`` is the rest of create_classifier."""
    rates: dict[str, Any] = {"drop_rate": config.drop, "drop_path_rate": config.drop_path}
    return create_classifier(
        name,
        num_classes=len(classes),
        img_size=img_size,
        classes=classes,
        **start,
        **{name: rate for name, rate in rates.items() if rate is not None},
    )
