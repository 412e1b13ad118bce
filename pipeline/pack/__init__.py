"""`mealv2 pack`: copy a data set into a form that is faster to read, as a tree or as tar files."""

import time
from typing import Any

from mealv2.data.jpegtran import Jpegtran
from mealv2.data.open import open_source
from pipeline.config import PackConfig
from pipeline.loading.sources import show_summary
from pipeline.pack.common import splits_of
from pipeline.pack.folder import pack_folder
from pipeline.pack.tars import pack_tars


def run(config: PackConfig) -> dict[str, Any]:
    """Pack a data set; return the report. Raises MealError and OSError."""
    began = time.monotonic()
    program = Jpegtran.find() if config.to == "folder" else None
    sources = [open_source(config.data_dir, split) for split in splits_of(config)]
    for source in sources:
        show_summary(source, strict=config.strict)
    return {
        "data_dir": str(config.data_dir),
        "output": str(config.output),
        "splits": [source.split for source in sources],
        "images": sum(map(len, sources)),
        **(pack_folder(config, sources, program) if program else pack_tars(config, sources)),
        "seconds": round(time.monotonic() - began, 3),
    }
