"""The HTTP client of huggingface_hub, guarded: a token goes to the Hub alone, and headers that become paths are held to
their form."""

from __future__ import annotations

import threading
from typing import Any
from urllib.parse import urlsplit

from .forms import commit_of, etag_of, size_of

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
            client.event_hooks = {
                "request": [*client.event_hooks.get("request", ()), _without_token],
                "response": [*client.event_hooks.get("response", ()), _hold_headers],
            }
            return client

        set_client_factory(factory)
        _is_set = True


def may_have_token(address: str) -> bool:
    """Whether an address is the Hub's, by scheme, host and port."""
    return origin_of(address) in _trusted


def _without_token(request: Any) -> None:
    """Take the token from a request that leaves the Hub; each redirect is a request of its own."""
    if not may_have_token(str(request.url)):
        for name in _SECRET_HEADERS:
            request.headers.pop(name, None)


def _hold_headers(response: Any) -> None:
    """Hold what huggingface_hub makes paths and sizes of to its form.

    Raises:
        InputError: something has another form.
    """
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
