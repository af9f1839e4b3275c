"""The calibration on its way through the layers of a conversion: the source and, where the quantizer needs it, the
quantized path beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibrate.lanes import Lane, LayerPass
from ..calibrate.quantized import QuantizedLayer
from ..calibrate.samples import CalibrationSet
from ..calibrate.skeleton import Skeleton, build_skeleton
from ..calibrate.statistics.base import Observer
from ..calibrate.statistics.key_value import KeyValueAmax
from ..calibrate.statistics.moments import SecondMoments
from ..calibrate.statistics.ranges import InputRanges
from ..calibrate.taps import KeyValueTap, LinearTap, Tap, Taps
from ..calibrate.walk import Walk, make_batches
from ..checkpoint.shard_bytes import ReadingOrder
from ..errors import InputError
from ..plan.plan import Plan
from ..recipe.groups import FusedGroup
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..reshape.trial import LayerTrial
from ..stream.hidden import HiddenBudget, HiddenStates
from .budget import hidden_budget
from .kept import BesideKept, Filling, KeptInputs, bytes_of, may_keep, room_beside
from .matrices import groups_of_layer
from .options import ConvertOptions
from .unclaimed import refuse_unclaimed
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
        columns: of the input of each fused group, by its name.
        tokens: of all batches.
        quantized: None where the source alone is walked.
    """

    def __init__(
        self, walk: Walk, columns: Mapping[str, int], tokens: int, source: Lane, quantized: Lane | None = None
    ) -> None:
        self._walk, self._source, self._quantized = walk, source, quantized
        self._columns, self._tokens = columns, tokens
        self._kept: KeptInputs | None = None
        self._source_is_ahead = False  # already behind the layer that the walk is in front of
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

    def passes(self, groups: Sequence[FusedGroup], folds: bool) -> int:
        """About how often batches go through a layer, all lanes together.

        Args:
            groups: of the layer.
            folds: whether inputs are observed for folds first.
        """
        is_kept = self._has_room(groups)
        if self._quantized is None:
            return 2 if folds and not is_kept else 1
        if is_kept:  # the source once, then the quantized path up to each site, and behind the layer
            return 2 + len(groups)
        # The source is observed once or twice. Both lanes go up to each site. The quantized path goes behind the layer.
        return 2 + 2 * len(groups) + folds

    def observe(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        groups: Sequence[FusedGroup],
        wants_mean_square: bool,
        cached: Sequence[str] = (),
        reshaping: Reshaping = UNCHANGED,
    ) -> Observed:
        """Send every batch of the source through a layer. Without a quantized path, the walk advances.

        Args:
            tensors: the layer's tensors by their names in the checkpoint, on the device.
            groups: fused groups of the layer, whose inputs are observed.
            cached: sites of a `KeyValueTap` that are observed, with the names in the checkpoint.
            reshaping: the inputs are observed after these folds.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        device = self._walk.skeleton.device
        ranges = {
            group.name: InputRanges(wants_mean_square, SOURCE, _scaling(reshaping.input_factor(group.name), device))
            for group in groups
        }
        amaxes = {site: KeyValueAmax(SOURCE) for site in cached}
        order = self._observe_source(layer, tensors, groups, ranges, amaxes, advance=self._quantized is None)
        return Observed(ranges, amaxes, [name for name in order if name in ranges])

    def observe_sizes(
        self, layer: int, tensors: Mapping[str, Tensor], groups: Sequence[FusedGroup]
    ) -> dict[str, InputRanges]:
        """Send every batch of the source through a layer, and observe the inputs of fused groups without the first
        token of each sequence, whose values have other sizes in most models. The walk stays in front of the layer."""
        sizes = {group.name: InputRanges(True, SOURCE, _without_first) for group in groups}
        self._observe_source(layer, tensors, groups, sizes, {}, advance=False)
        return sizes

    def _observe_source(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        groups: Sequence[FusedGroup],
        inputs: Mapping[str, Observer],
        amaxes: Mapping[str, Observer],
        advance: bool,
    ) -> list[str]:
        """Let statistics observe the source in a layer, from kept inputs if there are any. Returns the sites of inputs
        in the order in which the layer reaches them."""
        kept = self._kept_of(layer)
        if kept is not None and not amaxes and all(name in kept for name in inputs):
            for name, statistic in inputs.items():
                kept.feed(name, [statistic])
            if advance:
                kept.advance()
            return list(kept.order)
        if kept is None and not advance:
            kept = self._kept = self._room_to_keep(layer, groups)
            filling = {} if kept is None else {group.name: Filling(kept, group.name, SOURCE) for group in groups}
        else:
            filling = {}
        order: dict[str, None] = {}
        every: list[Mapping[str, Observer]] = [inputs, amaxes, filling]
        statistics = {site: [one[site] for one in every if site in one] for one in every for site in one}
        prefix = self._prefix_of(layer)
        taps: list[Tap] = [LinearTap.of_groups(groups, prefix)]
        taps += [KeyValueTap(prefix)] if amaxes else []
        watch = kept.keep_output if kept is not None and filling else None
        one_pass = LayerPass(self._source, tensors, lambda site, _inputs: order.setdefault(site), watch, advance)
        self._walk.forward(layer, [one_pass], Taps(*taps), statistics)
        return list(order)

    def _kept_of(self, layer: int) -> KeptInputs | None:
        return self._kept if self._kept is not None and self._kept.layer == layer else None

    def _room_to_keep(self, layer: int, groups: Sequence[FusedGroup]) -> KeptInputs | None:
        """An empty store for the inputs of some groups, if there is memory for them."""
        self._kept = None
        return KeptInputs(layer, self._source, self._sizes(groups), self._room()) if self._has_room(groups) else None

    def _has_room(self, groups: Sequence[FusedGroup]) -> bool:
        outputs = sum(self._source.hidden.sizes())
        return bool(groups) and not self._walk.hands_outputs_on and may_keep(self._sizes(groups), outputs, self._room())

    def _room(self) -> HiddenBudget:
        return room_beside([lane for lane in (self._source, self._quantized) if lane is not None])

    def _sizes(self, groups: Sequence[FusedGroup]) -> dict[str, int]:
        return {group.name: bytes_of(self._columns[group.name], self._tokens, self.dtype) for group in groups}

    @property
    def has_batches(self) -> bool:
        """Whether this rank has a batch."""
        return bool(self._source.calls)

    def trial(self, layer: int, tensors: Mapping[str, Tensor]) -> LayerTrial:
        """The first batch in front of a layer, for folds."""
        return LayerTrial(self._source, layer, tensors)

    def observe_moments(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        quantized: QuantizedLayer,
        group: FusedGroup,
        moments: SecondMoments,
        is_last: bool = False,
    ) -> None:
        """Send every batch of both lanes through a layer up to a fused group. The walk stays in front of the layer.

        Args:
            tensors: of the source.
            quantized: with the groups before this one quantized.
            is_last: whether nothing else of the source will be observed in this layer. Then the source goes through the
                whole layer at once, and `advance` sends the quantized path after it.
        """
        site = LinearTap.of_groups([group], self._prefix_of(layer))
        passes = [LayerPass(self._lane(QUANTIZED), quantized.tensors, quantized.round_inputs, advances=False)]
        observer: Observer = moments
        kept = self._kept_of(layer)
        if SOURCE in moments.lanes and kept is not None and group.name in kept:
            observer = BesideKept(moments, kept, group.name, SOURCE, QUANTIZED)
        elif SOURCE in moments.lanes:
            passes.insert(0, LayerPass(self._source, tensors, advances=is_last))
            self._source_is_ahead = is_last
        self._walk.forward(layer, passes, Taps(site, quantized.tap), {group.name: [observer]})

    def advance(self, layer: int, tensors: Mapping[str, Tensor], quantized: QuantizedLayer | None = None) -> None:
        """Send every batch of all lanes through a layer, unless the lane is already behind it.

        Args:
            quantized: complete. None where the source alone is walked.
        """
        kept, self._kept = self._kept_of(layer), None
        if kept is not None:
            kept.advance()
        passes = [] if kept is not None or self._source_is_ahead else [LayerPass(self._source, tensors)]
        self._source_is_ahead = False
        if quantized is None:
            self._walk.forward(layer, passes)
            return
        # The source's own inputs pass the tap unchanged.
        passes.append(LayerPass(self._lane(QUANTIZED), quantized.tensors, quantized.round_inputs))
        self._walk.forward(layer, passes, quantized.tap)

    def quantized_layer(
        self, plan: Plan, layer: int, tensors: Mapping[str, Tensor], reshaping: Reshaping = UNCHANGED
    ) -> QuantizedLayer:
        """A layer of the quantized path, of which nothing is quantized yet.

        Args:
            reshaping: its norms are those after these folds.
        """
        return QuantizedLayer(reshaping.tensors(tensors), self._prefix_of(layer), plan.layout, self.dtype)

    def close(self) -> None:
        """Drop the hidden states."""
        self._walk.close()

    def _lane(self, name: str) -> Lane:
        lane = self._source if name == SOURCE else self._quantized
        assert lane is not None
        return lane

    def _prefix_of(self, layer: int) -> str:
        return f"{self.prefix}.{layer}."


def _without_first(inputs: Tensor) -> Tensor:
    return inputs[:, 1:] if inputs.ndim == 3 and inputs.shape[1] > 1 else inputs


def _scaling(factor: Tensor | None, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """Multiplies inputs on a device by a factor of each channel, in float32."""
    if factor is None:
        return None
    own = factor.to(device)
    return lambda inputs: inputs.float() * own


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
        InputError, EnvironmentLack: see `source_skeleton` and `Walk.lane`.
    """
    watch.phase("record")
    trace, ranks = options.trace, options.ranks
    with ranks.step(), trace.span("build"):
        skeleton = source_skeleton(plan, torch.device(options.device), dtype)
    mine = ranks.split(make_batches(calibration.samples, options.batch_size))[ranks.rank]
    names = (SOURCE, QUANTIZED) if plan.has_two_lanes else (SOURCE,)
    with ranks.step():
        budget = hidden_budget(plan, mine, options, folder, len(names))
        walk = Walk(skeleton, mine, trace.timed, watch.before_batch)
        lanes = [walk.lane(name, budget) for name in names]
        tokens = sum(batch.numel() for batch in mine)
        made = CalibrationWalk(walk, columns_of_groups(plan), tokens, *lanes)
    first = groups_of_layer(plan.groups, plan.prefix, plan.layers[0])
    watch.expect_tokens(tokens * layers * made.passes(first, options.fold))
    return made


