"""Locations of data: a local path, or a URL of an object store, a web server or a program.

A URL can have secrets: a user name with a password, or a signature or token in its query. Files and
messages get ``without_secrets`` or ``shown``, requests get the URL itself.
"""

import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from mealv2.errors import ConfigError

Location = Path | str  # a str is a URL

_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
# the next URL of a list, NAME=URL,NAME=URL, and a parameter of a query with its value
_NEXT_URL = re.compile(r"(,(?=(?:[^,=:/?]*=)?[A-Za-z][A-Za-z0-9+.-]*://))")
_PARAMETER = re.compile(r"([?&;#]([^=&;?#]*)=)([^&;,#\s]+)")
# a URL in a command: user and password, host and path, query and fragment
_IN_COMMAND = re.compile(r"://([^\s'\"/@]*@)?([^\s'\"?#|;<>()]*)([?#][^\s'\"|;<>()]*)?")
# options and headers of a command with a secret; a variable of the shell is none
_SECRET_WORD = re.compile(
    r"""((?:authorization|[a-z-]*(?:token|api-?key|secret)):\s*(?:(?:bearer|basic|token)\s+)?+
    |(?<!\S)(?:-u|--user|--password|--http-password|--token|--oauth2-bearer)[\s=]\s*["']?)
    (?!["']?\$)[^\s'"]+""",
    re.IGNORECASE | re.VERBOSE,
)
_VARIABLE = re.compile(r"(?:\$(?:\w+|\{\w+\})|:)+@")
# in the name of a parameter: a signature or key, of S3, GCS, Azure, CloudFront and others
_SECRET_PARAMETER = re.compile(
    r"""sig$|signature|token|secret|passw|pwd|credential|auth|jwt|(api|access|private)[_-]?key
    |^key$|key-pair-id|^x-amz-|^x-goog-|^policy$|session""",
    re.IGNORECASE | re.VERBOSE,
)
# a folder can have this name, but the user probably means a store
_HALF = re.compile(r"(s3a?|gs|gcs|az|abfss?|hf|https?):(?!//)", re.IGNORECASE)
_FILE = "file://"
PIPE = "pipe:"
CREDENTIALS_VARIABLE = "MEALV2_URL_CREDENTIALS"  # pipeline.runtime.env reads it


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
        return _IN_COMMAND.sub(r"://\2", _SECRET_WORD.sub(r"\1…", location))
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def without_secrets(location: str) -> str:
    """Return a URL without user, password, and a query that has a signature or token.

    In a command, variables of the shell stay: they are no secrets.
    """
    if location.startswith(PIPE):
        return _IN_COMMAND.sub(_public_part, _SECRET_WORD.sub(r"\1…", location))
    parts = urlsplit(location)
    query = "" if _has_secret(parts.query) else parts.query
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, query, parts.fragment))


def word_without_secrets(word: str) -> str:
    """Return a word of a command line, such as ``NAME=URL`` or a list of URLs, without secrets."""
    before, pipe, command = word.partition(PIPE)
    cleaned = "".join(map(_item_without_secrets, _NEXT_URL.split(before)))
    # what the list did not show as a query, such as after a comma within one
    cleaned = _PARAMETER.sub(_without_value, cleaned)
    return cleaned + (without_secrets(pipe + command) if pipe else "")


def _item_without_secrets(item: str) -> str:
    """Return NAME=URL or a URL without its secrets; other text as it is."""
    if is_url(item):
        return without_secrets(item)
    name, equals, url = item.partition("=")
    return f"{name}={without_secrets(url)}" if equals and is_url(url) else item


def _without_value(found: re.Match[str]) -> str:
    return f"{found[1]}…" if _has_secret(f"{found[2]}={found[3]}") else found[0]


def _public_part(found: re.Match[str]) -> str:
    user, path, query = found[1] or "", found[2], found[3] or ""
    kept = user if _VARIABLE.fullmatch(user) else ""
    return f"://{kept}{path}{'' if _has_secret(query[1:]) else query}"


def _has_secret(query: str) -> bool:
    """Return whether a query has a secret; one that is a variable of the shell is none."""
    return any(
        _SECRET_PARAMETER.search(unquote(name)) and not value.startswith("$")
        for name, _, value in (part.partition("=") for part in re.split("[&;]", query))
    )


def with_secrets(url: str, known: Iterable[str]) -> str:
    """Return a URL with the user, password and query of the known URL that is nearest above it.

    A known URL has the same scheme and host, and its path is a folder above, or the path itself.
    What the URL has of its own stays.
    """
    parts = urlsplit(url)
    if url.startswith(PIPE) or "@" in parts.netloc:
        return url
    matching = [
        (len(given.path), given)
        for given in map(urlsplit, known)
        if (given.scheme, given.netloc.rpartition("@")[2]) == (parts.scheme, parts.netloc)
        and (parts.path == given.path or parts.path.startswith(f"{given.path.rstrip('/')}/"))
    ]
    if not matching:
        return url
    _, found = max(matching, key=lambda item: item[0])
    return urlunsplit(parts._replace(netloc=found.netloc, query=parts.query or found.query))


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
