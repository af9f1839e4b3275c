"""Checks against the source: nothing lost, nothing added, nothing changed that was not to be quantized."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..calibrate.ids import config_value
from ..checkpoint.headers import TensorInfo
from ..checkpoint.reordered import Reordered
from ..checkpoint.sidefiles import side_files
from ..checkpoint.source import Checkpoint, read_json, tensor_bytes, torch_dtype
from ..errors import InputError
from ..plan.heads import equal_tensors, tied_pair
from ..recipe.heads import head_source, untied
from ..recipe.roles import Role, role_of, unused_tensors
from ..weights.stored import KV_SCALES, split_name
from .folds import folds_of
from .moved import moved_norms
from .report import Finding, counted
from .subject import Subject, pieces
from .threads import map_in_threads

# Which program wrote the file and where its input lay: other tools rewrite them, and nothing reads them.
PROVENANCE_KEYS = frozenset({"transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only"})
DTYPE_KEYS = frozenset({"dtype", "torch_dtype"})


def check_names(subject: Subject, source: Checkpoint) -> Finding:
    """Check that every tensor of the source is there, copied under its name or quantized, and no other tensor.

    Other tools may skip tensors that no server reads: the head of a tied model, keys and values that no layer uses.
    They may store BF16 or FP16 as FP32, which has the same values, and a tied head as a copy of the embedding.
    """
    faults = []
    copies = _copies(subject)
    number, source = len(source.infos()), with_own_head(source, subject)
    infos = source.infos()
    unread = _unread(source) if subject.manifest is None else frozenset()
    left_out = [name for name in unread if name not in copies and split_name(name)[0] not in subject.matrices]
    for name in [name for name in infos if name not in left_out]:
        info = infos[name]
        module, leaf = split_name(name)
        copied = copies.get(name)
        if copied is not None:
            if not (
                _is_same_type(copied, info) or _is_widened(subject, copied, info) or _is_padded(subject, copied, info)
            ):
                faults.append(
                    f"{name} is {copied.dtype} {list(copied.shape)}, but the source has {info.dtype} {list(info.shape)}"
                )
        elif leaf != "weight" or module not in subject.matrices:
            faults.append(f"{name} is missing")
        elif module in subject.sound and (shape := _shape(subject, module)) != info.shape:
            faults.append(f"{module} is quantized as {list(shape)}, but the source has {list(info.shape)}")
    added = [name for name in copies if name not in infos and not _is_kv_scale(subject, name)]
    copied_head = _equal_copy(subject.checkpoint) if added and subject.manifest is None else frozenset()
    faults += [f"{name} is added" for name in added if name not in copied_head]
    faults += [f"{module} is quantized, but the source has no such weight" for module in subject.matrices
               if f"{module}.weight" not in infos]  # fmt: skip
    words = f"{counted(number, 'source tensor')}, {len(subject.matrices):,} of them quantized"
    if len(infos) > number:
        words += f" with {subject.head}, which has the rows of the embedding"
    return Finding(f"{words}, {len(left_out)} skipped that no server reads" if left_out else words, faults)


def with_own_head(source: Checkpoint, subject: Subject) -> Checkpoint:
    """The source with the rows of its embedding under the name of its head too, if it ties both and the checkpoint has
    a quantized head. Otherwise it is returned unchanged."""
    infos = source.infos()
    head = head_source({name: info.shape for name, info in infos.items()}, source.config)
    if subject.head is None or head is None or not head.is_embedding or head.module != subject.head:
        return source
    name, file = f"{head.module}.weight", source.files[head.tensor]
    shard = source.shards[file]
    tensors = {**shard.tensors, name: replace(infos[head.tensor], name=name)}
    made = replace(
        source, files={**source.files, name: file}, shards={**source.shards, file: replace(shard, tensors=tensors)}
    )
    if isinstance(made, Reordered) and head.tensor in made.axes:
        return replace(made, axes={**made.axes, name: made.axes[head.tensor]})
    return made


def _is_same_type(copied: TensorInfo, info: TensorInfo) -> bool:
    return (copied.dtype, copied.shape) == (info.dtype, info.shape)


def _is_widened(subject: Subject, copied: TensorInfo, info: TensorInfo) -> bool:
    """Whether another tool stored a tensor in FP32 that the source has in half of it."""
    is_wider = copied.dtype == "F32" and info.dtype in ("BF16", "F16")
    return subject.manifest is None and is_wider and copied.shape == info.shape


def _is_padded(subject: Subject, copied: TensorInfo, info: TensorInfo) -> bool:
    """Whether another tool gave an embedding or a head more rows, as many as its config counts: rows of no token, which
    make the vocabulary a round number."""
    is_vocabulary = role_of(info.name, info.shape) in (Role.EMBEDDING, Role.HEAD)
    is_longer = len(info.shape) == 2 and copied.shape[1:] == info.shape[1:] and copied.shape > info.shape
    is_counted = copied.shape[:1] == (config_value(subject.config, "vocab_size"),)
    return subject.manifest is None and is_vocabulary and is_longer and is_counted and copied.dtype == info.dtype


def _unread(source: Checkpoint) -> frozenset[str]:
    """Tensors of the source that no server reads."""
    return unused_tensors(source.config, source.infos()) | _equal_copy(source)


def _equal_copy(checkpoint: Checkpoint) -> frozenset[str]:
    """The head of a tied model that is stored as a copy of its embedding, which changes nothing."""
    pair = tied_pair(checkpoint)
    return frozenset(pair[:1]) if pair is not None and equal_tensors(checkpoint, *pair) else frozenset()


def _copies(subject: Subject) -> dict[str, TensorInfo]:
    """The tensors that belong to no quantized matrix, by name."""
    return {name: subject.infos[name] for name in subject.roles}


def _shape(subject: Subject, module: str) -> tuple[int, ...]:
    return subject.sound[module].rows, subject.sound[module].cols


def _is_kv_scale(subject: Subject, name: str) -> bool:
    return split_name(name)[1] in KV_SCALES and subject.quantization.get("kv_cache_scheme") is not None


def check_untouched(subject: Subject, source: Checkpoint) -> Finding:
    """Check that unquantized tensors have all of the source's bytes, or its values where another tool stored FP32."""
    infos = source.infos()
    copies = _copies(subject)
    # For `check_folds` and `check_distilled`.
    changed = {*folds_of(subject, source).norms, *moved_norms(subject)}
    names = [
        name
        for name, info in copies.items()
        if name in infos
        and name not in changed
        and (
            _is_same_type(info, infos[name])
            or _is_widened(subject, info, infos[name])
            or _is_padded(subject, info, infos[name])
        )
    ]
    found = map_in_threads(
        lambda name: _first_difference(subject.checkpoint, source, name), names, subject.progress, "comparing tensors"
    )
    faults = [
        f"{name} differs from the source, from byte {at:,} of {infos[name].nbytes:,} on"
        for name, at in zip(names, found, strict=True)
        if at is not None
    ]
    size = sum(infos[name].nbytes for name in names)
    widened = [name for name in names if _is_widened(subject, copies[name], infos[name])]
    more = sum(copies[name].nbytes - infos[name].nbytes for name in widened)
    words = f"{counted(len(names), 'tensor')}, {size:,} bytes"
    words += f", {len(widened)} stored in FP32 with {more:,} unnecessary bytes" if widened else ""
    for name in names:
        if _is_padded(subject, copies[name], infos[name]):
            words += f", {name} has {copies[name].shape[0] - infos[name].shape[0]:,} extra rows"
    return Finding(words, faults)


