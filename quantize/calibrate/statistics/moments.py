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
from ...format.kernels import add_products_on_gpu, has_triton

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
        rounds: rounds an input as the server does. It returns the input's dtype.
        weight: float32 [rows, cols], the group's stacked weights. With it, `cross` is multiplied by them at once, which
            takes less memory where there are fewer rows than columns.
        wants_cross: whether to gather `cross`. Without it, only the quantized path is observed.
        source_factor: float32 [cols]. The source's input is multiplied by it first, where a fold changed the scale of
            the quantized path's. `mean_square` and `weight` are those after the fold.
    """

    name: ClassVar[str] = "moments"

    def __init__(
        self,
        mean_square: Tensor,
        rounds: Callable[[Tensor], Tensor],
        weight: Tensor | None = None,
        wants_cross: bool = True,
        source_factor: Tensor | None = None,
    ) -> None:
        self.lanes = ("source", "quantized") if wants_cross else ("quantized",)
        self._rounds, self._weight, self._source_factor = rounds, weight, source_factor
        device = None if weight is None else weight.device
        self._unit = _power_of_two(mean_square.sqrt()).to(device)
        self._row_unit = self._unit
        if weight is not None:
            self._row_unit = _power_of_two((weight.double().square() @ mean_square.to(device)).sqrt())
        self._batch: list[tuple[Tensor, Tensor | None]] = []
        self._gram: _Sums | None = None
        self._cross: _Sums | None = None
        self._tokens = self._sequences = 0

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """Observe an input of a batch, which counts from `commit` on.

        Args:
            seen: the input by lane: [sequences, tokens, cols] or [tokens, cols]. It has no padding, and is not changed.
        """
        quantized, source = seen["quantized"], seen.get("source")
        if self._gram is None:
            self._begin(quantized)
        self._batch.append((quantized, source if "source" in self.lanes else None))

    def _begin(self, first: Tensor) -> None:
        """Prepare what every sequence needs, on the device and in the dtype of the products."""
        device = first.device
        cols, rows = len(self._unit), len(self._row_unit)
        if self._weight is not None:
            self._weight = self._weight.to(device, _dtype_of_products(first))
        if self._source_factor is not None:
            self._source_factor = self._source_factor.to(device)
        self._unit, self._row_unit = self._unit.to(device), self._row_unit.to(device)
        self._gram = _Sums(cols, cols, is_symmetric=True, device=device)
        if "source" in self.lanes:
            self._cross = _Sums(rows, cols, is_symmetric=False, device=device)

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
        dtype = _dtype_of_products(quantized)
        rounded = (self._rounds(quantized) / self._unit).to(dtype)  # a power of two: BF16 stays exact
        self._gram.add(rounded, rounded)
        if source is not None:
            assert self._cross is not None
            moved = self._folded(source) - quantized.float()
            if self._weight is not None:
                moved = _product(moved.t().to(dtype), self._weight.t())
            self._cross.add((moved / self._row_unit).to(dtype), rounded)
        self._tokens += len(quantized)
        self._sequences += 1

    def _folded(self, source: Tensor) -> Tensor:
        """The source's input in the scale of the quantized path, float32."""
        if self._source_factor is None:
            return source.float()
        return source.float() * self._source_factor

    def discard(self) -> None:
        """Forget the observations since the last `commit`."""
        self._batch = []

    def state(self) -> dict[str, Tensor]:
        """The committed data, on the CPU.

        Returns:
            `gram`: int64 [the elements of its panels], or [0] where nothing was observed. `cross`: likewise. `unit` and
            `row_unit`: float32 [cols] and [rows]. `through`: bool [1], whether a weight was given. `peaks`: float32
            [2], the largest products of a sequence. `counts`: int64 [2], tokens and sequences.
        """
        sums = [self._gram, self._cross]
        return {
            "gram": _flat(self._gram),
            "cross": _flat(self._cross),
            "unit": self._unit.cpu(),
            "row_unit": self._row_unit.cpu(),
            "through": torch.tensor([self._weight is not None]),
            "peaks": torch.stack([torch.zeros(()) if one is None else one.peak.cpu() for one in sums]),
            "counts": torch.tensor([self._tokens, self._sequences]),
        }

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """See `Statistic.merged`."""
        first = states[0]
        made = cls(torch.ones(len(first["unit"]), dtype=torch.float64), lambda inputs: inputs)
        made._unit, made._row_unit = first["unit"], first["row_unit"]
        made._weight = torch.empty(0) if bool(first["through"]) else None
        cols, rows = len(made._unit), len(made._row_unit)
        peaks = torch.stack([state["peaks"] for state in states]).amax(0)
        for name, at, height in (("gram", 0, cols), ("cross", 1, rows)):
            seen = [state[name] for state in states if len(state[name])]
            if seen:
                sums = _Sums(height, cols, name == "gram", torch.device("cpu"))
                sums.set(seen, peaks[at])
                setattr(made, f"_{name}", sums)
        made._tokens, made._sequences = torch.stack([state["counts"] for state in states]).sum(0).tolist()
        return made

    def result(self, name: str) -> Moments:
        """The means over everything committed. It frees the sums, which are twice as large, so it is called once.

        Args:
            name: of the fused group, for errors.
        Raises:
            CheckFailed: nothing was committed, or the quantized path left the source far behind.
        """
        if self._gram is None:
            raise CheckFailed(
                f"calibration never reached {name}: the model's forward skips it", hint="leave it out of the recipe"
            )
        for sums in (self._gram, self._cross):
            if sums is not None and not float(sums.peak) * self._sequences * 2.0**FRACTION_BITS < _LARGEST_SUM:
                raise CheckFailed(
                    f"the inputs of {name} grow without limit behind quantized layers", hint="use --quantizer mse"
                )
        factor = 2.0**-FRACTION_BITS / self._tokens
        gram = self._gram.taken(factor, self._unit, self._unit)
        cross = None if self._cross is None else self._cross.taken(factor, self._row_unit, self._unit)
        return Moments(gram, cross, self._weight is not None)


