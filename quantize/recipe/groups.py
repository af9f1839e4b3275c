"""Fused groups: matrices that vLLM joins into one and that must therefore share their global scales.

Source: `packed_modules_mapping` of vLLM's models (qkv_proj, gate_up_proj).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FUSED_MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_FUSED_NAME = {member: fused for fused, members in FUSED_MEMBERS.items() for member in members}


@dataclass(frozen=True)
class FusedGroup:
    """Matrices that share one weight global scale and one input global scale.

    Attributes:
        name: the fused module as vLLM calls it (`model.layers.0.mlp.gate_up_proj`); a matrix that stands alone has its
            own name.
        members: module names, in the order in which they are fused.
    """

    name: str
    members: tuple[str, ...]


def fused_name(module: str) -> str:
    """The name of the fused module to which a module belongs, its own name where it stands alone."""
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{_FUSED_NAME[leaf]}" if leaf in _FUSED_NAME and parent else module


def fused_groups(modules: Iterable[str]) -> tuple[FusedGroup, ...]:
    """Group modules, in the order of first appearance. A member that the model lacks (v_proj where K is V) is not
    invented."""
    members: dict[str, list[str]] = {}
    for module in modules:
        members.setdefault(fused_name(module), []).append(module)
    return tuple(
        FusedGroup(name, tuple(sorted(group, key=lambda module: _rank(name, module))))
        for name, group in members.items()
    )


def _rank(fused: str, module: str) -> int:
    order = FUSED_MEMBERS.get(fused.rpartition(".")[2], ())
    leaf = module.rpartition(".")[2]
    return order.index(leaf) if leaf in order else 0
