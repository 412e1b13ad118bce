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
from mealv2.label_set.reader import LabelSet
from mealv2.label_set.shard import APPENDED_PREFIX, Shard, class_id_type, shard_bytes
from mealv2.soft_labels import SoftLabels


class Appender:
    """Collects rows (key, view, label) that a label set lacks and appends them to its folder."""

    def __init__(self, label_set: LabelSet) -> None:
        self._label_set = label_set
        self._places: set[tuple[str, int]] = set()  # also of what is written: no row twice
        self._waiting: list[tuple[list[tuple[str, int]], SoftLabels]] = []

    def add(self, keys: Sequence[str], views: Sequence[int], labels: SoftLabels) -> None:
        """Keep rows for the next flush; ``labels`` on the CPU, in the set's top-k and type."""
        new = {
            place: row
            for row, place in enumerate(zip(keys, views, strict=True))
            if place not in self._places
        }
        if new:
            self._places.update(new)
            self._waiting.append((list(new), labels.rows(torch.tensor(list(new.values())))))

    def flush(self) -> Path | None:
        """Write the rows kept as one file; return its path, None without rows. Raises OSError."""
        if not self._waiting:
            return None
        manifest = self._label_set.manifest
        unsorted = [place for places, _ in self._waiting for place in places]
        order = sorted(range(len(unsorted)), key=unsorted.__getitem__)
        places = [unsorted[row] for row in order]
        joined = SoftLabels.joined([labels for _, labels in self._waiting])
        labels = joined.rows(torch.tensor(order))
        plan = manifest["plan"]
        value = np.dtype(plan["label_dtype"]).newbyteorder("<")
        dense = plan["topk"] == self._label_set.num_classes
        data = shard_bytes(
            Shard(
                plan_sha256=manifest["plan_sha256"],
                role=self._label_set.role,
                number=0,
                keys=[key for key, _ in places],
                views=np.array([[view] for _, view in places], dtype="<u8"),
                probs=labels.probs_NK.numpy()[:, None].astype(value),
                indices=None
                if dense
                else labels.indices_NK.numpy()[:, None].astype(
                    class_id_type(self._label_set.num_classes)
                ),
                rest=None if dense else labels.rest_N.numpy()[:, None].astype(value),
            )
        )
        name = f"{self._label_set.role}-{APPENDED_PREFIX}{sha256(data).hexdigest()[:16]}.h5"
        path = self._label_set.folder / name
        try:
            write_whole(path, data, replace=False)
        except PermissionError:
            raise LabelSetError(
                f"cannot append to {self._label_set.folder}: no permission; leave out --write-back"
            ) from None
        self._waiting.clear()
        return path
