"""The folder of a report: made beside its place, and moved there when it is complete.

REPORT/report.json lists its files, so that a folder with other files is never replaced.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.storage.atomic import TEMPORARY_PREFIX, new_temporary
from mealv2.storage.json_format import canonical_json, read_json

INDEX_NAME = "report.json"
_FORMAT = "mealv2 report"


def require_replaceable(folder: Path, name: str = "--output") -> None:
    """Raise ConfigError for a folder with files that no report wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{name} {folder} is a file; give another folder")
    known = _listed(folder)
    others = sorted(path for path in _files(folder) if path not in known)
    if others:
        raise ConfigError(
            f"{name} {folder} has files that are not of a report ({others[0]}, …); give another "
            "folder, or move them away"
        )


@contextmanager
def new_report(folder: Path, about: dict[str, Any]) -> Iterator[Path]:
    """Yield an empty folder to write a report to; it replaces the report in ``folder`` at the end.

    ``about`` is kept in report.json. After an error the earlier report stays. Raises ConfigError
    as ``require_replaceable``, OSError.
    """
    require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = new_temporary(folder)
    made.mkdir()
    try:
        yield made
        files = sorted([*map(str, _files(made)), INDEX_NAME])
        index = {"format": _FORMAT, **about, "files": files}
        (made / INDEX_NAME).write_text(canonical_json(index), encoding="utf-8")
        require_replaceable(folder)  # it took minutes
        _replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace(made: Path, folder: Path) -> None:
    """Give a new report its name; what had it goes, unless the rename fails."""
    if not folder.exists():
        made.rename(folder)
        return
    aside = new_temporary(folder)
    folder.rename(aside)
    try:
        made.rename(folder)
    except OSError:
        with suppress(OSError):
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _listed(folder: Path) -> set[str]:
    """Return the files of the report in a folder; none if there is no report."""
    try:
        index = read_json(folder / INDEX_NAME)
    except (OSError, ValueError):
        return set()
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        return set()
    files = index.get("files")
    return {str(name) for name in files} if isinstance(files, list) else set()


def _files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, but for temporary ones."""
    for path in folder.rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and not path.name.startswith(TEMPORARY_PREFIX):
            yield path.relative_to(folder).as_posix()
