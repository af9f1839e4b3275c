"""The two hosts of the test Hub: the Hub itself, and the one to which it redirects for large files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from support.hub_repos import DATE, Blob, Commit, Refused, Repo, paths_info, repo_info, tree
from support.hub_uploads import UploadRoutes
from support.hub_xet import XetHub, XetStore, Xorb

NAME = r"([^/]+/[^/]+)"
LIST = re.compile(r"/api/(model|dataset)s")
ABOUT = re.compile(rf"/api/(model|dataset)s/{NAME}(/.*)?")
FILE = re.compile(rf"/(datasets/)?{NAME}/resolve/([^/]+)/(.+)")
XET = re.compile(rf"/api/(model|dataset)s/{NAME}/xet-(read|write)-token/([^/]+)")
LFS = re.compile(rf"/(datasets/)?{NAME}\.git/info/lfs/objects/(batch|verify)")


@dataclass
class Signed:
    """An address at the CDN: the content that it gives or takes, and how often it was used."""

    path: str
    sha256: str
    blob: Blob | None = None
    repo: str = ""
    file: str = ""
    uses: int = 0


class Renamed(Exception):
    """The repository has this name in truth."""


class Hub(UploadRoutes, XetHub):
    """The API and the addresses of files."""

    def route(self) -> None:
        path = urlsplit(self.path).path  # still quoted, for a revision may contain a slash
        file = FILE.fullmatch(path)
        try:
            if file:
                self._resolve("dataset" if file[1] else "model", *(unquote(part) for part in file.groups()[1:]))
            elif xet := XET.fullmatch(path):
                self._pass(xet[1], unquote(xet[2]), xet[3] == "write", unquote(xet[4]))
            else:
                self.send_json(self._value(path))
        except Renamed as renamed:
            old, new = renamed.args
            self.send(307, {"Location": self.path.replace(f"/{quote(old)}", f"/{quote(new)}", 1)})

    def _value(self, path: str) -> Any:
        """What JSON answers a path."""
        alone = {
            "GET /api/whoami-v2": self.whoami,
            "POST /api/repos/create": self.create,
            "DELETE /api/repos/delete": self.delete,
            "POST /api/validate-yaml": self.validate_card,
        }
        if answer := alone.get(f"{self.command} {path}"):
            return answer()
        if match := LIST.fullmatch(path):
            return [repo_info(repo, None) for repo in self.hub.listed(match[1], self.query, self.token)]
        if match := LFS.fullmatch(path):
            repo = self.writable("dataset" if match[1] else "model", unquote(match[2]))
            return self.lfs_batch(repo) if match[3] == "batch" else self.lfs_verify()
        if match := ABOUT.fullmatch(path):
            rest = [unquote(part) for part in (match[3] or "/revision").strip("/").split("/")]
            verb, revision, below = rest[0], rest[1] if len(rest) > 1 else "main", "/".join(rest[2:])
            if self.command in ("GET", "HEAD") or verb == "paths-info":
                return self._read(self.hub.open(match[1], unquote(match[2]), self.token), verb, revision, below)
            return self._write_to(self.writable(match[1], unquote(match[2])), verb, revision)
        raise Refused(404)

    def _read(self, repo: Repo, verb: str, revision: str, below: str) -> Any:
        if verb == "refs":
            return _refs(repo)
        commit = repo.find(revision)
        if verb == "revision":
            return self._info(repo, commit)
        if verb == "tree":
            return tree(commit, below, self.query.get("recursive", ["false"])[0].lower() == "true")
        if verb == "paths-info":
            return paths_info(commit, self._paths())
        if verb == "commits":
            known = {"date": DATE, "authors": [], "message": ""}
            return [{"id": each.commit, "title": each.title, **known} for each in repo.history(revision)]
        raise Refused(404)

    def _write_to(self, repo: Repo, verb: str, revision: str) -> Any:
        if verb == "settings":
            return self.settings(repo)
        if verb == "preupload":
            return self.preupload(repo.find(revision))
        if verb == "commit":
            return self.commit(repo, revision)
        raise Refused(404)

    def _pass(self, kind: str, name: str, write: bool, revision: str) -> None:
        repo = self.writable(kind, name) if write else self.hub.open(kind, name, self.token, files=True)
        self.xet_pass(repo, repo.find(revision), write)

    def _info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        about = repo_info(repo, commit, blobs="blobs" in self.query)
        wanted = self.query.get("expand")
        return {key: value for key, value in about.items() if not wanted or key in ("id", *wanted)}

    def _paths(self) -> list[str]:
        """The paths of a paths-info request, which is a form or JSON."""
        body = self.read()
        if "json" in (self.headers.get("Content-Type") or ""):
            return [str(path) for path in json.loads(body)["paths"]]
        return parse_qs(body.decode())["paths"]

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        """Send a file, or the way to it."""
        repo = self.hub.open(kind, name, self.token, files=True)
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.commit, "Accept-Ranges": "bytes"}
        if file not in commit.files:
            raise Refused(404, "EntryNotFound", "Entry not found", headers)
        blob = commit.files[file]
        if blob.sha256 is None:
            self.send_blob(blob, headers, partial(self.hub.account, name, file))
            return
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"', "Vary": "Origin, Accept"}
        if self.hub.xet:
            headers |= self.xet_headers(repo, commit, blob)
        self.send(302, {**headers, "Location": self.hub.sign_file(name, file, self.seen.path, blob)})


class Cdn(XetStore):
    """The host of large files, which knows addresses and no names."""

    def _address(self) -> Signed | None:
        return self.hub.signed(self.query.get("X-Amz-Signature", [""])[0])

    def path_seen(self) -> str:
        signed = self._address()
        return f"/xet{self.xet_path()}" if self.xet_path() else f"/cdn{signed.path}" if signed else "/cdn/"

    def request_body(self) -> Iterator[bytes]:
        pieces, signed = super().request_body(), self._address()
        name = self.xet_xorb() or (signed.sha256 if signed and self.command == "PUT" else None)
        return self.hub.received_pieces(name, pieces) if name else pieces

    def route(self) -> None:
        if path := self.xet_path():
            self.send_json(self.xet_answer(path))
            return
        signed = self._address()
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.seen.path)
            raise Refused(400, message="Only one auth mechanism allowed")
        if signed is None or (self.command == "PUT") != (signed.blob is None):
            raise Refused(403, message="SignatureDoesNotMatch")
        signed.uses += 1
        if self.hub.cdn_expires_after is not None and signed.uses > self.hub.cdn_expires_after:
            raise Refused(403, message="Request has expired")
        if signed.blob is None:
            self.hub.objects.receive(signed.sha256, self.incoming)
            self.send(200, {"ETag": f'"{signed.sha256}"'})
            return
        name = f'inline; filename="{Path(signed.file).name}";'
        account = partial(self.hub.account, signed.repo, signed.file)
        if isinstance(signed.blob, Xorb):
            account = partial(signed.blob.account, account)
        self.send_blob(signed.blob, {"Content-Disposition": name}, account)


def _refs(repo: Repo) -> dict[str, Any]:
    def named(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()]

    return {"branches": named("heads", repo.branches), "tags": named("tags", repo.tags), "converts": []}
