"""Files that are whole under their final name or not there: temporary name, fsync, publish."""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"
SCRIPTS_NAME = "slurm"  # batch jobs keep their scripts there, in the folder that they fill
_SURROGATE = re.compile(r"\\u[dD]")


def content_of(folder: Path) -> list[str]:
    """Return the names in a folder, but for temporary files and the scripts that fill it."""
    names = sorted(path.name for path in folder.iterdir())
    return [n for n in names if not n.startswith(TEMPORARY_PREFIX) and n != SCRIPTS_NAME]


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and two-space indents: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_sha256(value: object) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises OSError, or ValueError where it is not JSON in UTF-8."""
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8; raises ValueError for all that ``canonical_json`` could not write.

    Such are texts nested too deep, numbers that are not finite, strings that are no Unicode.
    """
    text = data.decode("utf-8")
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {number[:20]}")
    return value


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write a file so that no reader ever sees a part of it; return whether it was put in place.

    A unique temporary file in the same folder, flush, fsync, then os.replace; with
    ``replace=False`` a hard link instead, so that the first whole file wins and False says another
    was there. Raises OSError (disk full, no permission), which names ``path``, and leaves nothing
    behind.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        elif not _link(temporary, path):
            return False
        _sync_folder(path.parent)
        return True
    except OSError as error:  # a full disk names no file, a failed rename the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if temporary.exists():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``path`` at the end, or is removed.

    For what is too large for the memory, or written by a library. Raises as write_whole.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _temporary(path: Path) -> Path:
    unique = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{unique}")


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: rename, which may replace an equal file
        temporary.replace(path)
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot sync a folder
        return
    finally:
        os.close(handle)
