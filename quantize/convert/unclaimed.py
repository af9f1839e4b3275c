"""Tensors of a source that its model's class does not read: draft layers, other heads, embeddings of n-grams. They are
copied byte for byte, and the configs leave them unquantized."""

from __future__ import annotations

from ..calibrate.skeleton import Skeleton
from ..errors import InputError
from ..plan.plan import Plan
from ..recipe.roles import describe


def unclaimed_tensors(plan: Plan, skeleton: Skeleton) -> list[str]:
    """Names in the source that the model does not read, in the model's order.

    Args:
        skeleton: of the source.
    """
    claimed = skeleton.claimed()
    return [name for name in plan.source.infos() if name not in claimed]


def refuse_unclaimed(plan: Plan, skeleton: Skeleton) -> None:
    """Refuse to quantize a matrix that no server has a parameter for, and that no input reaches.

    Raises:
        InputError: the recipe quantizes a matrix that the model's class does not read.
    """
    claimed = skeleton.claimed()
    foreign = [matrix.tensor for matrix in plan.inner_matrices if matrix.tensor not in claimed]
    if foreign:
        raise InputError(
            f"{plan.model} stores {describe(foreign, 1)}, which {type(skeleton.full).__name__} does not read, but "
            f"recipe {plan.recipe.name} quantizes it",
            where=plan.model,
            hint="write a recipe whose patterns do not match it",
        )