class _Sums:
    """Sums of products of columns, exact: int64 panels of rows. Of a symmetric matrix, a panel begins at its diagonal.

    Attributes:
        peak: float32 scalar, the largest product of a sequence.
    """

    def __init__(self, rows: int, cols: int, is_symmetric: bool, device: torch.device) -> None:
        self._shape, self._is_symmetric = (rows, cols), is_symmetric
        self._panels: dict[int, Tensor] = {
            begin: torch.zeros(
                (min(_PANEL, rows - begin), cols - (begin if is_symmetric else 0)), dtype=torch.int64, device=device
            )
            for begin in range(0, rows, _PANEL)
        }
        self.peak = torch.zeros((), device=device)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ·right of a sequence, [tokens, rows] and [tokens, cols]."""
        for begin, panel in self._panels.items():
            first = begin if self._is_symmetric else 0
            add_products(_product(left[:, begin : begin + len(panel)], right[:, first:]), panel, self.peak)

    def flat(self) -> Tensor:
        """All panels one after the other, int64 on the CPU."""
        return torch.cat([panel.flatten().cpu() for panel in self._panels.values()])

    def set(self, flats: Sequence[Tensor], peak: Tensor) -> None:
        """Become the sum of what `flat` returned in several processes."""
        self.peak = peak
        begin = 0
        for panel in self._panels.values():
            for flat in flats:
                panel += flat[begin : begin + panel.numel()].view_as(panel)
            begin += panel.numel()

    def taken(self, factor: float, row_unit: Tensor, unit: Tensor) -> Tensor:
        """The sums times a factor, with the units of rows and columns, float32 [rows, cols]. The sums are gone then."""
        device = row_unit.device
        made = torch.empty(self._shape, device=device)
        for begin in list(self._panels):
            panel = self._panels.pop(begin)
            end, first = begin + len(panel), begin if self._is_symmetric else 0
            rows = made[begin:end, first:]
            rows.copy_(panel.double().mul_(factor))
            rows *= row_unit[begin:end].unsqueeze(1) * unit[first:]
            if self._is_symmetric:  # what lies left of the diagonal
                square = made[begin:end, begin:end]
                square.copy_(square.triu() + square.triu(1).t())
                made[end:, begin:end] = made[begin:end, end:].t()
        return made


def add_products(products: Tensor, sums: Tensor, peak: Tensor) -> None:
    """Add products to sums in fixed point.

    Args:
        products: float32. They are spoiled.
        sums: int64 of the same shape, with `FRACTION_BITS` bits behind the point. They change in place.
        peak: float32 scalar, the largest magnitude so far, which changes in place.
    """
    if has_triton(products):
        add_products_on_gpu(products, sums, peak, FRACTION_BITS)
        return
    torch.maximum(peak, products.abs().amax(), out=peak)
    sums += products.mul_(2.0**FRACTION_BITS).round_().long()


def _flat(sums: _Sums | None) -> Tensor:
    return torch.empty(0, dtype=torch.int64) if sums is None else sums.flat()


def _dtype_of_products(inputs: Tensor) -> torch.dtype:
    """BF16 where a GPU multiplies it with float32 sums. Rounded inputs are exact in it."""
    has_products = inputs.is_cuda and inputs.dtype == torch.bfloat16 and hasattr(torch.ops.aten.mm, "dtype")
    return torch.bfloat16 if has_products else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ·right, float32."""
    if left.dtype == torch.float32:
        return left.t() @ right
    return torch.mm(left.t(), right, out_dtype=torch.float32)


def _power_of_two(sizes: Tensor) -> Tensor:
    """A power of two near each size, float32, and never far below the largest one."""
    largest = float(sizes.amax()) or 1.0
    return torch.exp2(torch.log2(sizes.clamp(min=largest * _SMALLEST)).round()).float()
