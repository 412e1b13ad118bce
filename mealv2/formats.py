"""What the JSON files of `mealv2 pack` begin with: what they are, and in which version."""

from typing import Any

from mealv2.errors import DataError
from mealv2.files import parse_json

AGAIN = "run the same `mealv2 pack` again"
AFRESH = f"remove it and {AGAIN} into a new folder"


def checked_json(
    data: bytes, name: str, *, what: str, known: tuple[str, int], advice: str = AFRESH
) -> dict[str, Any]:
    """Return the JSON object of a file that says to be of a ``known`` format and version.

    Raises DataError, calling it ``name``, for one that is not ``what`` it should be, with
    ``advice``.
    """
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
