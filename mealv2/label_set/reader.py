"""LabelSet: open a finished label set, look labels up by (key, view)."""

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.label_set.manifest import read_manifest
from mealv2.label_set.shard import APPENDED_PREFIX, column_offsets, read_shard, shard_keys
from mealv2.soft_labels import SoftLabels


class Lookup(NamedTuple):
    """Labels of N views: class ids int64, probabilities float32, most likely first unless dense."""

    indices_NK: np.ndarray
    probs_NK: np.ndarray


class LabelSet:
    """The labels of one role of a label set: ``train``, many views, or ``val``, the centre crop.

    Length is the number of images with all their views labelled. ``appended`` names the files of
    single rows that later jobs added. Shards are read through memory maps made at first use, so
    that an open set can be handed to worker processes.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], role: str, appended: Sequence[str]
    ) -> None:
        plan = manifest["plan"]
        self.folder = folder
        self.manifest = manifest
        self.role = role
        self.classes: list[str] = plan["classes"]
        self.num_classes = len(self.classes)
        self.num_views = int(plan["roles"][role]["num_views"])
        self.img_size = int(plan["img_size"])
        self._names = [entry["name"] for entry in manifest["roles"][role]["shards"]]
        self._maps: dict[int, dict[str, np.ndarray]] = {}
        self._rows: dict[str, tuple[int, int]] = {}
        for number, entry in enumerate(manifest["roles"][role]["shards"]):
            for row, key in enumerate(self._open_shard(entry)):
                self._rows[key] = (number, row)
        self.appended = list(appended)
        self._appended_rows: dict[tuple[str, int], tuple[int, int]] = {}
        for name in self.appended:
            for row, place in enumerate(self._open_appended(folder / name)):
                self._appended_rows.setdefault(place, (len(self._names), row))
            self._names.append(name)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        role: str = "train",
        appended: Sequence[str] | None = None,
    ) -> "LabelSet":
        """Open the finished label set in a folder.

        Checks the manifest, and every shard's presence, size and contents against its hashes (about
        a second per 2 GB). ``appended`` limits the appended files to those named, so that a run
        that goes on sees what it saw before; None takes all that are there. Raises LabelSetError
        when the set is unfinished, damaged or has no such role.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if role not in manifest["roles"]:
            raise LabelSetError(
                f"{folder} has no {role} labels (it has {', '.join(manifest['roles'])})"
            )
        if appended is None:
            found = folder.glob(f"{role}-{APPENDED_PREFIX}*.h5")
            appended = sorted(path.name for path in found)
        return cls(folder, manifest, role, appended)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def holds(self, key: str, view: int) -> bool:
        """Return whether the label of a view is there, in a shard or appended."""
        in_shard = key in self._rows and 0 <= view < self.num_views
        return in_shard or (key, view) in self._appended_rows

    def keys(self) -> Iterator[str]:
        """Iterate over the keys of the labelled images, in the order of the data set."""
        return iter(self._rows)

    @property
    def skipped(self) -> dict[str, str]:
        """The images without labels, by key, and why."""
        skipped: dict[str, str] = self.manifest["roles"][self.role]["skipped"]
        return skipped

    def lookup(self, keys: Sequence[str], views: Sequence[int]) -> Lookup:
        """Return the labels of view ``views[i]`` of image ``keys[i]``, row by row.

        Raises LabelSetError for an image or a view that the set does not hold, ValueError when the
        two sequences differ in length.
        """
        labels = self.soft_labels(keys, views)
        return Lookup(labels.indices_NK.numpy(), labels.probs_NK.numpy())

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> SoftLabels:
        """Return the same labels as tensors, with the mass that was not kept; raises as lookup."""
        places = [self._place(key, view) for key, view in zip(keys, views, strict=True)]
        k = self.manifest["plan"]["topk"]
        indices_NK = np.empty((len(places), k), dtype=np.int64)
        probs_NK = np.empty((len(places), k), dtype=np.float32)
        rest_N = np.zeros(len(places), dtype=np.float32)
        for position, (number, row, view) in enumerate(places):
            columns = self._columns(number)
            probs_NK[position] = columns["probs"][row, view]
            if "indices" in columns:
                indices_NK[position] = columns["indices"][row, view]
                rest_N[position] = columns["rest"][row, view]
            else:
                indices_NK[position] = np.arange(k)
        return SoftLabels(
            torch.from_numpy(indices_NK),
            torch.from_numpy(probs_NK),
            torch.from_numpy(rest_N),
            self.num_classes,
        )

    def _place(self, key: str, view: int) -> tuple[int, int, int]:
        """Return the file, row and column of a label."""
        if (key, view) in self._appended_rows:
            return *self._appended_rows[key, view], 0
        if key not in self._rows:
            reason = self.skipped.get(key)
            why = f"it was skipped: {reason}" if reason else "it is not an image of this set"
            raise LabelSetError(f"{self.folder} has no label for {key!r}; {why}")
        if not 0 <= view < self.num_views:
            raise LabelSetError(
                f"{self.folder} has no view {view} of {key!r}; it holds {self.num_views}, from 0"
            )
        return *self._rows[key], view

    def _open_shard(self, entry: dict[str, Any]) -> list[str]:
        """Check a shard against the manifest; return its keys."""
        path = self.folder / entry["name"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LabelSetError(
                f"cannot read shard {path}: {error.strerror}; run the same `mealv2 precompute` "
                "again to make it anew"
            ) from None
        if len(data) != entry["bytes"] or sha256(data).hexdigest() != entry["sha256"]:
            raise LabelSetError(
                f"shard {path} is not the one in the manifest (its size or its "
                "contents are others); run the same `mealv2 precompute` "
                "again to make it anew"
            )
        return shard_keys(data)

    def _open_appended(self, path: Path) -> list[tuple[str, int]]:
        """Check a file of appended rows by its own checksum; return the place of every row."""
        try:
            shard = read_shard(path)
        except FileNotFoundError:
            raise LabelSetError(f"{path} is gone; labels that this run used were in it") from None
        except LabelSetError as error:
            raise LabelSetError(f"{error}; remove the file, its rows can be made again") from None
        of_this_set = (shard.plan_sha256, shard.role) == (self.manifest["plan_sha256"], self.role)
        if not of_this_set or shard.views is None:
            raise LabelSetError(f"{path} holds rows of another label set; remove it")
        return list(zip(shard.keys, shard.views[:, 0].tolist(), strict=True))

    def _columns(self, number: int) -> dict[str, np.ndarray]:
        """Return the memory-mapped columns of a shard: probs, and unless dense indices and rest."""
        if number not in self._maps:
            path = self.folder / self._names[number]
            size = path.stat().st_size
            # torch maps the file and closes it; np.memmap would keep a descriptor of each column
            mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            self._maps[number] = {
                name: np.ndarray(shape, dtype, buffer=mapped, offset=offset)
                for name, (offset, shape, dtype) in column_offsets(path).items()
                if name in ("probs", "indices", "rest") and 0 not in shape
            }
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}
