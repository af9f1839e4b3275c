"""The output folder is checked before work, filled under a temporary name, and renamed when it is complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checkpoint.hub.shards import DownloadedShards
from ..checkpoint.places import own_folder, refuse_link
from ..checkpoint.sidefiles import read_side_file, side_files
from ..checkpoint.source import Checkpoint, read_json
from ..checkpoint.writer import sync_folder, write_bytes, write_json
from ..errors import InputError
from ..stream.manifest import MANIFEST_NAME
from ..weights.decoding import shards_below
from .identity import difference
from .journal import STATE_FOLDER, Journal
from .ownership import is_ours, refuse_foreign, remove_own

PARTIAL_SUFFIX = ".partial"
SLACK_BYTES = 64 << 20  # side files, index, manifest


def partial_folder(output: Path) -> Path:
    """The folder in which the output grows, on the same file system: beside the real folder, if `output` is a link."""
    folder = output.resolve()
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def _replaced_folder(output: Path) -> Path:
    """The folder of an earlier output while the new one takes its name."""
    folder = output.resolve()
    return folder.with_name(f".{folder.name}.nvquant-replaced")


def check_output(output: Path, needed_bytes: int, source: Path) -> None:
    """Refuse an impossible output before any work.

    Raises:
        InputError: it exists and is not nvquant's, or would overwrite the source, or the disk is too full.
    """
    try:
        _check_places(output, source)
        _check_room(output, needed_bytes)
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise InputError(
            f"-o {output} is not writable ({error.strerror})", where="-o", hint="choose another folder with -o"
        ) from error


def _check_places(output: Path, source: Path) -> None:
    if source.resolve().is_relative_to(output.resolve()):
        raise InputError(f"-o {output} is the source itself, or contains it", where="-o", hint="choose another folder")
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST_NAME).exists()):
            raise InputError(
                f"-o {output} exists, but nvquant did not write it",
                where="-o",
                hint="choose another folder, or remove it yourself",
            )
    partial = partial_folder(output)
    for folder in (partial, _replaced_folder(output)):
        refuse_link(folder)
        refuse_link(folder / STATE_FOLDER)
        if folder.exists() and not (folder.is_dir() and is_ours(folder)):
            raise InputError(
                f"{folder} exists, but nvquant did not write it",
                where=folder,
                hint="remove it, or choose another folder with -o",
            )


def _check_room(output: Path, needed_bytes: int) -> None:
    partial = partial_folder(output)
    parent = _existing_parent(partial)
    freed = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
    free = shutil.disk_usage(parent).free + freed
    if free < needed_bytes + SLACK_BYTES:
        raise InputError(
            f"-o {output} needs {needed_bytes + SLACK_BYTES:,} bytes, but {parent} has {free:,} free",
            where="-o",
            hint="free space, or choose another disk with -o",
        )


def check_finished(output: Path, identity: Mapping[str, Any], restart: bool) -> bool:
    """Whether a run of this identity has already written the output.

    Raises:
        InputError: another run has written it, and nvquant may not replace it.
    """
    path = output / MANIFEST_NAME
    if restart and output.is_dir():
        refuse_foreign(output, "--restart")
    if restart or not path.exists():
        return False
    _drop_replaced(output)
    differs = difference(read_json(path, "nvquant writes one"), identity)
    if differs is not None:
        raise InputError(
            f"-o {output} contains the finished checkpoint of another run ({differs})",
            where="-o",
            hint="choose another folder, or replace it with --restart",
        )
    return True


@contextmanager
def locked_partial(output: Path) -> Iterator[Path]:
    """Create the partial folder if it is missing, and lock it for this process.

    Raises:
        InputError: it cannot be created, or another run fills it.
    """
    partial = partial_folder(output)
    try:
        refuse_link(partial)
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise InputError(
            f"{partial} cannot be created ({error.strerror})", where=partial, hint="choose another folder with -o"
        ) from error
    try:
        try:
            # On the folder itself: the lock goes with it when it is renamed, and ends with the process.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another run is writing to {partial}", hint="wait until it ends, or choose another folder with -o"
            ) from error
        if not partial.exists() or partial.stat().st_ino != os.fstat(descriptor).st_ino:
            raise InputError(f"another run has just finished or removed {partial}", hint="run the command again")
        yield partial
    finally:
        os.close(descriptor)


def open_partial(partial: Path, identity: Mapping[str, Any], restart: bool, files: Iterable[str] = ()) -> Journal:
    """Resume an earlier run of this identity in the partial folder, or begin a new one.

    Args:
        restart: remove the files that an earlier run wrote there.
        files: names of the files that the run is going to write, relative to the folder.
    Raises:
        InputError: the folder contains another run, or something that nvquant did not write.
        CheckFailed: the identity of the run in it is damaged.
    """
    journal = Journal(partial)
    found = None if restart else journal.identity()
    if found is not None:
        differs = difference(found, identity)
        if differs is None:
            return journal
        raise InputError(
            f"{partial} contains another run ({differs})",
            where=partial,
            hint="use the same files and options to resume it, or --restart to begin anew",
        )
    refuse_link(journal.folder)
    refuse_foreign(partial, "--restart" if restart else "a new run")
    remove_own(partial)
    journal.begin(identity, files)
    return journal


def remove_partial(partial: Path) -> None:
    """Remove a partial folder, as far as the system permits."""
    with suppress(OSError):
        remove_own(partial)
        partial.rmdir()


def finish_publishing(output: Path) -> None:
    """Give a complete output its name if its run was killed before.

    Raises:
        InputError: that run is still active.
    """
    partial = partial_folder(output)

    def is_whole_without_name() -> bool:
        has_manifest = (partial / MANIFEST_NAME).exists() and not (partial / STATE_FOLDER).exists()
        return has_manifest and not (output / MANIFEST_NAME).exists()

    if is_whole_without_name():
        with locked_partial(output):
            if is_whole_without_name():
                publish(partial, output)


def publish(partial: Path, output: Path) -> None:
    """Give the complete output its final name, and replace an earlier output of nvquant's. Whenever this ends, either
    the old output or the complete new one exists, and the next run finishes the rest."""
    folder, replaced = output.resolve(), _replaced_folder(output)
    Journal(partial).clear()
    sync_folder(partial)
    _drop_replaced(output)
    with suppress(FileNotFoundError):
        folder.rename(replaced)
    partial.rename(folder)
    sync_folder(folder.parent)
    _drop_replaced(output)


@contextmanager
def fresh_partial(output: Path, identity: Mapping[str, Any], files: Iterable[str] = ()) -> Iterator[Path]:
    """An empty partial folder, locked for this process, for work without resumption. An error leaves nothing behind."""
    finish_publishing(output)
    with locked_partial(output) as partial:
        open_partial(partial, identity, True, files)
        try:
            yield partial
        except BaseException:
            remove_partial(partial)
            raise


def check_cache(source: Checkpoint, output: Path, output_bytes: int) -> None:
    """Refuse a model on the Hub that does not fit the cache, before any of its weights is downloaded.

    Args:
        output_bytes: size of the output, which may be on the same disk.
    Raises:
        InputError: the disk is too full.
    """
    content = shards_below(source)
    if source.hub is None or not isinstance(content, DownloadedShards):
        return
    missing = content.missing_bytes(source.shards)
    folder = source.folder
    is_shared = _existing_parent(partial_folder(output)).stat().st_dev == folder.stat().st_dev
    needed = missing + (output_bytes if is_shared else 0)
    free = shutil.disk_usage(folder).free
    if missing and free < needed + SLACK_BYTES:
        raise InputError(
            f"{source.name} has {missing:,} bytes to download, but the disk of the cache, {folder}, has {free:,} "
            f"free{' for it and the output' if is_shared else ''}",
            where=source.name,
            hint="use --low-disk, which keeps no weights, or set HF_HOME to a folder on a larger disk",
        )


def _drop_replaced(output: Path) -> None:
    """Remove the replaced output, as far as nvquant wrote it and the system permits."""
    replaced = _replaced_folder(output)
    if replaced.is_dir() and not replaced.is_symlink():
        remove_partial(replaced)


def _existing_parent(path: Path) -> Path:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return parent


def write_side_files(source: Path, folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy the side files of the folder `source` (tokenizer, chat template, …) and write the output's own configs."""
    for name in side_files(source):
        own_folder((folder / name).parent)
        write_bytes(folder / name, read_side_file(source, name))
    for name, config in configs.items():
        write_json(folder / name, config)
