"""HTTP of the test Hub: connections, request bodies, answers that faults may spoil, and the count of the bytes sent."""

from __future__ import annotations

import json
import re
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub_faults import Dropped, Fault, Hangup, IgnoreRange, LostAnswer, Stall, Status
from support.hub_repos import PIECE_BYTES, Blob, Refused

if TYPE_CHECKING:
    from support.hub_server import HubServer


class Request(NamedTuple):
    """What was asked for: the path is without query, and begins with `/cdn/` where the CDN was asked."""

    method: str
    path: str
    headers: Mapping[str, str]


class Listener(ThreadingHTTPServer):
    """One port of 127.0.0.1, served by threads that end with it."""

    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 128

    def __init__(self, handler: type[Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._open: set[socket.socket] = set()
        self._loop = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._loop.start()

    @property
    def url(self) -> str:
        """The address; still known after the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)  # here and not in the thread, so that the end misses none
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error; the server's own are noted by its handlers."""

    def stop(self) -> None:
        """Close every connection, for a client that keeps one must find it gone, and wait for the threads."""
        self.shutdown()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        self._loop.join()


class Handler(BaseHTTPRequestHandler, ABC):
    """Answers one request after the other; what to answer is a subclass's `route`."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    fault: Fault
    seen: Request

    @abstractmethod
    def route(self) -> None:
        """Answer `self.seen`, or raise Refused."""

    def path_seen(self) -> str:
        """The path for patterns and for the log."""
        return unquote(urlsplit(self.path).path)

    def do_GET(self) -> None:
        self.fault, self._begun = Fault(), False
        self.seen = Request(self.command, self.path_seen(), dict(self.headers.items()))
        self.incoming = self.request_body()
        try:
            self._answer()
        except (Dropped, ConnectionError):
            self.close_connection = True
        except Exception as error:
            self.hub.errors.append(error)
            self.close_connection = True
            if not self._begun:
                self._refuse(Refused(500, message=f"The test Hub itself failed: {error!r}"))

    def _answer(self) -> None:
        """Undergo the fault, and answer as the route says."""
        try:
            self.fault = self.hub.arrived(self.seen)
            self._suffer()
            self.route()
        except Refused as refusal:
            self._refuse(refusal)

    def _refuse(self, refusal: Refused) -> None:
        data = json.dumps(refusal.body).encode() if refusal.body else b""
        headers = {"Content-Type": "application/json", **refusal.headers}
        self.send(refusal.status, headers, len(data), [data])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Tests are silent."""

    @property
    def query(self) -> dict[str, list[str]]:
        """What follows the question mark."""
        return parse_qs(urlsplit(self.path).query)

    @property
    def token(self) -> str | None:
        """Who asks."""
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def read(self) -> bytes:
        """The request's body."""
        return b"".join(self.incoming)

    def request_body(self) -> Iterator[bytes]:
        """What follows the request's headers, by its length or in chunks; Dropped where the client goes away."""
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                yield from self._exactly(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        yield from self._exactly(int(self.headers.get("Content-Length") or 0))

    def send_json(self, value: Any, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Answer with JSON."""
        data = json.dumps(value).encode()
        self.send(200, {"Content-Type": "application/json", **headers}, len(data), [data], self._body_fault())

    def send_blob(
        self, blob: Blob, headers: Mapping[str, str], account: Callable[[int], Callable[[int], None]]
    ) -> None:
        """Answer with a file, or with the range of it that was asked for; `account` begins to count from a byte."""
        fault = self._body_fault()
        first, end, whole = self._range(blob, isinstance(fault, IgnoreRange))
        headers = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", **headers}
        if not whole:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{blob.size}"
        count = account(first) if self.command == "GET" else None
        self.send(200 if whole else 206, headers, end - first, blob.pieces(first, end), fault, count)

    def send(
        self,
        status: int,
        headers: Mapping[str, str],
        length: int = 0,
        pieces: Iterable[bytes] = (),
        body_fault: Fault | None = None,
        count: Callable[[int], None] | None = None,
    ) -> None:
        """Answer, spoiled by what faults there are; `count` is told of all bytes of the body that left."""
        for _ in self.incoming:
            pass
        if isinstance(self.fault, LostAnswer):
            raise Dropped
        self._begun = True
        spoil = body_fault or Fault()
        self.send_response(status)
        for key, value in spoil.headers(self.fault.headers(headers)).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(spoil.length(length)))
        self.end_headers()
        if self.command != "HEAD":
            for piece in spoil.body(iter(pieces), self.hub.wait):
                self._write(piece, count or (lambda _: None))

    def _write(self, piece: bytes, count: Callable[[int], None]) -> None:
        """Send, and count what left: before it leaves, so that nobody who has it finds it uncounted."""
        left = memoryview(piece)
        while left:
            count(len(left))
            done = 0
            try:
                done = self.connection.send(left)  # not sendall, which does not say how much left before an error
            finally:
                if done < len(left):
                    count(done - len(left))
            left = left[done:]

    def _suffer(self) -> None:
        """Undergo the faults that come before an answer."""
        if isinstance(self.fault, Status):
            retry = {} if self.fault.retry_after is None else {"Retry-After": str(self.fault.retry_after)}
            raise Refused(self.fault.status, self.fault.code, self.fault.message, retry)
        if isinstance(self.fault, Stall):
            self.hub.wait(self.fault.seconds)
        if isinstance(self.fault, Hangup):
            had = 0
            while had < self.fault.after and (piece := next(self.incoming, b"")):
                had += len(piece)
            raise Dropped

    def _body_fault(self) -> Fault | None:
        return None if self.command == "HEAD" else self.hub.take_fault(self.seen, of_body=True)

    def _range(self, blob: Blob, ignored: bool) -> tuple[int, int, bool]:
        """First byte, end (not included) and whether that is an answer with the whole file."""
        if self.headers.get("If-Match", f'"{blob.etag}"') not in (f'"{blob.etag}"', "*"):
            raise Refused(412)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        other = self.headers.get("If-Range", f'"{blob.etag}"') != f'"{blob.etag}"'
        if wanted is None or not any(wanted.groups()) or ignored or other:
            return 0, blob.size, True
        first = int(wanted[1]) if wanted[1] else max(blob.size - int(wanted[2]), 0)
        end = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else blob.size, blob.size)
        if first >= end:
            raise Refused(416, headers={"Content-Range": f"bytes */{blob.size}"})
        return first, end, False

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read(min(PIECE_BYTES, size))
            if not piece:  # the client went away
                raise Dropped
            size -= len(piece)
            yield piece
