"""A server on this machine that answers as the Hugging Face hub does, as far as pushes and pulls need it: repositories,
commits, large files, revisions, who may do what, and downloads that break off."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Repository:
    """Files by commit; branch names to commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class Hub:
    """What the server knows, and how it should misbehave: `fail` maps parts of paths to statuses."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    truncate: str = ""
    asked: list[str] = field(default_factory=list)

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        repository = self.repositories.setdefault(repo, Repository())
        before = repository.files(branch)
        after = {**(before[1] if before else {}), **files}
        commit = hashlib.sha1(
            repr(sorted((k, hashlib.sha1(v).digest()) for k, v in after.items())).encode()
        ).hexdigest()
        repository.commits[commit] = after
        repository.branches[branch] = commit
        return commit


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def log_message(self, *_: Any) -> None:
        pass

    # ------------------------------------------------------------ routes

    def route(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(f"{method} {path}")
        for part, status in self.state.fail.items():
            if part in f"{method} {path}":
                return self.send(status, b'{"error": "as asked"}')
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if parts[0] == "objects" and method == "PUT":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.state.objects[parts[1]] = body
            return self.send(200)
        if parts[:2] == ["api", "models"]:
            return self.model("/".join(parts[2:4]), parts[4:], body)
        if len(parts) > 3 and parts[2] == "resolve":
            return self.download("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[1].endswith(".git"):
            return self.large("/".join(parts[:2]).removesuffix(".git"), json.loads(body))
        return self.send(404)

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def allowed(self, name: str, write: bool = False) -> Repository | None:
        """The repository, or None after the refusal the hub would send."""
        repository = self.state.repositories.get(name)
        if self.token not in (None, WRITER, READER):
            message = "Invalid credentials in Authorization header"
            self.send(401, headers={"X-Error-Message": message})
        elif repository is None or (repository.private and self.token is None):
            # without a token the hub does not say whether a repository is there
            self.send(401 if self.token is None else 404, headers={"X-Error-Code": "RepoNotFound"})
        elif write and self.token != WRITER:
            self.send(403, headers={"X-Error-Message": "Forbidden"})
        else:
            return repository
        return None

    def create(self, asked: Any) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.token not in (WRITER, READER):
            return self.send(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
        if self.token != WRITER:
            return self.send(403, headers={"X-Error-Message": "You don't have the rights to create a model"})
        if name in self.state.repositories:
            return self.answer({"url": f"{self.state.url}/{name}"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.state.repositories[name] = Repository(private=private)
        return self.answer({"url": f"{self.state.url}/{name}"})

    def model(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self.allowed(name, write=rest[:1] in (["preupload"], ["commit"]))
        if repository is None:
            return None
        if rest[:1] == ["preupload"]:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if rest[:1] == ["commit"]:
            return self.commit(name, repository, rest[1], body)
        found = repository.files(rest[1] if rest[:1] == ["revision"] else "main")
        if found is None:
            return self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in found[1]]
        return self.answer({"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []})

    def commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        if branch not in repository.branches:
            return self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        files = {}
        for line in body.decode().splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            elif one["key"] == "lfsFile":
                files[one["value"]["path"]] = self.state.objects[one["value"]["oid"]]
        commit = self.state.put(name, files, branch)
        url = f"{self.state.url}/{name}/commit/{commit}"
        return self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def large(self, name: str, asked: Any) -> None:
        if self.allowed(name, write=True) is None:
            return None
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.state.url}/objects/{one['oid']}", "header": {}}},
            }
            for one in asked["objects"]
        ]
        return self.answer({"transfer": "basic", "objects": objects})

    def download(self, name: str, revision: str, path: str) -> None:
        repository = self.allowed(name)
        if repository is None:
            return None
        if repository.gated and self.token != WRITER:
            return self.send(401 if self.token is None else 403, headers={"X-Error-Code": "GatedRepo"})
        found = repository.files(revision)
        if found is None:
            return self.send(404, headers={"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if path not in files:
            return self.send(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if self.state.truncate and self.state.truncate in path and self.command == "GET":
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self.send(200, data, headers)

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, data: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
