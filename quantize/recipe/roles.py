"""The role of a tensor, from its name and shape.

Roles protect: a tower, a projector, a router, an embedding or a head is never quantized, whatever pattern a recipe
has, because stock vLLM builds these layers unquantized and has no parameter for their packed tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from ..checkpoint.config_values import config_int
from .decoder import DRAFT, LAYER, PROJECTOR, TOWER, layer_count
from .decoder import decoder_prefix as decoder_prefix
from .decoder import layer_index as layer_index
from .decoder import text_config as text_config


class Role(Enum):
    """The role of a tensor. The value is its name in reports."""

    MLP = "text MLP"
    ATTENTION = "text attention"
    LINEAR = "other text linear"
    CROSS_ATTENTION = "cross-attention"
    EXPERT = "experts"
    ROUTER = "router"
    PER_LAYER_INPUT = "per-layer input"
    EMBEDDING = "embedding"
    HEAD = "head"
    DRAFT = "draft layers"
    FULL_PRECISION = "built without quantization"
    TRANSPOSED = "stored transposed"
    TOWER = "vision and audio"
    PROJECTOR = "projector"
    OTHER = "other text"


QUANTIZABLE = frozenset({Role.MLP, Role.ATTENTION, Role.LINEAR})

# Tables that ids or positions are looked up in. A patch embedding multiplies, as every linear does.
_TABLE = re.compile(r"^w[tp]e$|^embed_(tokens|in|positions?)|(^|_)embed(s|ding|dings)?$|^relative_attention_bias$")
# What vLLM 0.32.0 builds with quant_config=None, or without any, in text decoders: Mamba's projections beside in_proj
# and out_proj (mamba_mixer.py, mamba_mixer2.py), convolutions, Kimi K3's residual gates, hyper-connections.
_FULL_PRECISION = frozenset(
    {"conv1d", "q_conv1d", "k_conv1d", "v_conv1d", "x_proj", "dt_proj", "weights_proj", "wgate", "mlp_res_proj",
     "self_attention_res_proj", "hc_fn", "hc_head_fn", "input_mix_weight_down", "input_mix_weight_up",
     "block_inject_weight", "eh_proj"}
)  # fmt: skip
# Parents of which no matrix, or only the named ones, get the quantization config: deepseek_v2.py and the like build the
# indexer's wk and weights_proj without, its wq_b with it; compressor.py all without.
_FULL_PRECISION_OF = {"indexer": frozenset({"wk", "weights_proj"}), "compressor": frozenset({"wkv", "wgate"})}
# GPT-2's Conv1D stores [inputs, outputs]; vLLM transposes it while it loads, which packed codes do not survive.
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc"})
_CONV1D_MODELS = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")
# Projections of a few rows that gate or decay a recurrent state, and coefficients that mix streams: no selector takes
# them. A rounded decay compounds over all tokens. Model Optimizer 0.47 and llm-compressor 0.14 leave them in BF16 too.
_GATES = frozenset(
    {"in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "f_a_proj", "f_b_proj", "igate_preact", "fgate_preact",
     "correction_coefs", "prediction_coefs", "modality_router"}
)  # fmt: skip
_ATTENTIONS = frozenset({"self_attn", "self_attention", "attention", "attn", "multi_head_attention"})
# Reads an encoder or an image, which text alone does not reach.
_CROSS_ATTENTIONS = frozenset({"encoder_attn", "cross_attn", "crossattention"})
_MLPS = frozenset(
    {"mlp", "mlps", "mlp_block", "feed_forward", "ffn", "shared_expert", "shared_experts", "shared_mlp",
     "block_sparse_moe", "moe"}
)  # fmt: skip
# Last parts that name a matrix's part whatever its parent is called (`mixer`, `temporal_block`, the layer itself).
_ATTENTION_LEAVES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})
_MLP_LEAVES = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"})
_RECURRENT = frozenset({"linear_attn", "mamba", "conv", "mlstm_layer"})  # parents whose q_proj is no attention's
_HEADS = frozenset({"lm_head", "embed_out", "score"})
_OUTER_HEADS = frozenset({"output", "output_layer", "head", "decoder"})  # inside of a layer these are linears
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
    match = LAYER.match(tensor)
    if match is None:
        return Role.OTHER
    inside = module_of(match["rest"]).split(".")
    if any(part.startswith("per_layer") or "_per_layer_" in part for part in inside):
        return Role.PER_LAYER_INPUT
    if "router" in inside or inside[-1] in ("gate", "shared_expert_gate"):
        return Role.ROUTER
    if "experts" in inside or _is_stack_of_experts(inside, shape):
        return Role.EXPERT
    if not tensor.endswith(".weight"):
        return Role.OTHER
    if "gate" in inside and len(shape) == 2:
        return Role.ROUTER
    if _is_built_in_full_precision(inside) and len(shape) > 1:
        return Role.FULL_PRECISION
    return _role_of_matrix(inside) if len(shape) == 2 else Role.OTHER


def _is_stack_of_experts(inside: list[str], shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds the matrices of all experts without a module of that name, as Granite's and Step's."""
    is_stack = len(shape) == 3 and shape[1] > 1 and "conv" not in inside[-1]
    return is_stack and bool(_MLPS.intersection(inside[:-1]))


