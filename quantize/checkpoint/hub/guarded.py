"""The HTTP client of huggingface_hub, guarded: a token goes to the Hub alone, and each header that becomes a path has
its form checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError
from .forms import commit_of, etag_of, size_of

SILENCE_SECONDS = 60.0  # between two pieces of an answer; a request with a limit of its own keeps that
MOST_ANSWER_BYTES = 256 << 20  # of what the Hub tells: the largest repositories list some ten megabytes
MOST_ANSWER_SECONDS = 300.0
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
    """Let every client of huggingface_hub keep its token for the Hub's own scheme, host and port.

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
    """Take the token from a request that leaves the Hub; each redirect is a request of its own.

    API answers come uncompressed, because a few compressed bytes can be gigabytes.
    """
    if request.url.path.startswith("/api/"):
        request.headers["accept-encoding"] = "identity"
    if not may_have_token(str(request.url)):
        for name in _SECRET_HEADERS:
            request.headers.pop(name, None)


def _hold_headers(response: Any) -> None:
    """Hold what huggingface_hub makes paths and sizes of to its form.

    Raises:
        InputError: something has another form.
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
    """Let an answer of the Hub's interface end, in bytes and in time; files have bounds of their own.

    The client reads the body only after the hooks, through the stream that is put here in the place of its own.
    """
    if not response.request.url.path.startswith("/api/"):
        return
    import httpx

    inner, where = response.stream, f"The answer of {response.request.url.host}"
    if response.headers.get("content-encoding", "identity") != "identity":
        raise InputError(f"{where} is compressed, which nobody asked for: check HF_ENDPOINT and the network.")

    class Bounded(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            begun, size = time.monotonic(), 0
            for piece in inner:
                size += len(piece)
                if size > MOST_ANSWER_BYTES or time.monotonic() - begun > MOST_ANSWER_SECONDS:
                    raise InputError(f"{where} has no end ({size:,} bytes so far): check HF_ENDPOINT and the network.")
                yield piece

        def close(self) -> None:
            inner.close()

    response.stream = Bounded()
