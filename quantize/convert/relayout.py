"""Relayout: rewrite an NVFP4 checkpoint in the other on-disk layout, tensor by tensor. Nothing is quantized again.

Packed codes and block scales keep their bytes, names change, and global scales are inverted. If nvquant's manifest
records the amax behind a global scale, the other layout's is computed from that amax, so that the output equals a
direct conversion into that layout. Otherwise it is one float32 reciprocal, exact to one ulp.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..checkpoint.sidefiles import flat_side_files
from ..checkpoint.source import INDEX_NAME, Checkpoint, open_checkpoint, read_json, tensor_bytes
from ..checkpoint.writer import TensorEntry, order_entries, write_json, write_shard
from ..errors import CheckFailed, InputError
from ..format.layouts import LAYOUTS, Layout
from ..format.schemes import Part
from ..plan.plan import PlannedShard
from ..recipe.decoder import decoder_prefix
from ..recipe.heads import HeadSource, is_tied, stored_head
from ..recipe.kv_cache import HALVES, attention_modules, scale_names, scale_spellings
from ..recipe.match import Selection, fusions_of
from ..recipe.matrices import Matrix, matrix_entries
from ..recipe.roles import QUANTIZABLE, Role, describe, roles_of, unused_tensors
from ..recipe.schema import SchemeName
from ..stream.manifest import MANIFEST_NAME
from ..weights.stored import part_leaves
from .config import QuantizedModel, output_configs
from .identity import source_identity
from .output import check_output, fresh_partial, publish, write_side_files
from .relayout_source import (
    HF_QUANT_CONFIG,
    read_manifest,
    recorded_amaxes,
    scalar_names,
    stored_layout,
    stored_matrices,
    unequal_groups,
)

COPY_CHUNK_BYTES = 16 << 20
# What marks a tensor as a part of some other quantization.
_FOREIGN_DTYPES = ("U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0")
_FOREIGN_LEAF = re.compile(
    r"(weight|input|output)_(scale|scale_2|scale_inv|global_scale|packed|zero_point|g_idx|shape)|pre_quant_scale"
)


@dataclass(frozen=True)
class RelayoutResult:
    """The result of a relayout, and the document of `relayout --json`.

    Attributes:
        scalars: whether global scales were made from the recorded amaxes (`exact`) or by a `reciprocal`.
        unequal_groups: fused groups whose members do not share their global scales. vLLM uses the largest stored
            value, which changes the others' weights, up in one layout and down in the other.
    """

    output: str
    format: str
    tensors: int
    tensor_bytes: int
    quantized: int
    scalars: Literal["exact", "reciprocal"]
    unequal_groups: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The document of `relayout --json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Move:
    """A tensor of the output: its entry, its name in the source, and its new value if it has one."""

    entry: TensorEntry
    source: str
    value: Tensor | None = None


def relayout(source: Checkpoint, target: Layout, output: Path) -> RelayoutResult:
    """Write `source` in the layout `target`. The output appears under its final name only when it is complete.

    Raises:
        InputError: the checkpoint is not quantized, not (only) in NVFP4, in that layout already, or contradicts its
            manifest. The output is impossible.
        CheckFailed: vLLM's rules would read the tensors from the new config in another way.
    """
    started = time.monotonic()
    layout = stored_layout(source)
    if layout is target:
        raise InputError(
            f"{source.where} is already in the {target.name} layout",
            where=source.where,
            hint="use it as it is, or choose the other layout with --format",
        )
    matrices = stored_matrices(source, layout)
    manifest = read_manifest(source, layout)
    amaxes = recorded_amaxes(manifest[1]) if manifest else {}
    scalars = {
        name: _inverted(source, name, part, target, layout, amaxes.get(name.rpartition(".")[0], {}).get(part))
        for matrix in matrices.values()
        for part, name in scalar_names(matrix, layout).items()
    }
    configs = output_configs(_described(source, matrices, target))
    shards = _shards(source, matrices, layout, target, scalars)
    planned = [PlannedShard(file, None, tuple(move.entry for move in moves)) for file, moves in shards.items()]
    check_output(output, sum(shard.file_bytes for shard in planned), source.folder)
    files = [*shards, *flat_side_files(source.folder)]
    with fresh_partial(
        output, {"relayout": target.name, "source": source_identity(source).as_json()}, files
    ) as partial:
        hashes = {file: _write_shard(source, partial / file, moves) for file, moves in shards.items()}
        _write_other_files(source, partial, planned, configs)
        if manifest:
            write_json(partial / MANIFEST_NAME, {**manifest[0], "format": target.name, "files": hashes})
        _check_written(partial, planned)
        publish(partial, output)
    return RelayoutResult(
        output=str(output),
        format=target.name,
        tensors=sum(len(shard.entries) for shard in planned),
        tensor_bytes=sum(shard.tensor_bytes for shard in planned),
        quantized=len(matrices),
        scalars="exact" if set(matrices) <= set(amaxes) else "reciprocal",
        unequal_groups=len(unequal_groups(source, matrices, layout)),
        seconds=round(time.monotonic() - started, 3),
    )


def _inverted(source: Checkpoint, name: str, part: Part, target: Layout, layout: Layout, amax: float | None) -> Tensor:
    """A global scale in the other layout: from its amax if that is known, otherwise by a reciprocal."""
    stored = source.read(name).reshape(())
    if amax is not None:
        if not torch.equal(stored, layout.stored_scalar(part, amax).reshape(())):
            raise InputError(
                f"{name} is {float(stored)!r}, which differs from the amax in {MANIFEST_NAME}",
                where=name,
                hint=(
                    "download or convert the checkpoint again, or remove the manifest, and relayout uses the "
                    "tensors alone"
                ),
            )
        return target.stored_scalar(part, amax)
    inverse = 1.0 / stored
    if not (float(stored) > 0 and bool(torch.isfinite(inverse))):
        raise InputError(
            f"{name} is {float(stored)!r}, which has no reciprocal", where=name, hint="the checkpoint is damaged"
        )
    return inverse.reshape(target.scalar_shape)


def _described(source: Checkpoint, matrices: Mapping[str, Matrix], target: Layout) -> QuantizedModel:
    """The subject of the new config: the unquantized model's tensors and their schemes."""
    _refuse_other_forms(source, matrices, target)
    schemes = {module: cast(SchemeName, matrix.scheme.name) for module, matrix in matrices.items()}
    shapes = _shapes(source, matrices)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    unused = unused_tensors(config, shapes)
    roles = {**roles_of(shapes, config), **dict.fromkeys(unused, Role.OTHER)}
    own = None if is_tied(config) else stored_head(shapes)
    head = next((HeadSource(name, m.tensor, False) for name, m in matrices.items() if m.tensor == own), None)
    _refuse_others(source, matrices, roles, head)
    selection = Selection(schemes, fusions_of(shapes, config).groups(schemes), roles, unused, head)
    return QuantizedModel(target, selection, shapes, config, _kv_cache(source))


