"""Answers appended to a finished label set: files of single rows beside its shards.

Each file is named after its own bytes and published whole, so any number of jobs may append at
once; the manifest is never touched. A reader takes every such file that is there.
"""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.files import write_whole
from mealv2.label_set.encoding import Rows
from mealv2.label_set.reader import LabelSet
from mealv2.label_set.shard import APPENDED_PREFIX, Shard, shard_bytes


class Appender:
    """Collects rows (key, view, label) that a label set lacks and appends them to its folder."""

    def __init__(self, label_set: LabelSet) -> None:
        self._label_set = label_set
        self._places: set[tuple[str, int]] = set()  # also of what is written: no row twice
        self._waiting: list[tuple[list[tuple[str, int]], Rows]] = []

    def add(self, keys: Sequence[str], views: Sequence[int], rows: Rows) -> None:
        """Keep rows for the next flush; ``rows`` on the CPU, in the set's own encoding."""
        new = {
            place: row
            for row, place in enumerate(zip(keys, views, strict=True))
            if place not in self._places
        }
        if new:
            self._places.update(new)
            self._waiting.append((list(new), rows.rows(torch.tensor(list(new.values())))))

    def flush(self) -> Path | None:
        """Write the rows kept as one file; return its path, None without rows. Raises OSError."""
        if not self._waiting:
            return None
        unsorted = [place for places, _ in self._waiting for place in places]
        order = sorted(range(len(unsorted)), key=unsorted.__getitem__)
        places = [unsorted[row] for row in order]
        rows = Rows.joined([rows for _, rows in self._waiting]).rows(torch.tensor(order))
        shard = Shard(
            plan_sha256=self._label_set.manifest["plan_sha256"],
            role=self._label_set.role,
            number=0,
            first_view=0,
            num_views=1,
            keys=[key for key, _ in places],
            blocks=self._label_set.encoding.blocks(rows, 1),
            views_N=np.array([view for _, view in places], dtype="<u8"),
        )
        try:
            path = write_rows(self._label_set.folder, shard)
        except PermissionError:
            raise LabelSetError(
                f"cannot append to {self._label_set.folder}: no permission; leave out --write-back"
            ) from None
        self._waiting.clear()
        return path


def write_rows(folder: Path, shard: Shard) -> Path:
    """Write a shard of rows under the name that its bytes give it; return its path."""
    data = shard_bytes(shard)
    path = folder / f"{shard.role}-{APPENDED_PREFIX}{sha256(data).hexdigest()[:16]}.h5"
    write_whole(path, data, replace=False)
    return path