def _role_of_matrix(inside: list[str]) -> Role:
    """The role of a matrix that servers may build quantized, by the parts of its name inside a layer."""
    parents, leaf = inside[:-1], inside[-1]
    if _CROSS_ATTENTIONS.intersection(parents):
        return Role.CROSS_ATTENTION
    if _ATTENTIONS.intersection(parents):
        return Role.ATTENTION
    if _MLPS.intersection(parents):
        return Role.MLP
    if _RECURRENT.intersection(parents):
        return Role.LINEAR
    if leaf in _ATTENTION_LEAVES:
        return Role.ATTENTION
    return Role.MLP if leaf in _MLP_LEAVES else Role.LINEAR


def gates_a_recurrence(module: str) -> bool:
    """Whether a module gates or decays a recurrent state, or mixes streams, by its name. Only a pattern that names it
    quantizes it."""
    return module.rpartition(".")[2] in _GATES


def is_table(module: str) -> bool:
    """Whether a module is a table that is looked up (an embedding of tokens or positions), by its name. No server
    quantizes one, wherever it stands."""
    leaf = module.rpartition(".")[2]
    return _TABLE.search(leaf) is not None and "patch" not in leaf and leaf not in _HEADS


def _is_built_in_full_precision(inside: list[str]) -> bool:
    if inside[-1] in _FULL_PRECISION:
        return True
    return any(inside[-1] in _FULL_PRECISION_OF.get(parent, ()) for parent in inside[:-1])


def _role_outside_of_layers(parts: list[str]) -> Role | None:
    """Role of a tensor that is protected wherever it stands, or None for the rest."""
    if any(DRAFT.search(part) for part in parts[:-1]):
        return Role.DRAFT
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


def roles_of(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, Role]:
    """The role of every tensor of a model: `role_of`, and the facts that only the complete model shows.

    Draft layers may be stored as further layers of the decoder. A second stack of layers is not part of the decoder.
    """
    prefix, count = decoder_prefix(shapes, config), layer_count(config)
    roles = {name: role_of(name, shape) for name, shape in shapes.items()}
    is_transposed = _stores_conv1d(shapes, config)
    for name, role in roles.items():
        layer = layer_index(name, prefix)
        if layer is not None and count is not None and layer >= count:
            roles[name] = Role.DRAFT
        elif role in QUANTIZABLE and layer is None:
            roles[name] = Role.OTHER
        elif role in QUANTIZABLE and is_transposed and module_of(name).rpartition(".")[2] in _CONV1D:
            roles[name] = Role.TRANSPOSED
    for name in _mamba1(roles):
        roles[name] = Role.FULL_PRECISION
    return roles


def _stores_conv1d(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> bool:
    """Whether a model's linears are GPT-2's Conv1D: by its class, or by more columns than rows where a linear has more
    rows."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, (list, tuple)) and architectures else ""
    if str(first).startswith(_CONV1D_MODELS):
        return True
    widening = [shape for name, shape in shapes.items() if name.endswith((".c_attn.weight", ".c_fc.weight"))]
    return bool(widening) and all(len(shape) == 2 and shape[0] < shape[1] for shape in widening)


def _mamba1(roles: Mapping[str, Role]) -> list[str]:
    """The projections around Mamba 1's x_proj, which mamba_mixer.py builds without quantization too."""
    mixers = {module_of(name).rpartition(".")[0] for name in roles if module_of(name).endswith(".x_proj")}
    return [
        name
        for name, role in roles.items()
        if role in QUANTIZABLE
        and module_of(name).rpartition(".")[0] in mixers
        and module_of(name).rpartition(".")[2] in ("in_proj", "out_proj")
    ]


def share_of_experts(text: Mapping[str, Any]) -> float:
    """The share of a layer's experts that one token uses, or 0 if the config does not contain it.

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
