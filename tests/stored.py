"""Looking into label sets, and spoiling them on purpose."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from label_sets import forms_of
from mealv2.label_set import (
    LabelSet,
    ShardFile,
    describe_file,
    read_manifest,
    read_shard,
    write_manifest,
    write_shard,
)
from mealv2.storage.json_format import json_sha256

Address = tuple[str, int]


def addresses_of(labels: LabelSet, *, appended: bool = False) -> list[Address]:
    """Return (key, view) of every label of a set."""
    keys = list(labels.keys())
    there = [(key, view) for key in keys for view in range(labels.num_views)]
    if appended:
        for file in labels.appended_files:
            there += zip(file.keys(), file.column("views").tolist(), strict=True)
    return [address for address in there if labels.holds(*address)]


def rows_of(folder: Path, split: str = "train", *, appended: bool = True) -> dict[Address, bytes]:
    """Return what is stored of every label of a set."""
    labels = LabelSet.open(folder, split=split, appended=None if appended else [])
    addresses = addresses_of(labels, appended=appended)
    rows = labels.rows([key for key, _ in addresses], [view for _, view in addresses])
    return dict(zip(addresses, forms_of(rows), strict=True))


def dense_of(folder: Path, split: str = "train") -> dict[Address, np.ndarray]:
    """Return every label of a set as a distribution."""
    labels = LabelSet.open(folder, split=split)
    addresses = addresses_of(labels)
    dense = labels.rows(
        [key for key, _ in addresses], [view for _, view in addresses]
    ).labels.to_dense()
    return dict(zip(addresses, dense.numpy(), strict=True))


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return manifest.json, parsed and nothing else."""
    value = json.loads((folder / "manifest.json").read_text())
    assert isinstance(value, dict)
    return value


def signed_again(folder: Path, change: Any) -> None:
    """Change plan and manifest with ``change(plan, roles)``, and make every hash right again."""
    manifest = read_manifest(folder)
    plan, splits = manifest["plan"], manifest["roles"]
    change(plan, splits)
    (folder / "plan.json").unlink()
    (folder / "plan.json").write_text(
        json.dumps(plan, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    )
    for split in splits.values():
        for block in split["blocks"]:
            for number, entry in enumerate(block["shards"]):
                path = folder / entry["name"]
                shard = replace(read_shard(path), plan_sha256=json_sha256(plan))
                write_shard(path, shard, replace=True)
                block["shards"][number] = describe_file(path, num_images=entry["images"])
    write_manifest(folder, plan, roles=splits, versions=manifest["versions"])
    assert read_manifest(folder)["plan_sha256"] == json_sha256(plan)


def files_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the SHA-256 of every file of a folder, and when it was written."""
    return {
        path.name: (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
    }


def without_hashes(folder: Path, pattern: str = "*.h5") -> None:
    """Write shards of a set without content hashes, as those of an import, and its manifest."""
    for path in folder.glob(pattern):
        shard = ShardFile(path).shard()
        assert shard.images is not None
        images = replace(shard.images, hashes_N=None)
        write_shard(path, replace(shard, images=images), replace=True)
    signed_again(folder, _without_content)


def _without_content(plan: dict[str, Any], splits: dict[str, Any]) -> None:
    for split in splits.values():
        split.pop("content", None)
