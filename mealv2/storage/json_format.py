"""JSON in one canonical form, its hash, and a strict parser."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from mealv2.errors import DataError
from mealv2.storage.regular_files import read_regular

_SEAL = "index_sha256"  # the field in which a sealed file has its own hash
_ZEROS = "0" * 64
_SURROGATE = re.compile(r"\\u[dD]")


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and two-space indents: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_sha256(value: object) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises OSError, or ValueError if it is not JSON in UTF-8."""
    return parse_json(read_regular(path))


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises ValueError for anything that ``canonical_json`` cannot write: text nested too deeply,
    numbers that are not finite, strings that are not Unicode.
    """
    text = data.decode("utf-8-sig")
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


def own_sha256(data: bytes, field: str) -> str | None:
    """Return the hash (hex) in a JSON text's ``field``, None if it has no such field."""
    found = _hash_field(field).search(data)
    return None if found is None else found[2].decode()


def with_own_sha256(data: bytes, field: str) -> bytes:
    """Return a JSON text with its own SHA-256 in ``field``, computed with 64 zeros there."""
    pattern = _hash_field(field)
    blank = pattern.sub(rb"\g<1>" + _ZEROS.encode() + b'"', data, count=1)
    return pattern.sub(
        rb"\g<1>" + hashlib.sha256(blank).hexdigest().encode() + b'"', blank, count=1
    )


def _hash_field(field: str) -> re.Pattern[bytes]:
    return re.compile(rb'("%b": ?")([0-9a-f]{64})"' % field.encode())


def sealed_json(known: tuple[str, int], value: dict[str, Any]) -> bytes:
    """Return compact JSON with its format, version and own SHA-256: equal values, equal bytes."""
    value = {"format": known[0], "format_version": known[1], _SEAL: _ZEROS, **value}
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return with_own_sha256((text + "\n").encode(), _SEAL)


def parse_sealed_json(
    data: bytes, name: str, *, what: str, known: tuple[str, int], advice: str
) -> dict[str, Any]:
    """Parse what ``sealed_json`` returned.

    Raises DataError, which names the file ``name``, what it should be and ``advice``.
    """
    if own_sha256(data, _SEAL) is None:
        raise DataError(f"{name} is not {what}; {advice}")
    if with_own_sha256(data, _SEAL) != data:
        raise DataError(f"{name} is damaged: its SHA-256 does not match; {advice}")
    try:
        value = parse_json(data)
    except ValueError as error:
        raise DataError(f"cannot read {name}: {error}; {advice}") from None
    if not isinstance(value, dict) or value.get("format") != known[0]:
        raise DataError(f"{name} is not {what}; {advice}")
    if value.get("format_version") != known[1]:
        raise DataError(
            f"{name} has format version {value.get('format_version')!r}; this mealv2 reads version "
            f"{known[1]}: install a later one, or {advice}"
        )
    return value
