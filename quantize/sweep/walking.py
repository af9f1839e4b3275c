"""A walk of the source that measures the fused groups of some layers, each quantized alone.

A lane of a group of layer k leaves the source's lane in front of layer k, goes through that layer with the group
quantized, and then through the source's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibrate.lanes import Lane, LayerPass
from ..calibrate.statistics.ranges import InputStatistics
from ..calibrate.walk import Walk
from ..checkpoint.config_values import config_int
from ..convert.budget import hidden_budget
from ..convert.folding import Folding
from ..convert.matrices import naming_damage
from ..convert.options import ConvertOptions
from ..convert.ranks import Ranks
from ..convert.walking import SOURCE, CalibrationWalk, begin_reading, columns_of_groups, source_skeleton
from ..plan.plan import Plan
from ..quantizers.base import Quantizer
from ..recipe.roles import text_config
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..stream.hidden import HiddenBudget
from ..stream.memory import give_back_free_memory
from ..stream.reading import LayerReader, LoadedLayer
from ..stream.trace import Trace
from ..verify.threads import Progress
from .candidates import Candidate, in_one_scheme
from .divergence import mean_divergences
from .emulated import ServedLayer

_DECODED_LAYERS = 4  # at once: both ends, a group alone, and the copy in use
Alone = tuple[str, str]  # a group's name and its scheme


@dataclass(frozen=True)
class Subject:
    """The subject of a sweep.

    Attributes:
        plan: of the recipe, with the source in the order of channels that a conversion chooses.
        candidates: the groups, in the order of the layers.
        quantizer: `rtn` or `mse`.
        batches: int64 [1, tokens] each.
        dtype: of the computation.
        options: the device, the memory budget, and whether folds are made.
        folder: for hidden states that fit no memory.
    """

    plan: Plan
    candidates: Sequence[Candidate]
    quantizer: Quantizer
    batches: Sequence[Tensor]
    dtype: torch.dtype
    options: ConvertOptions
    folder: Path

    @property
    def ends(self) -> int:
        """The number of lanes in which all groups are quantized."""
        return max(len(candidate.schemes) for candidate in self.candidates)

    @property
    def tokens(self) -> int:
        """Of all batches."""
        return sum(batch.numel() for batch in self.batches)

    def in_layer(self, layer: int) -> list[Candidate]:
        """The groups of a layer."""
        return [candidate for candidate in self.candidates if candidate.layer == layer]

    def most_lanes(self) -> int:
        """The number of lanes whose hidden states the memory holds."""
        budget = hidden_budget(self.plan, self.batches, self.options, self.folder, 1)
        tensors = self.plan.tensors_by_layer().values()
        layer = max(sum(self.plan.source.info(name).nbytes for name in names) for names in tensors)
        decoded = _DECODED_LAYERS * layer * self.dtype.itemsize // 2
        hidden = config_int(text_config(self.plan.source.config), "hidden_size")
        free = budget.device_bytes + budget.host_bytes - decoded
        return max(0, free // (self.tokens * hidden * self.dtype.itemsize))

    def window(self, layers: Sequence[int], has_ends: bool) -> list[int]:
        """The first of some layers, as many as one walk measures within the memory, and at least one.

        Args:
            has_ends: whether the walk also has the lanes in which all groups are quantized.
        """
        room = self.most_lanes() - 1 - (self.ends if has_ends else 0)
        window: list[int] = []
        for layer in layers:
            room -= sum(len(candidate.schemes) for candidate in self.in_layer(layer))
            if window and room < 0:
                break
            window.append(layer)
        return window


@dataclass(frozen=True)
class Measured:
    """The mean KL divergences of a walk in nats.

    Attributes:
        alone: with one group quantized.
        ends: with all groups in their first scheme, then in their second one. Empty where it was not requested.
    """

    alone: Mapping[Alone, float]
    ends: Sequence[float]


class Window:
    """One walk of the source.

    Args:
        layers: whose groups are measured.
        has_ends: whether to measure all groups together too.
        progress: called with (layers done, layers, words), then with rows of the vocabulary.
    """

    def __init__(self, subject: Subject, layers: Sequence[int], has_ends: bool, progress: Progress) -> None:
        self._subject, self._layers, self._progress = subject, frozenset(layers), progress
        ends = range(subject.ends if has_ends else 0)
        alone = sum(len(candidate.schemes) for layer in layers for candidate in subject.in_layer(layer))
        self._budget = _shared(subject, 1 + len(ends) + alone)
        self._plans = [in_one_scheme(subject.plan, at) for at in range(subject.ends)]
        plan = subject.plan
        self._walk = Walk(
            source_skeleton(plan, torch.device(subject.options.device), subject.dtype), subject.batches, keeps_last=True
        )
        self._by_layer = begin_reading(plan)
        self._source = self._walk.lane(SOURCE, self._budget)
        self._ends = [self._walk.lane(f"all groups, form {at}", self._budget) for at in ends]
        self._alone: dict[Alone, Lane] = {}
        self._calibration = CalibrationWalk(self._walk, columns_of_groups(plan), subject.tokens, self._source)
        self._folding = Folding(plan, Ranks(), Trace()) if subject.options.fold else None

    def run(self) -> Measured:
        """Measure.

        Raises:
            NvquantError: a damaged weight, a shard that changed, or not enough memory.
        """
        plan, device = self._subject.plan, self._walk.skeleton.device
        words = f"measuring the groups of layers {min(self._layers)} to {max(self._layers)}, layer"
        try:
            with LayerReader(plan.source, self._by_layer, plan.layers, device, lambda _layer: False, Trace()) as reader:
                for loaded in reader:
                    self._progress(plan.layer_places[loaded.layer], len(plan.layers), words)
                    self._layer(loaded)
                    loaded.release()
                    if device.type == "cpu":
                        give_back_free_memory()
            return self._result()
        finally:
            self._walk.close()

    def _result(self) -> Measured:
        named = {f"{group} alone in {scheme}": lane for (group, scheme), lane in self._alone.items()}
        ends = {lane.name: lane for lane in self._ends}
        subject = self._subject
        means = mean_divergences(self._walk.skeleton, subject.batches, self._source, {**named, **ends}, self._progress)
        alone = {key: means[name] for key, name in zip(self._alone, named, strict=True)}
        return Measured(alone, [means[name] for name in ends])

    def _layer(self, loaded: LoadedLayer) -> None:
        layer, walk = loaded.layer, self._walk
        candidates = self._subject.in_layer(layer)
        own = candidates if layer in self._layers else []
        passing = list(self._alone.values())
        leaving: dict[Alone, Lane] = {
            (candidate.group.name, scheme): walk.branch(f"{scheme} {candidate.group.name}", self._source, self._budget)
            for candidate in own
            for scheme in candidate.schemes
        }
        seen, reshaping = self._observe(loaded, candidates if own or self._ends else [])
        for lane in passing:
            walk.forward(layer, [LayerPass(lane, loaded.tensors)])
        for candidate in own:
            for at, scheme in enumerate(candidate.schemes):
                lane = leaving[candidate.group.name, scheme]
                self._forward(loaded, lane, [candidate], at, seen, reshaping)
        for at, lane in enumerate(self._ends):
            self._forward(loaded, lane, candidates, at, seen, reshaping)
        self._alone.update(leaving)

    def _forward(
        self,
        loaded: LoadedLayer,
        lane: Lane,
        candidates: Sequence[Candidate],
        at: int,
        seen: Mapping[str, InputStatistics],
        reshaping: Reshaping,
    ) -> None:
        """Send a lane through a layer with some groups quantized to their scheme number `at`."""
        served = ServedLayer(self._plans[at], self._calibration, loaded, reshaping)
        for candidate in candidates:
            served.put(candidate.group, seen[candidate.group.name], self._subject.quantizer)
        self._walk.forward(loaded.layer, [served.on(lane)], served.tap)

    def _observe(
        self, loaded: LoadedLayer, candidates: Sequence[Candidate]
    ) -> tuple[dict[str, InputStatistics], Reshaping]:
        """The folds of a layer, and the inputs of its groups after them. The source's lane advances."""
        subject, walk = self._subject, self._calibration
        groups = [candidate.group for candidate in candidates]
        if not groups:
            walk.advance(loaded.layer, loaded.tensors)
            return {}, UNCHANGED
        reshaping = UNCHANGED if self._folding is None else self._folding.fold(groups, loaded, walk).reshaping
        wants = "mean_square" in subject.quantizer.needs
        found = walk.observe(loaded.layer, loaded.tensors, groups, wants, reshaping=reshaping)
        with naming_damage(subject.plan, loaded.layer, loaded.tensors):
            return {name: ranges.result(name) for name, ranges in found.inputs.items()}, reshaping


def _shared(subject: Subject, lanes: int) -> HiddenBudget:
    """The budget of each of so many lanes."""
    return hidden_budget(subject.plan, subject.batches, subject.options, subject.folder, lanes)
