"""`mealv2 labels finish`: the manifest of a set whose shards were made by jobs."""

import time
from typing import Any

from mealv2 import label_set
from mealv2.errors import LabelSetError
from pipeline import finishing
from pipeline.config import LabelsFinishConfig


def run(config: LabelsFinishConfig) -> dict[str, Any]:
    """Check every shard of a plan and write the manifest; return the report.

    Raises LabelSetError where not all are whole, and nothing is written.
    """
    began = time.monotonic()
    plan = label_set.read_plan(config.labels)
    try:
        label_set.planned_shards(plan)
    except LabelSetError as error:
        raise LabelSetError(f"cannot finish {config.labels}: {error}") from None
    manifest = finishing.finish(config.labels, plan, batch_size=config.batch_size)
    report = finishing.report_of(config.labels, manifest)
    if "accuracy" in report:
        finishing.say_accuracy(report["accuracy"], len(plan["classes"]))
    return report | {"seconds": round(time.monotonic() - began, 2)}
