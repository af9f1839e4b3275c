"""The forms of values that the Hub or a mirror sends. nvquant checks each value before it uses it.

huggingface_hub makes paths of commits, ETags and names, so a mirror could overwrite any file of the machine.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from ...errors import InputError

MOST_BYTES = 1 << 50  # of one file; the Hub takes 50 GB at most today
MOST_FILES = 200_000
MOST_NAME_BYTES, MOST_PART_BYTES = 1024, 255
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ETAG = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,127}")  # as a file's name in the cache
_REPO = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")
_HIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\\]")


def commit_of(value: object, where: str) -> str:
    """A commit: 40 hexadecimal digits.

    Args:
        where: the sender, as `Hub model org/name`.
    Raises:
        InputError: it is not a commit.
    """
    if not isinstance(value, str) or _COMMIT.fullmatch(value) is None:
        raise _refused(where, "a commit", value)
    return value


def hash_of(value: object, where: str) -> str | None:
    """The published hash of a file, sha1 or sha256, or None where none is published.

    Raises:
        InputError: it has another form.
    """
    if value is None:
        return None
    if not isinstance(value, str) or _HASH.fullmatch(value) is None:
        raise _refused(where, "the hash of a file", value)
    return value


def etag_of(value: str, where: str) -> str:
    """An ETag as it stands in a header. It becomes the name of a file in the cache.

    Raises:
        InputError: it cannot be a name.
    """
    if _ETAG.fullmatch(value.removeprefix("W/").strip('"')) is None:
        raise _refused(where, "an ETag", value)
    return value


def size_of(value: object, where: str) -> int | None:
    """The size of a file in bytes, or None where the Hub sends none.

    Raises:
        InputError: it is not a size.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_BYTES:
        raise _refused(where, "the size of a file", value)
    return value


def repo_of(value: object, where: str) -> str:
    """`org/name`.

    Raises:
        InputError: it has another form.
    """
    if not isinstance(value, str) or _REPO.fullmatch(value) is None or ".." in value:
        raise _refused(where, "a name", value)
    return value


def file_name_of(value: object, where: str) -> str:
    """The name of a file in a repository: relative, and inside of it.

    Raises:
        InputError: it has another form.
    """
    if not isinstance(value, str) or _HIDDEN.search(value) or not 0 < len(value.encode()) <= MOST_NAME_BYTES:
        raise _refused(where, "the name of a file", value)
    parts = value.split("/")
    if any(part in ("", ".", "..") or len(part.encode()) > MOST_PART_BYTES for part in parts):
        raise _refused(where, "the name of a file", value)
    return PurePosixPath(value).as_posix()


def siblings_of(found: Any, where: str) -> list[Any]:
    """The entries for a repository's files.

    Raises:
        InputError: there are more than nvquant reads.
    """
    siblings = list(found.siblings or ())
    if len(siblings) > MOST_FILES:
        raise InputError(
            f"{where} lists {len(siblings):,} files, more than the {MOST_FILES:,} that nvquant reads",
            where=where,
            hint="choose another repository",
        )
    return siblings


def _refused(where: str, what: str, value: object) -> InputError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}…"
    return InputError(
        f"the server sent {shown} in place of {what}", where=where, hint="check HF_ENDPOINT and the network"
    )
