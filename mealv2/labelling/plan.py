"""The plan of a label set: the views, images, teachers and shards that determine its labels."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from mealv2 import defaults, label_set
from mealv2.data.extra import WithExtra
from mealv2.data.held_out import HeldOut
from mealv2.data.pixels import Resize, interpolation, operations_sha256, probe_sha256
from mealv2.data.requests import CENTRE, BatchRequest
from mealv2.data.source import ImageSource, fingerprint
from mealv2.data.view_reader import ViewReader
from mealv2.errors import ConfigError
from mealv2.label_set import PlannedShard
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.teachers import sizes_in
from mealv2.storage.json_format import json_sha256
from mealv2.view_recipe import RESIZE_OVER_CROP, ViewRecipe
from mealv2.views import DrawnViews


class LabellingSettings(Protocol):
    """The settings that determine the views and the shards; a PrecomputeConfig has them.

    ``shard_size`` None is ``defaults.SHARD_SIZE``, or with tar shards a shard for each tar file.
    """

    @property
    def num_views(self) -> int: ...

    @property
    def view_seed(self) -> int: ...

    @property
    def view_recipe(self) -> ViewRecipe: ...

    @property
    def img_size(self) -> int: ...

    @property
    def resize(self) -> Resize: ...

    @property
    def shard_size(self) -> int | None: ...


@dataclass(frozen=True)
class LabelSplit:
    """The views of a split to label: random views of ``train``, the centre crop of ``val``.

    ``shards`` has the positions of the images of each shard in the source of ``reader``.
    """

    name: str
    reader: ViewReader
    views: tuple[int, ...]
    shards: Sequence[Sequence[int]]
    plan_sha256: str

    @property
    def source(self) -> ImageSource:
        """The images of the split."""
        return self.reader.source

    @cached_property
    def planned(self) -> list[PlannedShard]:
        """The descriptions of the shards; a centre crop is view 0 of its image."""
        first = self.views[0] if self.name == "train" else 0
        views = range(first, first + len(self.views))
        return [PlannedShard(self.name, n, views, images) for n, images in enumerate(self.shards)]


def make_plan(
    settings: LabellingSettings,
    sources: dict[str, ImageSource],
    annotator: Annotator,
    described: list[dict[str, Any]],
    *,
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Return everything that determines the labels, as JSON: equal plans give equal labels.

    ``described`` are the teachers, from ``make_ensemble``; ``held_out`` are the validation images
    that were taken from the training images. Raises ConfigError as plan_shards.
    """
    views = {
        "train": DrawnViews(settings.view_seed, settings.view_recipe).entry(),
        "val": {"name": "centre-crop", "resize_over_crop": list(RESIZE_OVER_CROP)},
    }
    shards = plan_shards(settings, sources)
    common = {} if held_out is None else {"held_out": held_out.as_json()}
    probes = {"probe_sha256": probe_sha256(settings.resize)}
    if settings.view_recipe.has_operations:
        probes["operations_sha256"] = operations_sha256()
    return {
        **shards,
        **probes,
        "format": label_set.FORMAT,
        "classes": list(sources["train"].classes),
        "teachers": described,
        "ensemble": "mean of softmax",
        "precision": annotator.runtime.precision,
        "img_size": settings.img_size,
        "interpolation": interpolation(settings.resize),
        "labels": annotator.encoding.plan(),
        "roles": {
            name: {
                **shards["roles"][name],
                "split": source.split,
                "data_sha256": fingerprint(source),
                "views": views[name],
                **common,
                **_extra_of(source),
            }
            for name, source in sources.items()
        },
    }


def _extra_of(source: ImageSource) -> dict[str, Any]:
    """Return the entry of the folders of unlabelled pictures of a split; empty without one."""
    if not isinstance(source, WithExtra):
        return {}
    named = source.folders.items()
    return {"extra": [{"name": name, "num_images": len(folder)} for name, folder in named]}


def plan_shards(settings: LabellingSettings, sources: dict[str, ImageSource]) -> dict[str, Any]:
    """Return the part of a plan that needs no teacher: images and shards.

    ``label_set.planned_shards`` reads it. Raises ConfigError if --shard-size has no effect.
    """
    plan: dict[str, Any] = {"format_version": label_set.FORMAT_VERSION, "roles": {}}
    for name, source in sources.items():
        num_views = settings.num_views if name == "train" else 1
        entry: dict[str, Any] = {"num_images": len(source), "num_views": num_views}
        plan["roles"][name] = entry
        if source.shard_starts is None:
            plan["shard_size"] = settings.shard_size or defaults.SHARD_SIZE
        else:  # a shard of labels for each tar file
            ends = [*source.shard_starts, len(source)]
            entry["shard_sizes"] = [b - a for a, b in itertools.pairwise(ends)]
    if settings.shard_size is not None and "shard_size" not in plan:
        raise ConfigError(
            "--shard-size has no effect on tar shards: each tar file gets its own label shard"
        )
    return plan


def splits_of(
    settings: LabellingSettings, sources: dict[str, ImageSource], plan: dict[str, Any]
) -> list[LabelSplit]:
    """Return the splits to label, validation first, with the shards of the plan."""
    views = {"val": (CENTRE,), "train": tuple(range(settings.num_views))}
    drawn = DrawnViews(settings.view_seed, settings.view_recipe)
    planned = label_set.planned_shards(plan)
    splits = []
    for name, source in sources.items():
        reader = ViewReader(
            source,
            img_size=settings.img_size,
            views=drawn,
            resize=settings.resize,
            keeps_hashes=True,
            other_sizes=sizes_in(plan),
        )
        shards = [s.images for s in planned if s.split == name and s.images is not None]
        splits.append(LabelSplit(name, reader, views[name], shards, json_sha256(plan)))
    return splits


def batch_requests(
    positions: Sequence[int], views: Sequence[int], batch_size: int
) -> list[BatchRequest]:
    """Return requests of ``batch_size`` views each, the last one fewer, image by image."""
    num_views = len(views)
    total = len(positions) * num_views
    requests = []
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)
        requests.append(
            [
                (positions[image], tuple(views[max(0, start - first) : stop - first]))
                for image in range(start // num_views, -(-stop // num_views))
                for first in (image * num_views,)
            ]
        )
    return requests
