"""Transfer backbones to object detection: RetinaNet on images in COCO's format."""

from typing import Any

from pipeline.comparison.grid import run_grid
from pipeline.comparison.starts import with_absolute_starts
from pipeline.comparison.table import AVERAGE_PRECISIONS
from pipeline.config import TransferDetectionConfig
from pipeline.runtime.device import distributed_runtime
from pipeline.transfer_detection.single import fingerprints, train_one


def run(config: TransferDetectionConfig) -> dict[str, Any]:
    """Train, once or for every model, mode and seed, and return the report.

    Raises as training.loop.train, and ConfigError for a start or a data set that cannot be used.
    """
    config = with_absolute_starts(config)
    with distributed_runtime(config) as runtime:
        if config.is_grid:
            return run_grid(
                config,
                runtime,
                train_one=train_one,
                fingerprints=fingerprints,
                form=AVERAGE_PRECISIONS,
            )
        return train_one(config, runtime)
