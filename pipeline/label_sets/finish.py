"""`mealv2 labels finish`: the manifest of a set whose shards were made by jobs."""

import time
from typing import Any

from mealv2 import label_set
from mealv2.errors import LabelSetError
from pipeline.config import LabelsFinishConfig
from pipeline.labelling.manifest import finalize
from pipeline.labelling.store import open_store


def run(config: LabelsFinishConfig) -> dict[str, Any]:
    """Check every shard of a plan and write the manifest; return the report.

    Raises LabelSetError, and writes nothing, if a shard is missing or damaged.
    """
    began = time.monotonic()
    store = open_store(config, config.labels)
    plan = label_set.read_plan(store.folder)
    try:
        label_set.planned_shards(plan)
    except LabelSetError as error:
        raise LabelSetError(f"cannot finish {store.location}: {error}") from None
    report = finalize(store, plan, batch_size=config.batch_size)
    return report | {"seconds": round(time.monotonic() - began, 2)}
