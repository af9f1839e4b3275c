"""The common part of quantizers that choose block scales: one global scale a fused group, before any block scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..format.blocks import BlockQuantized, weight_amax
from ..format.constants import SMALLEST_WEIGHT_AMAX
from ..format.scales import global_scale
from ..format.schemes import Part
from ..recipe.matrices import Matrix
from .base import QuantizedGroup


def group_amax(group: Sequence[Matrix], weights: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of a fused group's weights, a float32 scalar on their device.

    Raises:
        NonFiniteError: a NaN or an infinity in a weight.
    """
    found = [weight_amax(weight, matrix.tensor) for matrix, weight in zip(group, weights, strict=True)]
    return torch.stack(found).amax()


@dataclass(frozen=True)
class BlockScales:
    """The global scale of a group under a headroom."""

    headroom: float

    def global_scale(self, matrix: Matrix, amax: Tensor) -> Tensor:
        """The global scale (divisor) for a group's amax, float32 scalar.

        Args:
            matrix: of the group, for messages.
        Raises:
            InputError: weights too small for NVFP4, or so large that the headroom exceeds float32.
        """
        if 0 < float(amax) < SMALLEST_WEIGHT_AMAX:
            raise InputError(
                f"{matrix.tensor} contains no value above {float(amax):.3g}, which is too small for NVFP4",
                hint="leave it out of the recipe's quantize list",
            )
        if not math.isfinite(float(amax * self.headroom)):
            raise InputError(
                f"{matrix.tensor} contains values near the limit of float32", hint="use --quantizer rtn for this model"
            )
        return global_scale(amax, self.headroom)

    def quantize_rows(
        self, matrix: Matrix, weight: Tensor, amax: Tensor, choose: Callable[[Tensor, Tensor], BlockQuantized]
    ) -> dict[Part, Tensor]:
        """See `Quantizer.quantize_rows`, and `quantize` for `choose`."""
        quantized = choose(weight, self.global_scale(matrix, amax))
        return {"codes": quantized.packed, "scales": quantized.scales}

    def quantize(
        self,
        group: Sequence[Matrix],
        weights: Sequence[Tensor],
        choose: Callable[[Tensor, Tensor], BlockQuantized],
    ) -> QuantizedGroup:
        """Quantize each matrix under the group's global scale.

        Args:
            choose: returns the codes and block scales of a weight under a global scale (divisor).
        Raises:
            NonFiniteError: a NaN or an infinity in a weight.
            InputError: weights too small for NVFP4, or so large that the headroom exceeds float32.
        """
        amax = group_amax(group, weights)
        scale = self.global_scale(group[0], amax)
        made = {}
        for matrix, weight in zip(group, weights, strict=True):
            quantized = choose(weight, scale)
            made[matrix.name] = {"codes": quantized.packed, "scales": quantized.scales}
        return QuantizedGroup(float(amax), made)  # type: ignore[arg-type]
