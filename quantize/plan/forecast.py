"""The memory that a conversion needs, and the GPUs that can serve its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.config_values import config_int, config_kinds, config_largest, config_part
from ..recipe.roles import text_config
from ..weights.decoding import decoded_form, stored_bytes
from .gpus import GPUS
from .plan import Plan
from .two_lanes import most_memory

SERVED_TOKENS = 8192
CACHE_SCALES = "KV cache"  # the part of their scales
SERVING_OVERHEAD_BYTES = 1_500_000_000
# The share of a GPU that vLLM takes without --gpu-memory-utilization. Source: vLLM 0.32.0, config/cache.py.
VLLM_SHARE = 0.92
BF16_BYTES = 2
FP8_BYTES = 1


@dataclass(frozen=True)
class Group:
    """A line of the census: tensors of one role."""

    name: str
    scheme: str
    tensors: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Fit:
    """Whether a GPU can serve the output with a context of 8192 tokens."""

    gpu: str
    memory_bytes: int
    fits: bool


def census(plan: Plan) -> list[Group]:
    """Tensors and bytes by role and scheme, before and after, in the order of the model."""
    infos = plan.source.infos()
    sizes = {entry.name: entry.nbytes for shard in plan.shards for entry in shard.entries}
    tensors: dict[tuple[str, str], int] = {}
    bytes_out: dict[tuple[str, str], int] = {}
    bytes_in: dict[tuple[str, str], int] = {}
    counted: set[str] = set()
    for name, origin in plan.origins.items():
        if origin.cached is not None:
            key = (CACHE_SCALES, "fp8")
        else:
            scheme = plan.matrices[origin.matrix].scheme.name if origin.matrix else infos[origin.source].dtype
            key = (plan.selection.roles[f"{origin.matrix}.weight" if origin.matrix else origin.source].value, scheme)
        tensors[key] = tensors.get(key, 0) + 1
        bytes_out[key] = bytes_out.get(key, 0) + sizes[name]
        if origin.cached is None and origin.source not in counted:
            counted.add(origin.source)
            bytes_in[key] = bytes_in.get(key, 0) + stored_bytes(plan.source, origin.source)
    return [
        Group(role, scheme, count, bytes_in.get((role, scheme), 0), bytes_out[role, scheme])
        for (role, scheme), count in tensors.items()
    ]


def kv_cache_bytes(config: Mapping[str, Any], tokens: int, value_bytes: int = BF16_BYTES) -> int:
    """Bytes of the KV cache for one sequence. Every layer that stores, stores both K and V, as vLLM does where both
    come from one matrix.

    Args:
        config: config.json. Heads and head sizes are read for each layer, in Google's form (global_head_dim) and in
            transformers' (per_layer_config).
        tokens: length of the sequence. Sliding layers store at most their window, and layers that share another's
            keys and values store nothing.
        value_bytes: of a cached value, 2 for BF16 and 1 for FP8.
    Raises:
        InputError: a number in the config is none, or beyond all reason.
    """
    text = text_config(config)
    layers = config_int(text, "num_hidden_layers")
    kinds = config_kinds(text) or ["full_attention"] * layers
    window = config_int(text, "sliding_window", tokens)
    total = 0
    for at, kind in enumerate(kinds[: max(0, layers - config_int(text, "num_kv_shared_layers"))]):
        heads, size = kv_heads(text, at, kind)
        total += 2 * value_bytes * heads * size * (min(tokens, window) if kind == "sliding_attention" else tokens)
    return total


def kv_heads(text: Mapping[str, Any], layer: int, kind: str) -> tuple[int, int]:
    """Number and size of a layer's KV heads.

    Args:
        text: the part of config.json for the text decoder.
        kind: of the layer's attention, `full_attention` or `sliding_attention`.
    """
    attention_heads = config_int(text, "num_attention_heads", 1)
    heads = config_int(text, "num_key_value_heads", attention_heads)
    size = config_int(text, "head_dim", config_int(text, "hidden_size") // attention_heads)
    if kind == "full_attention":
        heads = config_int(text, "num_global_key_value_heads", heads)
        size = config_int(text, "global_head_dim", size)
    own = config_part(config_part(text, "per_layer_config"), f"{layer:02d}")
    return config_int(own, "num_key_value_heads", heads), config_int(own, "head_dim", size)


def serving_bytes(plan: Plan) -> int:
    """Memory to serve the output: weights, BF16 KV cache for 8192 tokens, 1.5 GB."""
    return plan.tensor_bytes + kv_cache_bytes(plan.source.config, SERVED_TOKENS) + SERVING_OVERHEAD_BYTES


def fits(plan: Plan) -> list[Fit]:
    """For each GPU, whether it can serve the output."""
    needed = serving_bytes(plan)
    return [Fit(gpu, kind.memory_bytes, needed <= kind.memory_bytes) for gpu, kind in GPUS.items()]


@dataclass(frozen=True)
class Memory:
    """Peak memory of the conversion in bytes, an upper estimate: host (resident, process tree) and GPU (0 where
    none is needed)."""

    host_bytes: int
    gpu_bytes: int


# Measured (docs/benchmarks.md): what Python, torch and transformers take without and with a CUDA context.
_INTERPRETER_BYTES = 450_000_000
_WITH_MODEL_BYTES = 900_000_000
_WITH_GPU_BYTES = 2_000_000_000
_GPU_WORKSPACE_BYTES = 600_000_000  # of matrix products, and what the allocator rounds up
_STAGING_BYTES = 8 * (16 << 20)  # pinned pieces on their way to the GPU
HEAD_STRIP_BYTES = 32 << 20  # of the head's rows as stored
_HEAD_STRIP_COPIES = 6  # of such a strip while it is quantized: two or three in float32


def fixed_memory(plan: Plan, batch_tokens: int, gpu: bool) -> Memory:
    """Memory that the conversion needs beside the hidden states that wait between layers.

    Args:
        batch_tokens: tokens in the largest batch, or 0 without calibration.
        gpu: whether a GPU computes.
    """
    infos = plan.source.infos()
    layers = plan.tensors_by_layer().values()
    layer = max((sum(infos[name].nbytes for name in names) for names in layers), default=0)
    output = max((shard.tensor_bytes for shard in plan.shards if shard.layer is not None), default=0)
    matrix = max((plan.source_bytes(matrix) for matrix in plan.matrices.values() if matrix is not plan.head), default=0)
    text = text_config(plan.source.config)
    hidden, inner = config_int(text, "hidden_size"), config_largest(text, "intermediate_size")
    working = batch_tokens * (12 * hidden + 6 * inner) * (BF16_BYTES if gpu else 4)
    head, strip = _head_memory(plan)
    lanes = most_memory(plan) if batch_tokens else 0
    if plan.has_two_lanes:  # the layer in the quantized path too, in the dtype of the computation
        lanes += layer if gpu else 2 * layer
    if gpu:  # two layers on the device, one in use and one on its way; two outputs on the host, likewise
        return Memory(
            _WITH_GPU_BYTES + 2 * output + _STAGING_BYTES + head,
            2 * layer + output + working + _GPU_WORKSPACE_BYTES + strip + lanes,
        )
    head += strip
    if not batch_tokens:
        interpreter = _INTERPRETER_BYTES if plan.head is None else _WITH_MODEL_BYTES  # its class is built
        return Memory(interpreter + 2 * layer + 3 * output + matrix + head, 0)
    # The layer in use is in float32 too.
    return Memory(_WITH_MODEL_BYTES + 4 * layer + 3 * output + working + head + lanes, 0)


def _head_memory(plan: Plan) -> tuple[int, int]:
    """Memory for the quantization of the head, beside the walk: on the host, and where it is computed.

    The host has a strip of its rows as stored and as quantized, and all of its scales. A strip in float32 and a few
    copies are where the device computes.
    """
    if plan.head is None:
        return 0, 0
    strip = min(HEAD_STRIP_BYTES, plan.source_bytes(plan.head))
    sizes = [entry.nbytes for shard in plan.shards if shard.is_head for entry in shard.entries]
    return 2 * strip + sum(sizes) - max(sizes), _HEAD_STRIP_COPIES * strip


def forecast_memory(plan: Plan, samples: int, sequence_length: int, batch_size: int, gpu: bool) -> Memory:
    """Memory that the conversion will need without a limit. A `--memory-budget` limits the share of the hidden
    states.

    Args:
        samples, sequence_length, batch_size: of the calibration.
        gpu: whether a GPU computes.
    """
    if not plan.needs_calibration:
        return fixed_memory(plan, 0, gpu)
    fixed = fixed_memory(plan, batch_size * sequence_length, gpu)
    hidden_size = config_int(text_config(plan.source.config), "hidden_size")
    hidden_states = samples * sequence_length * hidden_size * (BF16_BYTES if gpu else 4)
    hidden_states *= 2 if plan.has_two_lanes else 1
    if gpu:
        return Memory(fixed.host_bytes, fixed.gpu_bytes + hidden_states)
    return Memory(fixed.host_bytes + hidden_states, 0)


def as_json(plan: Plan, memory: Memory) -> dict[str, Any]:
    """The document of `plan --json`."""
    return {
        "model": plan.model,
        "commit": None if plan.source.hub is None else plan.source.hub.commit,
        "source_form": decoded_form(plan.source),
        "casts": len(plan.casts),
        "recipe": plan.recipe.name,
        "format": plan.layout.name,
        "tensors": plan.tensors,
        "tensor_bytes": plan.tensor_bytes,
        "quantized": len(plan.matrices),
        "groups": [asdict(group) for group in census(plan)],
        "kept_shares": plan.kept_shares,
        "memory": asdict(memory),
        "fits": [asdict(fit) for fit in fits(plan)],
    }
