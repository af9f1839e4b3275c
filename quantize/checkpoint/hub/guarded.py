"""The HTTP client of huggingface_hub, guarded: it sends a token to the Hub alone, and checks the form of each header
that becomes a path."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError
from .forms import commit_of, etag_of, size_of

SILENCE_SECONDS = 60.0  # between two pieces of an answer; a request with a limit of its own keeps that
MOST_ANSWER_BYTES = 256 << 20  # of an answer of the API: the largest repositories list some ten megabytes
MOST_ANSWER_SECONDS = 300.0
PACE_SECONDS = 300.0  # of waiting for the pieces of a file, in which the mean pace may be slow
LEAST_BYTES_PER_SECOND = 1_000  # of a file: at this pace, a shard of 5 GB takes two months
_PORTS = {"http": 80, "https": 443}
_SECRET_HEADERS = ("authorization", "cookie", "proxy-authorization")
_COMMIT, _LINKED_ETAG, _LINKED_SIZE = "x-repo-commit", "x-linked-etag", "x-linked-size"
_lock = threading.Lock()
_trusted: set[tuple[str, str, int | None]] = set()
_is_set = False


def origin_of(address: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address."""
    parts = urlsplit(address)
    return parts.scheme.lower(), (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme.lower())


def guard_client(endpoint: str | None = None) -> None:
    """Restrict the token of every client of huggingface_hub to the Hub's own scheme, host and port.

    Args:
        endpoint: address of the Hub; None for the usual one.
    """
    global _is_set
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    with _lock:
        _trusted.add(origin_of(endpoint or constants.ENDPOINT))
        if _is_set:
            return

        def factory() -> Any:
            client = default_client_factory()
            client.timeout = SILENCE_SECONDS
            client.event_hooks = {
                "request": [*client.event_hooks.get("request", ()), _guard_request],
                "response": [*client.event_hooks.get("response", ()), _hold_headers],
            }
            return client

        set_client_factory(factory)
        _is_set = True


def may_have_token(address: str) -> bool:
    """Whether an address is the Hub's, by scheme, host and port."""
    return origin_of(address) in _trusted


def _guard_request(request: Any) -> None:
    """Remove the token from a request to another host than the Hub. Each redirect is a request of its own.

    API answers come uncompressed, because a few compressed bytes can be gigabytes.
    """
    if request.url.path.startswith("/api/"):
        request.headers["accept-encoding"] = "identity"
    if not may_have_token(str(request.url)):
        for name in _SECRET_HEADERS:
            request.headers.pop(name, None)


def _hold_headers(response: Any) -> None:
    """Check the form of the headers that become paths and sizes in huggingface_hub.

    Raises:
        InputError: one has another form.
    """
    _bound(response)
    headers = response.headers
    where = f"The answer of {response.request.url.host}"
    if _COMMIT in headers:
        commit_of(headers[_COMMIT], where)
        if "etag" in headers and response.request.method == "HEAD" and _LINKED_ETAG not in headers:
            etag_of(headers["etag"], where)
    if _LINKED_ETAG in headers:
        etag_of(headers[_LINKED_ETAG], where)
    if _LINKED_SIZE in headers:
        size_of(headers[_LINKED_SIZE], where)


def _bound(response: Any) -> None:
    """Limit an answer of the Hub's API in bytes and in time, and a file in its pace.

    The client reads the body only after the hooks, through the stream that replaces its own here.

    Raises:
        InputError: an answer of the API is compressed.
    """
    # huggingface_hub 1 uses httpx, and 2 uses httpx2.
    stream: Any = import_module(type(response).__module__.partition(".")[0]).SyncByteStream
    inner, where = response.stream, f"The answer of {response.request.url.host}"
    is_file = not response.request.url.path.startswith("/api/")
    if not is_file and response.headers.get("content-encoding", "identity") != "identity":
        raise InputError(
            f"{where} is compressed without a request for it", where=where, hint="check HF_ENDPOINT and the network"
        )
    pieces = _paced if is_file else _ending

    class Bounded(stream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            return pieces(inner, where)

        def close(self) -> None:
            inner.close()

    response.stream = Bounded()


def _ending(inner: Iterable[bytes], where: str) -> Iterator[bytes]:
    """The pieces of an answer of the API.

    Raises:
        InputError: they are too many, or come for too long.
    """
    begun, size = time.monotonic(), 0
    for piece in inner:
        size += len(piece)
        if size > MOST_ANSWER_BYTES or time.monotonic() - begun > MOST_ANSWER_SECONDS:
            raise InputError(
                f"{where} has no end ({size:,} bytes so far)", where=where, hint="check HF_ENDPOINT and the network"
            )
        yield piece


def _paced(inner: Iterable[bytes], where: str) -> Iterator[bytes]:
    """The pieces of a file. The time that the reader of the pieces takes does not count.

    Raises:
        InputError: they come so slowly that the file would never be complete.
    """
    waited, size = 0.0, 0
    pieces = iter(inner)
    while True:
        begun = time.monotonic()
        piece = next(pieces, None)
        waited += time.monotonic() - begun
        if piece is None:
            return
        size += len(piece)
        if waited > PACE_SECONDS:
            if size < LEAST_BYTES_PER_SECOND * waited:
                raise InputError(
                    f"{where} brings {size:,} bytes of a file in {waited:.0f} s, too few to complete it",
                    where=where,
                    hint="check HF_ENDPOINT and the network, and run the same command again to resume",
                )
            waited, size = 0.0, 0
        yield piece
