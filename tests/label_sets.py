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
    FittedLogits,
    Images,
    LabelSet,
    Rows,
    Shard,
    ShardFile,
    bound_to_first,
    claim,
    describe_file,
    shard_name,
    write_manifest,
    write_shard,
)
from mealv2.label_set.content import content_of
from mealv2.label_set.logits import LINE_SIZE
from mealv2.models.ensemble import combine
from mealv2.soft_labels import EncodedLabels, SoftLabels
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


def ensemble_outputs(
    num_rows: int, num_classes: int, *, num_views: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (probabilities, mean logits) of two teachers, sure of some images and not of others.

    The views of an image differ little, and mostly in one direction.
    """
    generator = torch.Generator().manual_seed(seed)
    if num_views == 1:
        scale_N1 = torch.rand(num_rows, 1, generator=generator) * 6
        logits_TNC = scale_N1 * torch.randn(2, num_rows, num_classes, generator=generator)
        return tuple(combine(logits_TNC))
    num_images = num_rows // num_views
    scale_I11 = torch.rand(num_images, 1, 1, generator=generator) * 6
    of_image, direction = torch.randn(2, 2, num_images, 1, num_classes, generator=generator)
    weight_IV1 = torch.randn(num_images, num_views, 1, generator=generator) * 0.5
    noise = torch.randn(2, num_images, num_views, num_classes, generator=generator) * 0.05
    logits = scale_I11 * (of_image + noise) + weight_IV1 * direction
    return tuple(combine(logits.flatten(1, 2)))


def encoded(encoding: Encoding, num_rows: int, *, num_views: int = 1, seed: int = 0) -> Rows:
    """Return random answers as a set of this encoding keeps them; views of an image in a block."""
    outputs = ensemble_outputs(num_rows, encoding.num_classes, num_views=num_views, seed=seed)
    return encoding.encode(*outputs, num_views=num_views)


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
    uses_first: bool = False,
    **plan_changes: Any,
) -> Made:
    """Write a finished set of the role ``train`` with random labels, or those of ``outputs_N``.

    ``block_ends``: where blocks of views end, the last at ``num_views`` (one block otherwise);
    images of ``first_block_only`` are left out of all blocks but the first. ``skipped`` images come
    as a second shard, of their own, in the first block. ``uses_first``: later blocks use the models
    of the first one where they are less, as ``labels add-views`` makes them.
    """
    first_stop = block_ends[0] if block_ends else num_views
    plan = plan_of(encoding, first_stop, **plan_changes)
    claim(folder, plan)
    if outputs_N is None:
        num_rows = len(keys) * num_views
        outputs_N = ensemble_outputs(num_rows, encoding.num_classes, num_views=num_views, seed=seed)
    ranges = list(zip([0, *block_ends[:-1]], block_ends or [num_views], strict=True))
    order_KV = torch.arange(len(keys) * num_views).reshape(len(keys), num_views)
    parts_B: list[Rows] = []
    for views in ranges:
        first = parts_B[0].labels if uses_first and parts_B else None
        models = first[::first_stop] if isinstance(first, EncodedLabels) else None
        parts_B.append(_encoded(encoding, outputs_N, order_KV[:, slice(*views)], models))
    order_N = torch.cat([order_KV[:, slice(*views)].flatten() for views in ranges]).argsort()
    rows = Rows.concat(parts_B).rows(order_N)
    made = Made(
        folder,
        rows.labels.to_dense().numpy().reshape(len(keys), num_views, encoding.num_classes),
        rows,
        list(keys),
        num_views,
    )
    blocks: list[dict[str, Any]] = []
    for (start, stop), of_block in zip(ranges, parts_B, strict=True):
        left_out = first_block_only if start else ()
        in_block = [key for key in keys if key not in left_out]
        parts = [in_block[i : i + shard_size] for i in range(0, len(in_block), shard_size)]
        if skipped and not start:
            parts.insert(1, [])
        listed = []
        for number, part in enumerate(parts):
            path = folder / shard_name("train", number, range(start, stop) if start else None)
            images_P = torch.tensor([made.keys.index(key) for key in part], dtype=torch.int64)
            views_PV = images_P[:, None] * (stop - start) + torch.arange(stop - start)
            reasons = (skipped or {}) if not part else {}
            shard = Shard(
                plan_sha256=json_sha256(plan),
                split="train",
                number=number,
                first_view=start,
                num_views=stop - start,
                keys=part,
                blocks=encoding.blocks(of_block.rows(views_PV.flatten()), stop - start),
                images=None if images is None else images.rows([made.keys.index(k) for k in part]),
                skipped={
                    key: {"position": n, "reason": reason, "bytes": 0, "class": 0}
                    for n, (key, reason) in enumerate(reasons.items())
                },
            )
            if start and uses_first:
                first_path = folder / blocks[0]["shards"][number]["name"]
                shard = bound_to_first(shard, encoding, ShardFile(first_path).head_sha256)
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


def _encoded(
    encoding: Encoding,
    outputs_N: tuple[Tensor, Tensor | None],
    order_KV: Tensor,
    first: EncodedLabels | None = None,
) -> Rows:
    """Encode some views of all images."""
    probs_NC, logits_NC = outputs_N
    order_N = order_KV.flatten()
    logits_NC = None if logits_NC is None else logits_NC[order_N]
    num_views = order_KV.shape[1]
    return encoding.encode(probs_NC[order_N], logits_NC, num_views=num_views, first=first)


def forms_of(rows: Rows) -> list[bytes]:
    """Return what is stored of each row.

    Its record, or the block that it shares with other views (and the one whose model that uses),
    and which of them it is; its values.
    """
    if isinstance(rows.labels, SoftLabels):
        labels = rows.labels
        parts = (labels.indices_NK, labels.probs_NK, labels.rest_N[:, None])
        forms = [b"".join(row) for row in zip(*(map(_bytes, part) for part in parts), strict=True)]
    else:
        forms = _forms_of_encoded(rows.labels)
    if rows.logits is None:
        return forms
    if isinstance(rows.logits, FittedLogits):
        lines, size = rows.logits.to_bytes(), LINE_SIZE
        return [form + lines[size * n : size * (n + 1)] for n, form in enumerate(forms)]
    # how far logits are padded says nothing
    counts = rows.labels.kept().is_kept_NK.sum(dim=1).tolist()
    logits = zip(rows.logits.values_NK, rows.logits.rest_N, counts, strict=True)
    values = [_bytes(row[:count]) + _bytes(rest) for row, rest, count in logits]
    return [form + value for form, value in zip(forms, values, strict=True)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _forms_of_encoded(labels: EncodedLabels) -> list[bytes]:
    forms = []
    data = labels.data_P.tobytes()
    is_shared_B = labels.shared_blocks()
    model_B = np.arange(len(is_shared_B)) if labels.model_B is None else labels.model_B
    for n, (block, view) in enumerate(zip(labels.block_N, labels.view_N, strict=True)):
        at, end = int(labels.at_B[block]), int(labels.ends_B[block])
        if is_shared_B[block]:
            form = bytes([1, view % 256, view // 256]) + data[at:end]
            if (model := model_B[block]) != block:
                form += data[int(labels.at_B[model]) : int(labels.ends_B[model])]
            forms.append(form)
        else:
            counts_R, at_R, sizes_R = (one := labels[n]).records()
            stored = one.data_P[int(at_R[0]) : int(at_R[0] + sizes_R[0])].tobytes()
            forms.append(int(counts_R[0]).to_bytes(3, "little") + stored)
    return forms


def same(a: Rows, b: Rows) -> bool:
    """Whether rows are equal to the bit, types included."""
    return (
        type(a.labels) is type(b.labels)
        and a.labels.num_classes == b.labels.num_classes
        and types_of(a) == types_of(b)
        and forms_of(a) == forms_of(b)
    )


def types_of(rows: Rows) -> list[object]:
    """Return the types that rows are stored in."""
    labels, logits = rows.labels, rows.logits
    types: list[object] = []
    if logits is not None:
        is_fitted = isinstance(logits, FittedLogits)
        values = logits.offsets_N if is_fitted else logits.values_NK
        types = [is_fitted, values.dtype, logits.rest_N.dtype]
    if isinstance(labels, SoftLabels):
        return [*types, labels.indices_NK.dtype, labels.probs_NK.dtype, labels.rest_N.dtype]
    return [*types, labels.count_size]


def flip(path: Path, data: bytes, bit: int) -> None:
    """Write a file with one bit turned."""
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
