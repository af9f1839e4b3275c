"""A checkpoint on the Hub to verify: downloaded completely, or read by ranges. Headers and scales are enough for most
checks of the stage structure."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.headers import Header
from ..checkpoint.hub.ranges import RangeReader
from ..checkpoint.hub.repository import HubModel
from ..checkpoint.hub.shards import DownloadedShards, RemoteShards
from ..checkpoint.hub.source import fetch_small_files, read_remote_header
from ..checkpoint.shard_bytes import ReadingOrder
from ..checkpoint.source import read_json
from ..errors import InputError
from .subject import Subject, refuse_other_formats
from .threads import Progress

SUFFIX = ".safetensors"


def fetch_checkpoint(model: HubModel, progress: Progress) -> Path:
    """Download a complete checkpoint, each file checked by its published hash. Returns its folder in the Hub's cache.

    Raises:
        InputError: see `download`.
    """
    folder = fetch_small_files(model)
    DownloadedShards(model).fetch_all(
        shards_of(model), lambda done, total: progress(done >> 20, total >> 20, f"downloading {model.repo} (MiB)")
    )
    return folder


@contextmanager
def remote_subject(model: HubModel, progress: Progress) -> Iterator[Subject]:
    """Open a checkpoint that is read by ranges: its small files and headers now, other tensors when a check requires
    them, each once.

    Raises:
        InputError: it is no NVFP4 checkpoint, or the network failed.
    """
    folder = fetch_small_files(model)
    reader = RangeReader(model)
    headers: dict[str, Header] = {}
    damaged = []
    names = shards_of(model)
    if not names:
        raise InputError(f"Hub model {model.repo} contains no {SUFFIX} file", hint="name a checkpoint that vLLM reads")
    for at, name in enumerate(names):
        progress(at, len(names), "reading headers")
        try:
            headers[name] = read_remote_header(reader, folder, name)
        except InputError as error:
            damaged.append(str(error))
    shards = RemoteShards(reader)
    config = read_json(folder / "config.json", "every checkpoint has one")
    subject = Subject(folder, config, headers, tuple(damaged), progress, shards, model)
    if not damaged:
        refuse_other_formats(subject)
    with tempfile.TemporaryDirectory(prefix="nvquant-verify-") as spool:
        every = frozenset(subject.infos)
        subject.checkpoint.begin(ReadingOrder([], sorted(every), every, spool=Path(spool)))
        try:
            yield subject
        finally:
            shards.end()


def shards_of(model: HubModel) -> list[str]:
    """The names of a model's shards, sorted."""
    return sorted(name for name in model.files if name.endswith(SUFFIX) and "/" not in name)


def unread_bytes(subject: Subject) -> int:
    """The bytes of a remote checkpoint's tensors that no check read, or 0 for a local checkpoint."""
    if not isinstance(subject.content, RemoteShards):
        return 0
    read = subject.content.names_read
    return sum(info.nbytes for name, info in subject.infos.items() if name not in read)
