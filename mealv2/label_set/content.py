"""The content hashes of the images that a label set labels, by the position in a source."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mealv2.data.content_hash import ALGORITHM, KnownHashes, combined_sha256, content_line
from mealv2.label_set.opening import concatenated
from mealv2.label_set.reader import LabelSet
from mealv2.label_set.shard_file import ShardFile, skipped_hashes


def labelled_hashes(labels: LabelSet, keys: Sequence[str]) -> KnownHashes:
    """Return the content hash of each image of ``keys`` when it was labelled.

    Unknown for an image that is neither in the set nor in its appended rows, whose bytes could not
    be read then, or of an imported set.
    """
    _, files = labels.blocks[0]
    of_row_R = concatenated([_column(file) for file in files], "<u8")
    has_hash = [file.has_column("content_hashes") for file in files]
    is_known_R = np.repeat(np.array(has_hash, bool), [file.num_images for file in files])
    rows_N = labels.image_rows(keys)
    found = KnownHashes.none(len(keys))
    found.is_known_N[:] = rows_N >= 0
    rows_N = rows_N[found.is_known_N]
    found.hashes_N[found.is_known_N] = of_row_R[rows_N]
    found.is_known_N[found.is_known_N] = is_known_R[rows_N]
    others: dict[str, int] = {}
    for file in labels.appended_files:
        others = file.content_hashes() | others
    for file in files:
        others |= skipped_hashes(file)
    for position, key in enumerate(keys) if others else ():  # few sets have any
        if key in others and not found.is_known_N[position]:
            found.set(position, others[key])
    for file in files:
        file.unmap()
    return found


def content_of(hashes: Mapping[str, int]) -> dict[str, Any] | None:
    """Return ``content`` in a manifest, from the content hashes by key; None without any."""
    if not hashes:
        return None
    lines = itertools.starmap(content_line, hashes.items())
    return {
        "algorithm": ALGORITHM,
        "images": len(hashes),
        "sha256": combined_sha256(lines),
    }


def shard_hashes(
    files: Iterable[tuple[ShardFile, Sequence[int]]], keys: Sequence[str]
) -> KnownHashes:
    """Return the content hashes in shards, each with the positions of its images in ``keys``."""
    found = KnownHashes.none(len(keys))
    for file, positions in files:
        of_key = file.content_hashes()
        for position in positions:
            if (value := of_key.get(keys[position])) is not None:
                found.set(position, value)
    return found


def _column(file: ShardFile) -> np.ndarray:
    if file.has_column("content_hashes"):
        return file.column("content_hashes")
    return np.zeros(file.num_images, "<u8")
