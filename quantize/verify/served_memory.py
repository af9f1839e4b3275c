"""The memory that a server's weights should take, from the checkpoint's own bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.config_values import config_int, config_kinds
from ..recipe.roles import Role, text_config
from ..serving.kernels import DECODED_IN_MEMORY
from ..serving.log import LogFacts
from .report import Finding, not_applicable
from .subject import Subject

# What a server adds to the file's bytes, measured with vLLM 0.24 on one H200 for a 31B: 0.8 % to 4 %, or 0.73 GiB,
# whether the weights are 58, 29 or 18 GiB. Rotary tables are computed below; the rest is padding to tiles (Marlin, 64;
# swizzled scales, 128 x 4) and what the allocator rounds up, which grow with the number of layers.
MOST_SHARE_ABOVE = 0.05
MOST_ABOVE = 512 << 20
# The log rounds to 0.01 GiB, and towers that are not served are left out.
MOST_SHARE_BELOW = 0.03
ROUNDING = 1 << 24
ROTARY_BYTES = 4


def forecast_weights(subject: Subject, tensor_parallel: int) -> int:
    """Forecast the bytes of weights on each GPU: all matrices split over the ranks, vectors and scalars on each.

    The head of a tied model is its embedding, which is stored and loaded once.
    """
    total = 0
    for name, info in subject.infos.items():
        if name in subject.unused:
            continue
        is_split = len(info.shape) >= 2 and subject.roles.get(name) not in (Role.TOWER, Role.PROJECTOR, Role.ROUTER)
        total += -(-info.nbytes // tensor_parallel) if is_split else info.nbytes
    return total


def rotary_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the tables of sines and cosines, for each kind of layer one, float32 at most."""
    text = text_config(config)
    heads = config_int(text, "num_attention_heads", 1)
    size = config_int(text, "head_dim", config_int(text, "hidden_size") // heads)
    sizes = {size, config_int(text, "global_head_dim", size)}
    kinds = max(len(sizes), len(set(config_kinds(text))))
    return kinds * max(sizes) * config_int(text, "max_position_embeddings") * ROTARY_BYTES


def check_memory(subject: Subject, facts: LogFacts, forecast: int, is_cpu: bool | None, tree_bytes: int) -> Finding:
    """Check that the server's weights take the memory that the checkpoint's bytes require, on each GPU.

    Args:
        forecast: from `forecast_weights`.
        is_cpu: whether the server computes on a CPU. None for a server that was not started here.
        tree_bytes: memory of all of the server's processes, or 0 where it is unknown.
    """
    expected = f"{_gb(forecast)} forecast from the checkpoint's bytes"
    if is_cpu:
        decoded = any(kernel.name in DECODED_IN_MEMORY for kernel in facts.kernels)
        why = ", its kernels keep decoded weights" if decoded else ""
        return not_applicable(
            f"a CPU build does not report the size of its weights (all processes: {_gb(tree_bytes)}, {expected}{why})"
        )
    if facts.weights_bytes is None:
        return not_applicable(f"the server does not report the size of its weights ({expected})")
    looked_at = f"{_gb(facts.weights_bytes)} of weights on each GPU, {expected}"
    towers = sum(
        subject.infos[name].nbytes for name, role in subject.roles.items() if role in (Role.TOWER, Role.PROJECTOR)
    )
    least = forecast * (1 - MOST_SHARE_BELOW) - towers - ROUNDING
    most = forecast * (1 + MOST_SHARE_ABOVE) + rotary_bytes(subject.config) + min(MOST_ABOVE, forecast) + ROUNDING
    faults = []
    if facts.weights_bytes > most:
        faults.append(
            f"the weights take {_gb(facts.weights_bytes)}, the limit is {_gb(round(most))}: some are loaded decoded, "
            f"or "
            f"twice"
        )
    if facts.weights_bytes < least:
        faults.append(
            f"the weights take {_gb(facts.weights_bytes)}, the lower limit is {_gb(round(least))}: some were not loaded"
        )
    return Finding(looked_at, faults)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
