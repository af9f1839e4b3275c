"""What a Hub holds: repositories, their commits and files, and the JSON in which its API tells of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Content = bytes | Path

PIECE_BYTES = 1 << 16
LFS_BYTES = 10_000_000  # the Hub keeps larger files with Git LFS, whatever their name
DATE = "2026-11-01T12:00:00.000Z"


class Refused(Exception):
    """An answer other than success: the status, and the Hub's own code and words for it."""

    def __init__(
        self,
        status: int,
        code: str = "",
        message: str = "",
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(code)
        self.status = status
        self.body = {**({"error": message} if message else {}), **(body or {})}
        named = {"X-Error-Code": code} if code else {}
        said = {"X-Error-Message": message or code} if message or code else {}
        self.headers = {**named, **said, **(headers or {})}


@dataclass(frozen=True)
class Blob:
    """A file's content; `oid` is its git blob's SHA-1, for a file of Git LFS that of the pointer to it."""

    content: Content
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """What names the content: SHA-256 of a file of Git LFS, the git blob's SHA-1 otherwise."""
        return self.sha256 or self.oid

    @property
    def lfs(self) -> dict[str, Any]:
        """What the API says of a file of Git LFS."""
        return {"size": self.size, "pointerSize": len(_pointer(str(self.sha256), self.size))}

    def pieces(self, first: int, end: int) -> Iterator[bytes]:
        """Bytes `first` to `end` (not included), never more than PIECE_BYTES at once."""
        if isinstance(self.content, bytes):
            for start in range(first, end, PIECE_BYTES):
                yield self.content[start : min(start + PIECE_BYTES, end)]
            return
        with self.content.open("rb") as stream:
            stream.seek(first)
            while first < end and (piece := stream.read(min(PIECE_BYTES, end - first))):
                first += len(piece)
                yield piece

    def read(self) -> bytes:
        """The whole content; for small files."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def stored_with_lfs(path: str, size: int) -> bool:
    """Whether the Hub keeps such a file with Git LFS."""
    return size > 0 and (path.endswith(".safetensors") or size > LFS_BYTES)


def make_blob(path: str, content: Content) -> Blob:
    """Hash a file as git would keep it: *.safetensors and whatever is large with Git LFS, the rest plainly."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    whole = Blob(content, size, "", None)
    if stored_with_lfs(path, size):
        return lfs_blob(content, size, _digest(hashlib.sha256(), whole))
    return Blob(content, size, _digest(hashlib.sha1(b"blob %d\0" % size), whole), None)


def lfs_blob(content: Content, size: int, sha256: str) -> Blob:
    """A file of Git LFS whose hash is known already."""
    pointer = _pointer(sha256, size)
    return Blob(content, size, hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), sha256)


def _digest(algorithm: Any, blob: Blob) -> str:
    for piece in blob.pieces(0, blob.size):
        algorithm.update(piece)
    return str(algorithm.hexdigest())


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    commit: str
    parent: str | None
    files: Mapping[str, Blob]
    title: str


@dataclass
class Repo:
    """A model or data set.

    Attributes:
        token: the one that may read it, where it is gated or private.
        gated: `auto` or `manual`: anybody sees what there is, only the token gets the files.
        private: without the token it is not there.
        wrong_case: what the Hub answers to its name in another case, 307 (to the right one) or 404.
        branches, tags: commit by name.
    """

    kind: str
    name: str
    token: str | None = None
    gated: str | None = None
    private: bool = False
    wrong_case: int = 307
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, files: Mapping[str, Blob], *, branch: str = "main", title: str = "Add files") -> Commit:
        """Put a commit on a branch; its hash depends on the contents, now and before, alone."""
        parent = self.branches.get(branch)
        state = [self.kind, self.name, parent, {path: files[path].etag for path in sorted(files)}]
        commit = Commit(hashlib.sha1(json.dumps(state).encode()).hexdigest(), parent, dict(files), title)
        self.commits[commit.commit] = commit
        self.branches[branch] = commit.commit
        return commit

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag or (the first 7 or more digits of) a commit's hash names."""
        commit = self.branches.get(revision) or self.tags.get(revision)
        if commit is None and len(revision) >= 7:
            commit = next((each for each in self.commits if each.startswith(revision)), None)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[commit]

    def history(self, revision: str) -> list[Commit]:
        """A commit and those before it, newest first."""
        found: list[Commit] = []
        commit: str | None = self.find(revision).commit
        while commit is not None:
            found.append(self.commits[commit])
            commit = found[-1].parent
        return found


def repo_info(repo: Repo, commit: Commit | None, *, blobs: bool = False) -> dict[str, Any]:
    """The API's answer about a repository at a commit (None: as in a list, without its files)."""
    card = read_card(commit or repo.find("main")) if repo.branches else {}
    about: dict[str, Any] = {
        "id": repo.name,
        "author": repo.name.split("/")[0],
        "sha": (commit.commit if commit else repo.branches.get("main")),
        "createdAt": DATE,
        "lastModified": DATE,
        "private": repo.private,
        "gated": repo.gated or False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(card),
    }
    if repo.kind == "model":
        about["modelId"] = repo.name
        about |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    if commit is None:
        return about
    if card:
        about["cardData"] = card
    return about | {"siblings": [_sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())]}


def _sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    stored = {"lfs": {"sha256": blob.sha256, **blob.lfs}} if blob.sha256 else {}
    return {"rfilename": path, "size": blob.size, "blobId": blob.oid, **stored}


def read_card(commit: Commit) -> dict[str, Any]:
    """The metadata at the head of README.md."""
    import yaml

    text = commit.files["README.md"].read().decode() if "README.md" in commit.files else ""
    if not text.startswith("---\n"):
        return {}
    found = yaml.safe_load(text.split("---\n", 2)[1])
    return found if isinstance(found, dict) else {}


def _tags(card: Mapping[str, Any]) -> list[str]:
    """A card's tags and those that the Hub makes from its other keys."""
    tags = [str(tag) for tag in card.get("tags") or []]
    tags += [str(card[key]) for key in ("library_name", "pipeline_tag") if key in card]
    tags += [f"license:{card['license']}"] if "license" in card else []
    bases = card.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        relation = card.get("base_model_relation")
        tags += [f"base_model:{base}"] + ([f"base_model:{relation}:{base}"] if relation else [])
    return [*dict.fromkeys(tags), "region:us"]


def entry(commit: Commit, path: str) -> dict[str, Any]:
    """A file as the lists of a tree and of paths-info have it."""
    blob = commit.files[path]
    stored = {"lfs": {"oid": blob.sha256, **blob.lfs}} if blob.sha256 else {}
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **stored}


def folder_entry(path: str) -> dict[str, Any]:
    """A folder in such a list."""
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def tree(commit: Commit, below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under a folder; without `recursive` only those directly in it."""
    prefix = f"{below.rstrip('/')}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(commit.files):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            entries[folder] = folder_entry(folder)
        if recursive or len(parts) == 1:
            entries[path] = entry(commit, path)
    if prefix and not entries:
        raise Refused(404, "EntryNotFound", headers={"X-Repo-Commit": commit.commit})
    return list(entries.values())


def paths_info(commit: Commit, paths: list[str]) -> list[dict[str, Any]]:
    """Those of the paths that there are, files and folders."""
    found = []
    for path in (each.rstrip("/") for each in paths):
        if path in commit.files:
            found.append(entry(commit, path))
        elif any(each.startswith(f"{path}/") for each in commit.files):
            found.append(folder_entry(path))
    return found
