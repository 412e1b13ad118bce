"""mealv2.storage.reachable: a server out of reach is found in seconds, any response is enough."""

import http.server
import socket
import threading
import time

import pytest

from mealv2.errors import RemoteError
from mealv2.storage import reachable
from mealv2.storage.reachable import require_reachable, unreachable
from stores import silent_server


class Missing(http.server.BaseHTTPRequestHandler):
    """Has nothing."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_with_an_error_is_reachable() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Missing)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert unreachable(f"http://127.0.0.1:{server.server_address[1]}/x") is None
    thread.join()
    server.server_close()


def test_a_silent_server_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachable, "RESPONSE_TIMEOUT_S", 0.1)
    with silent_server() as url, pytest.raises(RemoteError) as caught:
        require_reachable(url.replace("//", "//user:pa55w0rd@"), "check the network")
    assert str(caught.value) == f"cannot reach {url}: no response in 0.1 s; check the network"


def test_a_closed_port_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert str(unreachable(f"http://127.0.0.1:{port}")).endswith(": Connection refused")


def test_a_name_that_does_not_resolve_is_not() -> None:
    """Also if the resolver waits, which no argument of urlopen limits."""
    began = time.monotonic()
    assert unreachable("https://name.invalid") is not None
    assert time.monotonic() - began < 10


def test_a_resolver_that_never_answers_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachable, "RESPONSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(reachable, "_DNS_TIMEOUT_S", 0.05)
    never = threading.Event()

    def resolve(*_: object, **__: object) -> None:
        never.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    try:
        found = unreachable("http://127.0.0.1:9")
    finally:
        never.set()
    assert found == "cannot reach http://127.0.0.1:9: no response in 0.1 s"
