"""Checks against the source: nothing lost, nothing added, nothing changed that was not to be quantized."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..checkpoint.headers import TensorInfo
from ..checkpoint.sidefiles import side_files
from ..checkpoint.source import Checkpoint
from ..recipe.roles import Role, role_of, unused_tensors
from .manifest import Manifest
from .matrices import KV_SCALES, split_name
from .report import Finding
from .subject import Subject, is_tied, pieces

# Which program wrote the file and where its input lay: other tools rewrite them, and nothing reads them.
PROVENANCE_KEYS = frozenset({"transformers_version", "_name_or_path"})


def check_names(subject: Subject, source: Checkpoint) -> Finding:
    """Every tensor of the source is there, copied under its name or quantized; nothing is there that it lacks.

    Other tools may leave out what no server reads: the head of a tied model, keys and values that no layer uses.
    """
    faults = []
    copies = _copies(subject)
    infos = source.infos()
    unread = frozenset() if isinstance(subject.manifest, Manifest) else _unread(source)
    left_out = [name for name in unread if name not in copies and split_name(name)[0] not in subject.matrices]
    for name in [name for name in infos if name not in left_out]:
        info = infos[name]
        module, leaf = split_name(name)
        copied = copies.get(name)
        if copied is not None:
            if (copied.dtype, copied.shape) != (info.dtype, info.shape):
                faults.append(f"{name} is {copied.dtype} {list(copied.shape)}, was {info.dtype} {list(info.shape)}")
        elif leaf != "weight" or module not in subject.matrices:
            faults.append(f"{name} is missing")
        elif module in subject.sound and (shape := _shape(subject, module)) != info.shape:
            faults.append(f"{module} is quantized as {list(shape)}, was {list(info.shape)}")
    faults += [f"{name} is added" for name in copies if name not in infos and not _is_kv_scale(subject, name)]
    faults += [f"{module} is quantized, but the source has no such weight" for module in subject.matrices
               if f"{module}.weight" not in infos]  # fmt: skip
    words = f"{len(infos):,} source tensors, {len(subject.matrices)} of them quantized"
    return Finding(f"{words}, {len(left_out)} left out that no server reads" if left_out else words, faults)


def _unread(source: Checkpoint) -> frozenset[str]:
    """Tensors of the source that no server reads."""
    infos = source.infos()
    heads = [name for name, info in infos.items() if role_of(name, info.shape) is Role.HEAD]
    return unused_tensors(source.config, infos) | (frozenset(heads) if is_tied(source.config) else frozenset())


def _copies(subject: Subject) -> dict[str, TensorInfo]:
    """What is no part of a quantized matrix, by name."""
    return {name: subject.infos[name] for name in subject.roles}


def _shape(subject: Subject, module: str) -> tuple[int, ...]:
    return subject.sound[module].rows, subject.sound[module].cols


def _is_kv_scale(subject: Subject, name: str) -> bool:
    return split_name(name)[1] in KV_SCALES and subject.quantization.get("kv_cache_scheme") is not None


def check_untouched(subject: Subject, source: Checkpoint) -> Finding:
    """What is not quantized has the source's bytes, every one of them."""
    infos = source.infos()
    names = [
        name
        for name, info in _copies(subject).items()
        if name in infos and (info.dtype, info.shape) == (infos[name].dtype, infos[name].shape)
    ]
    faults = []
    for done, name in enumerate(names):
        subject.progress(done, len(names), f"comparing {name}")
        different = _first_difference(subject.checkpoint, source, name)
        if different is not None:
            faults.append(f"{name} differs from byte {different:,} of {infos[name].nbytes:,} on")
    return Finding(f"{len(names):,} tensors, {sum(infos[name].nbytes for name in names):,} bytes", faults)


def _first_difference(one: Checkpoint, other: Checkpoint, name: str) -> int | None:
    for (at, left), (_, right) in zip(pieces(one, name), pieces(other, name), strict=True):
        if not torch.equal(left, right):
            return at + int((left != right).nonzero()[0])
    return None


def check_config_source(subject: Subject, source: Checkpoint) -> Finding:
    """config.json says of the model what the source's says; only `quantization_config` is new.

    Of another tool's output, the keys that name the program that wrote the file may differ.
    """
    allowed = {"quantization_config"} | (frozenset() if isinstance(subject.manifest, Manifest) else PROVENANCE_KEYS)
    differences = list(_differences(source.config, subject.config, ""))
    faults = [words for key, words in differences if key.partition(".")[0] not in allowed]
    return Finding(f"{len(source.config)} keys", faults)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Keys (dotted) that differ, with words for how."""
    for key in dict.fromkeys([*old, *new]):
        path = f"{prefix}{key}"
        if key not in new:
            yield path, f"{path} is missing"
        elif key not in old:
            yield path, f"{path} is added"
        elif isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            yield from _differences(old[key], new[key], f"{path}.")
        elif old[key] != new[key] or type(old[key]) is not type(new[key]):
            yield path, f"{path} is {new[key]!r}, was {old[key]!r}"


def check_side_files(subject: Subject, source: Checkpoint) -> Finding:
    """Every side file of the source (tokenizer, chat template, licence ...) is there, byte for byte."""
    names = side_files(source.folder)
    faults = []
    for name in names:
        copy = subject.folder / name
        if not copy.is_file():
            faults.append(f"{name} is missing")
        elif not filecmp.cmp(source.folder / name, copy, shallow=False):
            faults.append(f"{name} differs")
    return Finding(f"{len(names)} side files of the source", faults)
