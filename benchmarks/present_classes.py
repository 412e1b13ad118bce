"""A label set with probability on the classes of its data only, from one of more classes."""

import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mealv2.label_set import Encoding, Shard, ShardFile
from pipeline.label_sets import writing


@dataclass(frozen=True)
class PresentClassesConfig:
    """A label set, the folder TRAIN/CLASS of the data, the class names by id; the set to write."""

    labels: Path
    classes_dir: Path
    class_map: Path
    output: Path

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: str(getattr(self, name)) for name in names}


def run(config: PresentClassesConfig) -> dict[str, Any]:
    """Write the set; return the report."""
    splits = writing.open_splits(config.labels, config.output)
    train = splits["train"]
    plan, encoding = train.manifest["plan"], train.encoding
    present = {folder.name for folder in config.classes_dir.iterdir()}
    names = config.class_map.read_text("utf-8").splitlines()
    present_C = torch.tensor([name in present for name in names])
    writer = writing.Writer.derive(
        config.output,
        "benchmarks.present_classes",
        "probabilities of the classes of the data",
        [plan],
        teachers=plan["teachers"],
    )
    for split, labels in splits.items():
        shards = [
            (views, partial(_shard, file, encoding, present_C))
            for views, files in labels.blocks
            for file in files
        ]
        writer.add(split, shards, what=f"classes of {split}")
    return writer.finish()


def of_present(probs_NC: Tensor, present_C: Tensor) -> Tensor:
    """Return probabilities with none on other classes, their sum 1 again, N x C."""
    kept_NC = probs_NC * present_C
    return kept_NC / kept_NC.sum(1, keepdim=True)


def _shard(file: ShardFile, encoding: Encoding, present_C: Tensor) -> Shard:
    shard = file.shard()
    probs_NC = writing.mean_probs([writing.all_rows(file, encoding)], [1])
    encoded = encoding.encode(of_present(probs_NC, present_C), None)
    return replace(shard, blocks=encoding.blocks(encoded, shard.num_views), counts={})
