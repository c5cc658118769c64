"""A Hub on this machine: enough of its HTTP interface to create repositories and to upload folders without LFS."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from fresh_accelerate import fresh_accelerate  # noqa: F401

TOKEN = "hf_of_the_tests"


class LocalHub(ThreadingHTTPServer):
    """Attributes: `repositories`, the files of each by name; `private`; `refuse`, a status to answer uploads with."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.private, self.refuse = {}, {}, None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid user token."})
        return self.answer(
            200, {"id": self.path, "sha": "0" * 40, "siblings": [], "tags": [], "downloads": 0, "likes": 0}
        )

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid user token."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            hub.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            return self.answer(200, {"url": f"{hub.address}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            ok = json.loads(body)["content"].startswith("---\n")
            return self.answer(200, {"errors": [] if ok else [{"message": "no metadata"}], "warnings": []})
        name, action = self.path.removeprefix("/api/models/").rsplit("/main", 1)[0].rsplit("/", 1)
        if hub.refuse is not None:
            return self.answer(hub.refuse, {"error": "the disk of the Hub is full"})
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(200, {"commitUrl": f"{hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})


@pytest.fixture
def hub(monkeypatch):
    """A `LocalHub` that huggingface_hub talks to, with a token."""
    server = LocalHub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
