"""A checksum of the labelled boxes: it detects a view that is cut from another box."""

from hashlib import sha256

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.label_set.shard import Shard
from mealv2.label_set.shard_file import ShardFile
from mealv2.views import Views


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
    boxes = [
        views.view(key, index, width=width, height=height).box()
        for key, (width, height) in zip(shard.keys, shard.images.sizes_N2.tolist(), strict=True)
        for index in indices
    ]
    return boxes_sha256(np.array(boxes, dtype=np.uint32))


def check_box_drift(file: ShardFile, views: Views) -> None:
    """Raise LabelSetError if ``views`` gives other boxes than the shard's labels have."""
    known = file.header["boxes_sha256"]
    if known is not None and boxes_of(file.shard(with_blocks=False), views) != known:
        raise LabelSetError(
            f"the views in {file.path} are not the labelled ones: this version of mealv2 computes "
            "other boxes; `mealv2 labels verify` checks the whole set"
        )
