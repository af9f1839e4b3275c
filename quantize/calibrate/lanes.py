"""Lanes: the same batches on their way through the model, each lane with weights and hidden states of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..stream.hidden import HiddenStates
from .record import LayerCall, Table, handed_in, with_handed
from .skeleton import Skeleton
from .statistics.base import Observer
from .taps import Handle

Watch = Callable[[int, Tensor, Tensor, LayerCall], None]
"""Called after each batch of a layer, with its number, the hidden state before and after, and the call."""


@dataclass(frozen=True)
class Lane:
    """All batches in front of a layer.

    Attributes:
        name: one in a walk. Statistics know the lane by it.
        skeleton: of the model that records and computes.
        hidden: the hidden states, in the order of the batches.
        calls: each batch's calls, one for each layer. Stores of shared keys and values in them are the lane's own.
        outputs: what layers returned after the hidden state, by batch and layer, while a later layer takes it.
    """

    name: str
    skeleton: Skeleton
    hidden: HiddenStates
    calls: list[list[LayerCall]]
    outputs: dict[int, dict[int, Sequence[Any]]] = field(default_factory=dict)

    def call(self, at: int, layer: int) -> LayerCall:
        """The call of a layer for a batch, with the outputs of earlier layers that it takes."""
        return with_handed(self.calls[at][layer], self.outputs.get(at, {}))

    def keep_outputs(self, at: int, layer: int, more: Sequence[Any]) -> None:
        """Keep what a layer returned after the hidden state, and drop what no later layer takes."""
        taken = {handed.layer for call in self.calls[at][layer + 1 :] for handed in handed_in(call)}
        kept = {**self.outputs.get(at, {}), layer: more}
        self.outputs[at] = {number: value for number, value in kept.items() if number in taken}

    def empty_stores(self, at: int, layer: int) -> None:
        """Drop the keys and values that a layer shared in a batch, which no later layer reads."""
        call = self.calls[at][layer]
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, Table):
                value.reset()
            elif isinstance(value, MutableMapping):
                value.clear()


@dataclass(frozen=True)
class LayerPass:
    """A lane's way through one layer.

    Attributes:
        tensors: the layer's tensors in this lane, by their names in the checkpoint, on the device.
        rounds: receives the tensors at the sites of the walk's tap, after the statistics. See `Handle`.
        watch: see `Watch`.
        advances: whether the lane goes on to the next layer. Otherwise its hidden states stay as they are.
    """

    lane: Lane
    tensors: Mapping[str, Tensor]
    rounds: Handle | None = None
    watch: Watch | None = None
    advances: bool = True


class Observing:
    """Statistics of the tensors that pass a layer's sites, one batch at a time.

    A statistic of several lanes observes the n-th tensor of each lane at a site together. The tensors wait until the
    last of these lanes has passed.

    Args:
        statistics: by site.
    """

    def __init__(self, statistics: Mapping[str, Sequence[Observer]]) -> None:
        self._statistics = statistics
        self._lanes = {site: {lane for one in some for lane in one.lanes} for site, some in statistics.items()}
        self._waiting: dict[str, dict[int, dict[str, Tensor]]] = {}
        self._numbers: dict[tuple[str, str], int] = {}

    def sites(self, lane: str) -> set[str]:
        """The sites at which a statistic observes this lane."""
        return {site for site, lanes in self._lanes.items() if lane in lanes}

    def handle(self, lane: str, rounds: Handle | None) -> Handle:
        """A handle that observes this lane, and then rounds."""
        sites = self.sites(lane)

        def take(site: str, tensor: Tensor) -> Tensor | None:
            if site in sites:
                self._see(site, lane, tensor)
            return None if rounds is None else rounds(site, tensor)

        return take

    def _see(self, site: str, lane: str, tensor: Tensor) -> None:
        number = self._numbers[site, lane] = self._numbers.get((site, lane), -1) + 1
        seen = self._waiting.setdefault(site, {}).setdefault(number, {})
        seen[lane] = tensor
        for statistic in self._statistics[site]:
            if lane in statistic.lanes and seen.keys() >= set(statistic.lanes):
                statistic.observe({name: seen[name] for name in statistic.lanes})
        if seen.keys() == self._lanes[site]:
            del self._waiting[site][number]

    def commit(self) -> None:
        """Count the batch."""
        self._end(lambda statistic: statistic.commit())

    def discard(self) -> None:
        """Forget the batch."""
        self._end(lambda statistic: statistic.discard())

    def _end(self, end: Callable[[Observer], None]) -> None:
        self._waiting.clear()
        self._numbers.clear()
        for statistics in self._statistics.values():
            for statistic in statistics:
                end(statistic)
