"""LabelSet: open a finished label set, look labels up by (key, view)."""

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mealv2.codec import EncodedLabels
from mealv2.errors import LabelSetError
from mealv2.label_set.encoding import Encoding, Rows
from mealv2.label_set.manifest import creating_command, read_manifest
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.label_set.shard_file import ShardFile
from mealv2.label_set.table import StoredBoxes, Table, encoded
from mealv2.soft_labels import Labels
from mealv2.views import RECIPE, STORED_BOXES, DrawnViews, Views


class Lookup(NamedTuple):
    """Labels of N views: class ids int64, probabilities float32, most likely first unless dense.

    Where a view keeps fewer classes than another, id -1 and probability 0 fill its row.
    """

    indices_NK: np.ndarray
    probs_NK: np.ndarray


class LabelSet:
    """The labels of one role of a label set: ``train``, many views, or ``val``, the centre crop.

    Length is the number of images with labels. ``appended`` names the files of single rows that
    later jobs added. What finds a label is in memory; the labels are read from the shards, of which
    some stay open, at most a quarter of what the process may have open. An open set works in forked
    workers; a spawned one opens it again by its path.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        split: str,
        appended: Sequence[str],
        num_views: int | None = None,
    ) -> None:
        plan = manifest["plan"]
        self.folder = folder
        self.manifest = manifest
        self.split = split
        self.classes: list[str] = plan["classes"]
        self.num_classes = len(self.classes)
        self.img_size = int(plan["img_size"])
        self.encoding = Encoding.of_plan(plan)
        entry = manifest["roles"][split]
        views = [range(*block["views"]) for block in entry["blocks"]]
        self.num_views = views[-1].stop if num_views is None else num_views
        if self.num_views not in {block.stop for block in views}:
            raise LabelSetError(
                f"{folder} holds {' or '.join(str(block.stop) for block in views)} views of each "
                f"image, {num_views} are needed"
            )
        views = [block for block in views if block.stop <= self.num_views]
        listed = zip(views, entry["blocks"], strict=False)
        files = [[self._open_shard(s, v) for s in block["shards"]] for v, block in listed]
        max_open_files = max(1, _most_open() // (len(views) + 1))
        self._tables = [
            Table(*table, max_open_files=max_open_files) for table in zip(files, views, strict=True)
        ]
        self.appended = list(appended)
        more = [_open_appended(folder / name, manifest, split) for name in self.appended]
        self._appended = Table(more, range(0, 1), max_open_files=max_open_files)
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
    ) -> "LabelSet":
        """Open the finished label set in a folder.

        Checks the manifest, every shard's presence and size, and everything by which labels are
        found; the labels themselves are checked whenever they are read. ``appended`` limits the
        appended files to those named, ``num_views`` the views to the first ones, so that a run that
        goes on sees what it saw before; None takes all that are there. Raises LabelSetError when
        the set is unfinished, damaged, or has no such role.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if split not in manifest["roles"] or split not in manifest["plan"]["roles"]:
            raise LabelSetError(
                f"{folder} has no {split} labels (it has {', '.join(manifest['roles'])})"
            )
        if appended is None:
            found = folder.glob(f"{split}-{APPENDED_PREFIX}*.h5")
            appended = sorted(path.name for path in found)
        return cls(folder, manifest, split, appended, num_views)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self.split, self.appended, self.num_views)

    def __len__(self) -> int:
        return self._tables[0].num_rows

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._tables[0].row(key) is not None

    def holds(self, key: str, view: int) -> bool:
        """Return whether the label of a view is there, in a shard or appended."""
        if (key, view) in self._appended_rows:
            return True
        return any(view in table.views and table.row(key) is not None for table in self._tables)

    def has_labels(self, keys: Sequence[str]) -> np.ndarray:
        """Return of each image whether it has labels, bool."""
        has_labels_N: np.ndarray = self._tables[0].rows(encoded(keys)) >= 0
        return has_labels_N

    def views(self) -> Views:
        """Return what the labelled views are; raises LabelSetError for those of another recipe."""
        recipe = dict(self.manifest["plan"]["roles"][self.split].get("views", {}))
        if recipe == STORED_BOXES:
            return StoredBoxes(self._tables)
        seed = recipe.pop("seed", None)
        if recipe == RECIPE and isinstance(seed, int) and 0 <= seed < 1 << 64:
            return DrawnViews(seed)
        raise LabelSetError(
            f"{self.folder} labels views of another recipe than this mealv2 cuts "
            f"({recipe.get('name')}, version {recipe.get('version')})"
        )

    def keys(self) -> Iterator[str]:
        """Iterate over the keys of the labelled images, in the order of the data set."""
        for file in self._tables[0].files:
            yield from file.keys()

    @property
    def skipped(self) -> dict[str, str]:
        """The images without labels, by key, and why."""
        skipped: dict[str, str] = self.manifest["roles"][self.split]["skipped"]
        return skipped

    @property
    def appended_files(self) -> list[ShardFile]:
        """The files of rows that were appended."""
        return self._appended.files

    @property
    def num_appended(self) -> int:
        """How many rows were appended."""
        return self._appended.num_rows

    @property
    def blocks(self) -> list[tuple[range, list[ShardFile]]]:
        """The views of each block, and its shards."""
        return [(table.views, table.files) for table in self._tables]

    def lookup(self, keys: Sequence[str], views: Sequence[int]) -> Lookup:
        """Return the labels of view ``views[i]`` of image ``keys[i]``, row by row.

        Raises LabelSetError for an image or a view that the set does not hold, or whose labels are
        damaged, ValueError when the two sequences differ in length.
        """
        labels = self.soft_labels(keys, views)
        if isinstance(labels, EncodedLabels):
            kept = labels.kept()
            indices_NK = torch.where(kept.is_kept_NK, kept.indices_NK, -1)
            return Lookup(indices_NK.numpy(), kept.probs_NK.numpy())
        indices_NK = labels.indices_NK.contiguous()  # of dense labels it is one row, repeated
        return Lookup(indices_NK.numpy(), labels.probs_NK.float().numpy())

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the same labels in the set's own form; raises as lookup."""
        return self.rows(keys, views).labels

    def rows(self, keys: Sequence[str], views: Sequence[int]) -> Rows:
        """Return the same with the ensemble's mean logits, if the set keeps them."""
        if len(keys) != len(views):
            raise ValueError(f"{len(keys)} keys and {len(views)} views")
        all_names = encoded(keys)
        views_N = _whole_numbers(views)
        appended_N = np.full(len(keys), -1)
        if self._appended_rows:
            addresses = zip(keys, map(int, views), strict=True)
            appended_N = np.array(
                [self._appended_rows.get(address, -1) for address in addresses], dtype=np.int64
            )
        found = []
        where = np.flatnonzero(appended_N >= 0)
        if len(where):
            names, first_N = [all_names[i] for i in where.tolist()], np.zeros_like(where)
            found.append(
                (where, self._appended.read(names, appended_N[where], first_N, self.encoding))
            )
        for table in self._tables:
            first, stop = table.views.start, table.views.stop
            where = np.flatnonzero((appended_N < 0) & (views_N >= first) & (views_N < stop))
            if len(where) or not len(keys):
                is_all = len(where) == len(keys)
                names = all_names if is_all else [all_names[i] for i in where.tolist()]
                rows_N = table.rows(names)
                if (rows_N < 0).any():
                    missing = int(where[np.argmin(rows_N)])
                    raise self._missing_label(keys[missing], int(views[missing]))
                read = table.read(names, rows_N, views_N[where] - first, self.encoding)
                found.append((where, read))
        found_N = np.concatenate([where for where, _ in found]) if found else np.empty(0, np.int64)
        if len(found_N) < len(keys):
            missing = int(np.setdiff1d(np.arange(len(keys)), found_N)[0])
            raise self._missing_label(keys[missing], int(views[missing]))
        return _in_order(found)

    def _missing_label(self, key: str, view: int) -> LabelSetError:
        """Return the error for a row that is not there."""
        if key not in self:
            reason = self.skipped.get(key)
            why = f"it was skipped: {reason}" if reason else "it is not an image of this set"
            return LabelSetError(f"{self.folder} has no label for {key!r}; {why}")
        held_views = [table.views for table in self._tables if table.row(key) is not None]
        why = f"it holds {sum(map(len, held_views))}, from 0"
        if view < self.num_views:
            why += "; the image could not be read when the others were added"
        return LabelSetError(f"{self.folder} has no view {view} of {key!r}; {why}")

    def _open_shard(self, entry: dict[str, Any], views: range) -> ShardFile:
        """Check a shard's index against the manifest, and return it."""
        path = self.folder / entry["name"]
        again = f"run the same {creating_command(self.manifest['plan'])} again to make it anew"
        try:
            file = ShardFile(path)
        except LabelSetError as error:
            raise LabelSetError(f"{error}; {again}") from None
        except OSError as error:
            raise LabelSetError(f"cannot read shard {path}: {error.strerror}; {again}") from None
        header = file.header
        is_same = (header["plan_sha256"], header["role"], file.first_view, file.num_views) == (
            self.manifest["plan_sha256"],
            self.split,
            views.start,
            len(views),
        )
        if file.head_sha256 != entry.get("head_sha256") or not is_same:
            raise LabelSetError(f"shard {path} is not the one in the manifest; {again}")
        return file