def columns_of_groups(plan: Plan) -> dict[str, int]:
    """The columns of the input of each fused group, by its name."""
    return {group.name: plan.matrices[group.members[0]].cols for group in plan.groups}


def begin_reading(plan: Plan) -> dict[int, list[str]]:
    """Let the source be read in the order of a walk that writes nothing. Returns the tensors of each layer."""
    by_layer = plan.tensors_by_layer()
    outer = [name for name in plan.source.files if plan.layer_of(name) is None]
    plan.source.begin(ReadingOrder(list(by_layer.values()), outer, frozenset(outer)))
    return by_layer


def source_skeleton(plan: Plan, device: torch.device, dtype: torch.dtype) -> Skeleton:
    """The skeleton of a plan's source.

    Args:
        dtype: of the computation.
    Raises:
        InputError, EnvironmentLack: see `build_skeleton` and `refuse_unclaimed`, or the config describes other layers.
    """
    skeleton = build_skeleton(plan.source, plan.prefix, device, dtype)
    if len(skeleton.layers) != len(plan.layers):
        raise InputError(
            f"config.json describes {len(skeleton.layers)} decoder layers, but the shards contain {len(plan.layers)}",
            where=plan.model,
            hint="download the model again",
        )
    refuse_unclaimed(plan, skeleton)
    return skeleton
