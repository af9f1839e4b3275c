"""The share of the decoder's matrices that a recipe leaves as in the source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

from .decoder import layer_index
from .roles import Role, gates_a_recurrence, module_of

# Matrices of these roles stay in every recipe, and are small.
NEVER_QUANTIZED = frozenset(
    {Role.ROUTER, Role.FULL_PRECISION, Role.PER_LAYER_INPUT, Role.EMBEDDING, Role.HEAD, Role.TOWER, Role.PROJECTOR}
    | {Role.DRAFT}
)


def kept_shares(
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Role],
    quantized: Collection[str],
    prefix: str | None,
) -> dict[str, float]:
    """The share of the decoder's matrices that stays as in the source, by role, the largest first.

    Args:
        shapes: of all tensors of the unquantized model.
        roles: theirs.
        quantized: names of the tensors that are quantized.
        prefix: of a layer's number.
    Returns:
        shares of the elements. Empty if every matrix is quantized.
    """
    sizes = {
        name: prod(shape)
        for name, shape in shapes.items()
        if layer_index(name, prefix) is not None and _may_be_quantized(name, shape, roles[name])
    }
    total, found = sum(sizes.values()), dict[str, int]()
    for name, size in sizes.items():
        if name not in quantized:
            found[roles[name].value] = found.get(roles[name].value, 0) + size
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return {role: round(size / total, 6) for role, size in ordered}


def _may_be_quantized(name: str, shape: tuple[int, ...], role: Role) -> bool:
    """Whether a tensor contains matrices that some recipe or server could have quantized."""
    if len(shape) < 2 or role in NEVER_QUANTIZED or gates_a_recurrence(module_of(name)):
        return False
    return role is Role.EXPERT or (len(shape) == 2 and name.endswith(".weight"))


def kept_words(shares: Mapping[str, float]) -> str | None:
    """A sentence about `kept_shares`, or None if nothing stays."""
    if not shares:
        return None
    listed = ", ".join(f"{role} {share:.1%}" for role, share in shares.items())
    return f"Of the decoder's matrices, {sum(shares.values()):.1%} stay as in the source: {listed}."
