"""`mealv2 report`: runs and their labels as one page, with figures and data beside it."""

import time
from datetime import UTC, datetime
from typing import Any

from mealv2.report.methods import methods_of
from mealv2.report.run import open_run
from mealv2.report.style import require_matplotlib
from mealv2.report.teachers import find_labels
from mealv2.storage.report_folder import new_report
from mealv2.storage.urls import shown
from mealv2.text import size_of
from mealv2.version import __version__
from pipeline import console
from pipeline.config import ReportConfig
from pipeline.report import answer, browser, classes, curves, labels, made, weights
from pipeline.report.page import PAGE_NAME, load_environment, write_page
from pipeline.report.sections import Inputs

_SECTIONS = (answer, curves, browser, labels, classes, weights, made)
_MAX_NAMES = 3  # methods in the title


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the page; return the report. Raises MealError and OSError; the earlier page stays."""
    require_matplotlib()
    load_environment()  # before minutes of work
    start_s = time.monotonic()
    runs = tuple(map(open_run, config.run))
    control = tuple(map(open_run, config.control))
    folder = config.labels or find_labels(runs)
    made_at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    about = {"made_at": made_at, "version": __version__}
    with new_report(config.output, about) as output:
        inputs = Inputs(runs, control, folder, config.data_dir, output, config)
        found = []
        for module in console.progress(
            _SECTIONS, total=len(_SECTIONS), what="writing the report", unit="sections"
        ):
            found.append(module.section(inputs))
        write_page(output, found, title=_title(inputs), notes=_notes(inputs), **about)
        num_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    seconds = time.monotonic() - start_s
    page = config.output / PAGE_NAME
    console.info(f"report {page} ({size_of(num_bytes)}, {console.duration(seconds)})")
    return {
        "report": str(page),
        "runs": [str(run.path) for run in (*runs, *control)],
        "labels": None if folder is None else shown(folder),
        "bytes": num_bytes,
        "seconds": round(seconds, 2),
        "missing": {section.id: section.missing for section in found if section.missing},
    }


def _title(inputs: Inputs) -> str:
    names = [method.name for method in methods_of(inputs.runs)]
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"Distillation report: {', '.join(names[:_MAX_NAMES])}{more}"


def _notes(inputs: Inputs) -> list[str]:
    """Return what the reader must know first: runs that are not finished."""
    unfinished = [run for run in (*inputs.runs, *inputs.control) if not run.is_finished]
    return [f"As of now, {run.path} is {run.state}." for run in unfinished]
