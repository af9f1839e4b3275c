"""The source on its way through the layers of a conversion, in one lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibrate.lanes import Lane, LayerPass
from ..calibrate.samples import CalibrationSet
from ..calibrate.skeleton import build_skeleton
from ..calibrate.statistics.base import Statistic
from ..calibrate.statistics.key_value import KeyValueAmax
from ..calibrate.statistics.ranges import InputRanges
from ..calibrate.taps import KeyValueTap, LinearTap, Taps
from ..calibrate.walk import Walk, make_batches
from ..errors import InputError
from ..plan.plan import Plan
from ..recipe.groups import FusedGroup
from ..stream.hidden import HiddenStates
from .budget import hidden_budget
from .options import ConvertOptions
from .watch import Watch

SOURCE = "source"


@dataclass(frozen=True)
class Observed:
    """The statistics of a layer.

    Attributes:
        inputs: of fused groups, by their names.
        cached: of keys and values, by site.
    """

    inputs: Mapping[str, InputRanges]
    cached: Mapping[str, KeyValueAmax]


class SourceWalk:
    """This rank's batches in front of a layer. Layers are walked in order.

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
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        groups: Sequence[FusedGroup],
        wants_mean_square: bool,
        cached: Sequence[str] = (),
    ) -> Observed:
        """Send every batch through a layer.

        Args:
            tensors: the layer's tensors by their names in the checkpoint, on the device.
            groups: fused groups of the layer, whose inputs are observed.
            cached: sites of a `KeyValueTap` that are observed, with the names in the checkpoint.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        prefix = f"{self._walk.skeleton.layer_prefix}.{layer}."
        inputs = LinearTap.of_groups(groups, prefix)
        seen = Observed(
            {group.name: InputRanges(wants_mean_square, SOURCE) for group in groups},
            {site: KeyValueAmax(SOURCE) for site in cached},
        )
        statistics: dict[str, list[Statistic]] = {name: [statistic] for name, statistic in seen.inputs.items()}
        statistics |= {site: [statistic] for site, statistic in seen.cached.items()}
        tap = Taps(inputs, KeyValueTap(prefix)) if cached else inputs
        self._walk.forward(layer, [LayerPass(self._source, tensors)], tap, statistics)
        return seen

    def replay(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """`observe` nothing."""
        self._walk.forward(layer, [LayerPass(self._source, tensors)])

    def close(self) -> None:
        """Drop the hidden states."""
        self._walk.close()


def open_walk(
    plan: Plan,
    calibration: CalibrationSet,
    options: ConvertOptions,
    dtype: torch.dtype,
    folder: Path,
    watch: Watch,
    layers: int,
) -> SourceWalk:
    """Build the model, and record how it calls its layers with this rank's batches.

    Args:
        dtype: of the model's computation.
        folder: for hidden states that fit no memory.
        layers: the number of layers that the batches will go through.
    Raises:
        InputError, EnvironmentLack: see `build_skeleton` and `Walk.lane`, or the config describes other layers.
    """
    watch.phase("record")
    trace, ranks = options.trace, options.ranks
    with ranks.step(), trace.span("build"):
        skeleton = build_skeleton(plan.source, plan.prefix, torch.device(options.device), dtype)
        if len(skeleton.layers) != len(plan.layers):
            raise InputError(
                f"config.json describes {len(skeleton.layers)} decoder layers, but the shards contain "
                f"{len(plan.layers)}",
                where=plan.model,
                hint="download the model again",
            )
    mine = ranks.split(make_batches(calibration.samples, options.batch_size))[ranks.rank]
    watch.expect_tokens(sum(batch.numel() for batch in mine) * layers)
    with ranks.step():
        budget = hidden_budget(plan, mine, options, folder)
        walk = Walk(skeleton, mine, trace.timed, watch.before_batch)
        return SourceWalk(walk, walk.lane(SOURCE, budget))
