"""Stage one from Python: label views of images with teachers, into a label set."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mealv2 import defaults
from mealv2.data.folder import is_flat
from mealv2.data.held_out import by_name
from mealv2.data.memory import ImageSequence, KeyedImage
from mealv2.data.open import open_source
from mealv2.data.own_source import ImageDataset, as_source
from mealv2.data.pixels import Resize
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, OnBadImage
from mealv2.label_set import LabelSet
from mealv2.labelling.annotator import Annotator, choose_encoding
from mealv2.labelling.label_set import make_label_set
from mealv2.labelling.plan import LabelSplit, make_plan, splits_of
from mealv2.labelling.shards import check_complete
from mealv2.labelling.store import Store
from mealv2.labelling.teachers import (
    FunctionTeacher,
    load_teacher,
    make_ensemble,
    teacher_size,
)
from mealv2.models.ensemble import TeacherEnsemble, unchanged
from mealv2.own_code import reason_of
from mealv2.runtime import LocalRuntime
from mealv2.storage.urls import located, shown
from mealv2.storage.weight_files import find_checkpoint
from mealv2.view_recipe import ViewRecipe
from mealv2.views import PAPER_RECIPE

Images = str | os.PathLike[str] | ImageSource | ImageDataset | Sequence[KeyedImage]
Teacher = str | nn.Module | Callable[[Tensor], Tensor]

MAX_SEED = (1 << 63) - 1  # as of --view-seed


@dataclass(frozen=True)
class _Settings:
    """The settings that determine views and shards."""

    num_views: int
    view_seed: int
    img_size: int
    resize: Resize
    view_recipe: ViewRecipe
    shard_size: int | None


def annotate(
    images: Images,
    teachers: Sequence[Teacher],
    output: str | os.PathLike[str],
    *,
    val_images: Images | None = None,
    train_split: str = "train",
    val_split: str | None = "val",
    classes: Sequence[str] | None = None,
    num_views: int = defaults.NUM_VIEWS,
    view_seed: int = 0,
    img_size: int = defaults.IMG_SIZE,
    teacher_img_size: int | None = None,
    resize: Resize = "torch",
    view_recipe: ViewRecipe = PAPER_RECIPE,
    rate: float | None = None,
    topk: int | Literal["all"] | None = None,
    label_dtype: Literal["float16", "float32"] | None = None,
    store_logits: bool = False,
    shard_size: int | None = None,
    batch_size: int = 256,
    workers: int = 2,
    device: str | torch.device | None = None,
    amp_dtype: torch.dtype | None = None,
    on_bad_image: OnBadImage = "fail",
) -> LabelSet:
    """Label views of images with teachers, as `mealv2 precompute` does; return the label set.

    ``images`` are a local data set as for ``--data-dir``, of which ``train_split`` and, unless it
    is None, ``val_split`` are labelled, or with ``classes`` and without ``val_split`` a folder of
    pictures without class folders; an ImageSource; a map-style Dataset of (PIL image or encoded
    bytes, class id) with ``classes``; or a sequence of (key, encoded image, class name or id of
    ``classes``). ``val_images``, of the same kinds, are labelled once, at the centre crop.
    ``classes`` are those of the label set in their order; the data's are found by name. A teacher
    is ``NAME`` or ``NAME=CHECKPOINT`` as for ``--teacher``, a Classifier, or any module or function
    from images, uint8 B x 3 x S x S on the device, to logits B x C: it normalises them. A
    checkpoint sees views of its own size, with ``teacher_img_size`` all see that. The plan has a
    module's class and weights' hash, of a function the name. A module is given back as it was.

    The other settings are the flags of `mealv2 precompute` with the same defaults, and equal ones
    give equal files. A folder ``output`` that is incomplete is completed; one of another plan is an
    error. ``device`` None is a GPU if there is one. Messages go to the logger ``mealv2``. Raises
    MealError and OSError.
    """
    _check_bounds(num_views=num_views, batch_size=batch_size, img_size=img_size)
    _check_bounds(0, MAX_SEED, view_seed=view_seed, workers=workers)
    sources = _sources(images, val_images, (train_split, val_split), classes)
    names = sources["train"].classes
    runtime = _runtime(device, amp_dtype)
    encoding = choose_encoding(
        len(names), rate=rate, topk=topk, label_dtype=label_dtype, store_logits=store_logits
    )
    with unchanged(teacher for teacher in teachers if isinstance(teacher, nn.Module)):
        ensemble, described = _ensemble(teachers, names, runtime, img_size, teacher_img_size)
        annotator = Annotator(ensemble, runtime, encoding, batch_size, on_bad_image)
        settings = _Settings(num_views, view_seed, img_size, resize, view_recipe, shard_size)
        plan, store = make_plan(settings, sources, annotator, described), Store(Path(output))
        store.claim(plan)
        _label(splits_of(settings, sources, plan), plan, annotator, store, workers)
    return LabelSet.open(store.folder)


def _label(
    splits: list[LabelSplit],
    plan: dict[str, object],
    annotator: Annotator,
    store: Store,
    workers: int,
) -> None:
    """Make the shards of a label set that are missing, and check all of them."""
    skips = annotator.on_bad_image == "skip"
    check = partial(check_complete, store=store, workers=workers, skip_unreadable=skips)
    make_label_set(splits, plan, annotator, store, workers=workers, check_complete=check)


def _runtime(device: str | torch.device | None, amp_dtype: torch.dtype | None) -> LocalRuntime:
    """Return the runtime of a device; raises ConfigError for one that torch cannot use."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(chosen)
        torch.empty(1, device=found).cpu()
    # torch has a kind for each cause: its AssertionError is for a build without CUDA
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"device {chosen!s}: {reason_of(error)}") from None
    return LocalRuntime(found, amp_dtype)


