"""The distilled checkpoint: the old one's files with other block scales and norms, and a record of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.places import own_folder
from ..checkpoint.regular import read_regular
from ..checkpoint.sidefiles import read_side_file, side_files
from ..checkpoint.source import INDEX_NAME, Checkpoint, open_checkpoint, read_json, tensor_bytes
from ..checkpoint.writer import TensorEntry, write_bytes, write_json, write_shard
from ..errors import CheckFailed
from ..format.marlin import count_flushed_blocks, scale_histogram
from ..format.scales import decode_e4m3
from ..stream.distillation import DistillationRecord, NormChange
from ..stream.manifest import MANIFEST_NAME, Manifest
from ..verify.distilled import largest_norm_change
from ..verify.subject import HF_QUANT_CONFIG, Subject
from .student import Student

OWN_FILES = ("config.json", HF_QUANT_CONFIG, INDEX_NAME)


def changes_of(student: Student, moved: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, NormChange]]:
    """How far the trained tensors moved: the block scales by module, and the norms by name. See `DistillationRecord`.

    Args:
        moved: as of `Student.moved`.
    """
    checkpoint = student.served.subject.checkpoint
    scales, norms = dict[str, float](), dict[str, NormChange]()
    modules = {one.matrix.parts["scales"].name: module for module, one in student.served.matrices.items()}
    for name, after in moved.items():
        before = checkpoint.read(name)
        if name in modules:
            scales[modules[name]] = largest_scale_change(before, after)
        else:
            adds_one = student.norm_adds_one(name)
            norms[name] = NormChange(adds_one=adds_one, largest=largest_norm_change(before, after, adds_one))
    return scales, norms


def largest_scale_change(before: Tensor, after: Tensor) -> float:
    """The largest |ln(after / before)| of block scales, float8_e4m3fn. Infinite where one of them alone is zero."""
    old, new = (decode_e4m3(one).double() for one in (before, after))
    moved = (new / old).log().abs().masked_fill(old == new, 0.0)
    return float(moved.max()) if moved.numel() else 0.0


def write_distilled(subject: Subject, moved: Mapping[str, Tensor], record: DistillationRecord, partial: Path) -> None:
    """Fill a folder with the distilled checkpoint.

    Args:
        moved: the tensors that differ, by name, on the CPU.
    Raises:
        CheckFailed: a header that was read back differs.
        InputError: the disk is full, or a file of the checkpoint cannot be read.
    """
    checkpoint, folder = subject.checkpoint, subject.folder
    hashes = {file: _write_shard(checkpoint, partial, file, moved) for file in checkpoint.shards}
    for name in side_files(folder):
        own_folder((partial / name).parent)
        write_bytes(partial / name, read_side_file(folder, name))
    for name in OWN_FILES:
        if (folder / name).exists():
            write_bytes(partial / name, read_regular(folder / name, folder))
    write_json(partial / MANIFEST_NAME, _manifest(subject, moved, record, hashes))
    _check_written(checkpoint, partial)


def _write_shard(checkpoint: Checkpoint, partial: Path, file: str, moved: Mapping[str, Tensor]) -> str:
    infos = sorted(checkpoint.shards[file].tensors.values(), key=lambda info: info.begin)
    entries = [TensorEntry(info.name, info.dtype, info.shape) for info in infos]

    def contents(entry: TensorEntry) -> Iterator[memoryview]:
        if entry.name in moved:
            yield tensor_bytes(moved[entry.name])
        else:
            yield from checkpoint.pieces(entry.name)

    return write_shard(partial / file, entries, contents)


def _manifest(
    subject: Subject, moved: Mapping[str, Tensor], record: DistillationRecord, hashes: Mapping[str, str]
) -> dict[str, Any]:
    """The old manifest with the new numbers. What the conversion recorded stays."""
    found = read_json(subject.folder / MANIFEST_NAME, "nvquant writes one")
    assert isinstance(subject.manifest, Manifest)
    for layer in found["layers"]:
        for group in layer["groups"].values():
            flushed = _flushed_blocks(subject, group["members"], moved)
            if flushed is not None and flushed != group.get("marlin_flushed_blocks", 0):
                group["marlin_flushed_blocks"] = flushed
    files = {**found.pop("files"), **hashes}
    found.pop("distillation", None)
    return {**found, "distillation": record.as_json(), "files": files}


def _flushed_blocks(subject: Subject, members: list[str], moved: Mapping[str, Tensor]) -> int | None:
    """The number of blocks of a fused group that Marlin turns to zeros. None where no block scale changed."""
    names = {module: subject.sound[module].parts["scales"].name for module in members}
    if not any(name in moved for name in names.values()):
        return None
    histograms = [
        scale_histogram(moved[name]) if name in moved else subject.histograms[module] for module, name in names.items()
    ]
    return count_flushed_blocks(torch.stack(histograms).sum(0))


def _check_written(checkpoint: Checkpoint, partial: Path) -> None:
    written = {name: (info.dtype, info.shape) for name, info in open_checkpoint(partial).infos().items()}
    if written != {name: (info.dtype, info.shape) for name, info in checkpoint.infos().items()}:
        raise CheckFailed("the distilled checkpoint has other tensors than the old one", hint="run the command again")
