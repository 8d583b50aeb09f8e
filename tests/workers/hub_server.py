"""A hub as far as the real client needs one to publish a model: it records what it is asked, in one thread."""

import hashlib
import json
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_valid_token"
LARGE = ".safetensors"


class HubServer:
    """One repository, `team/sums`, as it is after each commit; others belong to somebody else."""

    def __init__(self) -> None:
        self.exists, self.private, self.branches = False, True, list[str]()
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        """By sha256: what was uploaded, committed or not."""
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.fault: Callable[[str], int | None] = lambda request: None
        """The code that a request is answered with in place of what it should be; -1 closes the connection."""
        self.seconds = 0.0
        """That each answer takes."""
        self._server = HTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def of(self, beginning: str) -> list[str]:
        """The requests that begin so."""
        return [request for request in self.requests if request.startswith(beginning)]

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Code and JSON."""
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/"):
                self.large[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if (method, path) == ("POST", "/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]}
        if (method, path) == ("POST", "/api/repos/create"):
            asked = json.loads(body)
            if asked["organization"] != "team":
                return 403, {"error": "You don't have the rights to create a model under the namespace"}
            if self.exists:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/team/sums"}
            self.exists, self.private = True, asked.get("visibility") == "private"
            return 200, {"url": f"{self.url}/team/sums"}
        if not self.exists or not path.startswith("/api/models/team/sums"):
            return 404, {"error": "Repository not found"}
        rest = path.removeprefix("/api/models/team/sums")
        if rest.startswith("/branch/"):
            name = rest.removeprefix("/branch/")
            if method == "POST":
                self.branches.append(name)
            else:
                self.branches.remove(name)
            return 200, {}
        if rest.startswith("/tree/"):
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": _git(c)} for p, c in self.files.items()]
        if rest.startswith("/preupload/"):
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if rest.startswith("/commit/"):
            self._commit([json.loads(line) for line in body.splitlines()])
            commit = self.commits[-1]
            return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/team/sums/commit/{commit}"}
        siblings = [self._sibling(p, c) for p, c in self.files.items()]
        about = {"id": "team/sums", "private": self.private, "sha": (self.commits or ["0" * 40])[-1]}
        return 200, {**about, "siblings": siblings}

    def _mode(self, path: str) -> dict[str, Any]:
        there = self.files.get(path)
        known = {} if there is None else {"oid": hashlib.sha256(there).hexdigest() if LARGE in path else _git(there)}
        return {"path": path, "uploadMode": "lfs" if LARGE in path else "regular", "shouldIgnore": False, **known}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.large:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        self.commits.append(hashlib.sha1(json.dumps(lines).encode() + bytes([len(self.commits)])).hexdigest())

    def _sibling(self, path: str, content: bytes) -> dict[str, Any]:
        found = {"rfilename": path, "size": len(content), "blobId": _git(content)}
        if LARGE in path:
            found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self._body()
            hub.requests.append(f"{self.command} {path}")
            time.sleep(hub.seconds)
            code = hub.fault(hub.requests[-1])
            if code == -1:
                self.connection.close()
                return
            if code is None:
                code, said = hub.answer(self.command, path, body, self.headers.get("Authorization", ""))
            else:
                said = {"error": f"said so: {code}"}
            text = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        do_GET = do_POST = do_PUT = do_DELETE = _do

        def log_message(self, *args: Any) -> None:
            pass

    return Handler
