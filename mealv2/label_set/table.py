"""Shards of one range of views as one table: images by key, their labels, their stored boxes."""

from collections.abc import Iterator, Sequence

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.label_set.encoding import Encoding, Rows
from mealv2.label_set.shard import block_crc, key_hash
from mealv2.label_set.shard_file import ShardFile, damaged_rows
from mealv2.storage.atomic import OpenFiles
from mealv2.views import View, Views, unpacked_view


def encoded(keys: Sequence[str]) -> list[bytes]:
    """Return keys in UTF-8; surrogates, which no key there has, are looked for in vain."""
    return [key.encode("utf-8", "surrogatepass") for key in keys]


class Table:
    """Shards of one range of views: images by key, and their labels."""

    def __init__(self, files: list[ShardFile], views: range, *, max_open_files: int) -> None:
        self.files = files
        # read and not mapped: pages of a mapped file count as the process's memory, and where
        # blocks are picked at random these are in the end all
        self._open = OpenFiles(files, most=max_open_files)
        self.views = views
        counts = [file.num_images for file in files]
        self._first_rows = np.cumsum([0, *counts])
        self.num_rows = int(self._first_rows[-1])
        hashes = _concatenated([file.column("key_hashes") for file in files], "<u8")
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32)
        self._hashes = hashes[self._order]
        self._crcs = _concatenated([file.column("crc32") for file in files], "<u4")
        # where the blocks and keys of all files would end, one after another; 0 before the first
        self._ends = _ends([file.column("label_ends") for file in files])
        self._key_ends = _ends([file.column("key_ends") for file in files])
        self._keys = b"".join(file.column("keys").tobytes() for file in files)
        for file in files:
            file.unmap()

    def addresses(self) -> Iterator[tuple[str, int]]:
        """Iterate over (key, view) of appended rows."""
        for file in self.files:
            yield from zip(file.keys(), file.column("views").tolist(), strict=True)

    def row(self, key: str) -> int | None:
        """Return the row of an image, None when it is not here."""
        row = int(self.rows(encoded([key]))[0])
        return None if row < 0 else row

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the row of each image, by its key in UTF-8, -1 where it is not here."""
        hashes_N = np.frombuffer(b"".join(map(key_hash, keys)), dtype="<u8")
        at_N = np.searchsorted(self._hashes, hashes_N)
        rows_N = np.full(len(keys), -1, dtype=np.int64)
        left = np.arange(len(keys))
        while len(left):  # more than one turn where two keys have the same hash
            left = left[at_N[left] < self.num_rows]
            left = left[self._hashes[at_N[left]] == hashes_N[left]]
            found = self._order[at_N[left]].astype(np.int64)
            spans = self._key_ends[found].tolist(), self._key_ends[found + 1].tolist()
            candidates = [self._keys[begin:end] for begin, end in zip(*spans, strict=True)]
            is_same = np.array(
                [keys[i] == candidates[n] for n, i in enumerate(left.tolist())], bool
            )
            rows_N[left[is_same]] = found[is_same]
            left = left[~is_same]
            at_N[left] += 1
        return rows_N

    def read(
        self, keys: Sequence[bytes], rows_N: np.ndarray, views_N: np.ndarray, encoding: Encoding
    ) -> Rows:
        """Return one view of each row; raises LabelSetError where its labels fail their CRC."""
        numbers_N = np.searchsorted(self._first_rows, rows_N, side="right") - 1
        first_N = self._ends[self._first_rows[numbers_N]]
        begins_N, ends_N = self._ends[rows_N] - first_N, self._ends[rows_N + 1] - first_N
        blocks = [b""] * len(keys)
        order_N = np.argsort(numbers_N, kind="stable")  # one file after another
        spans_N = (numbers_N, begins_N, ends_N - begins_N, self._crcs[rows_N])
        spans = (column_N[order_N].tolist() for column_N in spans_N)
        for row, number, begin, size, crc in zip(order_N.tolist(), *spans, strict=True):
            block = self._open.read(number, size, self.files[number].labels_at + begin)
            if block_crc(keys[row], block) != crc:
                raise damaged_rows(self.files[number], keys[row].decode())
            blocks[row] = block
        data = np.frombuffer(b"".join(blocks), np.uint8)
        sizes_N = ends_N - begins_N
        try:
            return encoding.rows_of(data, np.cumsum(sizes_N), len(self.views), views_N)
        except LabelSetError as error:
            folder = self.files[0].path.parent
            raise LabelSetError(f"labels in {folder} are damaged: {error}") from None

    def file_of(self, row: int) -> tuple[ShardFile, int]:
        """Return the file that a row is in, and its row there."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.files[number], row - int(self._first_rows[number])


class StoredBoxes(Views):
    """The views whose boxes lie in the shards."""

    def __init__(self, tables: list[Table]) -> None:
        self._tables = tables

    def view(self, key: str, index: int, *, width: int, height: int) -> View:
        """Return a stored view; raises LabelSetError for one that is not there."""
        for table in self._tables:
            row = table.row(key) if index in table.views else None
            if row is not None:
                file, row_in_file = table.file_of(row)
                boxes, flips = file.column("boxes"), file.column("flips")
                column = index - table.views.start
                flip = bool(flips[row_in_file, column])
                return unpacked_view(boxes[row_in_file, column], flip, width=width, height=height)
        raise LabelSetError(f"no box is stored of view {index} of {key!r}")


def _concatenated(columns: list[np.ndarray], kind: str) -> np.ndarray:
    return np.concatenate([np.empty(0, kind), *columns])


def _ends(columns: list[np.ndarray]) -> np.ndarray:
    """Return where pieces end when those of all columns follow each other, int64; before them 0."""
    ends, last = [np.zeros(1, np.int64)], 0
    for column in columns:
        ends.append(column.astype(np.int64) + last)
        last = int(ends[-1][-1]) if len(column) else last
    return np.concatenate(ends)
