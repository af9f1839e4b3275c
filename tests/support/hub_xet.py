"""Xet at the test Hub: how huggingface_hub sends large files where hf_xet is installed, and gets them if `hub.xet`.

A repository's pass (a short-lived token, from the Hub) opens the store, which is at the CDN and knows files by a hash
of its own. Sending: chunks packed in xorbs, then a shard that says which chunks make which file; the commit names the
file by its SHA-256. Getting: a reconstruction says which bytes of which xorbs to fetch, from signed addresses.

This store cuts what it sends into chunks of equal size, and takes SHA-256 for the store's hash: clients check neither.
It tells of no chunk that it has, as it may, so a client sends again what an interrupted run of its own had sent.
Requests to the store count as `/xet/…`, those for the bytes of a file as `/cdn/…/resolve/<commit>/<file>`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from support.hub_http import Handler
from support.hub_repos import Blob, Commit, Refused, Repo
from support.hub_xet_format import CHUNK_HEADER_BYTES, Malformed, ShardFile, chunk_header, read_shard, read_xorb

CHUNK_BYTES = 1 << 16
FRAMED_BYTES = CHUNK_BYTES + CHUNK_HEADER_BYTES
XORB_CHUNKS = 500  # in one xorb; the format allows 8192


@dataclass(frozen=True)
class Pass:
    """What an access token of Xet opens."""

    repo: Repo
    commit: Commit
    write: bool


@dataclass
class Store:
    """Passes by token, and the xorbs that arrived: the file of each one's chunks, and where they begin and end."""

    place: str = field(default_factory=lambda: f"/xet-{secrets.token_hex(8)}")  # clients keep a cache for each address
    passes: dict[str, Pass] = field(default_factory=dict)
    xorbs: dict[str, tuple[Path, list[int]]] = field(default_factory=dict)

    def keep(self, name: str, data: bytes, folder: Path | None) -> None:
        """Unpack a xorb to the disk."""
        chunks = read_xorb(data)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as stream:
            stream.writelines(chunks)
        self.xorbs[name] = Path(stream.name), [0, *accumulate(map(len, chunks))]

    def pieces(self, file: ShardFile) -> Iterator[bytes]:
        """The content of a file."""
        for term in file.terms:
            if term.xorb not in self.xorbs:
                raise Refused(400, message=f"xorb {term.xorb} is missing")
            path, ends = self.xorbs[term.xorb]
            yield from Blob(path, ends[-1], "", None).pieces(ends[term.first], ends[term.end])


@dataclass(frozen=True)
class Xorb(Blob):
    """Some of a file's bytes from `start` on as chunks behind headers; `size` is that of all this."""

    whole: Blob
    start: int

    def pieces(self, first: int, end: int) -> Iterator[bytes]:
        for index in range(first // FRAMED_BYTES, -(-end // FRAMED_BYTES)):
            begin = self.start + index * CHUNK_BYTES
            length = min(CHUNK_BYTES, self.whole.size - begin)
            framed = chunk_header(length) + b"".join(self.whole.pieces(begin, begin + length))
            yield framed[max(first - index * FRAMED_BYTES, 0) : end - index * FRAMED_BYTES]

    def position(self, framed: int) -> int:
        """Which byte of the file is the next after that many bytes of the xorb."""
        chunks, rest = divmod(framed, FRAMED_BYTES)
        return self.start + chunks * CHUNK_BYTES + max(rest - CHUNK_HEADER_BYTES, 0)

    def account(self, opened: Callable[[int], Callable[[int], None]], first: int) -> Callable[[int], None]:
        """Count the bytes of the file among those of the xorb."""
        count, at = opened(self.position(first)), first

        def counted(done: int) -> None:
            nonlocal at
            count(self.position(at + done) - self.position(at))
            at += done

        return counted


class XetHub(Handler):
    """What the Hub adds to its answers."""

    def xet_pass(self, repo: Repo, commit: Commit, write: bool) -> None:
        """Answer with the way into the store."""
        token = f"xet_{secrets.token_hex(16)}"
        self.hub.secrets.append(token)
        self.hub.store.passes[token] = Pass(repo, commit, write)
        until = int(time.time()) + 3600
        url = self.hub.cdn_url + self.hub.store.place
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until)}
        self.send_json({"casUrl": url, "accessToken": token, "exp": until}, headers)

    def xet_headers(self, repo: Repo, commit: Commit, blob: Blob) -> dict[str, str]:
        """How a large file is known in the store, and where to get a pass."""
        route = f"{self.hub.endpoint}/api/{repo.kind}s/{repo.name}/xet-read-token/{commit.commit}"
        return {"X-Xet-Hash": str(blob.sha256), "Link": f'<{route}>; rel="xet-auth"'}