def _refuse_other_forms(source: Checkpoint, matrices: Mapping[str, Matrix], target: Layout) -> None:
    """Raise InputError for matrices that the other layout stores in another form, which only the weights can give."""
    other = [matrix for matrix in matrices.values() if target.schemes.get(matrix.scheme.name) != matrix.scheme]
    if other:
        scheme = other[0].scheme
        raise InputError(
            f"{source.where} stores {describe([matrix.name for matrix in other], 1)} in {scheme.words} with "
            f"{scheme.form}, which nvquant does not write in the {target.name} layout",
            where=source.where,
            hint=f"convert the source again with --format {target.name}",
        )


def _is_part(name: str, matrices: Mapping[str, Matrix]) -> bool:
    """Whether a tensor is a part of a quantized matrix, in either layout."""
    module, _, leaf = name.rpartition(".")
    return module in matrices and any(leaf in part_leaves(layout) for layout in LAYOUTS.values())


def _refuse_others(
    source: Checkpoint, matrices: Mapping[str, Matrix], roles: Mapping[str, Role], head: HeadSource | None
) -> None:
    """Raise InputError for quantization that the other layout's config cannot describe."""
    own = None if head is None else head.module
    protected = [name for name, matrix in matrices.items() if roles[matrix.tensor] not in QUANTIZABLE and name != own]
    if protected:
        raise InputError(
            f"{source.where} has {describe(protected)} in NVFP4 ({roles[matrices[protected[0]].tensor].value})",
            where=source.where,
            hint="nvquant describes only text linears in NVFP4",
        )
    for name, info in source.infos().items():
        if _is_part(name, matrices):
            continue
        if info.dtype in _FOREIGN_DTYPES or _FOREIGN_LEAF.fullmatch(name.rpartition(".")[2]):
            raise InputError(
                f"{source.where} is not in NVFP4 alone: {name} ({info.dtype}) belongs to another quantization, "
                f"which relayout does not support."
            )
    config = source.config.get("quantization_config")
    if isinstance(config, Mapping) and config.get("transform_config"):
        raise InputError(
            f"{source.where} transforms its weights (transform_config), which the other layout cannot describe."
        )


