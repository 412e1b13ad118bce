"""A label set of the mean of the teachers' logits, from the dense sets of each teacher alone.

mealv2 averages probabilities, as the paper does; this is for the comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mealv2.label_set import Encoding, Shard, ShardFile
from pipeline.label_sets import writing

_MIN_PROB = 1e-38  # the smallest normal float32, instead of 0


@dataclass(frozen=True)
class MeanLogitsConfig:
    """Label sets of one teacher each, with all classes, on the same views; the set to write."""

    sets: tuple[Path, ...]
    output: Path

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"sets": [str(folder) for folder in self.sets], "output": str(self.output)}


def run(config: MeanLogitsConfig) -> dict[str, Any]:
    """Write the set; return the report."""
    sets = [writing.open_splits(folder, config.output) for folder in config.sets]
    plans = [each["train"].manifest["plan"] for each in sets]
    encoding = sets[0]["train"].encoding
    if not all(each["train"].encoding == encoding and encoding.is_dense for each in sets):
        raise ValueError("the sets must have all classes, in one type")
    teachers = [teacher for plan in plans for teacher in plan["teachers"]]
    writer = writing.Writer.derive(
        config.output, "benchmarks.mean_logits", "mean of logits", plans, teachers=teachers
    )
    for split, labels in sets[0].items():
        shards = [
            (views, partial(_shard, same, encoding))
            for block, (views, _) in enumerate(labels.blocks)
            for same in zip(*(each[split].blocks[block][1] for each in sets), strict=True)
        ]
        writer.add(split, shards, what=f"averaging {split}")
    return writer.finish()


def mean_of_logits(probs_TNC: Tensor) -> Tensor:
    """Return the softmax of the mean of T teachers' logits from their probabilities, N x C."""
    # softmax((1/T) sum_t z_t) = softmax((1/T) sum_t log p_t): log p_t is z_t but for a constant
    log_probs_TNC = probs_TNC.double().clamp_min(_MIN_PROB).log()
    return torch.softmax(log_probs_TNC.mean(0), dim=1).float()


def _shard(files: Sequence[ShardFile], encoding: Encoding) -> Shard:
    rows = [writing.mean_probs([writing.all_rows(file, encoding)], [1]) for file in files]
    shard = files[0].shard()
    encoded = encoding.encode(mean_of_logits(torch.stack(rows)), None)
    return replace(shard, blocks=encoding.blocks(encoded, shard.num_views), counts={})
