"""`mealv2 labels finish`: write the manifest of a set whose shards were made by jobs."""

import time
from typing import Any

from mealv2.label_set import read_plan
from mealv2.labelling.manifest import finalize
from pipeline.config import LabelsFinishConfig
from pipeline.labelling.store import open_store


def run(config: LabelsFinishConfig) -> dict[str, Any]:
    """Check every shard of a plan and write the manifest; return the report.

    Raises LabelSetError, and writes nothing, if a shard is missing or damaged.
    """
    began = time.monotonic()
    store = open_store(config, config.labels)
    report = finalize(store, read_plan(store.folder), batch_size=config.batch_size)
    return report | {"seconds": round(time.monotonic() - began, 2)}