def _kv_cache(source: Checkpoint) -> Literal["bf16", "fp8"]:
    config = source.config.get("quantization_config")
    scheme = config.get("kv_cache_scheme") if isinstance(config, Mapping) else None
    path = source.folder / HF_QUANT_CONFIG
    nested = read_json(path, "it was here").get("quantization") if path.exists() else None
    algorithm = nested.get("kv_cache_quant_algo") if isinstance(nested, Mapping) else None
    is_fp8 = isinstance(scheme, Mapping) and (
        (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy") or "tensor") == (8, "float", "tensor")
        and not scheme.get("dynamic")
    )
    if (scheme and not is_fp8) or algorithm not in (None, "FP8"):
        raise InputError(
            f"{source.where} does not quantize the KV cache in FP8 per tensor",
            where=source.where,
            hint="relayout supports no other way",
        )
    return "fp8" if scheme or algorithm else "bf16"


def _cache_names(source: Checkpoint, matrices: Mapping[str, Matrix], target: Layout) -> dict[str, str]:
    """The new names of the scales of an FP8 KV cache by every old name. Their values are equal in both layouts."""
    shapes = _shapes(source, matrices)
    prefix = decoder_prefix(shapes, source.config)
    unused = unused_tensors(source.config, shapes)
    names: dict[str, str] = {}
    for attention in attention_modules(roles_of(shapes, source.config), unused, source.config, prefix or ""):
        new = scale_names(attention, target)
        names |= {old: new[half] for half in HALVES for old in scale_spellings(attention, half)}
    return names


def _shapes(source: Checkpoint, matrices: Mapping[str, Matrix]) -> dict[str, tuple[int, ...]]:
    """The shapes of the unquantized model's tensors, by name."""
    shapes = {name: info.shape for name, info in source.infos().items() if not _is_part(name, matrices)}
    return shapes | {matrix.tensor: (matrix.rows, matrix.cols) for matrix in matrices.values()}


def _shards(
    source: Checkpoint,
    matrices: Mapping[str, Matrix],
    layout: Layout,
    target: Layout,
    scalars: Mapping[str, Tensor],
) -> dict[str, list[_Move]]:
    """The content of each file of the output, in the order of the data."""
    moved = {}
    for matrix in matrices.values():
        new = matrix_entries(matrix, target)
        for part, entry in matrix_entries(matrix, layout).items():
            moved[entry.name] = _Move(new[part], entry.name, scalars.get(entry.name))
    cached = _cache_names(source, matrices, target)
    shards = {}
    for file, header in source.shards.items():
        moves = {}
        for name, info in header.tensors.items():
            is_scalar = name in cached and prod(info.shape) == 1
            shape = target.scalar_shape if is_scalar else info.shape
            kept = TensorEntry(cached.get(name, name), info.dtype, shape)
            move = moved.get(name, _Move(kept, name))
            moves[move.entry] = move
        shards[file] = [moves[entry] for entry in order_entries(moves)]
    return shards


def _write_shard(source: Checkpoint, path: Path, moves: list[_Move]) -> str:
    by_name = {move.entry.name: move for move in moves}

    def contents(entry: TensorEntry) -> Iterator[memoryview]:
        move = by_name[entry.name]
        if move.value is not None:
            yield tensor_bytes(move.value)
        else:
            yield from source.pieces(move.source)

    return write_shard(path, [move.entry for move in moves], contents)


def _write_other_files(
    source: Checkpoint, partial: Path, planned: list[PlannedShard], configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the index if the source has one, the side files and the configs."""
    if (source.folder / INDEX_NAME).exists():
        weight_map = {entry.name: shard.file for shard in planned for entry in shard.entries}
        total = sum(shard.tensor_bytes for shard in planned)
        write_json(
            partial / INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    write_side_files(source.folder, partial, configs)


def _check_written(partial: Path, planned: list[PlannedShard]) -> None:
    """Read back every header."""
    written = open_checkpoint(partial)
    for shard in planned:
        found = [TensorEntry(info.name, info.dtype, info.shape) for info in written.shards[shard.file].tensors.values()]
        if found != list(shard.entries):
            raise CheckFailed(f"the tensors of {shard.file} differ from the plan", hint="run the same command again")
