"""What a conversion refuses before it reads a weight: the checks that `plan` runs too, so that both say the same."""

from __future__ import annotations

from ..plan.plan import Plan
from .config import check_patterns


def check_conversion(plan: Plan) -> None:
    """Refuse a plan that `convert` would refuse before its first layer.

    Raises:
        CheckFailed: vLLM's rules would give some layer another treatment than the plan does.
        EnvironmentLack: a recipe that calibrates, and no transformers that knows the architecture.
        InputError: a recipe that calibrates, and a model that cannot be walked.
    """
    check_patterns(plan)
    if plan.recipe.needs_calibration:
        import torch

        from ..calibrate.skeleton import build_skeleton

        build_skeleton(plan.source, plan.prefix, torch.device("cpu"), torch.bfloat16)
