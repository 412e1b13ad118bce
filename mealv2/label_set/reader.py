"""LabelSet: look up the labels of a finished label set by (key, view)."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch

from mealv2.codec import EncodedLabels, encode
from mealv2.errors import LabelSetError
from mealv2.label_set.addresses import encoded_keys, views_as_int64
from mealv2.label_set.blocks import Rows
from mealv2.label_set.encoding import Encoding
from mealv2.label_set.first_blocks import first_views_of
from mealv2.label_set.html import label_set_html
from mealv2.label_set.index import Index
from mealv2.label_set.manifest import read_manifest
from mealv2.label_set.opening import max_open_files, open_appended, open_blocks
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.label_set.shard_file import ShardFile, damaged_rows
from mealv2.label_set.web_set import Missing, WebSet, is_web, web_set_at
from mealv2.soft_labels import Labels
from mealv2.storage.atomic import OpenFiles
from mealv2.views import STORED_BOXES, DrawnViews, View, Views, unpacked_view


class Lookup(NamedTuple):
    """Labels of N views: class ids int64, probabilities float32, likeliest first unless dense.

    Where a view keeps fewer classes than another, id -1 and probability 0 pad its row.
    """

    indices_NK: np.ndarray
    probs_NK: np.ndarray


class LabelSet:
    """The labels of one split of a label set: ``train``, many views, or ``val``, the centre crop.

    Its length is the number of images with labels. ``appended`` names the files of rows that jobs
    appended. The index is in memory. Labels are read from the shards; the open files of
    ``num_sets`` sets that are read together are at most a quarter of the process's limit. Forked
    workers can use an open set; a spawned worker opens it again by its path.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        split: str,
        appended: Sequence[str],
        num_views: int | None = None,
        num_sets: int = 1,
    ) -> None:
        plan = manifest["plan"]
        self.folder = folder
        self.manifest = manifest
        self.split = split
        self.classes: list[str] = plan["classes"]
        self.num_classes = len(self.classes)
        self.img_size = int(plan["img_size"])
        self.encoding = Encoding.of_plan(plan)
        blocks = open_blocks(folder, manifest, split, num_views)
        self.num_views = blocks[-1][0].stop
        self._num_sets = num_sets
        most = max_open_files((len(blocks) + bool(appended)) * num_sets)
        self._tables = [Table(files, views, max_open_files=most) for views, files in blocks]
        for table in self._tables[1:]:
            if any("first_sha256" in file.header for file in table.files):
                table.first = self._tables[0]
        self.appended = list(appended)
        files = open_appended(folder, manifest, split, appended)
        self._appended = Table(files, range(1), max_open_files=most)
        self._appended_rows: dict[tuple[str, int], int] = {}
        for row, address in enumerate(self._appended.addresses()):
            self._appended_rows.setdefault(address, row)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        split: str = "train",
        appended: Sequence[str] | None = None,
        num_views: int | None = None,
        num_sets: int = 1,
    ) -> "LabelSet":
        """Open the finished label set in a folder, or at an ``https://`` URL (a ``WebSet``).

        Checks the manifest, the size of every shard and the index; the labels are checked when they
        are read. ``appended`` limits the appended files to those named, and ``num_views`` the views
        to the first ones, so that a resumed run sees the same labels; None takes all. Raises
        LabelSetError when the set is unfinished or damaged, or does not have the split.
        """
        given = WebSet(str(path)) if is_web(path) else path
        folder = Path(given)
        manifest = read_manifest(folder)
        if split not in manifest["roles"] or split not in manifest["plan"]["roles"]:
            raise LabelSetError(
                f"{folder} has no {split} labels (it has {', '.join(manifest['roles'])})"
            )
        if appended is None:
            appended = sorted(p.name for p in folder.glob(f"{split}-{APPENDED_PREFIX}*.h5"))
        return cls(folder, manifest, split, appended, num_views, num_sets)

    def __reduce__(self) -> tuple[Any, ...]:
        opened = partial(LabelSet.open, split=self.split, appended=self.appended)
        opened = partial(opened, num_views=self.num_views, num_sets=self._num_sets)
        return opened, (web_set_at(self.folder) or self.folder,)

    def __len__(self) -> int:
        return self._tables[0].num_rows

    def _repr_html_(self) -> str:
        """Show the set in a notebook: what it is, and the label of its first view."""
        first = self.lookup([next(self.keys())], [self.blocks[0][0].start]) if len(self) else None
        key = next(self.keys(), None)
        return label_set_html(self.manifest, self.split, len(self), self.num_views, key, first)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._tables[0].row(key) is not None

    def holds(self, key: str, view: int) -> bool:
        """Return whether a shard or an appended file has the label of a view."""
        if (key, view) in self._appended_rows:
            return True
        return any(view in table.views and table.row(key) is not None for table in self._tables)

    def has_labels(self, keys: Sequence[str]) -> np.ndarray:
        """Return whether each image has labels, bool N."""
        return np.asarray(self.image_rows(keys) >= 0)

    def image_rows(self, keys: Sequence[str]) -> np.ndarray:
        """Return the row of each image among all that have labels, int64 N; -1 if it has none."""
        return self._tables[0].rows(encoded_keys(keys))

    def views(self) -> Views:
        """Return the labelled views; raises LabelSetError for an unknown recipe."""
        recipe = self.manifest["plan"]["roles"][self.split].get("views", {})
        if recipe == STORED_BOXES:
            return StoredBoxes(self._tables)
        try:
            return DrawnViews.from_entry(recipe)
        except ValueError as error:
            raise LabelSetError(
                f"{self.folder} labels views of the recipe {recipe.get('name')}, version "
                f"{recipe.get('version')}, which this mealv2 does not know: {error}"
            ) from None

    def keys(self) -> Iterator[str]:
        """Iterate over the keys of the labelled images, in the order of the data set."""
        for file in self._tables[0].files:
            yield from file.keys()

    @property
    def skipped(self) -> dict[str, str]:
        """The reason for each image without labels, by key."""
        skipped: dict[str, str] = self.manifest["roles"][self.split]["skipped"]
        return skipped

    @property
    def appended_files(self) -> list[ShardFile]:
        """The files of appended rows."""
        return self._appended.files

    @property
    def num_appended(self) -> int:
        """The number of appended rows."""
        return self._appended.num_rows

    @property
    def blocks(self) -> list[tuple[range, list[ShardFile]]]:
        """The views of each block, and its shards."""
        return [(table.views, table.files) for table in self._tables]

    def lookup(self, keys: Sequence[str], views: Sequence[int]) -> Lookup:
        """Return the labels of view ``views[i]`` of image ``keys[i]``, row by row.

        Raises LabelSetError for an image or a view without a label and for damaged labels,
        ValueError when the sequences differ in length.
        """
        labels = self.soft_labels(keys, views)
        if isinstance(labels, EncodedLabels):
            kept = labels.kept().by_probability()
            indices_NK = torch.where(kept.is_kept_NK, kept.indices_NK, -1)
            return Lookup(indices_NK.numpy(), kept.probs_NK.numpy())
        indices_NK = labels.indices_NK.contiguous()  # dense labels share one row
        return Lookup(indices_NK.numpy(), labels.probs_NK.float().numpy())

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the same labels as stored; raises as ``lookup``."""
        return self.rows(keys, views).labels

    def rows(self, keys: Sequence[str], views: Sequence[int]) -> Rows:
        """Return the same labels with the mean logits, if the set stores them."""
        if len(keys) != len(views):
            raise ValueError(f"{len(keys)} keys and {len(views)} views")
        names, views_N = encoded_keys(keys), views_as_int64(views)
        rows_N = np.full(len(keys), -1)
        if self._appended_rows:
            addresses = zip(keys, map(int, views), strict=True)
            rows_N[:] = [self._appended_rows.get(address, -1) for address in addresses]
        groups = [(self._appended, rows_N >= 0)]
        for table in self._tables:
            in_block_N = (views_N >= table.views.start) & (views_N < table.views.stop)
            groups.append((table, in_block_N & (rows_N < 0)))
        parts = []
        for table, is_member_N in groups:
            where_N = np.flatnonzero(is_member_N)
            if len(where_N) or not len(keys):
                is_all = len(where_N) == len(keys)
                members = names if is_all else [names[i] for i in where_N.tolist()]
                columns_N = np.zeros_like(where_N)
                if table is not self._appended:
                    rows_N[where_N] = table.rows(members)
                    columns_N = views_N[where_N] - table.views.start
                parts.append((where_N, table, members, columns_N))
        if (rows_N < 0).any():
            missing = int(np.argmin(rows_N))
            raise self._missing_label(keys[missing], int(views[missing]))
        found = [
            table.read(members, rows_N[where_N], columns_N, self.encoding)
            for where_N, table, members, columns_N in parts
        ]
        if len(found) == 1:
            return found[0]
        order_N = np.concatenate([where_N for where_N, *_ in parts]).argsort()
        return Rows.concat(found).rows(torch.from_numpy(order_N))

    def first_labels(self, keys: Sequence[str]) -> EncodedLabels:
        """Return a row of the first block of each image, not decoded, for ``Encoding.encode``.

        Of an image that has no labels, one without a model. Raises as ``lookup``.
        """
        names = encoded_keys(keys)
        has_labels_N = self._tables[0].rows(names) >= 0
        labels = self._tables[0].labels_of(names, self.encoding, np.flatnonzero(has_labels_N))
        no_model = encode(torch.ones(1, self.num_classes), topk=1)
        order_N = np.where(has_labels_N, np.cumsum(has_labels_N) - 1, len(labels))
        return EncodedLabels.concat([labels, no_model])[order_N]

    def _missing_label(self, key: str, view: int) -> LabelSetError:
        """Return the error for a label that the set does not have."""
        if key not in self:
            reason = self.skipped.get(key)
            why = f"it was skipped: {reason}" if reason else "it is not an image of this set"
            return LabelSetError(f"{self.folder} has no label for {key!r}; {why}")
        num_views = sum(len(table.views) for table in self._tables if table.row(key) is not None)
        why = f"its views are 0 to {num_views - 1}"
        if 0 <= view < self.num_views:
            why += "; the image could not be read when the other views were added"
        return LabelSetError(f"{self.folder} has no view {view} of {key!r}; {why}")


class Table:
    """Shards of one range of views: images by key, and their labels."""

    def __init__(self, files: list[ShardFile], views: range, *, max_open_files: int) -> None:
        self.first: Table | None = None  # has the first views, whose models added ones may use
        self.files = files
        self.views = views
        # not mapped: the pages of a mapped file count as the process's memory, and random reads
        # touch all of them in the end
        self._descriptor = OpenFiles(files, most=max_open_files).descriptor
        self._web = web_set_at(files[0].path.parent) if files else None
        self._index = Index(files)
        self.num_rows = self._index.num_rows

    def addresses(self) -> Iterator[tuple[str, int]]:
        """Iterate over (key, view) of appended rows."""
        for file in self.files:
            yield from zip(file.keys(), file.column("views").tolist(), strict=True)

    def row(self, key: str) -> int | None:
        """Return the row of an image, or None."""
        row = int(self.rows(encoded_keys([key]))[0])
        return None if row < 0 else row

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """Return the row of each image by its key in UTF-8, -1 for an unknown key."""
        return self._index.rows(keys)

    def read(
        self, keys: Sequence[bytes], rows_N: np.ndarray, views_N: np.ndarray, encoding: Encoding
    ) -> Rows:
        """Return one view of each row; raises LabelSetError for labels that fail their CRC."""
        blocks = self._blocks(keys, rows_N)
        firsts = None if self.first is None else partial(self.first.labels_of, keys, encoding)
        try:
            return encoding.rows_of(*blocks, len(self.views), views_N, firsts)
        except LabelSetError as error:
            folder = self.files[0].path.parent
            raise LabelSetError(f"labels in {folder} are damaged: {error}") from None

    def labels_of(
        self, names: Sequence[bytes], encoding: Encoding, some_N: np.ndarray
    ) -> EncodedLabels:
        """Return a row of the block of some images, not decoded; raises LabelSetError."""
        keys = [names[i] for i in some_N.tolist()]
        rows_N = self.rows(keys)
        if (rows_N < 0).any():
            raise LabelSetError(f"no first labels of {keys[int(np.argmin(rows_N))].decode()!r}")
        return first_views_of(*self._blocks(keys, rows_N), len(self.views), encoding.num_classes)

    def _blocks(self, keys: Sequence[bytes], rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of the blocks of rows, and where each ends."""
        found = self._index.locate(rows_N)
        blocks, missing = [b""] * len(keys), list[Missing]()
        order_N = np.argsort(rows_N)  # file by file, and in the order of the file
        columns = (order_N, *(column[order_N] for column in found))
        for row, number, at, size, crc in zip(*(c.tolist() for c in columns), strict=True):
            file = self._descriptor(number)
            blocks[row] = block = os.pread(file.fd, size, at)
            # not block_crc: a call for each block
            if crc32(block, crc32(keys[row])) != crc or (self._web and not any(block)):  # a hole
                if not self._web:
                    raise damaged_rows(self.files[number], keys[row].decode())
                missing.append(Missing(row, self.files[number].path, at, size, keys[row], crc))
        if missing and self._web:
            self._web.fill(blocks, missing)
        return np.frombuffer(b"".join(blocks), np.uint8), np.cumsum(found.sizes_N)

    def stored_view(self, row: int, view: int, *, width: int, height: int) -> View:
        """Return a view whose box the shard stores."""
        number = int(np.searchsorted(self._index.first_rows, row, side="right")) - 1
        file = self.files[number]
        at = row - self._index.first_rows[number], view - self.views.start
        flip = bool(file.column("flips")[at])
        return unpacked_view(file.column("boxes")[at], flip, width=width, height=height)


class StoredBoxes(Views):
    """Views whose boxes the shards store."""

    draws_small_boxes = True  # inside the image

    def __init__(self, tables: list[Table]) -> None:
        self._tables = tables

    def view(self, key: str, index: int, *, width: int, height: int) -> View:
        """Return a stored view; raises LabelSetError when the set does not have it."""
        for table in self._tables:
            row = table.row(key) if index in table.views else None
            if row is not None:
                return table.stored_view(row, index, width=width, height=height)
        raise LabelSetError(f"no box is stored for view {index} of {key!r}")
