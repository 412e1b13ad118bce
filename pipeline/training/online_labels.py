"""Labels of teachers that run in the loop; they label the validation split first."""

from collections.abc import Sequence
from typing import Any

import torch

from mealv2.data.loader import read_views
from mealv2.data.pixels import Resize
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import Encoding
from mealv2.labelling.annotator import Annotator
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.soft_labels import Labels
from mealv2.targets import OnlineTeachers
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.config import DEFAULT_IMG_SIZE, DistillConfig
from pipeline.labelling import teachers
from pipeline.loading.small_images import propose_crop
from pipeline.runtime.device import Runtime
from pipeline.training.evaluator import local_centre_requests
from pipeline.training.label_source import LabelSource

Teachers = tuple[TeacherEnsemble, list[dict[str, Any]]]  # and the description of each
_VAL_TOPK = 100  # classes kept in memory of each validation label


class CentreLabels:
    """The labels of a validation split's centre crops, in memory; a LabelTable."""

    def __init__(self, keys: Sequence[str], labels: Labels) -> None:
        self._rows = {key: row for row, key in enumerate(keys)}
        self._labels = labels

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the labels of images; there is one view of each."""
        return self._labels.rows(torch.tensor([self._rows[key] for key in keys]))


def from_online_teachers(
    config: DistillConfig, runtime: Runtime, source: ImageSource, val: ImageSource | None
) -> LabelSource:
    """Let the --teacher models label every step; they label the validation split first."""
    return label_online(config, runtime, source, val, build_teachers(config, runtime, source))


def build_teachers(config: DistillConfig, runtime: Runtime, source: ImageSource) -> Teachers:
    """Return the ensemble of --teacher, on its device, and the description of each teacher."""
    return teachers.build(
        config.teacher,
        classes=list(source.classes),
        img_size=config.img_size or DEFAULT_IMG_SIZE,
        teacher_img_size=config.teacher_img_size,
        runtime=runtime,
    )


def label_online(
    config: DistillConfig,
    runtime: Runtime,
    source: ImageSource,
    val: ImageSource | None,
    built: Teachers,
) -> LabelSource:
    """Return labels of built teachers, which label the validation split first."""
    img_size = config.img_size or DEFAULT_IMG_SIZE
    ensemble, described = built
    if config.resume is None:
        propose_crop(config, source, config.data_dir)
    val_labels, teacher_forwards = None, 0
    accuracies: dict[str, dict[str, float]] = {}
    if val is not None:
        val_labels, metrics = _label_validation(
            config, runtime, ensemble, val, img_size=img_size, resize=config.resize
        )
        teacher_forwards = len(val_labels)
        names = [*(f"teacher {teacher['model']}" for teacher in described), "ensemble"]
        accuracies = dict(zip(names, metrics, strict=True))
    return LabelSource(
        OnlineTeachers(ensemble, source.labels),
        list(range(len(source))),
        img_size,
        DrawnViews(config.view_seed or 0, config.view_recipe),
        config.resize,
        {"online": True, "teachers": described},
        val_labels,
        accuracies,
        teacher_forwards,
    )


def _label_validation(
    config: DistillConfig,
    runtime: Runtime,
    ensemble: TeacherEnsemble,
    val: ImageSource,
    *,
    img_size: int,
    resize: Resize,
) -> tuple[CentreLabels, list[dict[str, float]]]:
    """Label the validation split once; return the labels, and the accuracy of every teacher and of
    the ensemble. Each rank labels the images that it will evaluate.
    """
    num_classes, ranks = len(val.classes), runtime.ranks
    requests = local_centre_requests(val, config.batch_size, ranks)
    annotator = Annotator(
        ensemble,
        runtime,
        Encoding(num_classes, "float32", topk=min(num_classes, _VAL_TOPK)),
        batch_size=config.batch_size,
        on_bad_image=config.on_bad_image,
    )
    batches = console.progress(
        read_views(
            ViewReader(val, img_size=img_size, resize=resize, other_sizes=ensemble.other_sizes),
            requests,
            workers=config.workers,
            pin_memory=runtime.should_pin_memory,
        ),
        total=sum(map(len, requests)),
        what="teachers on the validation split",
        unit="images",
        size=lambda item: len(item.positions) + len(item.failed),
    )
    found = annotator.annotate(val, batches, num_views=1, count_correct=True)
    num_images = int(ranks.all_reduce(torch.tensor(len(found.positions))))
    percent = ranks.all_reduce(torch.from_numpy(found.correct)).numpy() * 100.0 / max(1, num_images)
    metrics = [{"top1": float(a), "top5": float(b)} for a, b in percent.T]
    return CentreLabels([val.keys[p] for p in found.positions], found.rows.labels), metrics
