"""Files that are whole under their final name or not there: temporary name, fsync, publish."""

import contextlib
import hashlib
import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


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
    return json.loads(path.read_bytes().decode("utf-8"))


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> bool:
    """Write a file so that no reader ever sees a part of it; return whether it was put in place.

    A unique temporary file in the same folder, flush, fsync, then os.replace; with
    ``replace=False`` a hard link instead, so that the first whole file wins and False says another
    was there. Raises OSError (disk full, no permission) and leaves nothing behind.
    """
    unique = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{unique}")
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
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


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
