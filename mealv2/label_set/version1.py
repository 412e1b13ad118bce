"""Reads label sets of format version 1: their shards become ones of today, in memory.

Version 1 kept ids, float values and the rest in HDF5 datasets, checked as a whole by SHA-256. Its
shards are parsed by HDF5 only after their hash in the manifest was found right.
"""

import io
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from mealv2.errors import LabelSetError
from mealv2.label_set.encoding import Encoding, Rows
from mealv2.label_set.shard import MAGIC, Shard, shard_bytes
from mealv2.label_set.shard_file import ShardFile
from mealv2.soft_labels import SoftLabels


def encoding_of(plan: dict[str, Any]) -> Encoding:
    """Return how a set of version 1 keeps its labels; raises LabelSetError."""
    try:
        if plan["label_dtype"] not in ("float16", "float32"):
            raise ValueError(f"values of type {plan['label_dtype']}")
        return Encoding(len(plan["classes"]), plan["label_dtype"], topk=plan["topk"])
    except (KeyError, TypeError, ValueError) as error:
        raise LabelSetError(f"the labels of this set cannot be read: {error}") from None


def shard_files(folder: Path, manifest: dict[str, Any], role: str) -> list[ShardFile]:
    """Return the shards of a role, each checked against the manifest."""
    files = []
    for entry in manifest["roles"][role]["shards"]:
        path = folder / entry["name"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LabelSetError(f"cannot read shard {path}: {error.strerror}") from None
        if sha256(data).hexdigest() != entry["sha256"]:
            raise LabelSetError(f"shard {path} is not the one in the manifest")
        files.append(_converted(path, data, manifest["plan"]))
    return files


def is_old(path: Path) -> bool:
    """Return whether a file of appended rows is of version 1: today's are appended to old sets."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) != MAGIC
    except OSError:
        return False


def appended_file(path: Path, manifest: dict[str, Any], role: str) -> ShardFile:
    """Return a file of appended rows, which is named after its hash."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LabelSetError(f"cannot read {path}: {error.strerror}") from None
    if sha256(data).hexdigest()[:16] != path.stem.rpartition("-")[2]:
        raise LabelSetError(f"{path} is damaged; remove the file, its rows can be made again")
    file = _converted(path, data, manifest["plan"])
    if not file.has_column("views") or file.header["plan_sha256"] != manifest["plan_sha256"]:
        raise LabelSetError(f"{path} holds rows of another label set; remove it")
    return file


def _converted(path: Path, data: bytes, plan: dict[str, Any]) -> ShardFile:
    """Return a shard, whose bytes are known to be whole, as one of today."""
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            columns = {name: file[name][()] for name in file}
            header = json.loads(str(file.attrs["header"]))
        encoding = encoding_of(plan)
        probs_NVK = columns["probs"]
        num_images, num_views, k = probs_NVK.shape
        probs_NK = torch.from_numpy(probs_NVK.reshape(num_images * num_views, k))
        if "indices" in columns:
            ids_NK = columns["indices"].reshape(probs_NK.shape).astype(np.int64)
            rest_N = torch.from_numpy(columns["rest"].reshape(-1))
            labels = SoftLabels(torch.from_numpy(ids_NK), probs_NK, rest_N, encoding.num_classes)
        else:
            labels = SoftLabels.of_all(probs_NK)
        packed, ends = columns["keys"].tobytes(), columns["key_ends"].tolist()
        shard = Shard(
            plan_sha256=header["plan_sha256"],
            role=header["role"],
            number=header["number"],
            first_view=0,
            num_views=num_views,
            keys=[packed[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=False)],
            blocks=encoding.blocks(Rows(labels), num_views),
            views_N=columns["views"][:, 0] if "views" in columns else None,
            skipped={key: {"reason": reason} for key, reason in header["skipped"].items()},
            counts=header["counts"],
        )
    except Exception as error:  # h5py raises OSError, KeyError, ValueError, RuntimeError on damage
        raise LabelSetError(f"shard {path} is damaged: {type(error).__name__}: {error}") from error
    return ShardFile(path, shard_bytes(shard))
