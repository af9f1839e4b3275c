"""The output folder: checked before work, filled under a temporary name, given its own when whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.writer import sync_folder, write_json
from ..errors import InputError
from .manifest import MANIFEST_NAME

PARTIAL_SUFFIX = ".partial"
RUN_NAME = "nvquant_run.json"  # the identity of the run that fills a partial folder
SLACK_BYTES = 64 << 20  # side files, index, manifest


def partial_folder(output: Path) -> Path:
    """Where the output grows, on the same file system: beside the folder itself, if `output` is a link to it."""
    folder = output.resolve()
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def check_output(output: Path, needed_bytes: int, source: Path) -> None:
    """Refuse an output that cannot be, before any work.

    Raises:
        InputError: it exists and is not nvquant's, or would overwrite the source, or there is not enough disk.
    """
    if source.resolve().is_relative_to(output.resolve()):
        raise InputError(f"-o {output} is the source itself, or holds it: choose another folder.")
    if output.exists():
        if not output.is_dir() or (any(output.iterdir()) and not (output / MANIFEST_NAME).exists()):
            raise InputError(
                f"-o {output} exists and was not made by nvquant: choose another folder, or remove it yourself."
            )
    partial = partial_folder(output)
    if partial.exists() and (not partial.is_dir() or not _is_ours(partial)):
        raise InputError(f"{partial} exists and was not made by nvquant: remove it, or choose another folder with -o.")
    parent = _existing_parent(partial)
    freed = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.exists() else 0
    free = shutil.disk_usage(parent).free + freed
    if free < needed_bytes + SLACK_BYTES:
        raise InputError(
            f"-o {output} needs {needed_bytes + SLACK_BYTES:,} bytes, but {parent} has {free:,} free: free "
            f"space or choose another disk with -o."
        )


def start_partial(output: Path, identity: Mapping[str, Any]) -> Path:
    """Make an empty partial folder that says whose it is; what an earlier run left there goes."""
    partial = partial_folder(output)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write_json(partial / RUN_NAME, identity)
    except OSError as error:
        raise InputError(f"{partial} cannot be made ({error.strerror}): choose another folder with -o.") from error
    return partial


def publish(partial: Path, output: Path) -> None:
    """Give the whole output its final name; an earlier output of nvquant's is replaced."""
    folder = output.resolve()
    (partial / RUN_NAME).unlink()
    sync_folder(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    sync_folder(folder.parent)


def _is_ours(partial: Path) -> bool:
    # A run that ends while it publishes leaves a whole folder, with a manifest, under the partial name.
    return any((partial / name).exists() for name in (RUN_NAME, MANIFEST_NAME)) or not any(partial.iterdir())


def _existing_parent(path: Path) -> Path:
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    return parent
