"""Small finished label sets in any encoding, and the truth about what they hold."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.label_set import (
    FORMAT,
    FORMAT_VERSION,
    Encoding,
    Images,
    LabelSet,
    Rows,
    Shard,
    claim,
    describe_file,
    shard_name,
    write_manifest,
    write_shard,
)
from mealv2.label_set.content import content_of
from mealv2.models.ensemble import combine
from mealv2.soft_labels import SoftLabels
from mealv2.storage.json_format import json_sha256
from mealv2.views import RECIPE

KEYS = ["ant/1.jpg", "größe/ü ñ.png", "猫/写真🐈.webp", "z/with\nnewline.png", "zz/" + "x" * 300]

ENCODINGS = {
    "rate": Encoding(50, rate=1e-2),
    "rate, logits": Encoding(50, rate=1e-2, logits=True),
    "curve": Encoding(50, topk=4),
    "curve of 300": Encoding(400, topk=300, logits=True),
    "curve of all": Encoding(9, topk=9, logits=True),
    "float16": Encoding(50, "float16", topk=3),
    "float32, logits": Encoding(50, "float32", topk=3, logits=True),
    "many classes": Encoding(70_000, "float16", topk=4),
    "dense float16": Encoding(6, "float16", topk=6),
    "dense float32, logits": Encoding(6, "float32", topk=6, logits=True),
}


class Made(NamedTuple):
    """A set that was made: ``rows`` has every view of every key, image by image.

    ``dense_NVC`` is the recovered distribution of each.
    """

    folder: Path
    dense_NVC: np.ndarray
    rows: Rows
    keys: list[str]
    num_views: int

    def of(self, addresses: Sequence[tuple[str, int]]) -> Rows:
        """Return what was put in for views of images."""
        order = [self.keys.index(key) * self.num_views + view for key, view in addresses]
        return self.rows.rows(torch.tensor(order, dtype=torch.int64))

    def addresses(self) -> list[tuple[str, int]]:
        """Return all (key, view), in the order of ``rows``."""
        return [(key, view) for key in self.keys for view in range(self.num_views)]


def ensemble_outputs(num_rows: int, num_classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (probabilities, mean logits) of two teachers, sure of some rows and not of others."""
    generator = torch.Generator().manual_seed(seed)
    scale_N1 = torch.rand(num_rows, 1, generator=generator) * 6
    logits_TNC = scale_N1 * torch.randn(2, num_rows, num_classes, generator=generator)
    return tuple(combine(logits_TNC))


def encoded(encoding: Encoding, num_rows: int, *, seed: int = 0) -> Rows:
    """Return random answers as a set of this encoding keeps them."""
    return encoding.encode(*ensemble_outputs(num_rows, encoding.num_classes, seed=seed))


def plan_of(
    encoding: Encoding, num_views: int = 4, *, view_seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """Return the plan of a set."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": [f"class {n}" for n in range(encoding.num_classes)],
        "teachers": [{"model": "resnet50.a1_in1k", "weights_sha256": "00" * 32}],
        "precision": "float32",
        "img_size": 64,
        "labels": encoding.plan(),
        "roles": {"train": {"num_views": num_views, "views": {**RECIPE, "seed": view_seed}}},
        **changes,
    }


def make_set(
    folder: Path,
    encoding: Encoding,
    keys: Sequence[str] = KEYS,
    num_views: int = 4,
    *,
    block_ends: Sequence[int] = (),
    first_block_only: Collection[str] = (),
    shard_size: int = 3,
    skipped: Mapping[str, str] | None = None,
    seed: int = 0,
    outputs_N: tuple[Tensor, Tensor | None] | None = None,
    images: Images | None = None,
    **plan_changes: Any,
) -> Made:
    """Write a finished set of the role ``train`` with random labels, or those of ``outputs_N``.

    ``block_ends``: where blocks of views end, the last at ``num_views`` (one block otherwise);
    images of ``first_block_only`` are left out of all blocks but the first. ``skipped`` images come
    as a second shard, of their own, in the first block.
    """
    first_stop = block_ends[0] if block_ends else num_views
    plan = plan_of(encoding, first_stop, **plan_changes)
    claim(folder, plan)
    num_rows = len(keys) * num_views
    if outputs_N is None:
        rows = encoded(encoding, num_rows, seed=seed)
    else:
        rows = encoding.encode(*outputs_N)
    made = Made(
        folder,
        rows.labels.to_dense().numpy().reshape(len(keys), num_views, encoding.num_classes),
        rows,
        list(keys),
        num_views,
    )
    blocks = []
    for start, stop in zip([0, *block_ends[:-1]], block_ends or [num_views], strict=True):
        left_out = first_block_only if start else ()
        in_block = [key for key in keys if key not in left_out]
        parts = [in_block[i : i + shard_size] for i in range(0, len(in_block), shard_size)]
        if skipped and not start:
            parts.insert(1, [])
        listed = []
        for number, part in enumerate(parts):
            path = folder / shard_name("train", number, range(start, stop) if start else None)
            wanted = [(key, view) for key in part for view in range(start, stop)]
            reasons = (skipped or {}) if not part else {}
            shard = Shard(
                plan_sha256=json_sha256(plan),
                split="train",
                number=number,
                first_view=start,
                num_views=stop - start,
                keys=part,
                blocks=encoding.blocks(made.of(wanted), stop - start),
                images=None if images is None else images.rows([made.keys.index(k) for k in part]),
                skipped={
                    key: {"position": n, "reason": reason, "bytes": 0, "class": 0}
                    for n, (key, reason) in enumerate(reasons.items())
                },
            )
            write_shard(path, shard)
            listed.append(describe_file(path, num_images=len(part)))
        blocks.append({"views": [start, stop], "shards": listed})
    split = {"blocks": blocks, "skipped": dict(skipped or {}), "num_images": len(keys)}
    if images is not None and images.hashes_N is not None:
        split["content"] = content_of(dict(zip(keys, images.hashes_N.tolist(), strict=True)))
    write_manifest(folder, plan, roles={"train": split})
    return made


def look_up(labels: LabelSet, addresses: Sequence[tuple[str, int]]) -> Rows:
    """Return the rows of views of images."""
    return labels.rows([key for key, _ in addresses], [view for _, view in addresses])


def tensors_of(rows: Rows) -> list[Tensor]:
    """Return all that rows are made of."""
    if isinstance(rows.labels, SoftLabels):
        parts = [rows.labels.indices_NK, rows.labels.probs_NK, rows.labels.rest_N]
    else:
        parts = [rows.labels.counts_N, rows.labels.payload_P]
    if rows.logits is None:
        return parts
    # how far logits are padded says nothing
    kept = rows.labels.kept()
    width = kept.indices_NK.shape[1]
    values_NK = torch.nn.functional.pad(
        rows.logits.values_NK, (0, width - rows.logits.values_NK.shape[1])
    )
    return [*parts, values_NK, rows.logits.rest_N]


def same(a: Rows, b: Rows) -> bool:
    """Whether rows are equal to the bit, types included."""
    pairs = list(zip(tensors_of(a), tensors_of(b), strict=True))
    return (
        type(a.labels) is type(b.labels)
        and len(a.labels) == len(b.labels)
        and a.labels.num_classes == b.labels.num_classes
        and all(
            x.dtype == y.dtype and x.shape == y.shape and x.numpy().tobytes() == y.numpy().tobytes()
            for x, y in pairs
        )
    )


def flip(path: Path, data: bytes, bit: int) -> None:
    """Write a file with one bit turned."""
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
