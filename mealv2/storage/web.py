"""Files of web servers. A time limit applies to each read, none to a whole request.

A download that is cut continues with a Range request if the server can tell that the file is the
same (RFC 9110, If-Range); otherwise it starts again. Redirects are followed by aiohttp, which sends
a password to no other server.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync

from mealv2.errors import RemoteError
from mealv2.storage.regular_files import MAX_BYTES
from mealv2.storage.transfer import File, TransferInterruptedError, reason, status_error
from mealv2.storage.urls import shown

CONNECT_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 60.0
FIRST_TIMEOUT_S = 5.0  # of a server that has not yet responded: it may be out of reach
MAX_READ_BYTES = MAX_BYTES  # as of a local file
_CHUNK = 1 << 20
_RESPONDED: set[str] = set()  # servers
_DENIED = (401, 403)
# a server or a signed URL may allow GET and not HEAD
_NO_HEAD = (400, 401, 403, 405, 501)


async def client(**settings: Any) -> Any:
    """Return the session of fsspec's client; proxies come from the environment."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
    )
    return aiohttp.ClientSession(timeout=timeout, trust_env=True, **settings)


def read(system: Any, url: str) -> bytes | None:
    """Return the bytes of a file of at most MAX_READ_BYTES; None if it is missing.

    A file that the server denies counts as missing: a store whose files cannot be listed denies
    every file that it does not have.
    """
    data: bytes | None = sync(system.loop, _read, system, url)
    return data


def info(system: Any, url: str) -> File:
    """Return the size and stamp of a file."""
    file: File = sync(system.loop, _info, system, url)
    return file


class Download:
    """A download to a file; another call continues it."""

    def __init__(self, system: Any, url: str, path: Path) -> None:
        self._system = system
        self._url = url
        self._path = path
        self._version = ""  # of the part that has been written, for If-Range

    def __call__(self) -> None:
        """Download what is not yet there. Raises TransferInterruptedError, MealError, OSError."""
        sync(self._system.loop, self._get)

    async def _get(self) -> None:
        start = self._path.stat().st_size if self._version else 0
        headers = {"Range": f"bytes={start}-", "If-Range": self._version} if start else {}
        got = start
        try:
            async with request(self._system, self._url, "GET", headers) as response:
                if start and not self._continues(response, start):
                    self._version = ""
                    raise TransferInterruptedError("the file has changed")
                if response.status != 206:
                    got, self._version = 0, _version(response.headers)
                total = _size(response.headers)
                with self._path.open("ab" if got else "wb") as file:
                    while chunk := await response.content.read(_CHUNK):
                        got += file.write(chunk)
            if total and got != total:
                raise TransferInterruptedError(f"received {got} of {total} bytes")
        except TransferInterruptedError as error:
            error.kept = max(0, got - start) if self._version else 0
            raise

    def _continues(self, response: Any, start: int) -> bool:
        """Return whether a response is the rest of the part, or the file from its start."""
        if response.status != 206:
            return bool(response.status == 200)
        at = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        return at == str(start) and _version(response.headers) in ("", self._version)


async def _read(system: Any, url: str) -> bytes | None:
    async with request(system, url, "GET", allowed=(404, 410, *_DENIED)) as response:
        if not response.ok:
            return None
        data, total = bytearray(), _size(response.headers)
        while total <= MAX_READ_BYTES and (chunk := await response.content.read(_CHUNK)):
            data += chunk
            total = max(total, len(data))
    if total > MAX_READ_BYTES:
        raise RemoteError(
            f"cannot read {shown(url)}: it has {total} bytes or more, at most {MAX_READ_BYTES} are "
            "read; replace it by the right file"
        )
    return bytes(data)


async def _info(system: Any, url: str) -> File:
    async with request(system, url, "HEAD", allowed=_NO_HEAD) as response:
        if response.ok and _size(response.headers):
            return _file(response.headers)
    async with request(system, url, "GET", {"Range": "bytes=0-0"}, (416,)) as response:
        return _file(response.headers)  # the body is not read


@contextlib.asynccontextmanager
async def request(
    system: Any,
    url: str,
    method: str,
    headers: Mapping[str, str] | None = None,
    allowed: tuple[int, ...] = (),
) -> AsyncIterator[Any]:
    """Send a request; yield the response if its status is a success or allowed.

    Raises RemoteError if a server that has not yet responded cannot be reached.
    """
    from aiohttp import (
        ClientConnectorDNSError,
        ClientConnectorError,
        ClientError,
        ClientSSLError,
        InvalidURL,
        TooManyRedirects,
    )

    server = urlsplit(url).netloc
    settings = {} if server in _RESPONDED else {"timeout": _first_timeout()}
    sent = {"Accept-Encoding": "identity", **(headers or {})}  # a size is that of the file
    try:
        session = await system.set_session()
        sending = session.request(method, system.encode_url(url), headers=sent, **settings)
        async with sending as response:
            _RESPONDED.add(server)
            if not response.ok and response.status not in allowed:
                raise status_error(url, response.status)
            yield response
    except (TimeoutError, ClientConnectorDNSError) as error:
        if server not in _RESPONDED:
            late = isinstance(error, TimeoutError)
            why = f"no response in {FIRST_TIMEOUT_S:g} s" if late else "its name is not known"
            advice = "check the network and the URL"
            raise RemoteError(f"cannot reach the server of {shown(url)}: {why}; {advice}") from None
        raise TransferInterruptedError(f"no data for {READ_TIMEOUT_S:g} s") from None
    except (ClientSSLError, InvalidURL, TooManyRedirects) as error:  # another attempt fails as well
        raise RemoteError(f"cannot read {shown(url)}: {reason(error)}; check the URL") from None
    except ClientConnectorError as error:
        code = error.os_error.errno  # none where several addresses failed
        why = os.strerror(code) if code else "no connection"
        raise TransferInterruptedError(f"{error.host}:{error.port}: {why}") from None
    except (ClientError, ConnectionError) as error:
        raise TransferInterruptedError(reason(error)) from None


def _first_timeout() -> Any:
    from aiohttp import ClientTimeout

    limit_s = min(FIRST_TIMEOUT_S, READ_TIMEOUT_S)
    return ClientTimeout(total=None, connect=limit_s, sock_read=limit_s)


def _file(headers: Mapping[str, str]) -> File:
    return File(_size(headers), headers.get("ETag") or headers.get("Last-Modified") or "")


def _size(headers: Mapping[str, str]) -> int:
    """Return the size of the file, also from a response that has a part of it; 0 if unknown."""
    text = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and text.isascii() else 0


def _version(headers: Mapping[str, str]) -> str:
    """Return what If-Range compares; empty if the server has nothing that is exact."""
    tag = headers.get("ETag", "")
    return tag if tag.startswith('"') else headers.get("Last-Modified", "") if not tag else ""
