"""The source on its way through the layers of a conversion, in one lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..calibrate.lanes import Lane, LayerPass
from ..calibrate.statistics.ranges import InputRanges
from ..calibrate.taps import LinearTap
from ..calibrate.walk import Walk
from ..recipe.groups import FusedGroup
from ..stream.hidden import HiddenStates

SOURCE = "source"


class SourceWalk:
    """This rank's batches in front of a layer.

    Args:
        walk: with the lane `source`.
    """

    def __init__(self, walk: Walk, source: Lane) -> None:
        self._walk, self._source = walk, source

    @property
    def hidden(self) -> HiddenStates:
        """The hidden states of the lane `source`."""
        return self._source.hidden

    @property
    def shares_state(self) -> bool:
        """Whether layers pass more to later layers than the hidden state."""
        return self._walk.shares_state

    def observe(
        self, layer: int, tensors: Mapping[str, Tensor], groups: Sequence[FusedGroup], wants_mean_square: bool
    ) -> dict[str, InputRanges]:
        """Send every batch through a layer. Returns the ranges of the inputs of fused groups, by their names.

        Args:
            layer: its number. Layers are walked in order.
            tensors: the layer's tensors by their names in the checkpoint, on the device.
            groups: fused groups of the layer. Without any, only hidden states advance.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        tap = LinearTap.of_groups(groups, f"{self._walk.skeleton.layer_prefix}.{layer}.")
        ranges = {group.name: InputRanges(wants_mean_square, SOURCE) for group in groups}
        statistics = {name: [statistic] for name, statistic in ranges.items()}
        self._walk.forward(layer, [LayerPass(self._source, tensors)], tap, statistics)
        return ranges

    def close(self) -> None:
        """Drop the hidden states."""
        self._walk.close()
