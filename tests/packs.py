"""What tests of `mealv2 pack` share: files but for temporary ones, and errors of one line."""

from pathlib import Path

from conftest import Result
from mealv2.storage.atomic import TEMPORARY_PREFIX


def final(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that are no temporary ones."""
    return {n: d for n, d in files.items() if not Path(n).name.startswith(TEMPORARY_PREFIX)}


def one_line(result: Result, code: int, *named: str) -> None:
    """Check that a command failed with one line that has some texts in it."""
    assert result.code == code, result.stderr
    assert result.stderr.startswith("mealv2: ")
    assert result.stderr.count("\n") == 1
    for text in named:
        assert text in result.stderr
