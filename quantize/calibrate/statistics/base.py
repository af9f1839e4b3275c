"""The interface of a statistic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Observer(Protocol):
    """Observes the tensors that pass one site, batch by batch.

    A batch counts once it is committed. A batch that ran out of memory is discarded and observed again.

    Attributes:
        lanes: names of the lanes whose tensors it observes together.
    """

    @property
    def lanes(self) -> tuple[str, ...]:
        """See the class."""
        ...

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """Observe a tensor of a batch, which counts from `commit` on.

        Args:
            seen: the tensor by lane, one for each of `lanes`: that which came to the site, before any rounding there.
                It is not changed.
        """
        ...

    def commit(self) -> None:
        """Count the observations since the last `commit` or `discard`."""
        ...

    def discard(self) -> None:
        """Forget the observations since the last `commit`."""
        ...


class Statistic(Observer, Protocol):
    """Gathers numbers of what it observes, which several processes can merge. Only `state` waits for the device.

    Attributes:
        name: the statistic's name, by which quantizers require it.
    """

    name: ClassVar[str]

    def state(self) -> dict[str, Tensor]:
        """The committed data, on the CPU: all that another process requires to merge it. The names and dtypes are the
        same in every process. Sizes may differ."""
        ...

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """The statistic that had observed everything that those of `states` observed, in their order.

        Args:
            states: one a process, in the order of the samples. Some may be without observations.
        """
        ...
