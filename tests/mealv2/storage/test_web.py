"""Files of web servers: what is tried again, what continues, how a refusal is named."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest
from fsspec.asyn import get_loop

from mealv2.errors import ConfigError, MealError, RemoteError
from mealv2.storage import object_store, transfer, web
from stores import silent_server

DATA = bytes(range(256)) * 64
SECRET = "s3cr3t"


@dataclass
class Server:
    """A web server with one file, and the requests that it got: method, range, credentials."""

    data: bytes = DATA
    tag: str = '"1"'
    status: list[int] = field(default_factory=list)  # of the next responses; 0: close
    ranges: bool = True
    head: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes of the next bodies
    between: Callable[[], object] | None = None  # called between the pieces of a body
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def bodies(self) -> list[str]:
        return [wanted for method, wanted, _ in self.requests if method == "GET"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(transfer, "RETRY_DELAY_S", 0.0)
    fsspec.get_filesystem_class("http").clear_instance_cache()
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            wanted = self.headers.get("Range", "")
            state.requests.append((self.command, wanted, self.headers.get("Authorization", "")))
            if not with_body and not state.head:
                self.send_error(405)
                return
            if state.status and (status := state.status.pop(0)) != 200:
                if status:
                    self.send_error(status)
                else:
                    self.close()
                return
            start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0)
            is_same = self.headers.get("If-Range", state.tag) == state.tag
            if not (state.ranges and is_same):
                start = 0
            is_part = bool(wanted) and state.ranges and is_same
            self.send_response(206 if is_part else 200)
            self.send_header("ETag", state.tag)
            self.send_header("Content-Length", str(len(state.data) - start))
            if is_part:
                last = len(state.data)
                self.send_header("Content-Range", f"bytes {start}-{last - 1}/{last}")
            self.end_headers()
            if with_body:
                self.body(state.data[start:])

        def body(self, data: bytes) -> None:
            cut = (
                state.cut_after.pop(0)
                if state.cut_after and self.headers.get("Range") != ("bytes=0-0")
                else len(data)
            )
            pieces = 8 if state.between else 1
            size = -(-cut // pieces) or 1
            with contextlib.suppress(OSError):
                for at in range(0, cut, size):
                    self.wfile.write(data[at : min(at + size, cut)])
                    if state.between:
                        state.between()
            if cut < len(data):
                self.close()

        def close(self) -> None:
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    port = httpd.server_address[1]
    state.url = f"http://user:{SECRET}@127.0.0.1:{port}/a.tar?X-Amz-Signature={SECRET}"
    yield state
    httpd.shutdown()
    httpd.server_close()
    fsspec.get_filesystem_class("http").clear_instance_cache()


def failure(action: Callable[[], object]) -> MealError:
    with pytest.raises(MealError) as caught:
        action()
    assert SECRET not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


def test_size_stamp_and_bytes_come_from_a_server(server: Server, tmp_path: Path) -> None:
    object_store.fetch(server.url, tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == DATA
    assert object_store.info(server.url) == (len(DATA), '"1"')
    assert object_store.read(server.url) == DATA
    assert all(sent.startswith("Basic ") for _, _, sent in server.requests)


def test_a_server_that_allows_no_head_is_asked_for_one_byte(server: Server) -> None:
    server.head = False
    assert object_store.info(server.url) == (len(DATA), '"1"')
    assert server.bodies == ["bytes=0-0"]


@pytest.mark.parametrize(
    ("status", "kind", "named"),
    [
        (401, RemoteError, "401 Unauthorized: the server denies access; check the password or"),
        (403, RemoteError, "403 Forbidden: the server denies access; check the password or sig"),
        (400, RemoteError, "400 Bad Request; check the URL"),
        (404, ConfigError, "does not exist (404 Not Found)"),
        (410, ConfigError, "does not exist (410 Gone)"),
    ],
)
def test_a_refusal_is_named_and_not_tried_again(
    status: int, kind: type[MealError], named: str, server: Server, tmp_path: Path
) -> None:
    server.status = [status] * 9

    error = failure(lambda: object_store.fetch(server.url, tmp_path / "a"))

    assert isinstance(error, kind)
    assert named in str(error)
    assert len(server.requests) == 1
    assert named in str(failure(lambda: object_store.info(server.url)))
    assert len(server.requests) <= 3  # HEAD, and GET where HEAD may be what is refused


@pytest.mark.parametrize("status", [408, 429, 500, 503, 0])
def test_a_server_with_a_problem_is_tried_again(
    status: int, server: Server, tmp_path: Path
) -> None:
    server.status = [status] * 3
    object_store.fetch(server.url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA

    server.status = [status] * (4 if status else 8)  # aiohttp tries a closed connection twice
    error = str(failure(lambda: object_store.fetch(server.url, tmp_path / "b")))
    assert "4 times" in error
    if status:
        assert f"{status} " in error
        assert "check the server and run the same command again" in error


@pytest.mark.parametrize(("status", "expected"), [(404, None), (403, None), (401, None)])
def test_a_small_file_that_is_missing_or_denied_is_none(
    status: int, expected: None, server: Server
) -> None:
    server.status = [status]
    assert object_store.read(server.url) is expected


def test_a_cut_download_continues(server: Server, tmp_path: Path) -> None:
    server.cut_after = [5000, 3000]
    object_store.fetch(server.url, tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == DATA
    assert server.bodies == ["", "bytes=5000-", "bytes=8000-"]


@pytest.mark.parametrize("tag", ['W/"1"', ""])
def test_without_an_exact_stamp_a_cut_download_starts_again(
    tag: str, server: Server, tmp_path: Path
) -> None:
    server.tag, server.cut_after = tag, [5000]
    object_store.fetch(server.url, tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == DATA
    assert server.bodies == ["", ""]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut_after = False, [5000, 3000]
    object_store.fetch(server.url, tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == DATA
    assert server.bodies == ["", "bytes=5000-", "bytes=3000-"]


def test_a_file_that_is_replaced_between_two_parts_is_not_mixed(
    server: Server, tmp_path: Path
) -> None:
    server.cut_after = [5000]
    request = web.request

    def replaced(*args: Any, **more: Any) -> Any:
        if server.requests:
            server.data, server.tag = DATA[::-1], '"2"'
        return request(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "request", replaced)
        object_store.fetch(server.url, tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == DATA[::-1]


class Clock:
    """The time of the client's event loop, which passes only where a test lets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = get_loop()
        self._now_s = self._loop.time()
        self._received = threading.Event()
        read = aiohttp.StreamReader.read

        async def reading(content: aiohttp.StreamReader, size: int = -1) -> bytes:
            data = await read(content, size)
            self._received.set()
            return data

        monkeypatch.setattr(aiohttp.StreamReader, "read", reading)
        monkeypatch.setattr(self._loop, "time", lambda: self._now_s)

    def advance(self, seconds: float) -> None:
        """Let time pass, once the client has read what it was sent."""
        assert self._received.wait(60)
        self._received.clear()
        self._now_s += seconds
        self._loop.call_soon_threadsafe(int)  # the loop looks at the time


