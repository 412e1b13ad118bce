"""What stands in for the authors' files: drawn weights, and a web server on this machine alone."""

import contextlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import timm
import torch
from torch import nn


def drawn(architecture: str) -> nn.Module:
    """Return a timm model in eval mode whose weights all matter and whose classes differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(architecture)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
        with torch.no_grad():
            spread = model.eval()(torch.rand(4, 3, 64, 64)).std()
            model.get_classifier().weight *= 3 / spread  # type: ignore[operator]
    return model


def as_published(model: nn.Module) -> bytes:
    """Return the bytes of the authors' kind of file: a state dict saved under DataParallel."""
    file = io.BytesIO()
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, file)
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path; of those in ``torn`` the second half never comes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.torn: set[str] = set()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        self.server.asked.append(path)
        if path not in self.server.files:
            self.send_error(404)
            return
        data = self.server.files[path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if path in self.server.torn else data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """Run a server for the length of a ``with`` block."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
