"""Inputs of a layer in the source, kept in memory, so that the layer runs once for all statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..calibrate.lanes import Lane
from ..calibrate.record import LayerCall
from ..calibrate.statistics.base import Observer
from ..stream.hidden import HiddenBudget, HiddenStates

SHARE = 0.9  # of the memory that hidden states leave


class KeptInputs:
    """All inputs of some sites of a layer, and the layer's outputs, in one lane.

    Attributes:
        layer: its number.
        order: the sites in the order in which the layer reached them.
    Args:
        sizes: bytes of all inputs, by site.
        budget: of all of them, large enough for `may_keep`.
    """

    def __init__(self, layer: int, lane: Lane, sizes: Mapping[str, int], budget: HiddenBudget) -> None:
        self.layer, self.order = layer, dict[str, None]()
        self._lane = lane
        self._stores: dict[str, HiddenStates] = {}
        self._numbers: dict[str, list[list[int]]] = {name: [] for name in sizes}
        self._outputs: list[Tensor] = []
        device_left = budget.device_bytes
        for name, size in sizes.items():
            is_on_device = size <= device_left or lane.hidden.device.type == "cpu"
            device_left -= size if is_on_device else 0
            own = HiddenBudget(size, 0, budget.folder) if is_on_device else HiddenBudget(0, size, budget.folder)
            self._stores[name] = HiddenStates(lane.hidden.device, own)

    def __contains__(self, site: str) -> bool:
        return site in self._stores

    def keep_output(self, _at: int, _before: Tensor, after: Tensor, _call: LayerCall) -> None:
        """A `Watch` that keeps the output of a batch, in the order of the batches."""
        self._outputs.append(after)

    def advance(self) -> None:
        """Send the lane to the next layer by the kept outputs. Without outputs, it is behind the last layer."""
        for at, output in enumerate(self._outputs):
            self._lane.hidden.store(at, output)
        self._outputs.clear()

    def add(self, site: str, inputs: Sequence[Tensor]) -> None:
        """Keep the inputs of the next batch."""
        store, numbers = self._stores[site], self._numbers[site]
        numbers.append(list(range(len(store), len(store) + len(inputs))))
        for tensor in inputs:
            store.append(tensor.clone())  # a module may change its input after this site

    def batch(self, site: str, at: int) -> list[Tensor]:
        """The inputs of a batch, on the device."""
        return [self._stores[site].fetch(number) for number in self._numbers[site][at]]

    def feed(self, site: str, statistics: Sequence[Observer]) -> None:
        """Let statistics of the lane observe all batches."""
        for at in range(len(self._numbers[site])):
            for tensor in self.batch(site, at):
                for statistic in statistics:
                    statistic.observe({self._lane.name: tensor})
            for statistic in statistics:
                statistic.commit()


class Filling:
    """An observer that only keeps what it observes."""

    def __init__(self, kept: KeptInputs, site: str, lane: str) -> None:
        self.lanes = (lane,)
        self._kept, self._site = kept, site
        self._batch: list[Tensor] = []

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """See `Observer.observe`."""
        self._kept.order.setdefault(self._site)
        self._batch.append(seen[self.lanes[0]])

    def commit(self) -> None:
        """See `Observer.commit`."""
        self._kept.add(self._site, self._batch)
        self._batch = []

    def discard(self) -> None:
        """See `Observer.discard`."""
        self._batch = []


class BesideKept:
    """Lets an observer of two lanes observe one of them, and takes the other's inputs from those that are kept.

    Args:
        statistic: of both lanes.
        kept: of the lane `kept_lane`, with the same batches.
    """

    def __init__(self, statistic: Observer, kept: KeptInputs, site: str, kept_lane: str, lane: str) -> None:
        self.lanes = (lane,)
        self._statistic, self._kept, self._site, self._kept_lane = statistic, kept, site, kept_lane
        self._at = 0
        self._batch: list[Tensor] | None = None

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """See `Observer.observe`."""
        if self._batch is None:
            self._batch = self._kept.batch(self._site, self._at)
        self._statistic.observe({**seen, self._kept_lane: self._batch.pop(0)})

    def commit(self) -> None:
        """See `Observer.commit`."""
        self._statistic.commit()
        self._at, self._batch = self._at + 1, None

    def discard(self) -> None:
        """See `Observer.discard`."""
        self._statistic.discard()
        self._batch = None


def room_beside(lanes: Sequence[Lane]) -> HiddenBudget:
    """The memory that the hidden states of lanes leave of their budgets."""
    left = [lane.hidden.left for lane in lanes]
    device, host = (int(SHARE * sum(getattr(one, name) for one in left)) for name in ("device_bytes", "host_bytes"))
    return HiddenBudget(device, host, left[0].folder)


def may_keep(sizes: Mapping[str, int], outputs: int, room: HiddenBudget) -> bool:
    """Whether inputs fit beside the hidden states, each site's in one kind of memory.

    Args:
        sizes: bytes by site.
        outputs: bytes of the layer's outputs, on the device.
    """
    device, host = room.device_bytes - outputs, room.host_bytes
    for size in sizes.values():
        if size <= device:
            device -= size
        elif size <= host:
            host -= size
        else:
            return False
    return device >= 0


def bytes_of(columns: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the inputs of a site."""
    return columns * tokens * dtype.itemsize
