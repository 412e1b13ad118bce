"""Parts of files on a web server, by range requests, some at a time.

Ranges that follow each other in a file are one request.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fsspec.asyn import sync

from mealv2.errors import MealError, RemoteError
from mealv2.storage import web
from mealv2.storage.transfer import TransferInterruptedError
from mealv2.storage.urls import shown

MAX_REQUESTS = 16  # at a time
_MAX_REQUEST = 8 << 20  # bytes; ranges that would make a longer request are requests of their own
_NOT_SATISFIABLE = 416


class Part(NamedTuple):
    """``size`` bytes at ``offset`` of a file that has ``file_size`` bytes."""

    url: str
    offset: int
    size: int
    file_size: int


class Reading:
    """Reads parts of files into ``found``; another call reads those that are not yet there."""

    def __init__(self, system: Any, parts: Sequence[Part], found: dict[Part, bytes]) -> None:
        self._system = system
        self._parts = parts
        self._found = found

    def __call__(self) -> None:
        """Read the parts. Raises TransferInterruptedError, RemoteError, ConfigError."""
        left = [part for part in dict.fromkeys(self._parts) if part not in self._found]
        if left:
            sync(self._system.loop, self._read, list(_requests(sorted(left))))

    async def _read(self, requests: Sequence[Sequence[Part]]) -> None:
        """Send requests; the first failure ends those that have not started."""
        slots, failures = asyncio.Semaphore(MAX_REQUESTS), list[Exception]()
        received = 0

        async def read(parts: Sequence[Part]) -> None:
            nonlocal received
            async with slots:
                if failures:
                    return
                try:
                    data = await _range(self._system, parts)
                except (MealError, TransferInterruptedError) as error:
                    failures.append(error)
                    return
            received += len(data)
            for part in parts:
                at = part.offset - parts[0].offset
                self._found[part] = data[at : at + part.size]

        await asyncio.gather(*map(read, requests))
        if failures:
            error = next((e for e in failures if isinstance(e, MealError)), failures[0])
            if isinstance(error, TransferInterruptedError):
                error.kept = received
            raise error


def _requests(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Yield the parts of each request, in order; ``parts`` are sorted."""
    request: list[Part] = []
    for part in parts:
        if request:
            first, last = request[0], request[-1]
            end = part.offset + part.size
            follows = part.url == last.url and part.offset == last.offset + last.size
            if not follows or end - first.offset > _MAX_REQUEST:
                yield request
                request = []
        request.append(part)
    if request:
        yield request


async def _range(system: Any, parts: Sequence[Part]) -> bytes:
    """Return the bytes of parts that follow each other, of one file."""
    url, start, _, file_size = parts[0]
    stop = parts[-1].offset + parts[-1].size
    asked = {"Range": f"bytes={start}-{stop - 1}"}
    async with web.request(system, url, "GET", asked, (_NOT_SATISFIABLE,)) as response:
        _check(response, url, f"bytes {start}-{stop - 1}", file_size)
        data = bytearray()
        while len(data) <= stop - start and (chunk := await response.content.readany()):
            data += chunk
    if len(data) != stop - start:
        raise TransferInterruptedError(f"received {len(data)} of {stop - start} bytes")
    return bytes(data)


def _check(response: Any, url: str, expected: str, file_size: int) -> None:
    """Raise RemoteError unless a response has the expected range of a file of this size."""
    found, _, total = response.headers.get("Content-Range", "").partition("/")
    is_known = response.status in (206, _NOT_SATISFIABLE) and total not in ("", "*")
    if is_known and total != str(file_size):
        raise RemoteError(
            f"{shown(url)} has {total} bytes, not {file_size}: it has changed, or was not "
            "uploaded completely; run the same command again, or upload it again"
        )
    if response.status == 200:
        raise RemoteError(
            f"the server of {shown(url)} does not support range requests (it sends the whole file);"
            " download the files and give their folder, or use a server that supports them"
        )
    if response.status != 206 or found != expected:
        raise RemoteError(
            f"the server of {shown(url)} sends another part than was requested (status "
            f"{response.status}, {found or 'no Content-Range'}); use a server that supports range "
            "requests"
        )
