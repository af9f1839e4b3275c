"""Requests to an untrusted server: each answer is bounded in time and size, and no request goes elsewhere.

Redirects are not followed, so that a request never reaches another host, port or scheme than the user named. No header
carries a token. The body of an answer is read without content encodings.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from ..errors import CheckFailed
from ..quoting import one_line
from .address import is_local

ATTEMPTS = 3
PAUSE_SECONDS = 0.5
MIB = 1 << 20
MOST_FACT_BYTES = 16 * MIB  # vLLM's list of metrics has some hundred kilobytes
MOST_ANSWER_BYTES = 32 * MIB  # a token's likelihood takes some hundred bytes
MOST_ERROR_BYTES = 64 << 10
MOST_ERROR_CHARACTERS = 400
FACT_SECONDS = 30.0
HEALTH_SECONDS = 5.0
_PIECE_BYTES = 256 << 10
_BUSY = (429, 502, 503, 504)
_REDIRECTS = (300, 301, 302, 303, 307, 308)


class ServerError(CheckFailed):
    """A server that does not answer, or answers with an error."""


class ServerGone(ServerError):
    """A server that can no longer be reached."""


class Http:
    """A server's address, and the requests to it.

    Args:
        url: from `base_url`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        # A proxy cannot reach this machine's own ports.
        proxies = [urllib.request.ProxyHandler({})] if is_local(url) else [urllib.request.ProxyHandler()]
        self._opener = urllib.request.OpenerDirector()
        for handler in (*proxies, _Plain(), _Secure(), urllib.request.HTTPErrorProcessor(), _Errors()):
            self._opener.add_handler(handler)

    def is_healthy(self) -> bool:
        """Whether the server accepts requests now. False too where nobody answers."""
        try:
            self._once("/health", None, HEALTH_SECONDS, MOST_ERROR_BYTES)
        except (OSError, http.client.HTTPException, _TooMuch, _TooLong):
            return False
        return True

    def ask(self, path: str, body: bytes | None, seconds: float, most_bytes: int) -> bytes:
        """Send one request, and retry it where the server was too busy or a read was cut.

        A request that may have been started is not retried, because it would be counted, and paid for, twice.

        Args:
            body: JSON to post, or None to get.
            seconds: for the complete answer.
            most_bytes: of it.
        Raises:
            ServerError: an error, a redirect, or an answer that is too long or too late.
            ServerGone: nobody answers.
        """
        where = f"{self.url}{path}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._once(path, body, seconds, most_bytes)
            except _TooMuch as error:
                raise ServerError(f"{where} answered with more than {most_bytes:,} bytes.") from error
            except _TooLong as error:
                raise ServerError(f"{where} gave no complete answer in {seconds:.0f} s.") from error
            except urllib.error.HTTPError as error:
                if error.code in _REDIRECTS:
                    raise ServerError(
                        f"{where} answered {error.code}, which redirects to another address",
                        where=where,
                        hint="give that one with --url",
                    ) from error
                if error.code not in _BUSY or attempt == ATTEMPTS:
                    raise ServerError(f"{where} answered {error.code}: {_words_of(error)}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if attempt == ATTEMPTS or not (body is None or isinstance(reason, ConnectionRefusedError)):
                    raise ServerGone(f"{self.url} cannot be reached ({_reason(reason)}).") from error
            time.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError

    def _once(self, path: str, body: bytes | None, seconds: float, most_bytes: int) -> bytes:
        """The body of one answer.

        Raises:
            _TooMuch, _TooLong: it is not within its bounds.
            OSError, HTTPException: see urllib.
        """
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        request = urllib.request.Request(f"{self.url}{path}", body, headers)
        with _Deadline(seconds) as deadline:
            request.deadline = deadline  # type: ignore[attr-defined]
            try:
                with self._opener.open(request, timeout=seconds) as answer:
                    content = _read(answer, most_bytes)
            except urllib.error.HTTPError as error:
                with contextlib.closing(error):
                    error.said = _beginning(error)  # type: ignore[attr-defined]
                if deadline.is_over:
                    raise _TooLong from error
                raise
            except (OSError, http.client.HTTPException) as error:
                if deadline.is_over or isinstance(getattr(error, "reason", error), TimeoutError):
                    raise _TooLong from error
                raise
            if deadline.is_over:  # what was cut looks like an end where no length was announced
                raise _TooLong
            return content


class _TooMuch(Exception):
    """An answer with more bytes than it may have."""


class _TooLong(Exception):
    """An answer that was not complete in its time."""


class _Deadline:
    """Cuts a connection when its time is over, however little comes of an answer, and however slowly.

    A timeout of the socket alone ends no answer of which a byte comes now and then.
    """

    def __init__(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.is_over = False

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._socket = None

    def watch(self, connected: socket.socket) -> None:
        """Cut this connection when the time is over."""
        with self._lock:
            self._socket = connected
        if self.is_over:
            self._cut()

    def _cut(self) -> None:
        with self._lock:
            self.is_over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # of TLS too, whose own shutdown would wait for the other side
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _watched(kind: type[http.client.HTTPConnection], deadline: _Deadline) -> Any:
    """A class of connections that the deadline can cut."""

    class Watched(kind):  # type: ignore[misc,valid-type]
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    return Watched


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: Any) -> Any:
        return self.do_open(_watched(http.client.HTTPConnection, request.deadline), request)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, request: Any) -> Any:
        return self.do_open(_watched(http.client.HTTPSConnection, request.deadline), request)


class _Errors(urllib.request.HTTPDefaultErrorHandler):
    """Every status but 200 and its like is an error. Redirects are too, because no handler follows them."""


def _read(answer: Any, most_bytes: int) -> bytes:
    pieces = []
    left = most_bytes
    for piece in _pieces(answer):
        left -= len(piece)
        if left < 0:
            raise _TooMuch
        pieces.append(piece)
    return b"".join(pieces)


def _pieces(answer: Any) -> Iterator[bytes]:
    while piece := answer.read1(_PIECE_BYTES):
        yield piece
    if answer.length:  # of what was announced, not everything came
        raise http.client.IncompleteRead(b"", answer.length)


def _beginning(error: urllib.error.HTTPError) -> bytes:
    """The beginning of an error's body, which a server may never end."""
    content = b""
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        for piece in _pieces(error):
            content += piece
            if len(content) >= MOST_ERROR_BYTES:
                break
    return content[:MOST_ERROR_BYTES]


def _words_of(error: urllib.error.HTTPError) -> str:
    """The server's own words for an error."""
    if error.code == 401:
        return "the server requires an API key, which nvquant does not send"
    content: bytes = getattr(error, "said", b"")
    said: object = content.decode(errors="replace") or error.reason
    with contextlib.suppress(ValueError, RecursionError):
        parsed = json.loads(content)
        if isinstance(parsed, dict):
            said = parsed.get("error", parsed)
        if isinstance(said, dict):
            said = said.get("message", said)
    return one_line(said)[:MOST_ERROR_CHARACTERS]


def _reason(reason: object) -> str:
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
