"""The files to upload: those of the checkpoint, by name from its index and the allow-list of side files, and those that
are made for the repository. Other files of the folder stay."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..checkpoint.digest import file_sha256
from ..checkpoint.hub.repository import HubFile
from ..checkpoint.regular import regular_path
from ..checkpoint.sidefiles import side_files
from ..checkpoint.source import INDEX_NAME, open_checkpoint
from ..errors import InputError
from ..stream.manifest import MANIFEST_NAME

CARD_NAME = "README.md"
VERIFY_NAME = "nvquant_verify.json"
CHART_NAME = "nvquant_layers.svg"
GENERATED = (CARD_NAME, VERIFY_NAME, CHART_NAME)
DESCRIPTIONS = ("config.json", "hf_quant_config.json", INDEX_NAME, MANIFEST_NAME)
HASHERS = 4  # threads: one alone does not fill a fast disk


@dataclass(frozen=True)
class LocalFile:
    """A file for the repository.

    Attributes:
        name: in the repository.
        content: its path, or its bytes.
    """

    name: str
    content: Path | bytes

    @cached_property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The hash of the content, which is read once."""
        if isinstance(self.content, bytes):
            return hashlib.sha256(self.content).hexdigest()
        return file_sha256(self.content)

    @cached_property
    def git_id(self) -> str:
        """Git's hash of the content, by which the Hub names small files."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def is_published_as(self, published: HubFile) -> bool:
        """Whether the Hub has this very content."""
        if published.size != self.size:
            return False
        return published.etag == (self.git_id if published.sha256 is None else self.sha256)


def checkpoint_files(folder: Path) -> tuple[LocalFile, ...]:
    """List the checkpoint's own files: its shards and their descriptions, tokenizer and the like, licence.

    Raises:
        InputError: the folder contains no complete checkpoint.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", where=folder, hint="give the output of a conversion")
    shards = open_checkpoint(folder).shards
    names = [*(name for name in DESCRIPTIONS if (folder / name).is_file()), *side_files(folder), *shards]
    for name in names:
        regular_path(folder / name, folder, "put the file itself in its place")
    return tuple(LocalFile(name, folder / name) for name in dict.fromkeys(names))


def hash_files(files: Iterable[LocalFile]) -> None:
    """Read every file once for its sha256, some at a time.

    Raises:
        InputError: one cannot be read.
    """

    def read(file: LocalFile) -> None:
        try:
            _ = file.sha256
        except OSError as error:
            raise InputError(f"{file.content!s} cannot be read ({error.strerror}).") from error

    with ThreadPoolExecutor(HASHERS, "hash") as pool:
        list(pool.map(read, files))
