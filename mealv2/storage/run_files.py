"""Names of the files of a run folder, and its lines of events."""

import json
from typing import Any

CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"
SUMMARY_NAME = "summary.csv"
REPORT_NAME = "report.json"
LABELS_NAME = "labels.json"
LOCK_NAME = "run.lock"
SESSION = "session"  # the event of a process that starts or resumes the run
WEIGHTS = "weights"  # percentiles of the weights of a layer


def parse_event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line of metrics.jsonl; None for a damaged line."""
    try:
        event = json.loads(line)  # parse_json would refuse a figure that is not finite
        at = event["step"] if "step" in event else event["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return event if type(at) is int else None
