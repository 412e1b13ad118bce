"""A checksum of the labelled boxes: it detects a view that is cut from another box."""

from hashlib import sha256

import numpy as np

from mealv2 import view_boxes
from mealv2.errors import LabelSetError
from mealv2.label_set.shard import Shard
from mealv2.label_set.shard_file import ShardFile
from mealv2.views import DrawnViews, Views

_DRAWN_AT_ONCE = 16_384  # views: their numbers fit a processor's cache


def boxes_sha256(boxes_NV5: np.ndarray) -> str:
    """Return the SHA-256 (hex) of boxes: uint32 top, left, height, width, flip, in row order."""
    return sha256(np.ascontiguousarray(boxes_NV5, dtype="<u4").tobytes()).hexdigest()


def boxes_of(shard: Shard, views: Views | None = None) -> str:
    """Return the SHA-256 of a shard's boxes, stored ones or those of ``views``."""
    stored = shard.stored_views
    if stored is not None:
        return boxes_sha256(np.concatenate([stored.boxes_NV4, stored.flips_NV[..., None]], axis=2))
    assert shard.images is not None, "the image sizes are missing"
    assert views is not None, "no boxes are stored and views is None"
    indices = range(shard.first_view, shard.first_view + shard.num_views)
    sizes_N2 = shard.images.sizes_N2
    if isinstance(views, DrawnViews) and views.recipe.crop != "center" and (sizes_N2 > 0).all():
        return boxes_sha256(_drawn_boxes(views, shard.keys, indices, sizes_N2))
    boxes = [
        views.view(key, index, width=width, height=height).box()
        for key, (width, height) in zip(shard.keys, sizes_N2.tolist(), strict=True)
        for index in indices
    ]
    return boxes_sha256(np.array(boxes, dtype=np.uint32))


def _drawn_boxes(views: Views, keys: list[str], indices: range, sizes_N2: np.ndarray) -> np.ndarray:
    """Return the boxes of all views of N images of these widths and heights, uint32."""
    num_views, parts = len(indices), [np.empty((0, 5), np.uint32)]
    step = max(1, _DRAWN_AT_ONCE // num_views)
    for start in range(0, len(keys), step):
        widths, heights = np.repeat(sizes_N2[start : start + step], num_views, axis=0).T
        of_views = [key for key in keys[start : start + step] for _ in indices]
        addresses = of_views, [*indices] * (len(of_views) // num_views)
        boxes_N5 = view_boxes.boxes_of(views, *addresses, widths, heights)
        parts.append(boxes_N5.astype(np.uint32))  # a negative number in two's complement
    return np.concatenate(parts)


def check_box_drift(file: ShardFile, views: Views) -> None:
    """Raise LabelSetError if ``views`` gives other boxes than the shard's labels have."""
    known = file.header["boxes_sha256"]
    if known is not None and boxes_of(file.shard(with_blocks=False), views) != known:
        raise LabelSetError(
            f"the views in {file.path} are not the labelled ones: this version of mealv2 computes "
            "other boxes; `mealv2 labels verify` checks the whole set"
        )