def _check_bounds(low: int = 1, high: int | None = None, /, **settings: int) -> None:
    """Raise ConfigError for a setting outside its bounds."""
    for name, value in settings.items():
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name} {value}: must be {bounds}")


def _sources(
    images: Images,
    val_images: Images | None,
    splits: tuple[str, str | None],
    classes: Sequence[str] | None,
) -> dict[str, ImageSource]:
    """Return the images to label by split, validation first."""
    if val_images is None and splits[1] is not None and isinstance(images, str | os.PathLike):
        val_images = images
    train = _source(images, splits[0], classes)
    if val_images is None:
        return {"train": train}
    in_memory = isinstance(val_images, Sequence) and not isinstance(val_images, str)
    val_classes = train.classes if in_memory else classes
    val = _source(val_images, splits[1] or "val", val_classes)
    if list(val.classes) != list(train.classes):
        raise ConfigError(
            "the validation images have other classes than the training images; give images of "
            "the same classes, or val_split=None"
        )
    return {"val": val, "train": train}


def _source(images: Images, split: str, classes: Sequence[str] | None) -> ImageSource:
    if isinstance(images, str | os.PathLike):
        source = _opened(images, split, classes)
    elif isinstance(images, Sequence):
        keyed = cast(Sequence[KeyedImage], images)  # a str is a sequence too, but was a path
        return ImageSequence(keyed, split=split, classes=classes)
    else:
        source = as_source(images, f"{type(images).__name__} ({split})", split=split)
    return source if classes is None else _with_classes(source, classes)


def _opened(
    images: str | os.PathLike[str], split: str, classes: Sequence[str] | None
) -> ImageSource:
    """Open a split of a local data set; ``classes`` are those of pictures without classes."""
    location = located(images if isinstance(images, str) else Path(images))
    if isinstance(location, str):
        raise ConfigError(
            f"annotate takes local images, not {shown(location)}; label them with "
            "`mealv2 precompute`, or copy them to this machine"
        )
    if is_flat(location) and (classes is None or split != "train"):
        raise ConfigError(
            f"{location} has pictures without class folders; give the teachers' class names as "
            "classes=, and val_split=None"
        )
    return open_source(location, split, names=None if classes is None else lambda: classes)


def _with_classes(source: ImageSource, classes: Sequence[str]) -> ImageSource:
    """Return a source with the class ids of its class names among ``classes``."""
    mapped = by_name(source, classes)
    if mapped is None:
        unknown = ", ".join(sorted(set(source.classes) - set(classes))[:4])
        raise ConfigError(
            f"{source.name} has classes that classes= does not list: {unknown}; add their names"
        )
    return mapped


def _ensemble(
    teachers: Sequence[Teacher],
    classes: Sequence[str],
    runtime: LocalRuntime,
    img_size: int,
    given_size: int | None,
) -> tuple[TeacherEnsemble, list[dict[str, object]]]:
    """Return the ensemble on its device, and the description of each teacher in the plan."""
    if not teachers:
        raise ConfigError("teachers is empty; give at least one teacher")
    loaded = [_teacher(teacher, classes, img_size, given_size) for teacher in teachers]
    models, sizes = [model for model, _ in loaded], [size for _, size in loaded]
    ensemble, described = make_ensemble(models, sizes, img_size=img_size)
    ensemble = runtime.to_device(ensemble)
    _check_logits(ensemble, runtime.device, described, img_size=img_size, num_classes=len(classes))
    return ensemble, described


def _teacher(
    teacher: Teacher, classes: Sequence[str], img_size: int, given_size: int | None
) -> tuple[nn.Module, int]:
    """Return a teacher, and the size at which it sees views of ``img_size``."""
    if isinstance(teacher, str):
        name, _, path = teacher.partition("=")
        checkpoint = find_checkpoint(Path(path)) if path else None
        size = teacher_size(name, checkpoint, img_size, given_size)
        return load_teacher(name, checkpoint, classes=classes, img_size=size), size
    module = teacher if isinstance(teacher, nn.Module) else FunctionTeacher(teacher)
    return module, given_size or img_size


def _check_logits(
    ensemble: TeacherEnsemble,
    device: torch.device,
    described: Sequence[dict[str, object]],
    *,
    img_size: int,
    num_classes: int,
) -> None:
    """Raise ConfigError for a teacher that does not give B x C logits."""
    for call, teacher in zip(ensemble.calls, described, strict=True):
        size = cast(int, teacher.get("img_size", img_size))
        images_BCHW = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
        with torch.inference_mode():
            logits = call(images_BCHW)
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(
                f"teacher {teacher['model']} gives {found} for 2 images; the data has "
                f"{num_classes} classes, so logits of (2, {num_classes}) are needed"
            )
