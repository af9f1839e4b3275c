"""The two hosts of the test Hub: the Hub itself, and the one to which it redirects for large files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from support.hub_http import Handler
from support.hub_repos import DATE, Blob, Commit, Refused, Repo, paths_info, repo_info, tree

NAME = r"[^/]+/[^/]+"


@dataclass
class Signed:
    """An address at the CDN: what it gives, and how often it was used."""

    repo: str
    file: str
    path: str
    blob: Blob
    uses: int = 0


class Renamed(Exception):
    """The repository has this name in truth."""


class Hub(Handler):
    """The API and the addresses of files."""

    def route(self) -> None:
        path = urlsplit(self.path).path  # still quoted, for a revision may contain a slash
        api = re.fullmatch(rf"/api/(model|dataset)s(?:/({NAME})(/.*)?)?", path)
        file = re.fullmatch(rf"/(datasets/)?({NAME})/resolve/([^/]+)/(.+)", path)
        try:
            if api and api[2] is None:
                found = self.hub.listed(api[1], self.query, self.token)
                self.send_json([repo_info(repo, None) for repo in found])
            elif api:
                rest = [unquote(part) for part in (api[3] or "/revision").strip("/").split("/")]
                self.send_json(self._api(api[1], unquote(api[2]), rest))
            elif file:
                self._resolve("dataset" if file[1] else "model", *(unquote(part) for part in file.groups()[1:]))
            else:
                raise Refused(404)
        except Renamed as name:
            old = (api or file)[2]  # type: ignore[index]
            self.send(307, {"Location": self.path.replace(f"/{old}", f"/{quote(str(name))}", 1)})

    def _api(self, kind: str, name: str, rest: list[str]) -> Any:
        """What JSON answers a path below a repository's."""
        repo = self.hub.open(kind, name, self.token)
        verb, revision, *below = [*rest, "main"] if len(rest) < 2 else rest
        if verb == "refs":
            return _refs(repo)
        commit = repo.find(revision)
        if verb == "revision":
            return self._info(repo, commit)
        if verb == "tree":
            return tree(commit, "/".join(below), self.query.get("recursive", ["false"])[0].lower() == "true")
        if verb == "paths-info":
            return paths_info(commit, self._paths())
        if verb == "commits":
            return [{"id": each.commit, "title": each.title, "date": DATE} for each in repo.history(revision)]
        raise Refused(404)

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
            self.send_blob(blob, headers, lambda first, _: self.hub.account(name, file, first))
            return
        linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"'}
        address = self.hub.sign(Signed(name, file, self.seen.path, blob))
        self.send(302, {**headers, **linked, "Location": address, "Vary": "Origin, Accept"})


class Cdn(Handler):
    """The host of large files, which knows addresses and no names."""

    def _address(self) -> Signed | None:
        return self.hub.signed(self.query.get("X-Amz-Signature", [""])[0])

    def path_seen(self) -> str:
        signed = self._address()
        return f"/cdn{signed.path}" if signed else "/cdn/"

    def route(self) -> None:
        signed = self._address()
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.seen.path)
            raise Refused(400, message="Only one auth mechanism allowed")
        if signed is None:
            raise Refused(403, message="SignatureDoesNotMatch")
        signed.uses += 1
        if self.hub.cdn_expires_after is not None and signed.uses > self.hub.cdn_expires_after:
            raise Refused(403, message="Request has expired")
        name = f'inline; filename="{Path(signed.file).name}";'
        self.send_blob(
            signed.blob,
            {"Content-Disposition": name},
            lambda first, _: self.hub.account(signed.repo, signed.file, first),
        )


def _refs(repo: Repo) -> dict[str, Any]:
    def named(kind: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()]

    return {"branches": named("heads", repo.branches), "tags": named("tags", repo.tags), "converts": []}
