"""The address of a server: accepted as people write it, and checked before anything is sent there."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse

from ..errors import InputError
from ..quoting import without_secrets

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
_PATH = re.compile(r"[\w.~!$&'()*+,;=:@%/-]*", re.ASCII)
MOST_HOST_CHARACTERS = 253  # RFC 1035


def base_url(url: str) -> str:
    """Returns a server's address without `/v1`.

    Raises:
        InputError: it is no address, or it contains a name and a password.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urllib.parse.urlsplit(full)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:  # a bracket that is never closed, a port that is no number
        raise _refused(full) from error
    if parts.scheme not in ("http", "https") or not _is_host(host) or port == 0:
        raise _refused(full)
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"--url {without_secrets(full)} contains a user name or a password, which nvquant does not send",
            where="--url",
            hint="give the address without them",
        )
    # urlsplit drops line feeds and tabulators: they must not pass as if they had not been there.
    if parts.query or parts.fragment or _PATH.fullmatch(parts.path) is None or re.search(r"[\s?#\\]", full):
        raise _refused(full)
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def is_local(url: str) -> bool:
    """Whether an address is one of this machine's own."""
    return urllib.parse.urlsplit(url).hostname in LOCAL_HOSTS


def _is_host(host: str) -> bool:
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return False
        return True
    labels = host.rstrip(".").split(".")
    return len(host) <= MOST_HOST_CHARACTERS and all(_LABEL.fullmatch(label) for label in labels)


def _refused(full: str) -> InputError:
    return InputError(
        f"--url {without_secrets(full)} is not the address of a server",
        where="--url",
        hint="write http://127.0.0.1:8000",
    )
