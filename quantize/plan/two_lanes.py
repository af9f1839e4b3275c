"""The work and the memory of a calibration in two lanes, beside those of one: convert.site_by_site and the modules that
it calls.

With d columns and r rows of a fused group, its second moments are int64: the upper triangle of [d, d], and [c, d],
where c is the lesser of r and d if r is far less (calibrate.statistics.moments). They are solved in float32
(quantizers.error_feedback).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..recipe.roles import Role
from .plan import Plan

_PANEL = 1024  # rows of a product of moments at a time: what lies right of its diagonal block is computed twice
_CANDIDATES = 10  # of a block's scale
_STEP_FLOP = 30  # of a column under a candidate: rounding, cost, and the feedback to the columns behind it in its block
_SOLVED_COPIES = 3  # of [d, d] in float32: H, its factor, and the products on the way to the inverse
_WEIGHT_COPIES = 4  # of [r, d] in float32


@dataclass(frozen=True)
class SolvedGroup:
    """A fused group whose quantizer sees the quantized path.

    Attributes:
        rows: of all members together.
    """

    rows: int
    cols: int

    @property
    def cross_rows(self) -> int:
        """Rows of the second moments between the lanes."""
        return self.rows if 2 * self.rows <= self.cols else self.cols

    @property
    def moment_flop(self) -> int:
        """Operations in float32 for one token."""
        through_weight = 2 * self.rows * self.cols if self.cross_rows < self.cols else 0
        return self.cols * (self.cols + _PANEL) + 2 * self.cross_rows * self.cols + through_weight

    @property
    def solve_flop(self) -> int:
        """Operations in float32: two factorisations, a triangular inverse, the target, the rounding with feedback."""
        product = 0 if self.cross_rows < self.cols else 2 * self.rows * self.cols**2  # W·C
        target = self.cols**3 // 3 + 2 * self.rows * self.cols**2 + product
        rounding = self.rows * self.cols * (self.cols + _CANDIDATES * _STEP_FLOP)
        return target + self.cols**3 // 3 + self.cols**3 + rounding

    @property
    def memory_bytes(self) -> int:
        """The most that is on the device at a time."""
        square, cross, weight = self.cols**2, self.cross_rows * self.cols, self.rows * self.cols
        gathered = 4 * square + 8 * cross + 4 * (square + cross) + (4 * weight if cross < square else 0)
        solved = 4 * (_SOLVED_COPIES * square + cross + _WEIGHT_COPIES * weight)
        return max(gathered, solved)


def solved_groups(plan: Plan) -> dict[int, list[SolvedGroup]]:
    """The groups of each decoder layer that are solved, in about the order in which the layer reaches them."""
    found: dict[int, list[tuple[tuple[bool, float], SolvedGroup]]] = {layer: [] for layer in plan.layers}
    for group in plan.solved_groups if plan.has_two_lanes else ():
        members = [plan.matrices[module] for module in group.members]
        solved = SolvedGroup(sum(matrix.rows for matrix in members), members[0].cols)
        is_mlp = plan.selection.roles[members[0].tensor] is Role.MLP
        layer = plan.layer_of(members[0].tensor) or 0
        found[layer].append(((is_mlp, -solved.rows / solved.cols), solved))
    return {layer: [group for _, group in sorted(groups, key=lambda at: at[0])] for layer, groups in found.items()}


def passes(groups: Sequence[SolvedGroup], linear_flop: float) -> float:
    """How often the tokens go through a layer, in parts of a complete forward: the source twice to observe its inputs,
    for folds and after them, both lanes up to each group, and each lane to the next layer, the source from the last
    group on. Without groups it is 1.

    Args:
        groups: see `solved_groups`.
        linear_flop: of the layer's matrix products for one token.
    """
    if not groups or not linear_flop:
        return 1.0
    before, parts = 0, list[float]()
    for group in groups:
        parts.append(before / linear_flop)
        before += 2 * group.rows * group.cols
    return 4 + 2 * sum(parts) - parts[-1]


def most_memory(plan: Plan) -> int:
    """Bytes on the device for the group that needs most, 0 in one lane."""
    return max((group.memory_bytes for groups in solved_groups(plan).values() for group in groups), default=0)
