"""The checkpoint to verify, opened so that its faults can be reported one by one.

`checkpoint.source.open_checkpoint` stops at the first fault. This module reads headers file by file, and leaves the
comparison with the index to a check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config_sizes import check_sizes
from ..checkpoint.diagnosis import names_in, no_config, no_folder, no_weights
from ..checkpoint.headers import Header, TensorInfo, read_header
from ..checkpoint.hub.repository import HubModel
from ..checkpoint.hub.shards import RemoteShards
from ..checkpoint.shard_bytes import LocalBytes, ShardBytes
from ..checkpoint.sidefiles import side_files
from ..checkpoint.source import Checkpoint, read_json
from ..errors import InputError
from ..format.declared import FP8_CALIBRATED, MIXED_ALGORITHM, REFUSED, scheme_of_algorithm, scheme_of_group
from ..format.layouts import COMPRESSED_TENSORS, LAYOUTS, Layout
from ..format.marlin import scale_histogram
from ..format.schemes import SCHEMES, Part
from ..recipe.groups import FusedGroup, Fusions
from ..recipe.heads import stored_head
from ..recipe.roles import Role, module_of, roles_of, unused_tensors
from ..stream.manifest import Manifest, read_manifest
from ..weights.stored import StoredMatrix, find_matrices, layouts_present
from .threads import Progress, map_in_threads, tell_nobody

HF_QUANT_CONFIG = "hf_quant_config.json"
FP8_CACHE: Mapping[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}  # as modelopt's config.json says it
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Subject:
    """An opened checkpoint to verify.

    Attributes:
        config: the JSON of config.json.
        headers: header of each readable shard by file name, whether the index names it or not.
        damaged: the faults in the headers of the others.
        progress: called with (done, total, phase) by long steps.
        content: the store that tensors are read from.
        hub: the model on the Hub. None for a folder. Its small files lie in `folder` either way.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    damaged: tuple[str, ...]
    progress: Progress = tell_nobody
    content: ShardBytes = field(default_factory=LocalBytes)
    hub: HubModel | None = None

    @property
    def name(self) -> str:
        """`org/name` of a model on the Hub, else the folder's own name."""
        return self.folder.resolve().name if self.hub is None else self.hub.repo

    @property
    def is_remote(self) -> bool:
        """Whether its shards are read by ranges over the network, so that most of them is not read at all."""
        return isinstance(self.content, RemoteShards)

    @cached_property
    def file_names(self) -> list[str]:
        """The names of its files, those in folders below left out."""
        if self.is_remote and self.hub is not None:
            return sorted(name for name in self.hub.files if "/" not in name)
        return sorted(path.name for path in self.folder.iterdir())

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint for reading tensors, wherever they lie. Of a tensor in two files, it has the first."""
        files: dict[str, str] = {}
        for file, header in self.headers.items():
            for name in header.tensors:
                files.setdefault(name, file)
        return Checkpoint(self.folder, self.config, self.headers, files, self.content, self.hub)

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """All tensors by name."""
        return self.checkpoint.infos()

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config`, or the same from hf_quant_config.json. Empty where there is neither."""
        stored = self.config.get("quantization_config")
        if isinstance(stored, Mapping):
            return stored
        try:
            nested = read_json(self.folder / HF_QUANT_CONFIG, "").get("quantization")
        except InputError:
            return {}
        if not isinstance(nested, Mapping):
            return {}
        found = {**nested, "quant_method": "modelopt", "ignore": nested.get("exclude_modules")}
        cache = nested.get("kv_cache_quant_algo")
        return found if cache is None else {**found, "kv_cache_scheme": FP8_CACHE if cache == "FP8" else cache}

    @property
    def method(self) -> str:
        """`quant_method` of the config."""
        return str(self.quantization.get("quant_method"))

    @cached_property
    def layout(self) -> Layout:
        """The layout of most tensors' names, or the config's where no name belongs to a layout."""
        counts = layouts_present(self.infos)
        if counts:
            return LAYOUTS[max(counts, key=lambda name: counts[name])]
        return LAYOUTS.get(self.method, COMPRESSED_TENSORS)

    @cached_property
    def matrices(self) -> dict[str, StoredMatrix]:
        """The quantized matrices by module, complete or not."""
        return find_matrices(self.infos, self.layout)

    @cached_property
    def sound(self) -> dict[str, StoredMatrix]:
        """The matrices whose numbers can be read. The `matrices` check reports the others."""
        return {module: matrix for module, matrix in self.matrices.items() if matrix.is_sound}

    @cached_property
    def groups(self) -> tuple[FusedGroup, ...]:
        """The fused groups of the matrices."""
        return self.fusions.groups(self.matrices)

    @cached_property
    def fusions(self) -> Fusions:
        """The fused groups that servers build for the model."""
        copied = (module_of(name) for name in self.roles if name.endswith(".weight"))
        return Fusions([*copied, *self.matrices], self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the unquantized model's tensors by name, with (1, 1) for a matrix whose shape cannot be read."""
        parts = {info.name for matrix in self.matrices.values() for info in matrix.parts.values()}
        shapes = {name: info.shape for name, info in self.infos.items() if name not in parts}
        for module, matrix in self.matrices.items():
            shapes[f"{module}.weight"] = (matrix.rows, matrix.cols) if matrix.is_sound else (1, 1)
        return shapes

    @cached_property
    def model_roles(self) -> dict[str, Role]:
        """The role of each tensor of the unquantized model."""
        return roles_of(self.shapes, self.config)

    @cached_property
    def head(self) -> str | None:
        """The module of the output head, if it is quantized."""
        stored = stored_head(self.shapes)
        module = None if stored is None else module_of(stored)
        return module if module in self.matrices else None

    @cached_property
    def sound_groups(self) -> tuple[FusedGroup, ...]:
        """The fused groups whose members are all sound."""
        return tuple(group for group in self.groups if all(module in self.sound for module in group.members))

    @cached_property
    def roles(self) -> dict[str, Role]:
        """The role of each tensor outside of the quantized matrices."""
        parts = {info.name for matrix in self.matrices.values() for info in matrix.parts.values()}
        return {name: self.model_roles[name] for name in self.infos if name not in parts}

    @cached_property
    def unused(self) -> frozenset[str]:
        """Tensors that no layer of the model reads."""
        return unused_tensors(self.config, self.infos)

    @cached_property
    def scalars(self) -> dict[tuple[str, Part], float]:
        """The scalars of the sound matrices as stored, by module and part: global scales, and those of FP8."""
        names = {
            (module, part): matrix.parts[part].name
            for module, matrix in self.sound.items()
            for part in matrix.scheme.shared
            if part in matrix.parts
        }
        values = map_in_threads(
            lambda name: float(self.checkpoint.read(name)), list(names.values()), self.progress, "reading global scales"
        )
        return dict(zip(names, values, strict=True))

    @cached_property
    def histograms(self) -> dict[str, Tensor]:
        """The counts of each block scale's byte, int64 [256], by module. Reads the block scales of all sound
        matrices."""
        matrices = {module: matrix for module, matrix in self.sound.items() if matrix.scheme.has_block_scales}
        histograms = map_in_threads(self._histogram, list(matrices.values()), self.progress, "reading block scales")
        return dict(zip(matrices, histograms, strict=True))

    def _histogram(self, matrix: StoredMatrix) -> Tensor:
        histogram = torch.zeros(256, dtype=torch.int64)
        for _, piece in pieces(self.checkpoint, matrix.parts["scales"].name):
            histogram += scale_histogram(torch.frombuffer(piece, dtype=torch.uint8))
        return histogram

    @cached_property
    def fp8(self) -> dict[str, StoredMatrix]:
        """The sound matrices in FP8: those without block scales."""
        return {module: matrix for module, matrix in self.sound.items() if not matrix.scheme.has_block_scales}

    @cached_property
    def fp8_scales(self) -> dict[str, Tensor]:
        """The weight scales of the sound FP8 matrices as float32, one for each row or one, by module."""
        names = [matrix.parts["scales"].name for matrix in self.fp8.values()]
        values = map_in_threads(self.checkpoint.read, names, self.progress, "reading FP8 scales")
        return {module: value.float().flatten() for module, value in zip(self.fp8, values, strict=True)}

    @cached_property
    def manifest(self) -> Manifest | str | None:
        """nvquant_manifest.json, or a sentence on why it cannot be used, or None for another tool's output."""
        return read_manifest(self.folder)

    def divisor(self, module: str) -> Tensor:
        """The weight global scale of a sound matrix as a float32 divisor, whichever way the layout stores it."""
        stored = torch.tensor(self.scalars[module, "weight_global"], dtype=torch.float32)
        return self.layout.canonical("weight_global", stored)


def open_subject(folder: Path, progress: Progress | None = None, hub: HubModel | None = None) -> Subject:
    """Open a quantized checkpoint and read its config.json and headers.

    Args:
        hub: the model on the Hub whose complete files the folder contains.
    Raises:
        InputError: no checkpoint, or none that is quantized to NVFP4 alone.
    """
    if not folder.is_dir():
        raise InputError(no_folder(folder))
    names = names_in(folder)
    if not os.path.lexists(folder / "config.json"):
        raise InputError(no_config(str(folder), names))
    config = read_json(folder / "config.json", "every checkpoint has one")
    side_files(folder)
    headers: dict[str, Header] = {}
    damaged = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            headers[path.name] = read_header(path)
        except InputError as error:
            damaged.append(str(error))
    if not headers and not damaged:
        raise InputError(no_weights(str(folder), names))
    subject = Subject(folder, config, headers, tuple(damaged), progress or tell_nobody, hub=hub)
    if not damaged:
        check_sizes(config, subject.infos.values())
        refuse_other_formats(subject)
    return subject


def pieces(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, bytearray]]:
    """A tensor's bytes in pieces, each with its offset and valid until the next."""
    size = checkpoint.info(name).nbytes
    piece = bytearray()
    for at in range(0, size, PIECE_BYTES):
        length = min(PIECE_BYTES, size - at)
        piece = piece if len(piece) == length else bytearray(length)
        checkpoint.read_into(name, memoryview(piece), at)
        yield at, piece


