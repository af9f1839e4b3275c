"""What can go wrong on the way from the Hub and to it, for `HubServer.fail`.

    hub.fail("*/resolve/*/model-00002*", Drop(after=1000), times=2)
    hub.fail("/api/models/org/name*", Status(429, retry_after=0))
    hub.fail("/cdn/*", Status(503), method="GET")

A pattern is matched with the path that was asked for, without query. The host to which the Hub redirects for files of
Git LFS counts as `/cdn/` + the path that redirected there, so `*/resolve/*` means both hosts and `/cdn/*` one of them.
Faults of a body (Drop, Truncate, Corrupt, IgnoreRange, StallBody, Drip) wait for an answer that has one: a success
that is no redirect and does not answer HEAD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

Wait = Callable[[float], object]


@dataclass(frozen=True)
class Fault:
    """One way to fail."""

    of_body: ClassVar[bool] = False

    def length(self, length: int) -> int:
        """What Content-Length says of a body of that length."""
        return length

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        """The other headers that are sent."""
        return headers

    def body(self, pieces: Iterator[bytes], wait: Wait) -> Iterator[bytes]:
        """What is sent of a body; Dropped ends the connection there. `wait` sleeps until the server stops."""
        return pieces


class Dropped(Exception):
    """The connection ends here."""


@dataclass(frozen=True)
class Status(Fault):
    """Another status than success, such as 401, 403, 404, 429 (with Retry-After, in seconds), 500, 503."""

    status: int
    retry_after: int | None = None
    code: str = ""
    message: str = ""


@dataclass(frozen=True)
class Hangup(Fault):
    """The connection closes without an answer, when `after` bytes of the request's body have been read."""

    after: int = 0


@dataclass(frozen=True)
class LostAnswer(Fault):
    """The request is obeyed, and the connection closes without an answer."""


@dataclass(frozen=True)
class Headers(Fault):
    """Other headers (None: without), such as a Content-Range or an ETag that does not match."""

    changed: Mapping[str, str | None]

    def headers(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        lower = {key.lower() for key in self.changed}
        kept = {key: value for key, value in headers.items() if key.lower() not in lower}
        return kept | {key: value for key, value in self.changed.items() if value is not None}


@dataclass(frozen=True)
class Drop(Fault):
    """The connection closes after that many bytes of the body."""

    after: int = 0
    of_body: ClassVar[bool] = True

    def body(self, pieces: Iterator[bytes], wait: Wait) -> Iterator[bytes]:
        yield from _first(pieces, self.after)
        raise Dropped


@dataclass(frozen=True)
class Truncate(Fault):
    """The body ends after that many bytes, and Content-Length agrees."""

    to: int
    of_body: ClassVar[bool] = True

    def length(self, length: int) -> int:
        return min(length, self.to)

    def body(self, pieces: Iterator[bytes], wait: Wait) -> Iterator[bytes]:
        return _first(pieces, self.to)


@dataclass(frozen=True)
class Corrupt(Fault):
    """Every bit of the body's byte `at` is turned round, so that the hash is wrong."""

    at: int = 0
    of_body: ClassVar[bool] = True

    def body(self, pieces: Iterator[bytes], wait: Wait) -> Iterator[bytes]:
        start = 0
        for piece in pieces:
            where = self.at - start
            start += len(piece)
            if 0 <= where < len(piece):
                piece = piece[:where] + bytes([piece[where] ^ 0xFF]) + piece[where + 1 :]
            yield piece


@dataclass(frozen=True)
class IgnoreRange(Fault):
    """The whole file, with status 200, whatever range was asked for."""

    of_body: ClassVar[bool] = True


@dataclass(frozen=True)
class Stall(Fault):
    """Nothing is answered for that many seconds."""

    seconds: float


@dataclass(frozen=True)
class StallBody(Fault):
    """Nothing more is sent for that many seconds after that many bytes of the body."""

    seconds: float
    after: int = 0
    of_body: ClassVar[bool] = True

    def body(self, pieces: Iterator[bytes], wait: Wait) -> Iterator[bytes]:
        sent, waited = 0, False
        for piece in pieces:
            cut = max(self.after - sent, 0)
            if not waited and cut < len(piece):
                yield piece[:cut]
                wait(self.seconds)
                piece, waited = piece[cut:], True
            sent += len(piece)
            yield piece


@dataclass(frozen=True)
class Drip(Fault):
    """The body comes a few bytes at a time, with that many seconds between them."""

    seconds: float
    bytes: int = 1
    of_body: ClassVar[bool] = True

    def body(self, pieces: Iterator[bytes], wait: Wait) -> Iterator[bytes]:
        for piece in pieces:
            for start in range(0, len(piece), self.bytes):
                wait(self.seconds)
                yield piece[start : start + self.bytes]


def _first(pieces: Iterator[bytes], count: int) -> Iterator[bytes]:
    for piece in pieces:
        if count <= 0:
            return
        yield piece[:count]
        count -= len(piece)
