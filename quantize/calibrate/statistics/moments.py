"""Second moments of the input that a fused group shares: what GPTQ needs of the inputs.

The sum over the sequences is exact, so no result depends on the order or the grouping of sequences, or on the rank that
saw them. The products of one sequence are float32, and are added as integers of 64 bits. Columns are divided by a power
of two near their root mean square first, so that all sums are of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...errors import CheckFailed

if TYPE_CHECKING:
    from typing_extensions import Self

FRACTION_BITS = 28
# A sum of products of columns with a mean square near 1 is about the number of tokens.
_LARGEST_SUM = float(1 << 62)
_PANEL = 1024  # rows of the products at a time
_SMALLEST = 2.0**-12  # a column's divisor beside the largest one: rounding may reach a column that is nearly dead


@dataclass(frozen=True)
class Moments:
    """Means over the tokens.

    Attributes:
        gram: float32 [cols, cols], of x̂·x̂ᵀ. x̂ is the input in the quantized path, as the server rounds it.
        cross: float32 [cols, cols], of (x - x̃)·x̂ᵀ. x is the input in the source, x̃ the one in the quantized path before
            its rounding. Or W·cross, float32 [rows, cols], see `is_through_weight`. None where it was not gathered.
        is_through_weight: whether `cross` is W·cross.
    """

    gram: Tensor
    cross: Tensor | None
    is_through_weight: bool


class SecondMoments:
    """The statistic `moments`: of the input that a fused group shares, in the source and in the quantized path.

    Args:
        mean_square: float64 [cols], about that of each column's input, as calibration saw it in the source. It only
            sets the size of the sums, and is the same on all ranks.
        rounds: rounds an input as the server does. It returns float32.
        weight: float32 [rows, cols], the group's stacked weights. With it, `cross` is multiplied by them at once, which
            takes less memory where there are fewer rows than columns.
        wants_cross: whether to gather `cross`. Without it, only the quantized path is observed.
    """

    name: ClassVar[str] = "moments"

    def __init__(
        self,
        mean_square: Tensor,
        rounds: Callable[[Tensor], Tensor],
        weight: Tensor | None = None,
        wants_cross: bool = True,
    ) -> None:
        self.lanes = ("source", "quantized") if wants_cross else ("quantized",)
        self._rounds, self._weight = rounds, weight
        device = None if weight is None else weight.device
        self._unit = _power_of_two(mean_square.sqrt()).to(device)
        self._row_unit = self._unit
        if weight is not None:
            self._row_unit = _power_of_two((weight.double().square() @ mean_square.to(device)).sqrt())
        self._batch: list[tuple[Tensor, Tensor | None]] = []
        self._gram: Tensor | None = None  # int64, the upper triangle by panels, on the device
        self._cross: Tensor | None = None
        self._peak: Tensor | None = None  # the largest product of a sequence
        self._tokens = self._sequences = 0

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """Observe an input of a batch, which counts from `commit` on.

        Args:
            seen: the input by lane: [sequences, tokens, cols] or [tokens, cols]. It has no padding, and is not changed.
        """
        quantized, source = seen["quantized"], seen.get("source")
        if self._gram is None:
            self._begin(quantized.device)
        self._batch.append((quantized, source if "source" in self.lanes else None))

    def _begin(self, device: torch.device) -> None:
        cols = len(self._unit)
        self._unit, self._row_unit = self._unit.to(device), self._row_unit.to(device)
        self._gram = torch.zeros((cols, cols), dtype=torch.int64, device=device)
        if "source" in self.lanes:
            self._cross = torch.zeros((len(self._row_unit), cols), dtype=torch.int64, device=device)
        self._peak = torch.zeros((), device=device)

    def commit(self) -> None:
        """Count the observations since the last `commit` or `discard`."""
        for quantized, source in self._batch:
            shaped = quantized if quantized.ndim == 3 else quantized.reshape(1, -1, quantized.shape[-1])
            others = [None] * len(shaped) if source is None else list(source.reshape(shaped.shape))
            for sequence, other in zip(shaped, others, strict=True):
                self._add(sequence, other)
        self.discard()

    def _add(self, quantized: Tensor, source: Tensor | None) -> None:
        """Add one sequence, [tokens, cols]."""
        assert self._gram is not None
        rounded = self._rounds(quantized).float() / self._unit  # a new tensor: an input may come back as it is
        self._add_products(rounded, rounded, self._gram, is_symmetric=True)
        if source is not None:
            assert self._cross is not None
            moved = source.float() - quantized.float()
            moved = moved if self._weight is None else moved @ self._weight.t()
            self._add_products(moved.div_(self._row_unit), rounded, self._cross, is_symmetric=False)
        self._tokens += len(quantized)
        self._sequences += 1

    def _add_products(self, left: Tensor, right: Tensor, total: Tensor, is_symmetric: bool) -> None:
        """Add leftᵀ·right to a total, of which only the upper triangle counts if it is symmetric."""
        for begin in range(0, left.shape[1], _PANEL):
            first = begin if is_symmetric else 0
            products = left[:, begin : begin + _PANEL].t() @ right[:, first:]
            self._peak = torch.maximum(self._peak, products.abs().amax())  # type: ignore[arg-type]
            total[begin : begin + _PANEL, first:] += products.mul_(2.0**FRACTION_BITS).round_().long()

    def discard(self) -> None:
        """Forget the observations since the last `commit`."""
        self._batch = []

    def state(self) -> dict[str, Tensor]:
        """The committed data, on the CPU.

        Returns:
            `gram`: int64 [cols, cols], or [0, 0] where nothing was observed. `cross`: likewise, [rows, cols]. `unit`
            and `row_unit`: float32 [cols] and [rows]. `through`: bool [1], whether a weight was given. `peak`: float32
            [1]. `counts`: int64 [2], tokens and sequences.
        """
        empty = torch.empty((0, 0), dtype=torch.int64)
        return {
            "gram": empty if self._gram is None else self._gram.cpu(),
            "cross": empty if self._cross is None else self._cross.cpu(),
            "unit": self._unit.cpu(),
            "row_unit": self._row_unit.cpu(),
            "through": torch.tensor([self._weight is not None]),
            "peak": torch.zeros(1) if self._peak is None else self._peak.reshape(1).cpu(),
            "counts": torch.tensor([self._tokens, self._sequences]),
        }

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """See `Statistic.merged`."""
        seen = [state for state in states if len(state["gram"])]
        first = states[0]
        made = cls(torch.ones(len(first["unit"]), dtype=torch.float64), lambda inputs: inputs)
        made._unit, made._row_unit = first["unit"], first["row_unit"]
        made._weight = torch.empty(0) if bool(first["through"]) else None
        made._gram = torch.stack([state["gram"] for state in seen]).sum(0) if seen else None
        crosses = [state["cross"] for state in seen if len(state["cross"])]
        made._cross = torch.stack(crosses).sum(0) if crosses else None
        made._peak = torch.stack([state["peak"].amax() for state in states]).amax()
        made._tokens, made._sequences = torch.stack([state["counts"] for state in states]).sum(0).tolist()
        return made

    def result(self, name: str) -> Moments:
        """The means over everything committed.

        Args:
            name: of the fused group, for errors.
        Raises:
            CheckFailed: nothing was committed, or the quantized path left the source far behind.
        """
        if self._gram is None or self._peak is None:
            raise CheckFailed(f"calibration never reached {name}: the model's forward skips it.")
        if not float(self._peak) * self._sequences * 2.0**FRACTION_BITS < _LARGEST_SUM:
            raise CheckFailed(
                f"the inputs of {name} grow without limit behind quantized layers", hint="use --quantizer mse"
            )
        gram = self._mean(self._gram, self._unit)
        for begin in range(0, len(gram), _PANEL):  # the lower triangle
            end = begin + _PANEL
            gram[begin:end, begin:end] = gram[begin:end, begin:end].triu() + gram[begin:end, begin:end].triu(1).t()
            gram[end:, begin:end] = gram[begin:end, end:].t()
        cross = None if self._cross is None else self._mean(self._cross, self._row_unit)
        return Moments(gram, cross, self._weight is not None)

    def _mean(self, total: Tensor, row_unit: Tensor) -> Tensor:
        """A sum of integers as a mean over the tokens, float32."""
        mean = torch.empty(total.shape, device=total.device)
        for begin in range(0, len(total), _PANEL):
            rows = slice(begin, begin + _PANEL)
            mean[rows] = total[rows].double().mul_(2.0**-FRACTION_BITS / self._tokens)
            mean[rows] *= row_unit[rows].unsqueeze(1) * self._unit
        return mean


def _power_of_two(sizes: Tensor) -> Tensor:
    """A power of two near each size, float32, and never far below the largest one."""
    largest = float(sizes.amax()) or 1.0
    return torch.exp2(torch.log2(sizes.clamp(min=largest * _SMALLEST)).round()).float()
