"""Files behind URLs: read, fetch, upload and list, through fsspec or the output of a program.

The clients find credentials themselves (environment variables, files). No message contains any.
"""

import contextlib
import errno
import itertools
import posixpath
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from mealv2.errors import ConfigError, RemoteError
from mealv2.storage import transfer, web, web_ranges
from mealv2.storage.transfer import (
    File,
    TransferInterruptedError,
    can_retry,
    reason,
    retry,
    status_text,
)
from mealv2.storage.urls import PIPE, shown

_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
# the clients' names for a value that changes when a file is replaced
_STAMPS = (
    "ETag",
    "etag",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "created",
    "blob_id",
)
_DENIED = ("Credentials", "AccessKey", "Token", "Signature")  # in the class names of errors


def read(url: str) -> bytes | None:
    """Return the bytes of a small file, or None if it is missing. Raises RemoteError."""
    if _is_web(url):
        return retry(url, lambda: web.read(_system(url)[0], url))
    with _as_remote_error(url, "read"):
        system, path = _system(url)
        try:
            return bytes(system.cat_file(path))
        except FileNotFoundError:
            _check_bucket(system, url, path)
            return None


def fetch(url: str, path: Path) -> None:
    """Download a URL to a new file, with retries.

    Raises RemoteError, ConfigError if the file is missing, OSError if ``path`` is not writable.
    """
    if _is_web(url):
        retry(url, web.Download(_system(url)[0], url, path))
        return
    write = _run if url.startswith(PIPE) else _download
    retry(url, lambda: write(url, path))


def read_parts(parts: Sequence[web_ranges.Part], found: dict[web_ranges.Part, bytes]) -> None:
    """Read parts of files on a web server into ``found``, several at a time.

    What ``found`` has is not read again, also after an error: it keeps what was received. Raises
    RemoteError, also for a file of another size and a server without range requests, ConfigError
    for a missing file.
    """
    if parts:
        url = parts[0].url
        retry(url, web_ranges.Reading(_system(url)[0], parts, found))


def info(url: str) -> File:
    """Return the size and stamp of a file; raises as ``fetch``."""
    if _is_web(url):
        return retry(url, lambda: web.info(_system(url)[0], url))
    return retry(url, lambda: _info(url))


def upload(url: str, path: Path, *, replace: bool = False, damaged: File | None = None) -> bool:
    """Upload a file in one step; return whether it was stored.

    The first upload wins: False means that another file exists. ``damaged`` is a file to replace if
    it is unchanged; ``replace`` replaces any file. S3 compares atomically (If-None-Match,
    If-Match). Other clients check the file before the upload and read it after: of two simultaneous
    uploads the last one stays, and the first may not notice. Raises RemoteError.
    """
    with _as_remote_error(url, "write"):
        system, target = _system(url)
        if replace:
            system.put_file(str(path), target)
            return True
        if "s3" in system.protocol and (damaged is None or damaged.stamp):
            with contextlib.suppress(_ConditionsUnsupportedError):
                return _upload_if_unchanged(system, target, path, damaged)
        return _upload_and_compare(system, target, path, damaged)


def _upload_if_unchanged(system: Any, target: str, path: Path, damaged: File | None) -> bool:
    for attempts in itertools.count(1):
        settings: dict[str, Any] = {"mode": "create"}
        if damaged is not None:
            # a single part of any size: s3fs has no condition for multipart uploads
            settings = {"IfMatch": damaged.stamp, "chunksize": path.stat().st_size + 1}
        try:
            system.put_file(str(path), target, **settings)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if damaged is None:
                raise
            damaged = None  # it was removed since
        except OSError as error:
            match _status(error):
                case 412:  # some stores report no more than a failed condition
                    return False
                case 501:
                    raise _ConditionsUnsupportedError from None
                case 409 if attempts < transfer.MAX_ATTEMPTS:  # a concurrent upload
                    time.sleep(transfer.RETRY_DELAY_S)
                case _:
                    raise
        else:
            return True
    raise AssertionError("count never ends")


def _upload_and_compare(system: Any, target: str, path: Path, damaged: File | None) -> bool:
    try:
        existing = _file_of(system.info(target))
    except FileNotFoundError:
        existing = None
    if existing is not None and existing != damaged:
        return False
    may_ask = existing is None and "s3" not in system.protocol  # S3 has just rejected it
    try:
        system.put_file(str(path), target, **({"mode": "create"} if may_ask else {}))
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError):  # the client has no such mode
        system.put_file(str(path), target)
    return bytes(system.cat_file(target)) == path.read_bytes()


