"""JSON in one canonical form, its hash, and a strict parser."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

_SURROGATE = re.compile(r"\\u[dD]")


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and two-space indents: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_sha256(value: object) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises OSError, or ValueError if it is not JSON in UTF-8."""
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises ValueError for anything that ``canonical_json`` cannot write: text nested too deeply,
    numbers that are not finite, strings that are not Unicode.
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number[:20]}")
    return value