def _first_difference(one: Checkpoint, other: Checkpoint, name: str) -> int | None:
    """Number of the first byte of `other`'s tensor whose value is another in `one`, where it may be stored in FP32."""
    dtype = torch_dtype(other.info(name).dtype)
    is_wider = one.info(name).dtype != other.info(name).dtype
    for at, right in pieces(other, name):
        left = bytearray(2 * len(right) if is_wider else len(right))
        one.read_into(name, memoryview(left), 2 * at if is_wider else at)
        wanted = tensor_bytes(torch.frombuffer(right, dtype=dtype).float()) if is_wider else right
        if left != wanted:
            differs = next(i for i, (a, b) in enumerate(zip(left, wanted, strict=True)) if a != b)
            return at + (differs // 2 if is_wider else differs)
    return None


def check_config_source(subject: Subject, source: Checkpoint) -> Finding:
    """Check that config.json describes the model as the source's does, with `quantization_config` as the only new key.
    A model with a quantized head must not tie it, at any level of the config.

    In another tool's output, the keys that name the program that wrote the file may differ. The dtype and the size of
    the vocabulary may differ too, where the tensors match them.
    """
    allowed = {"quantization_config"} | (PROVENANCE_KEYS if subject.manifest is None else frozenset())
    infos = source.infos()
    if any(_is_widened(subject, info, infos[name]) for name, info in _copies(subject).items() if name in infos):
        allowed |= DTYPE_KEYS
    if any(_is_padded(subject, info, infos[name]) for name, info in _copies(subject).items() if name in infos):
        allowed |= {"vocab_size", "text_config.vocab_size"}
    expected = source.config if subject.head is None else untied(source.config)
    differences = list(_differences(expected, subject.config, ""))
    faults = [
        words
        for key, words in differences
        if not {key, key.partition(".")[0]} & allowed and key.rpartition(".")[2] not in DTYPE_KEYS & allowed
    ]
    return Finding(counted(len(source.config), "key"), faults)


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
            yield path, f"{path} is {new[key]!r}, but the source has {old[key]!r}"


def check_side_files(subject: Subject, source: Checkpoint) -> Finding:
    """Check that every side file of the source (tokenizer, chat template, licence ...) is there, byte for byte.

    Another tool's JSON may have other bytes with the same content, except for the keys that name the program that
    wrote it.
    """
    names = side_files(source.folder)
    faults = []
    for name in names:
        old, new = source.folder / name, subject.folder / name
        if not new.is_file():
            faults.append(f"{name} is missing")
        elif not filecmp.cmp(old, new, shallow=False) and not (subject.manifest is None and _same_content(old, new)):
            faults.append(f"{name} differs")
    return Finding(counted(len(names), "side file of the source", "side files of the source"), faults)


def _same_content(old: Path, new: Path) -> bool:
    try:
        differences = _differences(read_json(old, ""), read_json(new, ""), "")
    except InputError:
        return False
    return all(key in PROVENANCE_KEYS for key, _ in differences)
