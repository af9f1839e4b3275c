"""A small Hub on 127.0.0.1: enough of its HTTP API for the real huggingface_hub client to list, inspect and download repositories.

    with HubServer() as hub:
        commit = hub.add("dataset", "org/name", {"data/train.jsonl": b"..."}, tags=("v1",))
        HfApi(endpoint=hub.endpoint).list_repo_files("org/name", repo_type="dataset")

It knows models and data sets, one commit each, with branch `main` and tags; byte ranges; gated repositories; and it remembers what it was asked.
huggingface_hub reads HF_ENDPOINT when it is imported, so pass `endpoint=` where the client takes it, or set the variable for a subprocess.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Content = bytes | Path


@dataclass(frozen=True)
class Repository:
    """One commit of a model or data set; `revisions` are its names: the commit, `main`, tags."""

    kind: str
    name: str
    files: Mapping[str, Content]
    commit: str
    revisions: frozenset[str]
    token: str | None = None


@dataclass
class HubServer:
    """The server; a context manager.

    Attributes:
        requests: (method, path without query) of every request, in order.
        failures: path → HTTP status to answer with instead, for faults.
    """

    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    _repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    _connections: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._connections):  # a client that keeps its connection must find it gone
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT or `endpoint=` takes."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self,
        kind: str,
        name: str,
        files: Mapping[str, Content] | Path,
        *,
        tags: tuple[str, ...] = (),
        token: str | None = None,
    ) -> str:
        """Publish a `model` or `dataset`, from bytes, paths, or all files of a folder; a `token` makes it gated. Returns the commit."""
        if isinstance(files, Path):
            folder = files
            files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        listing = json.dumps([[path, _digest(files[path])] for path in sorted(files)])
        commit = hashlib.sha1(f"{kind} {name} {listing}".encode()).hexdigest()
        self._repositories[kind, name] = Repository(
            kind, name, dict(files), commit, frozenset({commit, "main", *tags}), token
        )
        return commit

    def downloads(self) -> list[str]:
        """Files of which bytes were sent, in order."""
        return [
            path.split("/resolve/", 1)[1].split("/", 1)[1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


def _read(content: Content) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _digest(content: Content) -> str:
    return hashlib.sha256(_read(content)).hexdigest()


def _size(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


class _Refused(Exception):
    """An answer other than success, with the Hub's own error code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def setup(self) -> None:
        super().setup()
        self.server_state._connections.add(self.connection)

    def finish(self) -> None:
        self.server_state._connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Tests are silent."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        hub = self.server_state
        hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if path in hub.failures:
                raise _Refused(hub.failures[path], "")
            if path.startswith("/api/"):
                self._api(path.removeprefix("/api/"), parse_qs(url.query), body)
            else:
                self._resolve(path.lstrip("/"))
        except _Refused as refusal:
            self._send(refusal.status, b"", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        match = re.fullmatch(r"(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if match is None:
            raise _Refused(404, "")
        kind, name, verb, revision, below = match.groups()
        repository = self._repository(kind, name, revision or "main")
        if verb == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            self._send_json(_tree(repository, below or "", recursive))
        elif verb == "paths-info":
            self._send_json(
                [
                    _entry(path, repository.files[path])
                    for path in _paths(body, self.headers)
                    if path in repository.files
                ]
            )
        else:
            self._send_json(
                {
                    "id": name,
                    "sha": repository.commit,
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "siblings": [{"rfilename": path} for path in sorted(repository.files)],
                }
            )

    def _resolve(self, path: str) -> None:
        match = re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            raise _Refused(404, "")
        repository = self._repository("dataset" if match[1] else "model", match[2], match[3])
        if match[4] not in repository.files:
            raise _Refused(404, "EntryNotFound")
        content = repository.files[match[4]]
        headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        data, status = _read(content), 200
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, headers)

    def _repository(self, kind: str, name: str, revision: str) -> Repository:
        repository = self.server_state._repositories.get((kind, name))
        if repository is None:
            raise _Refused(404, "RepoNotFound")
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            raise _Refused(401, "GatedRepo")
        if revision not in repository.revisions:
            raise _Refused(404, "RevisionNotFound")
        return repository

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _paths(body: bytes, headers: Any) -> list[str]:
    """The paths of a paths-info request, which is a form or JSON."""
    if "json" in (headers.get("Content-Type") or ""):
        return [str(path) for path in json.loads(body)["paths"]]
    return parse_qs(body.decode())["paths"]


def _entry(path: str, content: Content) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": _size(content), "oid": _digest(content)[:40]}


def _tree(repository: Repository, below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files under a folder; without `recursive` its own files, and its folders as such."""
    prefix = f"{below.rstrip('/')}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(repository.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            if recursive or depth == 1:
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            entries[path] = _entry(path, content)
    return list(entries.values())
