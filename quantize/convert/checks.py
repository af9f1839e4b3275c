"""Checks of a conversion before it reads a weight. `plan` runs them too, so both report the same errors."""

from __future__ import annotations

from ..plan.plan import Plan
from ..recipe.roles import Role
from .config import check_patterns


def check_conversion(plan: Plan) -> list[str]:
    """Refuse a plan that `convert` would refuse before its first layer.

    Returns:
        names of source tensors that the model does not read, and that are copied. Without calibration, they are the
        draft layers by name.
    Raises:
        CheckFailed: vLLM's rules would treat a layer in another way than the plan.
        EnvironmentLack: the recipe calibrates, but the installed transformers does not support the architecture.
        InputError: the recipe calibrates, but nvquant cannot walk the model layer by layer. See also `head.check_head`
            and `kv_cache.cache_bounds`.
    """
    check_patterns(plan)
    if plan.head is not None:
        from .head import check_head

        check_head(plan)
    if plan.cached and plan.source.hub is None:
        from .kv_cache import cache_bounds

        cache_bounds(plan)
    if plan.needs_calibration:
        import torch

        from .unclaimed import unclaimed_tensors
        from .walking import source_skeleton

        return unclaimed_tensors(plan, source_skeleton(plan, torch.device("cpu"), torch.bfloat16))
    return [name for name, role in plan.selection.roles.items() if role is Role.DRAFT]
