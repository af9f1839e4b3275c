"""FP8 to nearest: every row, or the whole fused group, is scaled to 448 by its largest magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..format.fp8 import fp8_scale, quantize_rows
from ..format.schemes import FP8, Fp8, Part
from ..recipe.matrices import Matrix
from .base import Claim, GroupInputs, Need, QuantizedGroup
from .blocks import group_amax

CLAIM = Claim(headroom=1.0, scale_offsets=range(1))


@dataclass(frozen=True)
class Fp8Nearest:
    """Round to nearest. The error of FP8 is so small that no search for better scales is worth its time."""

    name: str = "nearest"
    schemes: frozenset[str] = frozenset({FP8.name})
    needs: frozenset[Need] = frozenset()
    lane: Literal["source", "quantized"] = "source"
    by_site: bool = False
    folds: bool = False
    claim: Claim = CLAIM
    rows_claim: Claim = CLAIM

    def quantize(
        self, group: Sequence[Matrix], weights: Sequence[Tensor], inputs: GroupInputs | None
    ) -> QuantizedGroup:
        """See `Quantizer.quantize`. `inputs` are not used."""
        amax = group_amax(group, weights)
        made = {
            matrix.name: self.quantize_rows(matrix, weight, amax) for matrix, weight in zip(group, weights, strict=True)
        }
        return QuantizedGroup(float(amax), made)

    def quantize_rows(self, matrix: Matrix, weight: Tensor, amax: Tensor) -> Mapping[Part, Tensor]:
        """See `Quantizer.quantize_rows`."""
        if isinstance(matrix.scheme, Fp8) and matrix.scheme.is_by_row:
            scales = fp8_scale(row_amax(weight))
            return {"codes": quantize_rows(weight, scales), "scales": scales}
        return {"codes": quantize_rows(weight, fp8_scale(amax))}


def row_amax(weight: Tensor) -> Tensor:
    """The largest magnitude of each row, float32 [rows, 1]."""
    low, high = torch.aminmax(weight, dim=1, keepdim=True)
    return torch.maximum(-low, high).float()
