"""A web server on loopback that sends parts of files, counts them, and fails as it is told."""

import contextlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class RangeServer:
    """The files of ``folder``; ``requests`` has the name and the range of each GET.

    ``status`` gives the status of a request by its number and name, None as it should be; 0 closes
    the connection. ``change`` changes a body before it is sent.
    """

    folder: Path
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: bool = True
    status: Callable[[int, str], int | None] = lambda number, name: None
    change: Callable[[str, bytes], bytes] = lambda name, data: data
    content_range: Callable[[str], str] = lambda text: text

    def ranges_of(self, suffix: str = ".h5") -> list[tuple[str, str]]:
        """Return the requests of files with a suffix, and forget all requests."""
        found = [request for request in self.requests if request[0].endswith(suffix)]
        self.requests.clear()
        return found


@contextlib.contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder."""
    state = RangeServer(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            name = unquote(urlsplit(self.path).path).lstrip("/")
            wanted = self.headers.get("Range", "")
            state.requests.append((name, wanted))
            status = state.status(len(state.requests), name)
            if status == 0:
                self.close_connection = True
                return
            if status is not None or not (state.folder / name).is_file():
                self.send_error(status or 404)
                return
            size = (state.folder / name).stat().st_size
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if state.ranges else None
            if found and int(found[1]) >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first, last = 0, size - 1
            if found:
                first, last = int(found[1]), min(int(found[2]), last)
            with (state.folder / name).open("rb") as file:
                file.seek(first)
                data = file.read(last + 1 - first)
            self.send_response(206 if found else 200)
            if found:
                text = state.content_range(f"bytes {first}-{last}/{size}")
                self.send_header("Content-Range", text)
            sent = state.change(name, data)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(sent)
            self.close_connection = self.close_connection or len(sent) != len(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64  # with 5, clients that connect at once wait for seconds
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
