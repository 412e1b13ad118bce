"""Transfer backbones to other data sets: from scratch, fine-tuned, or with a frozen backbone."""

from typing import Any

from pipeline.comparison.grid import run_grid
from pipeline.comparison.starts import with_absolute_starts
from pipeline.comparison.table import SETS
from pipeline.config import TransferConfig
from pipeline.runtime.device import distributed_runtime
from pipeline.transfer.single import fingerprints, train_one


def run(config: TransferConfig) -> dict[str, Any]:
    """Train, once or for every set, model, mode and seed, and return the report.

    Raises as training.loop.train, and ConfigError for a start or a list of sets that cannot be
    used.
    """
    config = with_absolute_starts(config)
    with distributed_runtime(config) as runtime:
        if config.is_grid:
            return run_grid(
                config, runtime, train_one=train_one, fingerprints=fingerprints, form=SETS
            )
        return train_one(config, runtime)
