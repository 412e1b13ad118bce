"""The JSON files of `mealv2 pack`: their format and version, and a SHA-256 of themselves."""

import json
import re
from hashlib import sha256
from typing import Any

from mealv2.errors import DataError
from mealv2.storage.json_format import parse_json

ADVICE_RERUN = "run the same `mealv2 pack` again"
ADVICE_RECREATE = f"remove it and {ADVICE_RERUN} into a new folder"
_SHA256 = "index_sha256"  # the field with the hash
_ZEROS = "0" * 64


def own_sha256(data: bytes, field: str) -> str | None:
    """Return the SHA-256 (hex) that a JSON text says is its own in ``field``; None without one."""
    found = _pattern(field).search(data)
    return None if found is None else found[2].decode()


def with_own_sha256(data: bytes, field: str) -> bytes:
    """Return a JSON text with its own SHA-256 in ``field``: that of the text with zeros there."""
    pattern = _pattern(field)
    blank = pattern.sub(rb"\g<1>" + _ZEROS.encode() + b'"', data, count=1)
    return pattern.sub(rb"\g<1>" + sha256(blank).hexdigest().encode() + b'"', blank, count=1)


def sealed_json(known: tuple[str, int], value: dict[str, Any]) -> bytes:
    """Return a file of a ``known`` format and version: compact JSON, the same for equal values."""
    value = {"format": known[0], "format_version": known[1], _SHA256: _ZEROS, **value}
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return with_own_sha256((text + "\n").encode(), _SHA256)


def checked_json(
    data: bytes, name: str, *, what: str, known: tuple[str, int], advice: str = ADVICE_RECREATE
) -> dict[str, Any]:
    """Return the JSON object of a file that ``sealed_json`` made.

    Raises DataError, calling it ``name``, for one that is not ``what`` it should be, with
    ``advice``.
    """
    own = own_sha256(data, _SHA256)
    if own is None:
        raise DataError(f"{name} is not {what}; {advice}")
    if with_own_sha256(data, _SHA256) != data:
        raise DataError(f"{name} is damaged: it fails its own SHA-256; {advice}")
    try:
        value = parse_json(data)
    except ValueError as error:
        raise DataError(f"cannot read {name}: {error}; {advice}") from None
    if not isinstance(value, dict) or value.get("format") != known[0]:
        raise DataError(f"{name} is not {what}; {advice}")
    if value.get("format_version") != known[1]:
        raise DataError(
            f"{name} has format version {value.get('format_version')!r}; this mealv2 knows version "
            f"{known[1]}: use a later one, or {advice}"
        )
    return value


def _pattern(field: str) -> re.Pattern[bytes]:
    return re.compile(rb'("%b": ?")([0-9a-f]{64})"' % field.encode())
