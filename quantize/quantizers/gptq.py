"""gptq: round column after column, and let the later columns make up for the error, on inputs of the quantized path.

The target of the rounding is not the source's weight W but W*, which also makes up for a part of what the quantized
layers before changed: W* = W + pull · W·C·(H + pull_damping · mean(diag H) · I)⁻¹, with H and C of `Moments`. The
rounding of the input itself is not in C.
Sources: Frantar et al., "GPTQ" (arXiv 2210.17323). Li et al., "GPTAQ" (arXiv 2504.02692), for a target of the source's
output. The values of the constants were measured (docs/recipes.md, section "Quantizers").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..calibrate.statistics.moments import Moments
from ..errors import CheckFailed
from ..format.schemes import NVFP4, NVFP4_A16, Part
from ..recipe.matrices import Matrix
from ..stream.manifest import FeedbackRecord
from .base import Claim, GroupInputs, Need, QuantizedGroup
from .blocks import BlockScales, group_amax
from .error_feedback import NoFactor, damped_factor, round_with_feedback
from .mse import CLAIM as ROWS_CLAIM
from .mse import sweep_blocks

CLAIM = Claim(headroom=2.0, scale_offsets=None, codes="any")


@dataclass(frozen=True)
class GPTQ:
    """Rounding with error feedback, each block's scale chosen on entry to it.

    Attributes:
        damping: part of the mean diagonal of H that is added to its diagonal.
        pull: the part of the way to the least-squares target.
        pull_damping: the damping of that target.
    """

    name: str = "gptq"
    schemes: frozenset[str] = frozenset({NVFP4.name, NVFP4_A16.name})
    needs: frozenset[Need] = frozenset({"mean_square", "moments"})
    lane: Literal["source", "quantized"] = "quantized"
    by_site: bool = True
    folds: bool = True
    claim: Claim = CLAIM
    rows_claim: Claim = ROWS_CLAIM
    damping: float = 0.03
    pull: float = 0.25
    pull_damping: float = 0.1

    def quantize(
        self, group: Sequence[Matrix], weights: Sequence[Tensor], inputs: GroupInputs | None
    ) -> QuantizedGroup:
        """See `Quantizer.quantize`.

        Raises:
            CheckFailed: there are no moments of the inputs, or their Gram matrix has no factor.
        """
        group_amax(group, weights)  # refuses damaged weights
        if inputs is None or inputs.moments is None:
            raise CheckFailed(f"gptq has no inputs of {group[0].name}", hint="use --quantizer mse")
        moments = inputs.moments
        weight = weights[0].float() if len(weights) == 1 else torch.cat([weight.float() for weight in weights])
        gram = moments.gram.to(weight.device)
        try:
            target, pull_damping = self.target(weight, gram, moments)
            amax = target.abs().amax()
            scale = BlockScales(self.claim.headroom).global_scale(group[0], amax)
            solved = round_with_feedback(target, gram, scale, self.damping)
        except NoFactor as error:
            raise CheckFailed(
                f"the Gram matrix of the inputs of {group[0].name} has no Cholesky factor", hint="use --quantizer mse"
            ) from error
        rows = [matrix.rows for matrix in group]
        parts: dict[str, Mapping[Part, Tensor]] = {
            matrix.name: {"codes": codes, "scales": scales}
            for matrix, codes, scales in zip(group, solved.packed.split(rows), solved.scales.split(rows), strict=True)
        }
        record = FeedbackRecord(
            damping=solved.damping,
            pull_damping=pull_damping,
            dead_columns=int((gram.diagonal() == 0).sum()),
            outgrown_blocks=solved.outgrown,
        )
        return QuantizedGroup(float(amax), parts, record)

    def has_more_damping(self, record: FeedbackRecord) -> bool:
        """Whether a factorisation of a group failed until its damping was raised."""
        return record.damping > self.damping or (record.pull_damping or 0.0) > self.pull_damping

    def target(self, weight: Tensor, gram: Tensor, moments: Moments) -> tuple[Tensor, float | None]:
        """W*, float32 [rows, cols], and the damping that its factorisation needed. None without a factorisation."""
        if moments.cross is None or not self.pull:
            return weight, None
        cross = moments.cross.to(weight.device)
        wanted = cross if moments.is_through_weight else weight @ cross
        factor, used = damped_factor(gram, self.pull_damping)
        # Not cholesky_solve, which copies the factor: 1.85 GB for 21504 columns.
        solved = torch.linalg.solve_triangular(factor, wanted.t(), upper=False)
        solved = torch.linalg.solve_triangular(factor.t(), solved, upper=True)
        del factor
        return torch.add(weight, solved.t(), alpha=self.pull), used

    def quantize_rows(self, matrix: Matrix, weight: Tensor, amax: Tensor) -> Mapping[Part, Tensor]:
        """See `Quantizer.quantize_rows`. Without inputs, the scales of mse are the best."""
        return BlockScales(self.claim.headroom).quantize_rows(matrix, weight, amax, sweep_blocks)
