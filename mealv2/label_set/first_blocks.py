"""Blocks of added views that use the models of the first blocks of their images."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mealv2.codec import EncodedLabels
from mealv2.errors import LabelSetError
from mealv2.label_set.blocks import BlockFormat, FirstLabels
from mealv2.label_set.manifest import shard_name
from mealv2.label_set.shard import Shard
from mealv2.label_set.shard_file import ShardFile, damaged_rows
from mealv2.label_set.shard_head import read_head


def bound_to_first(shard: Shard, encoding: BlockFormat, head_sha256: str) -> Shard:
    """Return a shard of added views that names the shard whose models its blocks use, if any do.

    ``head_sha256`` is that of the first views of the same images: other bytes there, even those of
    a set made again on another machine, would give other labels.
    """
    is_bound = False
    if encoding.shares_models and shard.blocks:
        sizes = shard.num_views, encoding.num_classes
        is_bound = bool(EncodedLabels.of_blocks(shard.blocks, *sizes).uses_others().any())
    return replace(shard, first_sha256=head_sha256 if is_bound else None)


def check_bound(file: ShardFile) -> None:
    """Raise LabelSetError if the shard whose models a shard uses is not in its folder any more."""
    if (expected := file.header.get("first_sha256")) is not None:
        path = _path_of_first(file)
        try:
            found = read_head(path, with_index=False).sha256
        except OSError as error:
            raise LabelSetError(
                f"shard {file.path} uses the models of {path}, which cannot be read: "
                f"{error.strerror}"
            ) from None
        if found != expected:
            raise LabelSetError(f"shard {file.path} was made for other first views than {path} has")


def _path_of_first(file: ShardFile) -> Path:
    split, number = file.header["role"], file.header["number"]
    if not split.isidentifier():  # it becomes a part of a path
        raise LabelSetError(f"shard {file.path} is damaged: its split is not valid")
    return file.path.with_name(shard_name(split, number))


def first_labels_of(file: ShardFile, encoding: BlockFormat) -> FirstLabels | None:
    """Return what reads the first blocks of the images of a shard; None if it uses none.

    Raises, now or then, LabelSetError if they are missing, damaged or not those it was made for.
    """
    if "first_sha256" not in file.header:
        return None
    check_bound(file)

    def read(blocks_N: np.ndarray) -> EncodedLabels:
        keys = file.packed_keys()
        wanted = [keys[block] for block in blocks_N.tolist()]
        found = dict.fromkeys(wanted, b"")
        first = ShardFile(_path_of_first(file))
        for key, block, is_intact in first.blocks():
            if key in found:
                if not is_intact:
                    raise damaged_rows(first, key.decode())
                found[key] = bytes(block)
        if missing := [key.decode() for key, block in found.items() if not block]:
            raise LabelSetError(f"{first.path} has no labels of {missing[0]!r}")
        blocks = [found[key] for key in wanted]
        ends_N = np.cumsum([len(block) for block in blocks])
        data = np.frombuffer(b"".join(blocks), np.uint8)
        return first_views_of(data, ends_N, first.num_views, encoding.num_classes)

    return read


def first_views_of(
    data: np.ndarray, ends_N: np.ndarray, num_views: int, num_classes: int
) -> EncodedLabels:
    """Return the first view of each of N blocks, not decoded: a row by which to name the block."""
    return EncodedLabels.of_data(data, ends_N, num_views, num_classes)[::num_views]
