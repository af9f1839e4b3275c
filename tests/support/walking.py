"""A walk in one lane, with the statistics of fused groups where a test asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvquant.calibrate.lanes import LayerPass
from nvquant.calibrate.skeleton import Skeleton
from nvquant.calibrate.statistics.ranges import InputRanges
from nvquant.calibrate.taps import LinearTap
from nvquant.calibrate.walk import Walk
from nvquant.recipe.groups import FusedGroup
from nvquant.stream.hidden import HiddenBudget
from torch import Tensor


class OneLane:
    """A walk whose only lane is the source's."""

    def __init__(self, skeleton: Skeleton, batches: Sequence[Tensor], budget: HiddenBudget, **options: Any) -> None:
        self.walk = Walk(skeleton, batches, **options)
        self.skeleton = skeleton
        self.lane = self.walk.lane("source", budget)
        self.hidden = self.lane.hidden

    def step(
        self, layer: int, tensors: Mapping[str, Tensor], groups: Sequence[FusedGroup] = (), squares: bool = False
    ) -> dict[str, InputRanges]:
        """Send every batch through a layer; the ranges of the groups' inputs."""
        ranges = {group.name: InputRanges(squares) for group in groups}
        tap = LinearTap.of_groups(groups, f"{self.skeleton.layer_prefix}.{layer}.")
        statistics = {name: [statistic] for name, statistic in ranges.items()}
        self.walk.forward(layer, [LayerPass(self.lane, tensors)], tap, statistics)
        return ranges
