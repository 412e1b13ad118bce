"""The index of shards in memory: the row of each image by its key, and where its block lies."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mealv2.label_set.blocks import key_hashes
from mealv2.label_set.shard import LABELS
from mealv2.label_set.shard_file import ShardFile


class Locations(NamedTuple):
    """Where the blocks of N rows lie: the number of the file, the offset in it, bytes, CRC-32."""

    numbers_N: np.ndarray
    at_N: np.ndarray
    sizes_N: np.ndarray
    crcs_N: np.ndarray


class Index:
    """The images of shards; their rows are counted through all files. No file stays open."""

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self.first_rows = np.cumsum([0, *(file.num_images for file in files)], dtype=np.int64)
        self.num_rows = int(self.first_rows[-1])
        key_ats, label_ats = (
            np.cumsum([0, *(file.shape(name)[0] for file in files)], dtype=np.int64)
            for name in ("keys", LABELS)
        )
        hashes, self._crcs = np.empty(self.num_rows, "<u8"), np.empty(self.num_rows, "<u4")
        self._keys = bytearray(int(key_ats[-1]))
        keys = np.frombuffer(self._keys, np.uint8)
        # ends in the concatenated files, with a 0 first
        self._key_ends, self._ends = np.zeros((2, self.num_rows + 1), "<i8")
        for n, file in enumerate(files):
            rows = slice(*self.first_rows[n : n + 2].tolist())
            key_ends, ends = (
                e[rows.start + 1 : rows.stop + 1] for e in (self._key_ends, self._ends)
            )
            file.read_columns(
                key_hashes=hashes[rows],
                crc32=self._crcs[rows],
                keys=keys[slice(*key_ats[n : n + 2].tolist())],
                key_ends=key_ends.view("<u8"),
                label_ends=ends.view("<u8"),
            )
            key_ends += key_ats[n]
            ends += label_ats[n]
        # from the end of a block in the concatenated files to the same in its file
        self._shifts = np.array([file.labels_at for file in files], np.int64) - label_ats[:-1]
        self._order = np.argsort(hashes).astype(np.uint32)
        self._hashes = hashes[self._order]

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the row of each image by its key in UTF-8, -1 for an unknown key, int64 N."""
        hashes_N = key_hashes(keys)
        at_N = np.searchsorted(self._hashes, hashes_N)
        rows_N = np.full(len(keys), -1, np.int64)
        left = np.arange(len(keys))
        while len(left):  # repeats only for keys of equal hash
            left = left[at_N[left] < self.num_rows]
            left = left[self._hashes[at_N[left]] == hashes_N[left]]
            found = self._order[at_N[left]].astype(np.int64)
            begins, ends = self._key_ends[found].tolist(), self._key_ends[found + 1].tolist()
            wanted = keys if len(left) == len(keys) else [keys[i] for i in left.tolist()]
            is_same = np.array(
                [self._keys[a:b] == k for k, a, b in zip(wanted, begins, ends, strict=True)], bool
            )
            rows_N[left[is_same]] = found[is_same]
            left = left[~is_same]
            at_N[left] += 1
        return rows_N

    def locate(self, rows_N: np.ndarray) -> Locations:
        """Return where the blocks of rows lie."""
        numbers_N = np.searchsorted(self.first_rows, rows_N, side="right") - 1
        begins_N = self._ends[rows_N]
        return Locations(
            numbers_N,
            begins_N + self._shifts[numbers_N],
            self._ends[rows_N + 1] - begins_N,
            self._crcs[rows_N],
        )
