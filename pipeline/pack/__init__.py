"""`mealv2 pack`: a data set in a form that is faster to read, as a tree or as tar files."""

from typing import Any

from pipeline.config import PackConfig
from pipeline.pack import folder, tars


def run(config: PackConfig) -> dict[str, Any]:
    """Pack a data set; return the report. Raises MealError and OSError."""
    return tars.run(config) if config.to == "tar" else folder.run(config)
