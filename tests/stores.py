"""A real S3 endpoint on loopback, connections that are cut, and a plain web server."""

import contextlib
import http.server
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from mealv2.storage import web

KEYS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
}


class Store:
    """A bucket of a server of this process."""

    def __init__(self, port: int, bucket: str | None, env: pytest.MonkeyPatch) -> None:
        import s3fs

        self.port = port
        self.url = f"s3://{bucket}"
        self._env = env
        for name, value in KEYS.items():
            env.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_SHARED_CREDENTIALS_FILE"):
            env.delenv(name, raising=False)
        env.setenv("AWS_CONFIG_FILE", os.devnull)
        self.through(port)
        self.system = s3fs.S3FileSystem()
        if bucket is not None:
            self.system.mkdir(bucket)

    def through(self, port: int, **settings: str) -> None:
        """Let clients go through another port, or with other settings."""
        import s3fs

        self._env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name, value in settings.items():
            self._env.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # they keep what they began with

    def upload(self, folder: Path, prefix: str) -> str:
        """Put the files of a folder there; return their URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self.system.pipe_file(f"{self.url}/{prefix}/{name}", path.read_bytes())
        return f"{self.url}/{prefix}"

    def names(self, prefix: str) -> list[str]:
        """Return the names of what lies under a prefix."""
        self.system.invalidate_cache()
        found = self.system.find(f"{self.url}/{prefix}")
        return sorted(name.rpartition("/")[2] for name in found)

    def data(self, name: str) -> bytes:
        """Return an object's bytes."""
        self.system.invalidate_cache()
        return bytes(self.system.cat_file(f"{self.url}/{name}"))


_numbers = itertools.count()


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run an S3 server on loopback; gives its port."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


@contextlib.contextmanager
def denying_server() -> Iterator[int]:
    """Run an S3 server that knows nobody; gives its port."""
    with pytest.MonkeyPatch.context() as env:
        env.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "0")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        found = next(m for line in lines if (m := re.search(r"http://127\.0\.0\.1:(\d+)", line)))
        yield int(found[1])
    finally:
        process.kill()
        process.communicate()


def new_store(port: int, env: pytest.MonkeyPatch) -> Store:
    """Make a bucket nobody else has."""
    return Store(port, f"bucket-{next(_numbers)}", env)


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Accept connections and never answer, as behind some firewalls; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        web._RESPONDED.discard(address)  # a server of another test had this port
        yield f"http://{address}"


@contextlib.contextmanager
def cutting_proxy(target: int, may_pass: Callable[[bytes], int | None]) -> Iterator[int]:
    """Forward connections to a port of loopback; gives the proxy's own.

    ``may_pass`` says of each request how many bytes of the answer come through before the
    connection is cut; None: all.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, target, may_pass), daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def _accept(listener: socket.socket, target: int, may_pass: Callable[[bytes], int | None]) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_forward, args=(client, target, may_pass), daemon=True).start()


def _forward(client: socket.socket, target: int, may_pass: Callable[[bytes], int | None]) -> None:
    with client, socket.create_connection(("127.0.0.1", target)) as server:
        left: list[int | None] = [None]

        def there() -> None:
            with contextlib.suppress(OSError):
                while data := client.recv(1 << 16):
                    left[0] = may_pass(data)
                    server.sendall(data)
                server.shutdown(socket.SHUT_WR)

        threading.Thread(target=there, daemon=True).start()
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if left[0] is not None:
                    data, left[0] = data[: left[0]], left[0] - len(data)
                client.sendall(data)
                if left[0] is not None and left[0] <= 0:
                    client.shutdown(socket.SHUT_RDWR)
                    return


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; gives its URL."""
    handler = partial(_QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
