"""Writing to the test Hub: accounts, new repositories, settings, objects of Git LFS, and commits.

    hub.users["hf_mine"] = User("me", orgs=("team",))           # a token that may write; User(…, write=False) may not
    HfApi(endpoint=hub.endpoint, token="hf_mine").upload_folder(repo_id="me/name", folder_path=folder)
    hub.files("me/name"), hub.received

A large file's content goes to the CDN by a PUT, once: what a repository of this server has, it does not ask for again.
That is the way of `basic` transfers, which the client goes only where hf_xet is missing or HF_HUB_DISABLE_XET is set;
otherwise it goes by way of Xet and asks nobody: see hub_xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.hub_http import Handler
from support.hub_repos import Blob, Commit, Refused, Repo, lfs_blob, make_blob, stored_with_lfs

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # what a new repository begins with


@dataclass(frozen=True)
class User:
    """Whose a token is, and whether it may write to the namespaces of its owner."""

    name: str
    orgs: tuple[str, ...] = ()
    write: bool = True

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Where its repositories are."""
        return (self.name, *self.orgs)


class Objects:
    """Contents of Git LFS by SHA-256, in a folder."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.blobs: dict[str, Blob] = {}

    def note(self, blobs: Iterable[Blob]) -> None:
        """Know the contents of a repository, so that they need not be sent."""
        self.blobs |= {blob.sha256: blob for blob in blobs if blob.sha256}

    def receive(self, sha256: str, pieces: Iterable[bytes]) -> None:
        """Keep what is sent, unless its hash is another; what is broken off leaves nothing."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as stream:
            path = Path(stream.name)
            try:
                for piece in pieces:
                    digest.update(piece)
                    stream.write(piece)
                if digest.hexdigest() != sha256:
                    raise Refused(400, message="The provided 'x-amz-checksum-sha256' does not match what was computed")
            except BaseException:
                path.unlink()
                raise
        self.blobs[sha256] = lfs_blob(path, path.stat().st_size, sha256)


