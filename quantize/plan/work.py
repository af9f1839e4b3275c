"""The exact work of a conversion, layer by layer: bytes to read and write, operations, elements to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ..checkpoint.config_values import config_int, config_kinds
from ..checkpoint.headers import TensorInfo
from ..recipe.roles import Role, share_of_experts, text_config, unused_tensors
from ..weights.decoding import stored_bytes
from .forecast import kv_heads
from .plan import Plan
from .two_lanes import passes, solved_groups


@dataclass(frozen=True)
class LayerWork:
    """Of one decoder layer.

    Attributes:
        linear_flop: of the matrix products for one token.
        attention_flop: of scores and sums for one sequence.
        elements: of the matrices that are quantized.
        passes: how often the tokens go through it, see `two_lanes.passes`.
        moment_flop: in float32, of the second moments of inputs for one token.
        solve_flop: in float32, of quantization with error feedback.
        files: the source's shards that contain it.
    """

    read_bytes: int
    written_bytes: int
    linear_flop: float
    attention_flop: int
    elements: int
    passes: float
    moment_flop: int
    solve_flop: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """Of a conversion.

    Attributes:
        layers: in the order of the walk.
        copied_bytes: of the tensors outside of the layers, which are copied.
        copied_file_bytes: of the files with these tensors.
        outer_bytes, outer_files: those of them that the calibration reads too, before the first layer.
        shards: bytes of the source's files.
        samples, sequence_length, batch_size: of the calibration. Without one there are 0 samples.
    """

    layers: tuple[LayerWork, ...]
    copied_bytes: int
    copied_file_bytes: int
    outer_bytes: int
    outer_files: tuple[str, ...]
    shards: Mapping[str, int]
    samples: int
    sequence_length: int
    batch_size: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of the source's decoder layers."""
        return sum(layer.read_bytes for layer in self.layers)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return self.layer_bytes + self.copied_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes of all shards of the output, headers included."""
        return sum(layer.written_bytes for layer in self.layers) + self.copied_file_bytes


def measure_work(plan: Plan, samples: int, sequence_length: int, batch_size: int) -> Work:
    """The work of a plan.

    Args:
        samples, sequence_length, batch_size: of the calibration. They are ignored if the recipe has none.
    """
    infos = plan.source.infos()
    if not plan.needs_calibration:
        samples = 0
    root = plan.prefix.removesuffix("layers")
    rest = [info for name, info in infos.items() if plan.layer_of(name) is None]
    outer = [
        info
        for info in rest
        if samples and info.name.startswith(root) and plan.selection.roles[info.name] is not Role.DRAFT
    ]
    return Work(
        _layers(plan, infos, sequence_length),
        sum(stored_bytes(plan.source, info.name) for info in rest),
        sum(shard.file_bytes for shard in plan.shards if shard.layer is None),
        sum(stored_bytes(plan.source, info.name) for info in outer),
        tuple(dict.fromkeys(plan.source.files[info.name] for info in outer)),
        {name: header.file_bytes for name, header in plan.source.shards.items()},
        samples,
        sequence_length,
        batch_size,
    )


def _layers(plan: Plan, infos: Mapping[str, TensorInfo], sequence_length: int) -> tuple[LayerWork, ...]:
    config = plan.source.config
    names = plan.tensors_by_layer()
    written = {shard.layer: shard.file_bytes for shard in plan.shards}
    unused = unused_tensors(config, infos)
    share = share_of_experts(text_config(config))
    elements: dict[int, int] = dict.fromkeys(names, 0)
    for matrix in plan.matrices.values():
        if matrix is not plan.head:  # which is quantized beside the walk
            elements[plan.layer_of(matrix.tensor) or 0] += matrix.rows * matrix.cols
    solved = solved_groups(plan)
    found = []
    for at, (layer, tensors) in enumerate(names.items()):
        used = [infos[name] for name in tensors if name not in unused]
        linear_flop = sum(_flop(info, plan.selection.roles[info.name], share) for info in used)
        found.append(
            LayerWork(
                sum(stored_bytes(plan.source, name) for name in tensors),
                written[layer],
                linear_flop,
                attention_flop(config, at, sequence_length),
                elements[layer],
                passes(solved[layer], linear_flop),
                sum(group.moment_flop for group in solved[layer]),
                sum(group.solve_flop for group in solved[layer]),
                tuple(dict.fromkeys(plan.source.files[name] for name in tensors)),
            )
        )
    return tuple(found)


def _flop(info: TensorInfo, role: Role, share: float) -> float:
    """Operations for one token in a matrix. Only the experts that one token uses count."""
    if len(info.shape) < 2:
        return 0
    return 2 * prod(info.shape) * (share if role is Role.EXPERT else 1)


def attention_flop(config: Mapping[str, Any], layer: int, tokens: int) -> int:
    """Operations of a layer's scores and weighted sums for one sequence: two products of a head's size for each query
    and key that the causal mask, and the layer's window, leave together.

    Args:
        config: config.json. Heads, head sizes and kinds of layers are read as for the KV cache.
        layer: its place in the decoder.
        tokens: length of the sequence.
    """
    text = text_config(config)
    kinds = config_kinds(text)
    kind = kinds[layer] if layer < len(kinds) else "full_attention"
    window = config_int(text, "sliding_window", tokens) if kind == "sliding_attention" else tokens
    seen = min(window, tokens)
    pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen
    heads = config_int(text, "num_attention_heads")
    return 4 * heads * kv_heads(text, layer, kind)[1] * pairs