def listing(url: str) -> dict[str, File]:
    """Return the files of a folder by name, without subfolders; empty if the folder is missing.

    Raises RemoteError, ConfigError if the bucket is missing or the server has no listings.
    """
    with _as_remote_error(url, "list"):
        system, path = _system(url)
        if _is_web(url):
            raise ConfigError(
                f"a web server cannot list {shown(url)}; name the files, for example "
                f"{shown(url).rstrip('/')}/train-{{000000..000146}}.tar"
            )
        try:
            found = system.ls(path.rstrip("/"), detail=True)
        except FileNotFoundError:
            _check_bucket(system, url, path)
            return {}
    return {
        posixpath.basename(entry["name"]): _file_of(entry)
        for entry in found
        if entry["type"] == "file" and not entry["name"].endswith("/")
    }


def _file_of(entry: dict[str, Any]) -> File:
    stamp = next((entry[name] for name in _STAMPS if entry.get(name)), "")
    return File(int(entry.get("size") or 0), str(stamp))


# --- clients ----------------------------------------------------------------------------------


class _ConditionsUnsupportedError(Exception):
    """The store has no conditional writes."""


def _status(error: BaseException) -> int:
    """Return the HTTP status of an S3 client's error, or 0."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    found = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    return int(found.get("HTTPStatusCode", 0))


def _is_web(url: str) -> bool:
    return urlsplit(url).scheme.lower() in ("http", "https")


def _system(url: str) -> tuple[Any, str]:
    """Return fsspec's client for a URL, and the client's path of the file."""
    try:
        # no cache of listings: other machines upload files as well
        settings = {"get_client": web.client} if _is_web(url) else {}
        system, path = url_to_fs(url, use_listings_cache=False, **settings)
    except ImportError:
        kind = urlsplit(url).scheme
        package = f"'mealv2[{_EXTRAS[kind]}]'" if kind in _EXTRAS else "fsspec's package for it"
        raise ConfigError(f"{kind}:// needs another package: pip install {package}") from None
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: {str(error).splitlines()[0]}") from None
    return system, path


def _info(url: str) -> File:
    with _as_remote_error(url, "read"):
        system, path = _system(url)
        try:
            entry = system.info(path)
        except FileNotFoundError:
            _check_bucket(system, url, path)
            raise ConfigError(f"{shown(url)} does not exist") from None
    return _file_of(entry)


def _download(url: str, path: Path) -> None:
    size = _info(url).size
    with _as_remote_error(url, "read"):
        system, remote = _system(url)
        with _as_interrupted():
            system.get_file(remote, str(path))
    if size and (got := path.stat().st_size) != size:
        raise TransferInterruptedError(f"received {got} of {size} bytes")


def _run(url: str, path: Path) -> None:
    """Write the output of a program; the shell runs the command as it is."""
    command = url.removeprefix(PIPE).strip()
    with path.open("wb") as output:
        done = subprocess.run(command, shell=True, stdout=output, stderr=subprocess.PIPE)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise TransferInterruptedError(
            f"it exits with code {done.returncode}{': ' if last else ''}{shown(PIPE + last)[5:]}"
        )


@contextlib.contextmanager
def _as_interrupted() -> Iterator[None]:
    """Convert the clients' errors for a lost connection into TransferInterruptedError."""
    try:
        yield
    except (PermissionError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise  # an error of the local file
        if (status := _status(error)) and not can_retry(status):
            raise
        raise TransferInterruptedError(reason(error)) from None
    except Exception as error:  # clients have their own classes: botocore, aiohttp
        if any(word in type(error).__name__ for word in _DENIED):
            raise
        raise TransferInterruptedError(reason(error)) from None


@contextlib.contextmanager
def _as_remote_error(url: str, what: str) -> Iterator[None]:
    """Convert the clients' errors into a RemoteError with advice."""
    try:
        yield
    except (RemoteError, ConfigError, TransferInterruptedError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # an error of a local file
        advice = "check the connection and run the same command again"
        if isinstance(error, PermissionError) or any(w in type(error).__name__ for w in _DENIED):
            advice = "check the credentials (for S3 in the environment or ~/.aws)"
        status = f"{status_text(_status(error))}: " if _status(error) else ""
        raise RemoteError(
            f"cannot {what} {shown(url)}: {status}{reason(error)}; {advice}"
        ) from None


def _check_bucket(system: Any, url: str, path: str) -> None:
    """Raise ConfigError if the bucket of a missing file does not exist."""
    if "s3" not in system.protocol:
        return
    bucket = path.partition("/")[0]
    if not system.exists(bucket):
        raise ConfigError(f"{shown(url)}: there is no bucket {bucket} for these credentials")
