"""A simulated Hub: as much of its HTTP interface as an upload needs, on loopback, in memory."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class SimulatedHub:
    """Holds what was uploaded.

    Attributes:
        repositories: name -> {"private": bool, "files": {path: bytes}}.
        tokens: every Authorization header that came.
    """

    def __init__(self, refuse: int | None = None) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.refuse = refuse
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON answer of one request."""
        self.requests.append(f"{method} {path}")
        if self.refuse is not None:
            return self.refuse, {"error": "no"}
        path = path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility", "private" if asked.get("private") else "public")
            self.repositories.setdefault(name, {"private": private == "private", "files": {}})
            return 200, {"url": f"{self.endpoint}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [{"path": f["path"], "shouldIgnore": False,
                      "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if path.endswith("/objects/batch"):
            objects = [{**o, "actions": {"upload": {"href": f"{self.endpoint}/blob/{o['oid']}"}}}
                       for o in json.loads(body)["objects"]]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if "/commit/" in path:
            return 200, self._commit(path, body)
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            held = self.repositories[name]
            if "/tree/" in path:
                return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40}
                             for p, c in held["files"].items()]  # fmt: skip
            siblings = [{"rfilename": p} for p in held["files"]]
            return 200, {"id": name, "sha": "0" * 40, "private": held["private"],
                         "siblings": siblings}  # fmt: skip
        return 404, {"error": f"{method} {path} is not simulated"}

    def _commit(self, path: str, body: bytes) -> dict[str, Any]:
        name = path.removeprefix("/api/models/").split("/commit/")[0]
        files = self.repositories[name]["files"]
        for line in body.splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif record["key"] == "deletedFile":
                del files[value["path"]]
        return {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40,
                "success": True}  # fmt: skip


def _handler(hub: SimulatedHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self.path.startswith("/blob/"):
                hub.tokens.add(self.headers.get("Authorization"))
            status, answer = hub.answer(self.command, self.path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
