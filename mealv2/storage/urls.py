"""Locations of data: a local path, or a URL of an object store, a web server or a program."""

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from mealv2.errors import ConfigError

Location = Path | str  # a str is a URL

_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_IN_COMMAND = re.compile(r"://(?:[^\s'\"/@]*@)?([^\s'\"?#|;<>()]*)(?:[?#][^\s'\"|;<>()]*)?")
# a folder can have this name, but the user probably means a store
_HALF = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf|https?):(?!//)", re.IGNORECASE)
_FILE = "file://"
PIPE = "pipe:"


def located(text: str | Path) -> Location:
    """Return a URL as text and anything else as a path, also a ``file:`` URL.

    fsspec does not write local files atomically. Raises ConfigError for a malformed URL.
    """
    if isinstance(text, str):
        _check_url(text)
    if isinstance(text, str) and text.startswith(_FILE):
        return Path(unquote(text.removeprefix(_FILE).removeprefix("localhost")))
    return text if is_url(text) else Path(text)


def _check_url(text: str) -> None:
    """Raise ConfigError for a URL without two slashes, host, bucket or program."""
    kind, _, rest = text.partition(":")
    if _HALF.match(text):
        meant = shown(f"{kind}://{rest.lstrip('/')}")
        raise ConfigError(f"the URL needs two slashes after {kind}: write {meant}")
    if text.startswith(_FILE) or not is_url(text):
        return
    if text.startswith(PIPE):
        if not rest.strip():
            raise ConfigError("pipe: has no command; write pipe:COMMAND")
    elif not rest.removeprefix("//").partition("/")[0].rpartition("@")[2]:
        what = "host" if kind.lower() in ("http", "https") else "bucket"
        raise ConfigError(f"the URL has no {what}; write {kind}://{what.upper()}/…")


def is_url(location: object) -> bool:
    """Return whether a location is a URL: ``s3://…``, ``https://…``, ``pipe:COMMAND``, …"""
    return isinstance(location, str) and _URL.match(location) is not None


def shown(location: Location) -> str:
    """Return a location for messages: a URL without passwords and signatures."""
    if not isinstance(location, str):
        return str(location)
    if location.startswith(PIPE):
        return _IN_COMMAND.sub(r"://\1", location)
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def beside(url: str, name: str) -> str:
    """Return the URL of another file in a file's folder."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=posixpath.join(posixpath.dirname(parts.path), name)))


def within(url: str, name: str) -> str:
    """Return the URL of a file in a folder."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def file_name(url: str) -> str:
    """Return the last part of a URL's path."""
    return posixpath.basename(urlsplit(url).path)
