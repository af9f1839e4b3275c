"""The only place that opens untrusted files.

A link in a downloaded folder could lead to any file of the machine, which would then be copied or uploaded. A pipe or
a device has no end. So a file must be a regular file, and one that belongs to a folder must lie in that folder,
or be a blob of the same repository of the Hub's cache, whose snapshots are folders of links
(https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError

MOST_SMALL_BYTES = 100_000_000  # of a file that is read whole; a tokenizer has at most some tens of megabytes
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class MissingFile(InputError):
    """There is no file of this name."""


def open_regular(path: Path, folder: Path | None = None, hint: str = "restore the file and try again") -> BinaryIO:
    """Open a file for reading, without waiting as for a pipe.

    Args:
        folder: where the file must lie after all links are followed. None allows any place, for a file that the user
            named.
        hint: the way out for a file that is missing or cannot be read, as the end of a sentence.
    Raises:
        MissingFile: the file does not exist. A link that leads nowhere raises InputError.
        InputError: it is not a regular file, lies elsewhere, or cannot be read.
    """
    try:
        real = regular_path(path, folder, hint)
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _refuse_irregular(path, os.fstat(descriptor))  # it may have been exchanged since
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise unreadable(path, error, hint) from error


def regular_path(path: Path, folder: Path | None = None, hint: str = "restore the file and try again") -> Path:
    """The path behind all links of a file that another library opens, checked as by `open_regular`.

    Raises:
        MissingFile: the file does not exist. A link that leads nowhere raises InputError.
        InputError: it is not a regular file, lies elsewhere, or cannot be read.
    """
    try:
        real = path.resolve(strict=True)
        if folder is not None:
            _refuse_foreign(path, real, folder.resolve(strict=True))
        _refuse_irregular(path, real.stat())
    except (OSError, ValueError, RuntimeError) as error:  # Python 3.10 to 3.12 raise RuntimeError for a loop of links
        raise unreadable(path, error, hint) from error
    return real


def is_file(path: Path) -> bool:
    """Whether this name belongs to a file for `open_regular`, False where the system refuses the name itself.

    A link counts as a file, wherever it leads. `open_regular` refuses it if necessary.
    """
    try:
        return path.is_symlink() or (path.exists() and not path.is_dir())
    except (OSError, ValueError):
        return False


def read_regular(
    path: Path,
    folder: Path | None = None,
    hint: str = "restore the file and try again",
    most: int = MOST_SMALL_BYTES,
) -> bytes:
    """All bytes of a small file, opened by `open_regular`.

    Args:
        most: the largest size in bytes.
    Raises:
        MissingFile: the file does not exist. A link that leads nowhere raises InputError.
        InputError: it is not a regular file, lies elsewhere, is too large, or cannot be read.
    """
    with open_regular(path, folder, hint) as file:
        try:
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
        except OSError as error:
            raise unreadable(path, error, hint) from error
    if data is None or len(data) > most:
        raise InputError(f"{path} is larger than the {most:,} bytes that such a file may have", where=path, hint=hint)
    return data


def unreadable(path: Path, error: Exception, hint: str) -> InputError:
    """The exception to raise for an error while a file is opened or read. An `InputError` is returned unchanged."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, FileNotFoundError):
        if path.is_symlink():
            return InputError(f"{path} is a link that leads nowhere", where=path, hint=hint)
        return MissingFile(f"{path} is missing", where=path, hint=hint)
    if isinstance(error, RuntimeError) or getattr(error, "errno", None) == errno.ELOOP:
        return InputError(f"{path} is a link that leads back to itself", where=path, hint=hint)
    reason = error.strerror if isinstance(error, OSError) else None
    return InputError(f"{path} cannot be read ({reason or error})", where=path, hint=hint)


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((words for is_kind, words in _KINDS if is_kind(status.st_mode)), "something else")
        raise InputError(f"{path} is {kind}, not a file", where=path, hint="put the file itself in its place")


def _refuse_foreign(path: Path, real: Path, folder: Path) -> None:
    if real.is_relative_to(folder):
        inner = real.relative_to(folder).parts
        # A link to a hidden file is no file of the model: `.git/config` may hold a password.
        if not any(part.startswith(".") for part in inner) or path.parts[-len(inner) :] == inner:
            return
    blobs = folder.parent.parent / "blobs"
    if folder.parent.name == "snapshots" and real.parent == blobs:
        return
    raise InputError(
        f"{path} is a link to a file outside of its folder", where=path, hint="put the file itself in its place"
    )