def refuse_other_formats(subject: Subject) -> None:
    """Refuse a checkpoint that is not quantized to NVFP4 alone.

    Raises:
        InputError: it is not.
    """
    if not subject.quantization and not subject.matrices:
        raise InputError(
            f"{_where(subject)} is not quantized (config.json has no quantization_config, and no tensor is packed)",
            hint="give the output of a conversion",
        )
    if not subject.matrices and subject.method not in LAYOUTS:
        raise InputError(
            f"{_where(subject)} is quantized, but not to NVFP4 (quant_method {subject.method})",
            hint="give an NVFP4 checkpoint",
        )
    unknown = [declared for declared in _declared(subject.quantization) if declared not in (*SCHEMES, REFUSED)]
    fp8 = [name for name, info in subject.infos.items() if _is_fp8_weight(name, info)]
    # FP8 matrices that store no input scale, under a config that calls for one, fail the check `config`.
    is_known = set(unknown) <= {FP8_CALIBRATED} and all(module_of(name) in subject.sound for name in fp8)
    if fp8 and unknown and not is_known:
        raise InputError(
            f"{_where(subject)} mixes NVFP4 with other formats ({fp8[0]} is F8_E4M3, and the config declares "
            f"{unknown[0]}), which verify does not support",
            hint=f"give a checkpoint in {', '.join(SCHEMES)} alone",
        )


def _is_fp8_weight(name: str, info: TensorInfo) -> bool:
    return name.endswith(".weight") and info.dtype == "F8_E4M3"


def _declared(quantization: Mapping[str, Any]) -> list[str]:
    """The schemes that a config declares for groups or modules."""
    if quantization.get("quant_algo") == MIXED_ALGORITHM:
        layers = quantization.get("quantized_layers")
        listed = layers.values() if isinstance(layers, Mapping) else ()
        return [scheme_of_algorithm(entry.get("quant_algo")) for entry in listed if isinstance(entry, Mapping)]
    groups = quantization.get("config_groups")
    if quantization.get("quant_method") == "modelopt" or not isinstance(groups, Mapping):
        return []
    return [
        scheme_of_group(group, quantization.get("format")) for group in groups.values() if isinstance(group, Mapping)
    ]


def _where(subject: Subject) -> str:
    return str(subject.folder) if subject.hub is None else f"Hub model {subject.hub.repo}"
