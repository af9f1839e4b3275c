"""What a tensor is for, read from its name and shape.

Roles protect: a tower, a projector, a router, an embedding or a head is never quantized, whatever a recipe's pattern
says, because stock vLLM builds these layers unquantized and has no parameter for their packed tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from ..checkpoint.config_values import config_int


class Role(Enum):
    """The part that a tensor plays; the value is what reports call it."""

    MLP = "text MLP"
    ATTENTION = "text attention"
    LINEAR = "other text linear"
    EXPERT = "experts"
    ROUTER = "router"
    PER_LAYER_INPUT = "per-layer input"
    EMBEDDING = "embedding"
    HEAD = "head"
    TOWER = "vision and audio"
    PROJECTOR = "projector"
    OTHER = "other text"


QUANTIZABLE = frozenset({Role.MLP, Role.ATTENTION, Role.LINEAR})

_LAYER = re.compile(r"^(?P<prefix>(?:.+\.)?(?:layers|h|blocks))\.(?P<index>\d+)\.(?P<rest>.+)$")
TOWER = re.compile(r"vision|visual|audio|image|speech|video|^vit$")
PROJECTOR = re.compile(r"^embed_(vision|audio)$|projector|^connector$|^aligner$|^merger$")
# Tables that ids or positions are looked up in; what embeds patches multiplies, as every linear does.
_TABLE = re.compile(r"^w[tp]e$|^embed_(tokens|in|positions?)|(^|_)embed(s|ding|dings)?$|^relative_attention_bias$")
_HEADS = frozenset({"lm_head", "embed_out", "score"})
_OUTER_HEADS = frozenset({"output", "output_layer"})  # inside of a layer these are linears
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_USED = ("num_experts_per_tok", "top_k_experts", "moe_topk")


def module_of(tensor: str) -> str:
    """The module that owns a weight: the tensor's name without `.weight`."""
    return tensor.removesuffix(".weight")


def role_of(tensor: str, shape: tuple[int, ...]) -> Role:
    """The role of a tensor of a checkpoint, by its name there and its shape."""
    parts = module_of(tensor).split(".")
    outside = _role_outside_of_layers(parts)
    if outside is not None:
        return outside
    match = _LAYER.match(tensor)
    if match is None:
        return Role.OTHER
    inside = module_of(match["rest"]).split(".")
    if any(part.startswith("per_layer") or "_per_layer_" in part for part in inside):
        return Role.PER_LAYER_INPUT
    if "router" in inside or inside[-1] in ("gate", "shared_expert_gate"):
        return Role.ROUTER
    if "experts" in inside:
        return Role.EXPERT
    if len(shape) != 2 or not tensor.endswith(".weight"):
        return Role.OTHER
    if any(part in ("self_attn", "self_attention", "attention", "attn") for part in inside[:-1]):
        return Role.ATTENTION
    if any(part in ("mlp", "feed_forward", "ffn", "shared_expert", "shared_experts") for part in inside[:-1]):
        return Role.MLP
    return Role.LINEAR


def is_table(module: str) -> bool:
    """Whether a module is a table that is looked up (an embedding of tokens or positions), by its name; no server
    quantizes one, wherever it stands."""
    leaf = module.rpartition(".")[2]
    return _TABLE.search(leaf) is not None and "patch" not in leaf and leaf not in _HEADS


def _role_outside_of_layers(parts: list[str]) -> Role | None:
    """Role of what is protected wherever it stands; None for the rest."""
    if any(PROJECTOR.search(part) for part in parts):
        return Role.PROJECTOR
    if any(TOWER.search(part) for part in parts):
        return Role.TOWER
    is_inside = any(part.isdecimal() for part in parts)
    if parts[-1] in _HEADS or (parts[-1] in _OUTER_HEADS and not is_inside):
        return Role.HEAD
    if is_table(".".join(parts)):
        return Role.EMBEDDING
    if parts[-1].startswith("per_layer"):
        return Role.PER_LAYER_INPUT
    return None


def decoder_prefix(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What precedes a layer's number in the names of the text decoder's tensors, as `model.layers`; None without
    a decoder."""
    counts = Counter(
        match["prefix"]
        for tensor, shape in shapes.items()
        if (match := _LAYER.match(tensor)) and role_of(tensor, shape) not in (Role.TOWER, Role.PROJECTOR)
    )
    return counts.most_common(1)[0][0] if counts else None


def layer_index(tensor: str, prefix: str | None) -> int | None:
    """The number of the decoder layer that owns a tensor; None outside of the layers."""
    if prefix is None or not tensor.startswith(prefix + "."):
        return None
    number = tensor[len(prefix) + 1 :].split(".", 1)[0]
    return int(number) if number.isdecimal() else None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the text decoder."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            nested: Mapping[str, Any] = config[key]
            return nested
    return config


def share_of_experts(text: Mapping[str, Any]) -> float:
    """The share of a layer's experts that one token uses; 0 where the config does not tell it.

    Args:
        text: see `text_config`.
    """
    number = next(filter(None, (config_int(text, key) for key in _EXPERTS)), 0)
    used = next(filter(None, (config_int(text, key) for key in _EXPERTS_USED)), 0)
    return min(1.0, used / number) if number else 0.0


def unused_tensors(config: Mapping[str, Any], tensors: Iterable[str]) -> frozenset[str]:
    """Keys and values of layers that use another layer's: stored in some checkpoints (Gemma 4 E2B, E4B), read by
    no layer."""
    text = text_config(config)
    shared = config_int(text, "num_kv_shared_layers")
    first_shared = config_int(text, "num_hidden_layers") - shared
    expression = re.compile(r".+\.layers\.(\d+)\.self_attn\.[kv]_(proj|norm)\.weight$")
    matches = (expression.match(name) for name in tensors if _role_outside_of_layers(name.split(".")) is None)
    return frozenset(match[0] for match in matches if match and shared and int(match[1]) >= first_shared)


def describe(tensors: Iterable[str], limit: int = 3) -> str:
    """A few names for a sentence: `a, b, c and 7 more`."""
    names = list(tensors)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
