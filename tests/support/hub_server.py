"""A Hub on 127.0.0.1 for the real huggingface_hub client: lists, files, byte ranges, redirects, refusals, and faults.

    with HubServer() as hub:
        commit = hub.add("model", "org/name", {"config.json": b"{}", "model.safetensors": path}, tags=("v1",))
        hub.fail("*/resolve/*/model.safetensors", Drop(after=1000), times=2)        # see hub_faults
        HfApi(endpoint=hub.endpoint).model_info("org/name", files_metadata=True)
        hub.bytes_sent("org/name"), hub.sent_twice("org/name")
        hub.users["hf_mine"] = User("me")                                           # see hub_uploads

As on the real Hub, files of Git LFS (*.safetensors, and all above 10 MB) come from another host, here localhost with
another port, by a redirect to an address with a signature. That host takes no token; it refuses a request that carries
one, and `leaks` remembers it. A repository that is renamed, or asked for in another case, answers 307; one that is
private or missing answers 401 without token and 404 with one. Anybody sees the list of a gated one; its files answer
401 and 403.

huggingface_hub reads HF_ENDPOINT when it is imported, so pass `endpoint=` where the client takes it, or set the
variable for a subprocess.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from support.hub_faults import Fault, Status
from support.hub_hosts import Cdn, Hub, Renamed, Signed
from support.hub_http import Listener, Request
from support.hub_repos import Blob, Content, Refused, Repo, make_blob
from support.hub_uploads import Objects, User
from support.hub_xet import Store


@dataclass
class Planned:
    """A fault that is still to come."""

    pattern: str
    fault: Fault
    times: int
    method: str | None

    def meets(self, request: Request, of_body: bool) -> bool:
        """Whether it is that request's turn to fail."""
        named = self.method in (None, request.method) and fnmatchcase(request.path, self.pattern)
        return named and self.times > 0 and self.fault.of_body == of_body


