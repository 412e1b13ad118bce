"""Labels appended to a finished label set: files of single rows beside its shards.

The name of a file is a hash of its bytes and the manifest stays the same, so any number of jobs can
append at once. A reader uses every such file in the folder.
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.label_set.blocks import Rows
from mealv2.label_set.reader import LabelSet
from mealv2.label_set.shard import APPENDED_PREFIX, Shard, shard_bytes
from mealv2.storage.atomic import write_atomic


class Appender:
    """Collects rows (key, view, label) that are missing in a label set and appends them.

    ``hash_of`` returns the content hash of an image that was read, by key.
    """

    def __init__(
        self, label_set: LabelSet, hash_of: Callable[[str], int | None] | None = None
    ) -> None:
        self._label_set = label_set
        self._hash_of = hash_of or (lambda _: None)
        self._addresses: set[tuple[str, int]] = set()  # written ones too: no row twice
        self._pending: list[tuple[list[tuple[str, int]], Rows]] = []

    def add(self, keys: Sequence[str], views: Sequence[int], rows: Rows) -> None:
        """Keep rows for the next flush; ``rows`` is on the CPU, in the set's encoding."""
        new = {
            address: row
            for row, address in enumerate(zip(keys, views, strict=True))
            if address not in self._addresses
        }
        if new:
            self._addresses.update(new)
            self._pending.append((list(new), rows.rows(torch.tensor(list(new.values())))))

    def flush(self) -> Path | None:
        """Write the kept rows to a file and return its path, None without rows; raises OSError."""
        if not self._pending:
            return None
        unsorted = [address for addresses, _ in self._pending for address in addresses]
        order = sorted(range(len(unsorted)), key=unsorted.__getitem__)
        addresses = [unsorted[row] for row in order]
        rows = Rows.concat([rows for _, rows in self._pending]).rows(torch.tensor(order))
        hashes = [value for key, _ in addresses if (value := self._hash_of(key)) is not None]
        has_all = len(hashes) == len(addresses)
        shard = Shard(
            plan_sha256=self._label_set.manifest["plan_sha256"],
            split=self._label_set.split,
            number=0,
            first_view=0,
            num_views=1,
            keys=[key for key, _ in addresses],
            blocks=self._label_set.encoding.blocks(rows, 1),
            views_N=np.array([view for _, view in addresses], dtype="<u8"),
            hashes_N=np.array(hashes, dtype="<u8") if has_all else None,
        )
        try:
            path = write_rows(self._label_set.folder, shard)
        except PermissionError:
            raise LabelSetError(
                f"cannot append to {self._label_set.folder}: no permission; leave out --write-back"
            ) from None
        self._pending.clear()
        return path


def write_rows(folder: Path, shard: Shard) -> Path:
    """Write a shard of rows, named by the hash of its bytes; return its path."""
    data = shard_bytes(shard)
    path = folder / f"{shard.split}-{APPENDED_PREFIX}{sha256(data).hexdigest()[:16]}.h5"
    write_atomic(path, data, replace=False)
    return path
