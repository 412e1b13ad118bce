"""Files behind URLs: read, fetched, put and listed, through fsspec or the output of a program.

Credentials are the client's own business (its environment variables and files); no message has any.
"""

import contextlib
import errno
import itertools
import posixpath
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from mealv2.errors import ConfigError, RemoteError
from mealv2.storage.urls import PIPE, shown

T = TypeVar("T")

_MAX_ATTEMPTS = 4  # of a transfer that breaks off; clients try some of their own
_RETRY_DELAY_S = 0.5  # before the second try, twice as long before each other
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
# what clients call that which differs between a file and one that takes its place
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "created")
_REFUSED = ("Credentials", "AccessKey", "Token", "Signature")  # in the names of clients' errors


class File(NamedTuple):
    """A file as a server describes it: its size in bytes, 0 where that is not said, and what tells
    it from one that takes its place, empty where nothing does.
    """

    size: int
    stamp: str


def read(url: str) -> bytes | None:
    """Return the bytes of a small file, None where there is none. Raises RemoteError."""
    with _as_remote_error(url, "read"):
        system, path = _system(url)
        try:
            return bytes(system.cat_file(path))
        except FileNotFoundError:
            _check_bucket(system, url, path)
            return None


def fetch(url: str, path: Path) -> None:
    """Write the bytes of a URL to a new file, whole or not at all.

    Tries again where a transfer breaks off. Raises RemoteError, ConfigError for a file that is not
    there, OSError where ``path`` cannot be written.
    """
    write = _run if url.startswith(PIPE) else _download
    _retry(url, lambda: write(url, path))


def info(url: str) -> File:
    """Return what a listing says of a file; raises as ``fetch``."""
    return _retry(url, lambda: _info(url))


def _retry(url: str, action: Callable[[], T]) -> T:
    """Do something, again where it breaks off; raises RemoteError at last."""
    for attempts in itertools.count(1):
        try:
            return action()
        except _InterruptedError as error:
            if attempts == _MAX_ATTEMPTS:
                what = "the program" if url.startswith(PIPE) else "the connection"
                raise RemoteError(
                    f"cannot read {shown(url)}: {error}, {attempts} times; nothing is lost: run "
                    f"the "
                    f"same command again when {what} is well"
                ) from None
            time.sleep(_RETRY_DELAY_S * 2 ** (attempts - 1))
    raise AssertionError("count never ends")


def upload(url: str, path: Path, *, replace: bool = False, damaged: File | None = None) -> bool:
    """Put a file where a URL says, in one step, so that nobody ever sees a part of it.

    The first one wins, and False says that another was there; ``damaged`` gives way if it is still
    that file, and with ``replace`` any does. S3 compares in the same step (If-None-Match,
    If-Match). Other clients may pass over that: there it is looked before, and read after, so that
    of two at the very same time the last one stays, and the first may not hear of it. Raises
    RemoteError.
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
            # whole, however large: s3fs has no condition for the end of several parts
            settings = {"IfMatch": damaged.stamp, "chunksize": path.stat().st_size + 1}
        try:
            system.put_file(str(path), target, **settings)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if damaged is None:
                raise
            damaged = None  # it was removed meanwhile
        except OSError as error:
            match _status(error):
                case 412:  # of a store that does not say which condition
                    return False
                case 501:
                    raise _ConditionsUnsupportedError from None
                case 409 if attempts < _MAX_ATTEMPTS:  # another one is writing
                    time.sleep(_RETRY_DELAY_S)
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
    may_ask = existing is None and "s3" not in system.protocol  # which has answered already
    try:
        system.put_file(str(path), target, **({"mode": "create"} if may_ask else {}))
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError):  # a client that knows no such mode
        system.put_file(str(path), target)
    return bytes(system.cat_file(target)) == path.read_bytes()


def listing(url: str) -> dict[str, File]:
    """Return the files right in a folder by name; none where there is no such folder.

    Raises RemoteError, ConfigError where the bucket is missing or the server lists nothing.
    """
    with _as_remote_error(url, "list"):
        system, path = _system(url)
        if "http" in system.protocol:
            raise ConfigError(
                f"a web server does not say what is in {shown(url)}; name the files, such as "
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


class _InterruptedError(Exception):
    """A transfer that came to an end too early; another try may succeed."""


class _ConditionsUnsupportedError(Exception):
    """A store that does not know "unless it is there"."""


def _status(error: OSError) -> int:
    """Return the HTTP status that an error of an S3 client stands for, 0 for none."""
    response = getattr(error.__cause__, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _system(url: str) -> tuple[Any, str]:
    """Return fsspec's client for a URL, and what it calls the file."""
    try:
        # without a cache: other machines put files there too
        system, path = url_to_fs(url, use_listings_cache=False)
    except ImportError:
        kind = urlsplit(url).scheme
        package = f"'mealv2[{_EXTRAS[kind]}]'" if kind in _EXTRAS else "fsspec's package for it"
        raise ConfigError(f"reading {kind}:// needs more: pip install {package}") from None
    except ValueError as error:
        raise ConfigError(f"{shown(url)}: {str(error).splitlines()[0]}") from None
    return system, path


