"""What a conversion refuses before it reads a weight: the checks that `plan` runs too, so that both say the same."""

from __future__ import annotations

import torch

from ..calibrate.skeleton import build_skeleton
from ..plan.plan import Plan
from .config import output_configs


def check_conversion(plan: Plan) -> None:
    """Refuse a plan that `convert` would refuse before its first layer.

    Raises:
        CheckFailed: vLLM's rules would give some layer another treatment than the plan does.
        EnvironmentLack: a recipe that calibrates, and no transformers that knows the architecture.
        InputError: a recipe that calibrates, and a model that cannot be walked.
    """
    output_configs(plan)
    if plan.recipe.needs_calibration:
        build_skeleton(plan.source, plan.prefix, torch.device("cpu"), torch.bfloat16)
