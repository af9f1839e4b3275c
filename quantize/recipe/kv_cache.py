"""The attention modules of a decoder, and the names of their scales for an FP8 KV cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..format.layouts import Layout
from .decoder import layer_index
from .roles import Role, text_config

Half = Literal["k", "v"]
HALVES: Mapping[Half, str] = {"k": "keys", "v": "values"}
"""The two halves of a cache, in words."""
_QUERIES = ("q_proj", "qkv_proj")


@dataclass(frozen=True)
class Attention:
    """An attention module of a decoder layer.

    Attributes:
        module: its name in the checkpoint.
        query: the tensor that makes its queries, which every attention module has.
        has_own: whether keys and values each have a matrix of their own that servers read.
    """

    module: str
    layer: int
    query: str
    has_own: bool


def attention_modules(
    roles: Mapping[str, Role], unused: Collection[str], config: Mapping[str, Any], prefix: str
) -> list[Attention]:
    """The attention modules whose keys and values servers cache, in the order of the tensors.

    Args:
        roles: of every tensor of the unquantized model.
        unused: tensors that no layer reads.
        prefix: before a layer's number.
    Returns:
        Nothing for a model that caches a latent vector instead.
    """
    found: list[Attention] = []
    if text_config(config).get("kv_lora_rank"):
        return found
    for name, role in roles.items():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        layer = layer_index(name, prefix)
        if role is Role.ATTENTION and layer is not None and leaf in _QUERIES:
            own = [f"{module}.{half}_proj.weight" for half in HALVES]
            found.append(Attention(module, layer, name, all(part in roles and part not in unused for part in own)))
    return found


def scale_spellings(attention: Attention, half: Half) -> tuple[str, str]:
    """The names under which servers find a scale: the module's own, and that beside the matrix."""
    return f"{attention.module}.{half}_scale", f"{attention.module}.{half}_proj.{half}_scale"


def scale_names(attention: Attention, layout: Layout) -> dict[Half, str]:
    """The names of the scales of keys and values.

    modelopt puts them beside the matrices. Servers drop those of matrices that they do not read, and give a key's scale
    to values that the key's matrix makes. The module's own names reach its cache everywhere.
    """
    is_beside = layout.name == "modelopt" and attention.has_own
    return {half: scale_spellings(attention, half)[is_beside] for half in HALVES}