def _info(url: str) -> File:
    with _as_remote_error(url, "read"):
        system, path = _system(url)
        try:
            entry = system.info(path)
        except FileNotFoundError as error:
            if getattr(error.__cause__, "status", 404) != 404 or _is_connection(error.__cause__):
                raise _InterruptedError(_reason(error.__cause__ or error)) from None
            _check_bucket(system, url, path)
            raise ConfigError(f"there is no {shown(url)}") from None
    return _file_of(entry)


def _download(url: str, path: Path) -> None:
    size = _info(url).size
    with _as_remote_error(url, "read"):
        system, remote = _system(url)
        with _as_interrupted():
            system.get_file(remote, str(path))
    if size and (got := path.stat().st_size) != size:
        raise _InterruptedError(f"{got} of {size} bytes came")


def _is_connection(error: BaseException | None) -> bool:
    """Return whether a client gave up for want of a connection, and not of the file."""
    return error is not None and "Connect" in type(error).__name__


def _run(url: str, path: Path) -> None:
    """Write what a program prints; a shell takes the command as it is."""
    command = url.removeprefix(PIPE).strip()
    with path.open("wb") as output:
        done = subprocess.run(command, shell=True, stdout=output, stderr=subprocess.PIPE)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _InterruptedError(f"it ended with code {done.returncode}{': ' if last else ''}{last}")


@contextlib.contextmanager
def _as_interrupted() -> Iterator[None]:
    """Turn what clients raise when a connection is cut into one error."""
    try:
        yield
    except (PermissionError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise  # of the file that is written
        raise _InterruptedError(_reason(error)) from None
    except Exception as error:  # each client has kinds of its own: botocore's, aiohttp's
        if any(word in type(error).__name__ for word in _REFUSED):
            raise
        raise _InterruptedError(_reason(error)) from None


@contextlib.contextmanager
def _as_remote_error(url: str, what: str) -> Iterator[None]:
    """Turn what clients raise into a RemoteError that says what to do."""
    try:
        yield
    except (RemoteError, ConfigError, _InterruptedError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of this machine's own file
        refused = isinstance(error, PermissionError) or any(
            word in type(error).__name__ for word in _REFUSED
        )
        advice = (
            "check the credentials, which are taken from where the client always has them (for S3 "
            "the environment or ~/.aws)"
            if refused
            else "run the same command again when the connection is well"
        )
        raise RemoteError(f"cannot {what} {shown(url)}: {_reason(error)}; {advice}") from None


def _reason(error: BaseException) -> str:
    """Return why something failed, in a line without addresses that may hold secrets."""
    text = str(error).strip().split("\n")[0]
    # their texts quote the request: signed URLs, keys
    return text if text and len(text) < 120 and "://" not in text else type(error).__name__


def _check_bucket(system: Any, url: str, path: str) -> None:
    """Raise ConfigError where a file is missing because its whole bucket is."""
    if "s3" not in system.protocol:
        return
    bucket = path.partition("/")[0]
    if not system.exists(bucket):
        raise ConfigError(f"{shown(url)}: there is no bucket {bucket} for these credentials")
