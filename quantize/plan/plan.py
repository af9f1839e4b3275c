"""Computes the plan of a conversion. `convert` executes and asserts it. Nothing else determines the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..checkpoint.custom_code import lack_of_code
from ..checkpoint.headers import DTYPE_BYTES, TensorInfo
from ..checkpoint.source import Checkpoint
from ..checkpoint.writer import TensorEntry, build_header, order_entries
from ..errors import InputError
from ..format.layouts import Layout
from ..format.schemes import Part
from ..recipe.decoder import decoder_prefix, layer_index
from ..recipe.groups import FusedGroup
from ..recipe.heads import untied
from ..recipe.kept import kept_shares
from ..recipe.kv_cache import Attention, Half, attention_modules, scale_names
from ..recipe.match import Selection, select
from ..recipe.matrices import Matrix, matrix_entries
from ..recipe.roles import Role
from ..recipe.schema import ON_QUANTIZED_PATH, Recipe
from ..weights.encoded import group_form
from .heads import refuse_other_head
from .quantized_source import as_computed

SHARD_LIMIT_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Origin:
    """The origin of an output tensor: a copied source tensor, a part of a quantized matrix, or a scale of the KV cache.

    Attributes:
        source: name of the source tensor. A scale of the KV cache has that of its layer's queries.
        matrix: name of the matrix, or None.
        cached: whether it scales keys or values, or None.
    """

    source: str
    part: Part | None = None
    matrix: str | None = None
    cached: Half | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the output has the source's bytes."""
        return self.part is None and self.cached is None


@dataclass(frozen=True)
class PlannedShard:
    """An output shard.

    Attributes:
        layer: number of the decoder layer in it, or None for the rest of the model.
        entries: its tensors in the order of the data.
        is_head: whether it contains the quantized head, and nothing else.
    """

    file: str
    layer: int | None
    entries: tuple[TensorEntry, ...]
    is_head: bool = False

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def file_bytes(self) -> int:
        """Size of the file, header included."""
        return len(build_header(self.entries)) + self.tensor_bytes


