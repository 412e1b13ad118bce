"""The report page at the end of the demo: its students beside the control, with their labels."""

from pathlib import Path

from mealv2.errors import ConfigError
from pipeline import console, report
from pipeline.config import DemoConfig, ReportConfig
from pipeline.demo import parts

FOLDER = "report"


def write_page(config: DemoConfig) -> str | None:
    """Write the page; return its path, or None after a message where it cannot be written."""

    def runs(*arms: str) -> tuple[Path, ...]:
        names = [parts.run_name(seed, arm) for arm in arms for seed in config.all_seeds]
        return tuple(config.output / name for name in names)

    settings = ReportConfig(
        run=runs(parts.SOFT, parts.EXTRA, parts.HARD_LONGER),
        control=runs(parts.HARD),
        labels=config.output / parts.LABELS,
        data_dir=config.data,
        output=config.output / FOLDER,
    )
    try:
        return str(report.run(settings)["report"])
    except ConfigError as error:  # a package is missing, or the folder has other files
        console.info(f"no report page: {error}")
        return None