class XetStore(Handler):
    """The store's own answers, below its place at the CDN."""

    def xet_path(self) -> str | None:
        """The path within the store, if it is one."""
        if self.path == "/v1/telemetry":  # clients forget the place here
            return self.path
        place = self.hub.store.place
        return self.path.removeprefix(place) if self.path.startswith(f"{place}/") else None

    def xet_xorb(self) -> str | None:
        """The name of the xorb that arrives."""
        match = re.fullmatch(r"/v1/xorbs/default/([0-9a-f]{64})", self.xet_path() or "")
        return match[1] if match and self.command == "POST" else None

    def xet_answer(self, path: str) -> Any:
        """What JSON answers a path of the store."""
        xorb, shards = self.xet_xorb(), path == "/v1/shards"
        opened = self._open(write=bool(xorb or shards))
        try:
            if xorb:
                return self._take_xorb(xorb)
            if shards:
                return self._take_shard()
        except Malformed as malformed:
            raise Refused(400, message=str(malformed)) from malformed
        if path == "/v1/telemetry":
            return {}
        if match := re.fullmatch(r"/v1/reconstructions/([0-9a-f]{64})", path):
            return self._reconstruction(opened, match[1])
        raise Refused(404)  # newer versions of these paths too: clients then take these

    def _open(self, write: bool) -> Pass:
        opened = self.hub.store.passes.get(self.token or "")
        if opened is None:
            if self.token:
                self.hub.leaks.append(self.seen.path)
            raise Refused(401, message="No valid access token")
        if write and not opened.write:
            raise Refused(403, message="This access token may not write")
        return opened

    def _take_xorb(self, name: str) -> Any:
        new = name not in self.hub.store.xorbs
        self.hub.store.keep(name, self.read(), self.hub.objects.folder)
        return {"was_inserted": new}

    def _take_shard(self) -> Any:
        for file in read_shard(self.read()):
            self.hub.objects.receive(file.sha256, self.hub.store.pieces(file))
        return {"result": 1}

    def _reconstruction(self, opened: Pass, xet_hash: str) -> Any:
        """Which chunks of which xorbs make the file, or the range of it that was asked for, and where they are."""
        found = [(path, blob) for path, blob in opened.commit.files.items() if blob.sha256 == xet_hash]
        if not found:
            raise Refused(404)
        (path, blob), terms, fetched = found[0], [], {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        first, end = (int(wanted[1]), min(int(wanted[2]) + 1, blob.size)) if wanted else (0, blob.size)
        if first >= end:
            raise Refused(416)
        chunk, last = first // CHUNK_BYTES, -(-end // CHUNK_BYTES)
        while chunk < last:
            number = chunk // XORB_CHUNKS
            stop = min(last, (number + 1) * XORB_CHUNKS)
            name = hashlib.sha256(f"{xet_hash} {number}".encode()).hexdigest()
            term, fetch = self._term(opened, path, blob, number * XORB_CHUNKS, chunk, stop)
            terms.append({"hash": name, **term})
            fetched[name] = [fetch]
            chunk = stop
        return {"offset_into_first_range": first % CHUNK_BYTES, "terms": terms, "fetch_info": fetched}

    def _term(self, opened: Pass, path: str, blob: Blob, base: int, first: int, end: int) -> tuple[Any, Any]:
        """Chunks of the xorb that begins with the file's chunk `base`, and the address of their bytes."""
        begin, last = base * CHUNK_BYTES, min(end * CHUNK_BYTES, blob.size)
        size = (last - begin) + (end - base) * CHUNK_HEADER_BYTES
        xorb = Xorb(b"", size, "", f"{blob.sha256}-{base}", blob, begin)
        url = self.hub.sign_file(
            opened.repo.name, path, f"/{opened.repo.name}/resolve/{opened.commit.commit}/{path}", xorb
        )
        chunks = {"range": {"start": first - base, "end": end - base}}
        bytes_of = {"start": (first - base) * FRAMED_BYTES, "end": size - 1}
        return {**chunks, "unpacked_length": last - first * CHUNK_BYTES}, {**chunks, "url": url, "url_range": bytes_of}
