"""Read a label set for an export: shard by shard, its labels and the boxes of its views."""

from collections.abc import Iterator

import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.label_set import LabelSet, Rows, ShardFile
from mealv2.soft_labels import EncodedLabels
from mealv2.views import BOX_UNIT, DrawnViews, fractions
from pipeline import console
from pipeline.label_sets.writing import all_rows, averaged


def shards(labels: LabelSet) -> Iterator[tuple[int, ShardFile]]:
    """Yield the shards of the first block of views with their numbers, with a progress bar."""
    _, files = labels.blocks[0]
    return console.progress(enumerate(files), total=len(files), what="exporting", unit="shards")


def rows_of(labels: LabelSet, number: int) -> Rows:
    """Return the labels of all views of the images of a shard, image by image."""
    parts, addresses, first_row = [], [], 0
    keys = labels.blocks[0][1][number].keys()
    for views, files in labels.blocks:
        file = files[number]
        row_of = {key: row for row, key in enumerate(file.keys())}
        if missing := [key for key in keys if key not in row_of]:
            labels.rows(missing[:1], [views.start])  # raises the error that explains it
        images_N1 = np.array([row_of[key] for key in keys], dtype=np.int64)[:, None]
        addresses.append(first_row + images_N1 * len(views) + np.arange(len(views)))
        parts.append(all_rows(file, labels.encoding))
        first_row += len(parts[-1].labels)
    order_N = torch.from_numpy(np.concatenate(addresses, axis=1).reshape(-1))
    return parts[0] if len(parts) == 1 else Rows.concat(parts).rows(order_N)


def blocks_of(labels: LabelSet, number: int) -> list[bytes]:
    """Return a block of all views of each image; views added later are encoded with the others."""
    rows, encoding, num_views = rows_of(labels, number), labels.encoding, labels.num_views
    is_added = len(labels.blocks) > 1
    if is_added and isinstance(rows.labels, EncodedLabels) and rows.labels.shares_models:
        rows = averaged([rows], [1], encoding, num_views)
    return encoding.blocks(rows, num_views)


def has_plain_boxes(labels: LabelSet) -> bool:
    """Return whether each view is a box inside its image and a left-right flip."""
    views = labels.views()
    return not isinstance(views, DrawnViews) or views.recipe.has_plain_boxes


def boxes_of(
    labels: LabelSet, file: ShardFile, views: range | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes N x V x 4 as fractions of the image, float64, and flips N x V, bool.

    ``views``, by default all, are those of the set.
    """
    images, views = file.images, range(labels.num_views) if views is None else views
    if (stored := file.stored_views) is not None:
        some = slice(views.start, views.stop)
        boxes_NV4 = stored.boxes_NV4[:, some].astype(np.int64)
        # rounded up, a half and a half are more than the image
        sizes = np.minimum(boxes_NV4[..., 2:], BOX_UNIT - boxes_NV4[..., :2])
        parts = np.concatenate([boxes_NV4[..., :2], sizes], axis=-1)
        return parts / BOX_UNIT, stored.flips_NV[:, some].astype(bool)
    if images is None:
        raise LabelSetError(f"{file.path} has no image sizes; its boxes cannot be computed")
    recipe = labels.views()
    if not has_plain_boxes(labels):
        raise LabelSetError(
            f"{labels.folder} has views that are more than a box and a left-right flip "
            f"({labels.manifest['plan']['roles']['train']['views']['name']}), which the files of "
            "FKD and SRe2L cannot describe; use --to parquet or --to webdataset"
        )
    boxes, flips = [], []
    for key, (width, height) in zip(file.keys(), images.sizes_N2.tolist(), strict=True):
        for index in views:
            view = recipe.view(key, index, width=width, height=height)
            boxes.append(fractions(view, width=width, height=height))
            flips.append(view.flip)
    shape = (file.num_images, len(views))
    return np.array(boxes).reshape(*shape, 4), np.array(flips, dtype=bool).reshape(shape)
