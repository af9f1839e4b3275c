"""The calibration on its way through the layers of a conversion: the source and, where the quantizer needs it, the
quantized path beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibrate.lanes import Lane, LayerPass
from ..calibrate.quantized import QuantizedLayer
from ..calibrate.samples import CalibrationSet
from ..calibrate.skeleton import build_skeleton
from ..calibrate.statistics.base import Statistic
from ..calibrate.statistics.key_value import KeyValueAmax
from ..calibrate.statistics.moments import SecondMoments
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

SOURCE, QUANTIZED = "source", "quantized"


@dataclass(frozen=True)
class Observed:
    """The statistics of a layer in the source.

    Attributes:
        inputs: of fused groups, by their names.
        cached: of keys and values, by site.
        order: names of the groups in the order in which the layer reaches them. Empty without batches.
    """

    inputs: Mapping[str, InputRanges]
    cached: Mapping[str, KeyValueAmax]
    order: Sequence[str]


class CalibrationWalk:
    """This rank's batches in front of a layer. Layers are walked in order.

    Attributes:
        prefix: the text before a layer's number in the names of tensors.
        dtype: of the computation.

    Args:
        walk: with these lanes.
        quantized: None where the source alone is walked.
    """

    def __init__(self, walk: Walk, source: Lane, quantized: Lane | None) -> None:
        self._walk, self._source, self._quantized = walk, source, quantized
        self.prefix, self.dtype = walk.skeleton.layer_prefix, walk.skeleton.dtype

    @property
    def has_quantized(self) -> bool:
        """Whether it walks the quantized path too."""
        return self._quantized is not None

    @property
    def hidden(self) -> dict[str, HiddenStates]:
        """The hidden states of each lane, by name."""
        lanes = [self._source] if self._quantized is None else [self._source, self._quantized]
        return {lane.name: lane.hidden for lane in lanes}

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
        """Send every batch of the source through a layer. Without a quantized path, the walk advances.

        Args:
            tensors: the layer's tensors by their names in the checkpoint, on the device.
            groups: fused groups of the layer, whose inputs are observed.
            cached: sites of a `KeyValueTap` that are observed, with the names in the checkpoint.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        prefix = self._prefix_of(layer)
        inputs = LinearTap.of_groups(groups, prefix)
        order: dict[str, None] = {}
        seen = Observed(
            {group.name: InputRanges(wants_mean_square, SOURCE) for group in groups},
            {site: KeyValueAmax(SOURCE) for site in cached},
            [],
        )
        statistics: dict[str, list[Statistic]] = {name: [statistic] for name, statistic in seen.inputs.items()}
        statistics |= {site: [statistic] for site, statistic in seen.cached.items()}
        tap = Taps(inputs, KeyValueTap(prefix)) if cached else inputs

        def note(site: str, _tensor: Tensor) -> None:
            order.setdefault(site)

        self._walk.forward(
            layer, [LayerPass(self._source, tensors, note)], tap, statistics, advance=self._quantized is None
        )
        return Observed(seen.inputs, seen.cached, [name for name in order if name in seen.inputs])

    def observe_moments(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        quantized: QuantizedLayer,
        group: FusedGroup,
        moments: SecondMoments,
    ) -> None:
        """Send every batch of both lanes through a layer up to a fused group. The walk stays in front of the layer.

        Args:
            tensors: of the source.
            quantized: with the groups before this one quantized.
        """
        site = LinearTap.of_groups([group], self._prefix_of(layer))
        passes = [LayerPass(self._lane(name), values, rounds) for name, values, rounds in (
            (SOURCE, tensors, None), (QUANTIZED, quantized.tensors, quantized.round_inputs)
        ) if name in moments.lanes]  # fmt: skip
        self._walk.forward(layer, passes, Taps(site, quantized.tap), {group.name: [moments]}, advance=False)

    def advance(self, layer: int, tensors: Mapping[str, Tensor], quantized: QuantizedLayer | None = None) -> None:
        """Send every batch of all lanes through a layer.

        Args:
            quantized: complete. None where the source alone is walked.
        """
        passes = [LayerPass(self._source, tensors)]
        if quantized is None:
            self._walk.forward(layer, passes)
            return
        # The source's own inputs pass the tap unchanged.
        passes.append(LayerPass(self._lane(QUANTIZED), quantized.tensors, quantized.round_inputs))
        self._walk.forward(layer, passes, quantized.tap)

    def quantized_layer(self, plan: Plan, layer: int, tensors: Mapping[str, Tensor]) -> QuantizedLayer:
        """A layer of the quantized path, of which nothing is quantized yet."""
        return QuantizedLayer(tensors, self._prefix_of(layer), plan.layout, self.dtype)

    def close(self) -> None:
        """Drop the hidden states."""
        self._walk.close()

    def _lane(self, name: str) -> Lane:
        lane = self._source if name == SOURCE else self._quantized
        assert lane is not None
        return lane

    def _prefix_of(self, layer: int) -> str:
        return f"{self.prefix}.{layer}."


def open_walk(
    plan: Plan,
    calibration: CalibrationSet,
    options: ConvertOptions,
    dtype: torch.dtype,
    folder: Path,
    watch: Watch,
    layers: int,
) -> CalibrationWalk:
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
    watch.expect_tokens(sum(batch.numel() for batch in mine) * layers * _passes(plan))
    names = (SOURCE, QUANTIZED) if plan.has_two_lanes else (SOURCE,)
    with ranks.step():
        budget = hidden_budget(plan, mine, options, folder, len(names))
        walk = Walk(skeleton, mine, trace.timed, watch.before_batch)
        lanes = [walk.lane(name, budget) for name in names]
        return CalibrationWalk(walk, lanes[0], lanes[1] if plan.has_two_lanes else None)


def _passes(plan: Plan) -> int:
    """About how often each lane's batches go through a layer, all lanes together."""
    if not plan.has_two_lanes:
        return 1
    sites = sum(group.name.startswith(f"{plan.prefix}.") for group in plan.groups)
    return 3 + 2 * -(-sites // len(plan.layers))  # observed once, then both lanes up to each site, then both behind it