@dataclass
class HubServer:
    """The server; a context manager.

    Attributes:
        log: every request, in order.
        failures: path → HTTP status to answer with instead, always.
        on_request: called with every request before it is answered, in the server's thread.
        cdn_expires_after: how many requests an address at the CDN serves; then 403, until a new resolve gives another.
        xet: whether the Hub tells clients that they may get large files by way of Xet.
        secrets: all signatures of addresses and passes to Xet, which no log and no file may contain.
        leaks: paths of requests to the CDN that carried a token.
        users: whose a token is; one that is not here may read what `add` was told of it, and else what anybody may.
        received: (SHA-256, bytes) of each PUT of a large file, those that broke off included.
        objects, store: the large files that there are, and what Xet is made of.
        errors: what went wrong in the server or in `on_request`; the first is raised at the end.
        sent: (first byte, end) of each answer with bytes of a file, by (repository, file): what really left.
    """

    log: list[Request] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    on_request: Callable[[Request], object] | None = None
    cdn_expires_after: int | None = None
    xet: bool = False
    secrets: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    users: dict[str, User] = field(default_factory=dict)
    received: list[tuple[str, int]] = field(default_factory=list)
    objects: Objects = field(default_factory=Objects)
    store: Store = field(default_factory=Store)
    sent: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)
    _repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    _renamed: dict[tuple[str, str], str] = field(default_factory=dict)
    _planned: list[Planned] = field(default_factory=list)
    _signed: dict[str, Signed] = field(default_factory=dict)
    _downloads: list[str] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> HubServer:
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self.objects.folder = Path(self._folder.name)
        self._hub, self._cdn = (Listener(type("Bound", (handler,), {"hub": self})) for handler in (Hub, Cdn))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopping.set()
        for listener in (self._hub, self._cdn):
            listener.stop()
        self._folder.cleanup()
        if self.errors and kind is None:
            raise self.errors[0]

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT or `endpoint=` takes; still known, and refusing, after the server has stopped."""
        return self._hub.url

    @property
    def requests(self) -> list[tuple[str, str]]:
        """(method, path without query) of every request, in order."""
        return [(request.method, request.path) for request in self.log]

    def add(
        self,
        kind: str,
        name: str,
        files: Mapping[str, Content] | Path,
        *,
        tags: tuple[str, ...] = (),
        branch: str = "main",
        token: str | None = None,
        gated: str | None = None,
        private: bool = False,
    ) -> str:
        """Publish a commit of a model or data set, which is `main` (or another branch) from now on.

        Args:
            kind: `model` or `dataset`.
            name: `org/name`.
            files: contents or paths by name, or a folder of which all files are taken; the commit has no others.
            tags: other revisions that name this commit.
            token: makes it gated (or private): only with this token are its files served.
            gated: `auto` or `manual`.
            private: without the token there is no such repository.

        Returns:
            The commit, 40 hexadecimal digits that depend on the contents of this and earlier commits alone.
        """
        if isinstance(files, Path):
            folder = files
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        blobs = {path: make_blob(path, content) for path, content in files.items()}
        with self._lock:
            repo = self._repos.setdefault((kind, name), Repo(kind, name))
            repo.private = repo.private or private
            repo.token = token or repo.token
            repo.gated = gated or repo.gated or ("auto" if token and not private else None)
            commit = repo.add(blobs, branch=branch).commit
            self.objects.note(blobs.values())
            repo.tags |= dict.fromkeys(tags, commit)
        return commit

    def repo(self, name: str, kind: str = "model") -> Repo:
        """What the server holds under that name, to look at or to change (`wrong_case`, `gated`, `private`, …)."""
        return self._repos[kind, name]

    def has(self, kind: str, name: str) -> bool:
        """Whether there is such a repository."""
        return (kind, name) in self._repos

    def remove(self, kind: str, name: str) -> None:
        """Take a repository away."""
        with self._lock:
            del self._repos[kind, name]

    def rename(self, old: str, new: str, kind: str = "model") -> None:
        """Give a repository another name; the old one answers with a redirect."""
        with self._lock:
            repo = self._repos.pop((kind, old))
            repo.name = new
            self._repos[kind, new] = repo
            self._renamed[kind, old] = new

    def fail(self, pattern: str, fault: Fault, *, times: int = 1, method: str | None = None) -> None:
        """Let the next requests for a path of that pattern fail; see hub_faults."""
        with self._lock:
            self._planned.append(Planned(pattern, fault, times, method))

    def recover(self) -> None:
        """Let nothing fail any more."""
        with self._lock:
            self._planned.clear()
            self.failures.clear()

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The contents of a repository, by path."""
        return {path: blob.read() for path, blob in self.repo(name, kind).find(revision).files.items()}

    def downloads(self) -> list[str]:
        """Files of which bytes were sent, in order."""
        return list(self._downloads)

    def bytes_sent_of(self, name: str, file: str) -> int:
        """How many bytes of a file left the server, those sent again included."""
        with self._lock:
            return sum(end - first for first, end in self.sent.get((name, file), ()))

    def bytes_sent(self, name: str) -> int:
        """How many bytes of a repository's files left the server; not what the API said of them."""
        with self._lock:
            return sum(self.bytes_sent_of(*key) for key in self.sent if key[0] == name)

    def sent_twice(self, name: str) -> list[tuple[str, int, int]]:
        """(file, first byte, end) of what left the server more than once, each stretch once."""
        found: list[tuple[str, int, int]] = []
        with self._lock:
            for (repo, file), ranges in sorted(self.sent.items()):
                reached = told = 0
                for first, end in sorted(ranges) if repo == name else ():
                    begin, stop = max(first, told), min(reached, end)
                    if begin < stop:
                        found.append((file, begin, stop))
                        told = stop
                    reached = max(reached, end)
        return found

    # What follows is for the handlers.

    def arrived(self, request: Request) -> Fault:
        """Note a request; the fault that it meets, or none."""
        with self._lock:
            self.log.append(request)
        if self.on_request:
            self.on_request(request)
        if request.path in self.failures:
            return Status(self.failures[request.path])
        return self.take_fault(request) or Fault()

    def take_fault(self, request: Request, of_body: bool = False) -> Fault | None:
        """The next fault that is planned for such a request."""
        with self._lock:
            for planned in self._planned:
                if planned.meets(request, of_body):
                    planned.times -= 1
                    return planned.fault
        return None

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the server's end."""
        self._stopping.wait(seconds)

    def open(self, kind: str, name: str, token: str | None, *, files: bool = False) -> Repo:
        """The repository, if the token may see it (or read its files); raises Renamed and the Hub's refusals."""
        with self._lock:
            repo = self._named(kind, name)
        if repo is None or (repo.private and not self.may_read(repo, token)):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.name != name:
            raise Renamed(name, repo.name)
        if files and repo.gated and not self.may_read(repo, token):
            raise Refused(403 if token else 401, "GatedRepo", f"Access to {kind} {name} is restricted.")
        return repo

    def may_read(self, repo: Repo, token: str | None) -> bool:
        """Whether that token opens a private or gated repository."""
        user = self.users.get(token or "")
        owns = user is not None and repo.name.split("/")[0] in user.namespaces
        return owns or (token is not None and token == repo.token)

    def listed(self, kind: str, query: Mapping[str, list[str]], token: str | None) -> list[Repo]:
        """The repositories of an author whose name contains a word, whatever its case."""
        author, word = (query.get(key, [""])[0] for key in ("author", "search"))
        found = [
            repo
            for repo in list(self._repos.values())
            if repo.kind == kind and author in ("", repo.name.split("/")[0]) and word.lower() in repo.name.lower()
            if not repo.private or self.may_read(repo, token)
        ]
        return found[: int(query.get("limit", [len(found)])[0])]

    @property
    def cdn_url(self) -> str:
        """The other host, which has not even the same name: clients differ in what is a host."""
        return self._cdn.url.replace("127.0.0.1", "localhost")

    def sign_file(self, repo: str, file: str, path: str, blob: Blob) -> str:
        """An address at the CDN that gives a content; the path is that of the request that led there."""
        return self._sign(Signed(path, str(blob.sha256), blob, repo, file))

    def sign_upload(self, path: str, sha256: str) -> str:
        """An address at the CDN that takes a content."""
        return self._sign(Signed(f"{path}/{sha256}", sha256))

    def _sign(self, signed: Signed) -> str:
        secret = secrets.token_hex(16)
        with self._lock:
            self.secrets.append(secret)
            self._signed[secret] = signed
        return f"{self.cdn_url}/repos/{signed.sha256}?X-Amz-Expires=3600&X-Amz-Signature={secret}"

    def signed(self, secret: str) -> Signed | None:
        """What an address's signature stands for."""
        return self._signed.get(secret)

    def account(self, repo: str, file: str, first: int) -> Callable[[int], None]:
        """Begin to count an answer's bytes."""
        with self._lock:
            self._downloads.append(file)

        place: int | None = None

        def count(done: int) -> None:
            nonlocal place
            with self._lock:
                ranges = self.sent.setdefault((repo, file), [])
                if place is None:
                    place = len(ranges)
                    ranges.append((first, first))
                ranges[place] = (first, ranges[place][1] + done)

        return count

    def received_pieces(self, sha256: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Count what a PUT brings."""
        with self._lock:
            place = len(self.received)
            self.received.append((sha256, 0))
        for piece in pieces:
            with self._lock:
                self.received[place] = (sha256, self.received[place][1] + len(piece))
            yield piece

    def writing(self) -> AbstractContextManager[object]:
        """Nobody else writes meanwhile."""
        return self._lock

    def _named(self, kind: str, name: str) -> Repo | None:
        while (kind, name) in self._renamed and (kind, name) not in self._repos:
            name = self._renamed[kind, name]
        if (kind, name) in self._repos:
            return self._repos[kind, name]
        alike = (repo for repo in self._repos.values() if repo.kind == kind and repo.name.lower() == name.lower())
        return next((repo for repo in alike if repo.wrong_case == 307), None)
