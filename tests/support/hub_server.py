"""A small Hub on 127.0.0.1, enough for the real huggingface_hub client to list, inspect and download repositories.

    with HubServer() as hub:
        commit = hub.add("dataset", "org/name", {"data/train.jsonl": b"..."}, tags=("v1",))
        HfApi(endpoint=hub.endpoint).list_repo_files("org/name", repo_type="dataset")

It knows models and data sets with branch `main` and tags, byte ranges and gated repositories, and remembers what it was
asked. huggingface_hub reads HF_ENDPOINT when it is imported, so pass `endpoint=` where the client takes it, or set the
variable for a subprocess.
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
class Commit:
    """One state of a model or data set; `names` are its revisions: the commit, `main`, tags."""

    commit: str
    files: Mapping[str, Content]
    digests: Mapping[str, str]
    names: frozenset[str]
    token: str | None


@dataclass
class HubServer:
    """The server; a context manager.

    Attributes:
        requests: (method, path without query) of every request, in order.
        failures: path → HTTP status to answer with instead, for faults.
    """

    requests: list[tuple[str, str]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    _commits: dict[tuple[str, str], list[Commit]] = field(default_factory=dict)
    _connections: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> HubServer:
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
        """What HF_ENDPOINT or `endpoint=` takes; still known, and refusing, after the server has stopped."""
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
        """Publish a commit of a model or data set, which is `main` from now on.

        Args:
            kind: `model` or `dataset`.
            name: `org/name`.
            files: contents or paths by name, or a folder of which all files are taken.
            tags: other revisions that name this commit.
            token: makes it gated: only requests with this token are served.

        Returns:
            The commit, 40 hexadecimal digits that depend on the content alone.
        """
        if isinstance(files, Path):
            folder = files
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        digests = {path: hashlib.sha256(_read(files[path])).hexdigest() for path in sorted(files)}
        commit = hashlib.sha1(json.dumps([kind, name, digests]).encode()).hexdigest()
        names = frozenset({commit, "main", *tags})
        self._commits.setdefault((kind, name), []).insert(0, Commit(commit, dict(files), digests, names, token))
        return commit

    def find(self, kind: str, name: str, revision: str, token: str | None) -> Commit:
        """The newest commit of that name; raises the refusal that the Hub would send."""
        commits = self._commits.get((kind, name))
        if not commits:
            raise Refused(404, "RepoNotFound")
        if commits[0].token not in (None, token):
            raise Refused(401, "GatedRepo")
        for commit in commits:
            if revision in commit.names:
                return commit
        raise Refused(404, "RevisionNotFound")

    def downloads(self) -> list[str]:
        """Files of which bytes were sent, in order."""
        gets = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return [path.split("/resolve/", 1)[1].split("/", 1)[1] for path in gets]


class Refused(Exception):
    """An answer other than success, with the Hub's own error code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def setup(self) -> None:
        super().setup()
        self.hub._connections.add(self.connection)

    def finish(self) -> None:
        self.hub._connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if path in self.hub.failures:
                raise Refused(self.hub.failures[path], "")
            if path.startswith("/api/"):
                self._send_json(self._api(path.removeprefix("/api/"), body))
            else:
                self._resolve(path.lstrip("/"))
        except Refused as refusal:
            self._send(refusal.status, b"", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.code})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Tests are silent."""

    def _api(self, path: str, body: bytes) -> Any:
        """What JSON answers a path below /api/."""
        match = re.fullmatch(r"(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if match is None:
            raise Refused(404, "")
        kind, name, verb, revision, below = match.groups()
        commit = self._commit(kind, name, revision or "main")
        if verb == "tree":
            query = parse_qs(urlsplit(self.path).query)
            return _tree(commit, below or "", query.get("recursive", ["false"])[0].lower() == "true")
        if verb == "paths-info":
            return [_entry(commit, path) for path in _paths(body, self.headers) if path in commit.files]
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        return {"id": name, "sha": commit.commit, **about}

    def _resolve(self, path: str) -> None:
        """Send a file, or the range of it that was asked for."""
        match = re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            raise Refused(404, "")
        commit, file = self._commit("dataset" if match[1] else "model", match[2], match[3]), match[4]
        if file not in commit.files:
            raise Refused(404, "EntryNotFound")
        data, status = _read(commit.files[file]), 200
        headers = {"ETag": f'"{commit.digests[file]}"', "X-Repo-Commit": commit.commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(status, data, headers)

    def _commit(self, kind: str, name: str, revision: str) -> Commit:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        return self.hub.find(kind, name, revision, token)

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


def _read(content: Content) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _paths(body: bytes, headers: Any) -> list[str]:
    """The paths of a paths-info request, which is a form or JSON."""
    if "json" in (headers.get("Content-Type") or ""):
        return [str(path) for path in json.loads(body)["paths"]]
    return parse_qs(body.decode())["paths"]


def _entry(commit: Commit, path: str) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(_read(commit.files[path])), "oid": commit.digests[path][:40]}


def _tree(commit: Commit, below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under a folder; without `recursive` only those directly in it."""
    prefix = f"{below.rstrip('/')}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(commit.files):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
        if recursive or len(parts) == 1:
            entries[path] = _entry(commit, path)
    return list(entries.values())
