"""`mealv2 labels convert`: a label set in another encoding."""

from dataclasses import replace
from functools import partial
from typing import Any

from mealv2.label_set import Encoding, Shard, ShardFile
from pipeline import console
from pipeline.config import LabelsConvertConfig
from pipeline.label_sets.writing import (
    Writer,
    accuracies_of,
    all_rows,
    derived_plan,
    encoded,
    new_encoding,
    open_splits,
    require_outside,
)


def run(config: LabelsConvertConfig) -> dict[str, Any]:
    """Write the set anew; return the report. Raises MealError and OSError."""
    require_outside(config.output, [config.labels])
    splits = open_splits(config.labels)
    train = splits["train"]
    old = train.encoding
    new = new_encoding(config, old.num_classes, default=old, has_logits=old.logits)
    plan = train.manifest["plan"]
    writer = Writer(
        config.output, derived_plan(plan, "labels convert", "converted", [plan], labels=new.plan())
    )
    for name, labels in splits.items():
        files = [(views, file) for views, files in labels.blocks for file in files]
        for views, file in console.progress(
            files, total=len(files), what=f"converting {name}", unit="shards"
        ):
            writer.add(name, views, partial(_converted, file, old, new))
        for file in labels.appended_files:
            writer.add_rows(file, range(file.num_images), encoded(all_rows(file, old), old, new))
    report = writer.finish(accuracies_of(splits))
    console.info(f"{config.output} keeps {new}, in {console.size_of(report['bytes'])}")
    return report


def _converted(file: ShardFile, old: Encoding, new: Encoding) -> Shard:
    rows = encoded(all_rows(file, old), old, new)
    return replace(file.shard(), blocks=new.blocks(rows, file.num_views))