@dataclass(frozen=True)
class Plan:
    """The input and output of a conversion.

    Attributes:
        model: name of the source in reports.
        matrices: the matrices to quantize by name, in the model's order.
        groups: their fused groups.
        origins: the origin of each output tensor.
        cached: the attention modules that get scales for the KV cache.
        shards: the output files, in the order of their names.
        prefix: the text before a layer's number in the source's names.
        quantizer: its name.
    """

    model: str
    source: Checkpoint
    recipe: Recipe
    layout: Layout
    selection: Selection
    matrices: Mapping[str, Matrix]
    groups: tuple[FusedGroup, ...]
    cached: tuple[Attention, ...]
    origins: Mapping[str, Origin]
    shards: tuple[PlannedShard, ...]
    prefix: str
    quantizer: str

    @property
    def tensors(self) -> int:
        """Number of output tensors."""
        return len(self.origins)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(shard.tensor_bytes for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        """Bytes of all output shards, headers included."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def needs_calibration(self) -> bool:
        """Whether the conversion has to see inputs of matrices, or keys and values."""
        return self.has_calibrated_scales or self.has_two_lanes

    @property
    def has_calibrated_scales(self) -> bool:
        """Whether servers round the inputs of any matrix, or keys and values, under a stored scale that no norm gives,
        as it does for the head."""
        return bool(self.cached) or any(matrix.scheme.inputs == "calibrated" for matrix in self.inner_matrices)

    @property
    def has_two_lanes(self) -> bool:
        """Whether the calibration also walks the quantized path, whose inputs the quantizer sees."""
        return self.quantizer in ON_QUANTIZED_PATH and bool(self.solved_groups)

    @property
    def solved_groups(self) -> list[FusedGroup]:
        """The fused groups of decoder layers with a choice of block scales, which is for the quantizer of the run."""
        inner = {matrix.name for matrix in self.inner_matrices if matrix.scheme.has_block_scales}
        return [group for group in self.groups if group.members[0] in inner]

    @cached_property
    def casts(self) -> Mapping[str, str]:
        """The forms of the matrices that keep the codes of a quantized source, if no fold changes them, by name."""
        found = {}
        for group in self.groups:
            matrices = [self.matrices[module] for module in group.members]
            form = None if self.head in matrices else group_form(self.source, matrices)
            found.update({} if form is None else dict.fromkeys(group.members, form))
        return found

    @property
    def inner_matrices(self) -> list[Matrix]:
        """The matrices to quantize in decoder layers: all but the head."""
        return [matrix for matrix in self.matrices.values() if matrix is not self.head]

    @property
    def head(self) -> Matrix | None:
        """The output head, if it is quantized."""
        return None if self.selection.head is None else self.matrices[self.selection.head.module]

    @property
    def output_config(self) -> Mapping[str, Any]:
        """config.json of the output without `quantization_config`: the source's, but for the tie of a quantized
        head."""
        return untied(self.source.config) if self.head is not None else self.source.config

    @cached_property
    def kept_shares(self) -> dict[str, float]:
        """The share of the decoder's matrices that stays as in the source, by role (see `recipe.kept`)."""
        shapes = {name: info.shape for name, info in self.source.infos().items()}
        done = {matrix.tensor for matrix in self.matrices.values()} | self.selection.unused
        return kept_shares(shapes, self.selection.roles, done, self.prefix)

    def source_bytes(self, matrix: Matrix) -> int:
        """Bytes of a matrix in the source."""
        return matrix.rows * matrix.cols * DTYPE_BYTES[self.source.info(matrix.tensor).dtype]

    @property
    def layers(self) -> list[int]:
        """Numbers of the decoder's layers, ascending."""
        return list(self.layer_shards)

    @cached_property
    def layer_shards(self) -> dict[int, PlannedShard]:
        """The shard of each decoder layer, by the layer's number, ascending."""
        return {shard.layer: shard for shard in self.shards if shard.layer is not None}

    @cached_property
    def layer_places(self) -> dict[int, int]:
        """The place of each decoder layer among all of them, by its number."""
        return {layer: at for at, layer in enumerate(self.layer_shards)}

    def layer_of(self, tensor: str) -> int | None:
        """The number of the decoder layer that owns a source tensor, or None outside of them, as for draft layers."""
        return _layer_of(tensor, self.prefix, self.selection)

    def tensors_by_layer(self) -> dict[int, list[str]]:
        """Source names of each decoder layer's tensors."""
        layers: dict[int, list[str]] = {layer: [] for layer in self.layers}
        for name in self.source.files:
            number = self.layer_of(name)
            if number is not None:
                layers[number].append(name)
        return layers


def compute_plan(source: Checkpoint, recipe: Recipe, layout: Layout, model: str, quantizer: str | None = None) -> Plan:
    """Plan the conversion of a checkpoint. It reads no weight but a head that is stored although the config ties it.

    Args:
        quantizer: its name. None for the recipe's.
    Raises:
        InputError: the source is quantized in a form that nvquant does not decode, its stored head contradicts its
            config, it lacks code that its auto_map names, or the recipe does not fit it (see `recipe.match.select`).
    """
    source = as_computed(source, model)
    refuse_other_head(source, model)
    lack = lack_of_code(source.folder)
    if lack is not None:
        raise InputError(
            f"{model} lacks {lack}",
            where=model,
            hint="download that file, or remove auto_map if servers know the architecture without it",
        )
    infos = source.infos()
    shapes = {name: info.shape for name, info in infos.items()}
    selection = select(recipe, infos, model, source.config)
    prefix = decoder_prefix(shapes, source.config)
    if prefix is None:
        raise InputError(
            f"{model} has no decoder layers (no tensor has a name like …layers.N.…)",
            where=model,
            hint="choose a decoder model",
        )
    matrices = _matrices(recipe, selection, infos, layout)
    cached = _cached(recipe, selection, source.config, prefix, model)
    origins, entries = _outputs(infos, matrices, layout, selection, cached)
    shards = _shards(entries, origins, prefix, selection)
    facts = (matrices, selection.groups, cached, origins, shards, prefix, quantizer or recipe.quantizer)
    return Plan(model, source, recipe, layout, selection, *facts)


def _cached(
    recipe: Recipe, selection: Selection, config: Mapping[str, Any], prefix: str, model: str
) -> tuple[Attention, ...]:
    """The attention modules that get scales for the KV cache."""
    if not recipe.kv_cache.has_scales:
        return ()
    found = attention_modules(selection.roles, selection.unused, config, prefix)
    if not found:
        raise InputError(
            f"{model} has no attention modules whose keys and values servers cache under scales",
            where=f"recipe {recipe.name}",
            hint="use kv_cache: {dtype: fp8}",
        )
    return tuple(found)


def _matrices(
    recipe: Recipe, selection: Selection, infos: Mapping[str, TensorInfo], layout: Layout
) -> dict[str, Matrix]:
    group_of = {module: group.name for group in selection.groups for module in group.members}
    result = {}
    for module, name in selection.schemes.items():
        if name not in layout.schemes:
            raise InputError(
                f"the {layout.name} layout has no form for scheme {name}",
                where=f"recipe {recipe.name}",
                hint="choose the other layout with --format, or another scheme",
            )
        head = selection.head
        tensor = head.tensor if head is not None and head.module == module else f"{module}.weight"
        group = group_of[module]
        rows, cols = infos[tensor].shape
        result[module] = Matrix(module, tensor, layout.schemes[name], rows, cols, group, group, group)
    return result


def _outputs(
    infos: Mapping[str, TensorInfo],
    matrices: Mapping[str, Matrix],
    layout: Layout,
    selection: Selection,
    cached: Iterable[Attention],
) -> tuple[dict[str, Origin], dict[str, TensorEntry]]:
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in matrices.values():
        by_tensor.setdefault(matrix.tensor, []).append(matrix)
    origins: dict[str, Origin] = {}
    entries: dict[str, TensorEntry] = {}
    embedding = selection.head.tensor if selection.head is not None and selection.head.is_embedding else None
    expected = 0
    for name, info in infos.items():
        if name not in by_tensor or name == embedding:
            expected += 1
            origins[name], entries[name] = Origin(name), TensorEntry(name, info.dtype, info.shape)
        for matrix in by_tensor.get(name, ()):
            parts = matrix_entries(matrix, layout)
            expected += len(parts)
            for part, entry in parts.items():
                origins[entry.name], entries[entry.name] = Origin(name, part, matrix.name), entry
    for attention in cached:
        for half, name in scale_names(attention, layout).items():
            expected += 1
            origins[name] = Origin(attention.query, cached=half)
            entries[name] = TensorEntry(name, "F32", layout.scalar_shape)
    if len(entries) != expected:
        raise InputError(
            "the source stores tensors under names that the output requires for scales",
            hint="choose a source that is not quantized",
        )
    return origins, entries


def _layer_of(tensor: str, prefix: str, selection: Selection) -> int | None:
    return None if selection.roles[tensor] is Role.DRAFT else layer_index(tensor, prefix)


def _shards(
    entries: Mapping[str, TensorEntry], origins: Mapping[str, Origin], prefix: str, selection: Selection
) -> tuple[PlannedShard, ...]:
    """One shard a decoder layer, then the rest in shards of at most 5 GB (a larger tensor has one of its own), then a
    quantized head."""
    layers: dict[int, list[TensorEntry]] = {}
    rest: list[TensorEntry] = []
    head: list[TensorEntry] = []
    for entry in entries.values():
        if selection.head is not None and origins[entry.name].matrix == selection.head.module:
            head.append(entry)
            continue
        number = _layer_of(origins[entry.name].source, prefix, selection)
        (rest if number is None else layers.setdefault(number, [])).append(entry)
    parts: list[tuple[int | None, tuple[TensorEntry, ...]]] = [
        (number, order_entries(layers[number])) for number in sorted(layers)
    ]
    parts += [(None, order_entries(chunk)) for chunk in _chunks(rest)]
    parts += [(None, order_entries(head))] if head else []
    total = len(parts)
    return tuple(
        PlannedShard(f"model-{at:05d}-of-{total:05d}.safetensors", number, tensors, bool(head) and at == total)
        for at, (number, tensors) in enumerate(parts, 1)
    )


def _chunks(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    chunks: list[list[TensorEntry]] = []
    size = 0
    for entry in entries:
        if not chunks or size + entry.nbytes > SHARD_LIMIT_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(entry)
        size += entry.nbytes
    return chunks
