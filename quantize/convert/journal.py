"""The journal of a run, in its partial folder: one small file for each shard that is complete and on the disk.

A shard is done when its record exists. The record is written after the shard is durable, under a temporary name, and
then renamed, like the shard. No record ever changes, so a run that ends at any point leaves only complete records.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.digest import file_sha256
from ..checkpoint.places import own_folder
from ..checkpoint.source import read_json
from ..checkpoint.writer import sync_folder, write_json
from ..errors import CheckFailed, InputError
from ..plan.plan import PlannedShard
from ..stream.manifest import FileNames, HeadRecord, LayerRecord, ShardRecord, held_to

STATE_FOLDER = "nvquant_run"
CLEARED_FOLDER = "nvquant_run.cleared"
IDENTITY_NAME = "identity.json"
LIST_NAME = "files.json"
_HASH_THREADS = 4


class Journal:
    """The records of a partial folder.

    Args:
        partial: the folder in which the output grows.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.folder = partial / STATE_FOLDER

    def identity(self) -> dict[str, Any] | None:
        """The identity of the run that fills the folder, or None before it is written.

        Raises:
            CheckFailed: the identity is damaged.
        """
        path = self.folder / IDENTITY_NAME
        try:
            return read_json(path, "") if path.exists() else None
        except InputError as error:
            raise CheckFailed(f"{path} is damaged", where=path, hint="begin anew with --restart") from error

    def listed(self) -> frozenset[str] | None:
        """Names of the files that the run is going to write; None if it has no list."""
        path = self.folder / LIST_NAME
        if self.folder.is_symlink() or not path.is_file():
            return None
        try:
            return frozenset(held_to(FileNames, read_json(path, ""), str(path)).files)
        except InputError:
            return None

    def begin(self, identity: Mapping[str, Any], files: Iterable[str] = ()) -> None:
        """Write the identity of this run.

        Args:
            files: names of the files that it is going to write, relative to the folder.
        """
        own_folder(self.folder)
        if names := sorted(files):
            write_json(self.folder / LIST_NAME, {"files": names})
        write_json(self.folder / IDENTITY_NAME, identity)
        sync_folder(self.partial)

    def note(self, shard: PlannedShard, sha256: str, layer: LayerRecord | None, head: HeadRecord | None = None) -> None:
        """Write the record of a shard that is complete and on the disk.

        Args:
            layer: the manifest's entry for the layer in it, or None for the rest of the model.
            head: the manifest's entry for the quantized head in it.
        """
        record = ShardRecord(sha256=sha256, layer=layer, **({} if head is None else {"head": head}))
        write_json(self._path(shard), record.as_json())

    def has(self, shard: PlannedShard) -> bool:
        """Whether the shard has a record."""
        return self._path(shard).exists()

    def records(self, shards: Sequence[PlannedShard]) -> dict[str, ShardRecord]:
        """The records of the complete shards, by file. A shard whose file was removed counts as not done.

        Raises:
            CheckFailed: a record is damaged.
        """
        noted = [shard for shard in shards if self._path(shard).exists() and (self.partial / shard.file).exists()]
        return {shard.file: self._read(shard) for shard in noted}

    def done(self, shards: Sequence[PlannedShard]) -> dict[str, ShardRecord]:
        """`records`, after reading and hashing the bytes of every shard again.

        Raises:
            CheckFailed: a shard or a record is damaged.
        """
        records = self.records(shards)
        noted = [shard for shard in shards if shard.file in records]
        with ThreadPoolExecutor(_HASH_THREADS, "hash") as pool:
            found = list(pool.map(file_sha256, [self.partial / shard.file for shard in noted]))
        for shard, digest in zip(noted, found, strict=True):
            if digest != records[shard.file].sha256:
                raise CheckFailed(
                    f"{self.partial / shard.file} is damaged (its sha256 differs from the journal's)",
                    hint="remove this file and run the same command again, which rebuilds this file alone",
                )
        return records

    def clear(self) -> None:
        """Remove all records at once. The other files of the folder are the complete output."""
        with suppress(FileNotFoundError):
            self.folder.rename(self.partial / CLEARED_FOLDER)
        shutil.rmtree(self.partial / CLEARED_FOLDER, ignore_errors=True)

    def _path(self, shard: PlannedShard) -> Path:
        return self.folder / f"{shard.file}.json"

    def _read(self, shard: PlannedShard) -> ShardRecord:
        path = self._path(shard)
        try:
            record = held_to(ShardRecord, read_json(path, ""), str(path))
        except InputError as error:
            raise CheckFailed(
                f"{path} is damaged", where=path, hint="remove this file and run the same command again"
            ) from error
        if (record.layer is None, record.head is None) != (shard.layer is None, not shard.is_head):
            raise CheckFailed(f"{path} is damaged", where=path, hint="remove this file and run the same command again")
        return record
