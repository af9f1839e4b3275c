"""Files that nvquant writes: new files in the folder that the user named, never behind a link.

A link in an output folder may lead to any file of the machine, and may have come with the folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError


def refuse_link(path: Path, what: str = "") -> None:
    """Refuse a link in the place of a file or folder that is to be written.

    Args:
        what: the option that names it, for the message.
    Raises:
        InputError: it is a link.
    """
    if path.is_symlink():
        named = f"{what} {path}" if what else str(path)
        raise InputError(
            f"{named} is a link, which nvquant does not write through",
            where=named,
            hint="remove it, or choose another place",
        )


def new_file(path: Path) -> BinaryIO:
    """Open a new file under this name for writing. A file that had the name before loses it and keeps its content.

    The mode follows the umask.

    Raises:
        OSError: the system cannot create it, or a folder has the name.
    """
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "wb", buffering=0)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name and rename it, which replaces a link in its place.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with new_file(temporary) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror})", where=path, hint="choose another place for it"
        ) from error


def own_folder(path: Path) -> None:
    """Make a folder where it is missing.

    Raises:
        InputError: a link is in its place.
        OSError: it cannot be made.
    """
    refuse_link(path)
    path.mkdir(exist_ok=True)