class UploadRoutes(Handler):
    """What the Hub answers to those who write."""

    def account(self) -> User:
        """Whose the token is."""
        user = self.hub.users.get(self.token or "")
        if user is None:
            raise Refused(401, message="Invalid credentials in Authorization header" if self.token else "Log in first")
        return user

    def writable(self, kind: str, name: str) -> Repo:
        """A repository, if the token may write to it."""
        repo = self.hub.open(kind, name, self.token)
        self._check_writer(kind, name.split("/")[0])
        return repo

    def _check_writer(self, kind: str, namespace: str) -> None:
        user = self.account()
        if not user.write or namespace not in user.namespaces:
            raise Refused(403, message=f'You don\'t have the rights to write a {kind} in the namespace "{namespace}"')

    def whoami(self) -> Any:
        """The account, its organizations, and what the token may do."""
        user = self.account()
        role = "write" if user.write else "read"
        orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": role} for org in user.orgs]
        access = {"type": "access_token", "accessToken": {"displayName": "a test's", "role": role}}
        return {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": access}

    def create(self) -> Any:
        """A new repository, which begins with a commit; Refused with 409 where there is one."""
        asked = json.loads(self.read())
        kind = asked.get("type") or "model"
        namespace = asked.get("organization") or self.account().name
        name = f"{namespace}/{asked['name']}"
        self._check_writer(kind, namespace)
        about = {"url": f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
        if self.hub.has(kind, name):
            raise Refused(409, message=f"You already created this {kind} repo: {name}", body=about)
        self.hub.add(kind, name, {".gitattributes": GIT_ATTRIBUTES}, private=_private(asked) or False)
        return about

    def delete(self) -> Any:
        """Remove a repository."""
        asked = json.loads(self.read())
        name = f"{asked.get('organization') or self.account().name}/{asked['name']}"
        self.writable(asked.get("type") or "model", name)
        self.hub.remove(asked.get("type") or "model", name)
        return {}

    def settings(self, repo: Repo) -> Any:
        """Change who sees a repository."""
        asked = json.loads(self.read())
        private = _private(asked)
        repo.private = repo.private if private is None else private
        repo.gated = asked.get("gated", repo.gated) or None
        return {"private": repo.private, "gated": repo.gated or False}

    def validate_card(self) -> Any:
        """Errors and warnings about the metadata at the head of a README.md."""
        errors, warnings = _card_faults(json.loads(self.read())["content"])
        about = {
            name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))
        }
        if errors:
            raise Refused(400, message="Invalid metadata", body=about)
        return about

    def preupload(self, commit: Commit) -> Any:
        """How each file is to be sent, and what is there under its name; no .gitignore is obeyed."""
        files = []
        for file in json.loads(self.read())["files"]:
            path, old = file["path"], commit.files.get(file["path"])
            mode = "lfs" if stored_with_lfs(path, file["size"]) else "regular"
            there = {"oid": old.etag} if old else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        return {"files": files}

    def lfs_batch(self, repo: Repo) -> Any:
        """Where each object is to be sent that is not there yet."""
        asked = json.loads(self.read())
        if "basic" not in asked.get("transfers", ["basic"]):
            raise Refused(400, message="Only basic transfers")
        objects = []
        for each in asked["objects"]:
            given = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects.blobs:
                path = f"/{repo.name}.git/info/lfs/objects"
                verify = {"href": f"{self.hub.endpoint}{path}/verify"}
                given["actions"] = {"upload": {"href": self.hub.sign_upload(path, each["oid"])}, "verify": verify}
            objects.append(given)
        return {"transfer": "basic", "objects": objects}

    def lfs_verify(self) -> Any:
        """Whether an object arrived."""
        asked = json.loads(self.read())
        blob = self.hub.objects.blobs.get(asked["oid"])
        if blob is None or blob.size != asked["size"]:
            raise Refused(404, message="Object not found")
        return {"success": True}

    def commit(self, repo: Repo, branch: str) -> Any:
        """Put what the lines of the body say on a branch."""
        lines = [json.loads(line) for line in self.read().splitlines() if line]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if branch not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        with self.hub.writing():
            if not repo.branches[branch].startswith(header.get("parentCommit") or ""):
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(repo.find(branch).files)
            for line in lines:
                self._apply(files, line["key"], line["value"])
            made = repo.add(files, branch=branch, title=header["summary"]).commit
            self.hub.objects.note(files.values())
        return {"success": True, "commitOid": made, "commitUrl": f"{self.hub.endpoint}/{repo.name}/commit/{made}"}

    def _apply(self, files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        """One line of a commit."""
        path = value.get("path", "")
        if key == "file":
            files[path] = make_blob(path, base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects.blobs:
                raise Refused(400, message=f"LFS object of {path} is missing")
            files[path] = self.hub.objects.blobs[value["oid"]]
        elif key == "deletedFile":
            files.pop(path, None)
        elif key == "deletedFolder":
            for each in [each for each in files if each.startswith(f"{path.rstrip('/')}/")]:
                del files[each]


def _private(asked: Mapping[str, Any]) -> bool | None:
    """What a request says of it: clients have two ways."""
    if "visibility" in asked:
        return bool(asked["visibility"] == "private")
    return asked.get("private")


def _card_faults(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card, as far as the Hub's rules are known."""
    if not content.startswith("---\n"):
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(content.split("---\n", 2)[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(card, dict):
        return ["metadata must be a mapping"], []
    errors = [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag") if not _is(card, key)]
    errors += [
        f'"{key}" must be strings' for key in ("tags", "datasets", "base_model", "language") if not _are(card, key)
    ]
    relations = ("finetune", "adapter", "quantized", "merge", None)
    errors += [] if card.get("base_model_relation") in relations else ['"base_model_relation" must be one of 4 words']
    return errors, []


def _is(card: Mapping[str, Any], key: str) -> bool:
    return isinstance(card.get(key, ""), str)


def _are(card: Mapping[str, Any], key: str) -> bool:
    value = card.get(key, [])
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
