"""The amax of keys or values, from which the scales of an FP8 KV cache follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...errors import CheckFailed

if TYPE_CHECKING:
    from typing_extensions import Self


class KeyValueAmax:
    """The statistic `key_value_amax`: of one site of a `KeyValueTap`, keys or values, in one lane.

    No method waits for the device before `state` or `result`. A maximum is exact in any order.

    Args:
        lane: the name of the lane.
    """

    name: ClassVar[str] = "key_value_amax"

    def __init__(self, lane: str = "source") -> None:
        self.lanes = (lane,)
        self._batch: list[Tensor] = []
        self._amax: Tensor | None = None  # float32 scalar, on the device

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """Observe the keys or values of a batch, which count from `commit` on.

        Args:
            seen: the tensor by lane, any shape, float dtype and device. It has no padding, and is not changed.
        """
        self._batch.append(seen[self.lanes[0]].detach().abs().amax().float())

    def commit(self) -> None:
        """Count the observations since the last `commit` or `discard`."""
        for amax in self._batch:
            self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        self.discard()

    def discard(self) -> None:
        """Forget the observations since the last `commit`."""
        self._batch = []

    def state(self) -> dict[str, Tensor]:
        """`amax`: float32 [1] on the CPU, or [0] where nothing was observed."""
        return {"amax": torch.empty(0) if self._amax is None else self._amax.reshape(1).cpu()}

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """See `Statistic.merged`."""
        made = cls()
        found = [state["amax"] for state in states if len(state["amax"])]
        made._amax = torch.cat(found).amax() if found else None
        return made

    def result(self, name: str) -> float:
        """The amax of everything committed, a float32 value.

        Args:
            name: of the site, for errors.
        Raises:
            CheckFailed: nothing was committed, or a value is not finite.
        """
        if self._amax is None:
            raise CheckFailed(f"calibration never reached {name}: the model does not use transformers' attention.")
        amax = float(self._amax)
        if not math.isfinite(amax):
            raise CheckFailed(f"calibration found a NaN or an infinity in {name}", hint="check the model")
        return amax
