"""`mealv2 labels convert`: a label set in another encoding."""

from dataclasses import replace
from functools import partial
from typing import Any

from mealv2.label_set import Encoding, Shard, ShardFile
from pipeline import console
from pipeline.config import LabelsConvertConfig
from pipeline.label_sets import writing


def run(config: LabelsConvertConfig) -> dict[str, Any]:
    """Write the set in another encoding; return the report. Raises MealError and OSError."""
    splits = writing.open_splits(config.labels, config.output)
    old, plan = splits["train"].encoding, splits["train"].manifest["plan"]
    new = writing.new_encoding(config, [old])
    writer = writing.Writer.derive(
        config.output, "labels convert", "converted", [plan], labels=new.plan()
    )
    for name, labels in splits.items():
        shards = [
            (views, partial(_converted, file, old, new))
            for views, file in writing.shards_of(labels)
        ]
        writer.add(name, shards, what=f"converting {name}")
        writer.add_appended(labels)
    report = writer.finish()
    console.info(f"{config.output}: {new}, {console.size_of(report['bytes'])}")
    return report


def _converted(file: ShardFile, old: Encoding, new: Encoding) -> Shard:
    before, num_views, shard = writing.all_rows(file, old), file.num_views, file.shard()
    rows = writing.encoded(before, old, new, num_views)
    loss = shard.loss if new == old else writing.loss_of([before], [1], [old], rows, num_views)
    return replace(shard, blocks=new.blocks(rows, num_views), loss=loss)
