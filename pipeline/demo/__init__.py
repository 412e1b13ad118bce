"""Run both stages on 5,000 digits of MNIST, and compare soft labels with hard ones.

It drives the other commands (docs/adr/0005). A second call keeps finished parts and resumes others.
"""

import time
from contextlib import ExitStack
from typing import Any

from pipeline import console
from pipeline.config import MAX_DEMO_PROCS, DemoConfig
from pipeline.demo.page import write_page
from pipeline.demo.parts import Part, is_labelled, kept_report, plan_parts
from pipeline.demo.pictures import write_pictures
from pipeline.demo.table import report_of, table_of
from pipeline.demo.workers import run_parts
from pipeline.runtime import env

LOGS = "logs"


def run(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; print and return its figures. Raises MealError and OSError."""
    start_s = time.monotonic()
    planned = plan_parts(config)
    reports = {part.name: kept for part in planned if (kept := kept_report(part)) is not None}
    write_pictures(config.data)
    left = [part for part in planned if part.name not in reports]
    num_kept = len(reports) + sum(map(is_labelled, planned))
    console.info(
        f"{len(planned)} parts, {num_kept} of them kept; what they print is in "
        f"{config.output / LOGS}"
    )
    with ExitStack() as stack:
        bar = None
        if env.on_terminal():
            bar = stack.enter_context(console.ProgressBar(len(left), what="demo", unit="parts"))

        def on_done(part: Part, report: dict[str, Any], seconds: float) -> None:
            reports[part.name] = report
            count = f"[{len(reports)}/{len(planned)}]"
            console.info(f"{count} {part.title}: {_result(report)}, {console.duration(seconds)}")
            if bar is not None:
                bar.update(1)

        run_parts(
            left,
            kept=set(reports),
            num_procs=num_procs_of(config),
            logs=config.output / LOGS,
            on_done=on_done,
            on_poll=lambda: None if bar is None else bar.update(0),
        )
    report = report_of(config, reports) | {"seconds": round(time.monotonic() - start_s, 1)}
    console.info(f"\n{table_of(report)}\n{console.duration(report['seconds'])}")
    return report | {"page": write_page(config)}


def num_procs_of(config: DemoConfig) -> int:
    """Return how many processes run the parts."""
    return config.num_procs or min(env.num_cores(), MAX_DEMO_PROCS)


def _result(report: dict[str, Any]) -> str:
    """Return the figure of a part that a reader waits for."""
    if "top1" in report:
        return f"top-1 {report['top1']:.1f} %"
    made = f"{report['views']} views" if report["shards_made"] else "kept"
    return f"ensemble {report['accuracy']['ensemble']['top1']:.1f} %, {made}"
