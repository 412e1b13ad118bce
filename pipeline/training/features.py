"""Features of a frozen backbone: computed once, then batches come from a table in memory."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mealv2.batches import split_evenly
from mealv2.data.loader import on_device, read_views
from mealv2.data.requests import Batch, BatchRequest, check_failures, num_views_of
from mealv2.data.view_reader import ViewReader
from mealv2.errors import DataError, OnBadImage
from mealv2.models.frozen import FrozenClassifier
from pipeline import console
from pipeline.runtime.device import Runtime

_BYTES = 4  # of a feature, float32
_REDUCED = 1 << 20  # features that ranks exchange at a time


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """The features of some views of the images of a source, float32 N x V x D.

    ``views`` are the view numbers by column. ``failed`` are images that could not be read.
    """

    features_NVD: np.ndarray
    views: Sequence[int]
    failed: dict[int, str] = field(default_factory=dict)

    def batches(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Yield the batch of each request: its images are features, B x D."""
        column_of = {view: column for column, view in enumerate(self.views)}
        for request in requests:
            rows = [(p, v) for p, views in request for v in views if p not in self.failed]
            positions, views = [p for p, _ in rows], [v for _, v in rows]
            columns = [column_of[view] for view in views]
            yield Batch(
                torch.from_numpy(self.features_NVD[positions, columns]),
                np.zeros((len(rows), 2), dtype=np.uint32),
                np.zeros((len(rows), 5), dtype=np.uint32),
                positions,
                views,
                {p: self.failed[p] for p, _ in request if p in self.failed},
            )


def num_bytes(num_images: int, num_views: int, num_features: int) -> int:
    """Return the memory of a table."""
    return _BYTES * num_images * num_views * num_features


def compute_features(
    model: FrozenClassifier,
    reader: ViewReader,
    runtime: Runtime,
    *,
    views: Sequence[int],
    batch_size: int,
    workers: int,
    on_bad_image: OnBadImage,
) -> FeatureTable:
    """Run the backbone once on some views of every image; each rank on its part of the images.

    Raises DataError for an image that cannot be read, unless bad images are skipped, and for
    features that are not finite.
    """
    source, ranks = reader.source, runtime.ranks
    local = split_evenly([1] * len(source), ranks.size)[ranks.rank]
    num_images = max(1, math.ceil(batch_size / len(views)))
    requests: list[BatchRequest] = [
        [(position, tuple(views)) for position in local[start : start + num_images]]
        for start in range(0, len(local), num_images)
    ]
    shape = (len(source), len(views), model.head.in_features)
    table = FeatureTable(np.zeros(shape, dtype=np.float32), views)
    column_of = {view: column for column, view in enumerate(views)}
    model.eval()
    shown = console.progress(
        read_views(reader, requests, workers=workers, pin_memory=runtime.should_pin_memory),
        total=sum(map(num_views_of, requests)),
        what=f"features of {source.split}",
        unit="views",
        size=lambda batch: len(batch.positions) + len(batch.failed) * len(views),
    )
    for batch in on_device(shown, runtime.device):
        check_failures(source, batch.failed, on_bad_image)
        table.failed.update(batch.failed)
        if not batch.positions:
            continue
        with runtime.autocast():
            features_BD = model.features(batch.images_BCHW).float().cpu()
        if not bool(torch.isfinite(features_BD).all()):
            raise DataError(f"the features of {source.name} are not finite; leave out --amp")
        columns = [column_of[view] for view in batch.views]
        table.features_NVD[batch.positions, columns] = features_BD.numpy()
    _exchange(table, runtime)
    return table


def _exchange(table: FeatureTable, runtime: Runtime) -> None:
    """Give all ranks the rows of all: a row is zero on every rank but one."""
    ranks = runtime.ranks
    if not ranks.is_distributed:
        return
    flat = table.features_NVD.reshape(-1)
    for start in range(0, len(flat), _REDUCED):
        part = torch.from_numpy(flat[start : start + _REDUCED])
        part.copy_(ranks.all_reduce(part))
    for text in ranks.all_gather_text(json.dumps(list(table.failed.items()))):
        table.failed.update({int(position): reason for position, reason in json.loads(text)})