_BEYOND = 1 << 62
_MAX_OPEN = 1024


def _most_open() -> int:
    """Return how many shards of a set may stay open: a part of what the process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if soft == resource.RLIM_INFINITY else min(_MAX_OPEN, soft // 4 - 16)


def _whole_numbers(views: Sequence[int]) -> np.ndarray:
    """Return views as int64; one that has more bits is in no block, and becomes _BEYOND."""
    try:
        return np.asarray(views, dtype=np.int64).reshape(-1)
    except OverflowError:
        return np.array([max(-1, min(int(view), _BEYOND)) for view in views], dtype=np.int64)


def _open_appended(path: Path, manifest: dict[str, Any], split: str) -> ShardFile:
    """Check a file of appended rows; raises LabelSetError where it is none of this set."""
    try:
        file = ShardFile(path)
    except FileNotFoundError:
        raise LabelSetError(f"{path} is gone; labels that this run used were in it") from None
    except LabelSetError as error:
        raise LabelSetError(f"{error}; remove the file, its rows can be made again") from None
    except OSError as error:
        raise LabelSetError(f"cannot read {path}: {error.strerror}") from None
    of_this_set = (file.header["plan_sha256"], file.header["role"]) == (
        manifest["plan_sha256"],
        split,
    )
    if not of_this_set or not file.has_column("views") or file.num_views != 1:
        raise LabelSetError(f"{path} holds rows of another label set; remove it")
    return file


def _reopen(folder: Path, split: str, appended: Sequence[str], num_views: int) -> LabelSet:
    return LabelSet.open(folder, split=split, appended=appended, num_views=num_views)


def _in_order(found: list[tuple[np.ndarray, Rows]]) -> Rows:
    """Put rows that were read in groups where they belong."""
    if len(found) == 1:
        return found[0][1]
    order = torch.from_numpy(np.concatenate([where for where, _ in found]).argsort())
    return Rows.concat([rows for _, rows in found]).rows(order)
