"""A server on loopback with the requests of the Hugging Face Hub that huggingface_hub sends."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_loopbacksecret"
USER = "ant-lab"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories of models, data sets and Spaces. USER owns the token; others' are only read."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}  # by kind (models) and name
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.num_uploads = 0
        self.upload_status = 200

    def add(self, kind: str, name: str, *, private: bool = False, **about: Any) -> None:
        """Create a repository."""
        self.repos[kind, name] = {"private": private, "files": {}, "commits": [], **about}

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """Return the files of a repository."""
        found: dict[str, bytes] = self.repos[kind, name]["files"]
        return found

    def environment(self, home: object) -> dict[str, str]:
        """Return the variables of a user of this hub, without Xet, a protocol of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.server.requests.append((self.command, path))
        if path == "/":
            return self._send(200)
        if path.startswith("/upload/"):
            self.server.uploads[path.removeprefix("/upload/")] = body
            self.server.num_uploads += 1
            return self._send(self.server.upload_status)
        found = re.match(r"/(?:api/)?datasets/([^/]+/[^/]+)(/.*)?$", path)
        if found and self.command != "POST" and ("datasets", found[1]) in self.server.repos:
            return self._data_set(found[1], found[2] or "")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/(models|spaces|datasets)/([^/]+/[^/]+)(/.*)?", path):
            return self._api(found[1], found[2], found[3] or "", body)
        if found := re.fullmatch(r"/(?:(spaces|datasets)/)?(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            return self._resolve(found[1], found[2])
        return self._send(404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or USER
        name, kind = f"{owner}/{asked['name']}", asked.get("type", "model") + "s"
        url = f"{self.server.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if owner != USER:
            return self._send(403, {"error": f"You don't have the rights to create under {owner}"})
        if (kind, name) in self.server.repos:
            return self._send(409, {"error": "You already created this repo", "url": url})
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.server.add(kind, name, private=bool(is_private), sdk=asked.get("sdk"))
        return self._send(200, {"url": url})

    def _api(self, kind: str, name: str, rest: str, body: bytes) -> None:
        repo = self.server.repos.get((kind, name))
        if repo is None:
            return self._send(404, X_Error_Code="RepoNotFound")
        if rest in ("", "/revision/main"):
            sha = repo["commits"][-1] if repo["commits"] else "0" * 40
            return self._send(200, {"id": name, "private": repo["private"], "sha": sha})
        if not name.startswith(f"{USER}/"):
            return self._send(403, {"error": "Forbidden: you must use a write token"})
        if rest == "/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": self._mode(f["path"]), "shouldIgnore": False}
                | {"oid": self._oid(repo["files"].get(f["path"]), f["path"])}
                for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": files})
        if rest == "/commit/main":
            return self._commit(repo, name, body)
        return self._send(404)

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith((".safetensors", ".h5")) else "regular"

    def _oid(self, data: bytes | None, path: str) -> str | None:
        if data is None:
            return None
        if self._mode(path) == "lfs":
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | (
                {}
                if o["oid"] in self.server.uploads
                else {"actions": {"upload": {"href": f"{self.server.url}/upload/{o['oid']}"}}}
            )
            for o in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: dict[str, Any], name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.uploads[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        repo["commits"].append(oid)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _data_set(self, name: str, rest: str) -> None:
        """Answer a request that reads a data set."""
        files = self.server.files("datasets", name)
        commit = "1" * 40
        if rest == "" or rest.startswith("/revision/"):
            is_private = self.server.repos["datasets", name]["private"]
            return self._send(200, {"id": name, "sha": commit, "private": is_private, "tags": []})
        if found := re.fullmatch(r"/tree/[^/]+(?:/(.*))?", rest):
            folder = f"{found[1]}/" if found[1] else ""
            below = [n.removeprefix(folder) for n in files if n.startswith(folder)]
            entries = [
                {"type": "directory" if "/" in n else "file", "path": folder + n.partition("/")[0]}
                | {
                    "size": len(files.get(folder + n, b"")),
                    "oid": self._oid(files.get(folder + n), n),
                }
                for n in below
            ]
            return self._send(200, list({e["path"]: e for e in entries}.values()))
        found = re.fullmatch(r"/resolve/[^/]+/(.+)", rest)
        if found is None or found[1] not in files:
            return self._send(404, X_Error_Code="EntryNotFound")
        data = files[found[1]]
        return self._send(200, data, ETag=f'"{self._oid(data, found[1])}"', X_Repo_Commit=commit)

    def _resolve(self, name: str, path: str) -> None:
        repo = self.server.repos.get(("models", name))
        if repo is None or path not in repo["files"]:
            self._send(404, X_Error_Code="EntryNotFound")
            return
        data = repo["files"][path]
        self._send(200, data, ETag=f'"{self._oid(data, path)}"', X_Repo_Commit=repo["commits"][-1])


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the server."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
