"""Where data lies: a path of this machine, or a URL of object storage, a web server, a program."""

import posixpath
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from mealv2.errors import ConfigError

Location = Path | str  # a path; text is a URL

_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_IN_COMMAND = re.compile(r"://(?:[^\s'\"/@]*@)?([^\s'\"?#|;<>()]*)(?:[?#][^\s'\"|;<>()]*)?")
# a folder may be called so, but who types it means a store
_HALF = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf|https?):(?!//)", re.IGNORECASE)
_FILE = "file://"
PIPE = "pipe:"


def located(text: str | Path) -> Location:
    """Return a URL as text, anything else as a path: a ``file:`` URL too, for fsspec puts files
    there in pieces and over others.

    Raises ConfigError for what was to be a URL and is none.
    """
    if isinstance(text, str):
        _check_url(text)
    if isinstance(text, str) and text.startswith(_FILE):
        return Path(unquote(text.removeprefix(_FILE).removeprefix("localhost")))
    return text if is_url(text) else Path(text)


def _check_url(text: str) -> None:
    """Raise ConfigError for a URL that lacks a slash, or what is behind its slashes."""
    kind, _, rest = text.partition(":")
    if _HALF.match(text):
        meant = shown(f"{kind}://{rest.lstrip('/')}")
        raise ConfigError(f"a URL has two slashes behind {kind}: — {meant}")
    if text.startswith(_FILE) or not is_url(text):
        return
    if text.startswith(PIPE):
        if not rest.strip():
            raise ConfigError("pipe: names no program; give pipe:COMMAND")
    elif not rest.removeprefix("//").partition("/")[0].rpartition("@")[2]:
        what = "host" if kind.lower() in ("http", "https") else "bucket"
        raise ConfigError(f"a URL names no {what}; give {kind}://{what.upper()}/…")


def is_url(location: object) -> bool:
    """Return whether a place is a URL: ``s3://…``, ``https://…``, ``pipe:COMMAND``, …"""
    return isinstance(location, str) and _URL.match(location) is not None


def shown(location: Location) -> str:
    """Return a place as messages name it: without what a URL has of passwords and signatures."""
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