@pytest.mark.parametrize("has_responded", [False, True])
def test_a_time_limit_is_for_each_read_not_for_the_file(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_responded: bool
) -> None:
    limit_s = web.FIRST_TIMEOUT_S
    if has_responded:
        object_store.info(server.url)
        server.requests.clear()
        limit_s = web.READ_TIMEOUT_S
    clock = Clock(monkeypatch)
    server.between = lambda: clock.advance(limit_s / 4)  # 8 pieces: twice the limit

    object_store.fetch(server.url, tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == DATA
    assert len(server.requests) == 1


def test_a_server_that_sends_nothing_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ended = Clock(monkeypatch), threading.Event()

    def silent() -> None:
        clock.advance(web.READ_TIMEOUT_S + 1)
        ended.wait(60)

    server.between = silent
    try:
        error = failure(lambda: object_store.fetch(server.url, tmp_path / "a"))
    finally:
        ended.set()
    assert "no data for 60 s, 4 times" in str(error)


def test_a_server_that_never_responded_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "FIRST_TIMEOUT_S", 0.1)
    with silent_server() as url:
        error = failure(lambda: object_store.fetch(f"{url}/a.tar?sig={SECRET}", tmp_path / "a"))
    assert str(error) == (
        f"cannot reach the server of {url}/a.tar: no response in 0.1 s; check the network and the "
        "URL"
    )


def test_a_refused_connection_is_named_in_plain_words(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]  # closed below: nothing listens
    error = failure(lambda: object_store.fetch(f"http://127.0.0.1:{port}/a.tar", tmp_path / "a"))
    assert f": 127.0.0.1:{port}: Connection refused, 4 times; " in str(error)


def test_a_server_that_has_responded_is_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.fetch(server.url, tmp_path / "a")
    monkeypatch.setattr(web, "FIRST_TIMEOUT_S", 0.0)
    server.status = [0, 503]
    object_store.fetch(server.url, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == DATA


def test_progress_of_a_continued_download_gives_new_attempts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_PROGRESS", 1000)
    server.cut_after = [1000] * 9
    object_store.fetch(server.url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA

    server.cut_after = [999] * 9
    failure(lambda: object_store.fetch(server.url, tmp_path / "b"))


def test_a_file_too_large_to_hold_is_not_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "MAX_READ_BYTES", len(DATA))
    assert object_store.read(server.url) == DATA
    monkeypatch.setattr(web, "MAX_READ_BYTES", len(DATA) - 1)
    with pytest.raises(RemoteError, match=f"it has {len(DATA)} bytes or more") as caught:
        object_store.read(server.url)
    assert SECRET not in str(caught.value)
    assert len(server.bodies) == 2  # another attempt would fail as well
