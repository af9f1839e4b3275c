"""Ranges of the inputs of quantized matrices from calibration, and the input global scale that follows.

No result depends on the order or the grouping of sequences: amax by max, mean squares as one float64 vector a sequence,
summed in the order of the samples, percentiles by a histogram over BF16 bit patterns. Source of the headroom rule:
docs/calibration.md, section "Input scales".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...errors import CheckFailed
from ...format.constants import BLOCK
from ...format.kernels import CHUNK, gather_with_kernel, has_kernel

if TYPE_CHECKING:
    from typing_extensions import Self

# E4M3 spans 448 / 2^-6 = 28672 in its normal range; 16384 is the largest power of two inside.
NORMAL_RANGE = 16384.0
SMALLEST_EXPONENT = 2
PERCENTILE = 0.01
_BF16_PATTERNS = 1 << 15  # not negative
INT32_MAX = 2**31 - 1
_COPIES = 16  # of a GPU's histogram, so that its programs seldom wait for each other; 2 MiB a group


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the input that a fused group shares.

    Attributes:
        amax: the largest magnitude seen (float32 value).
        low: the first percentile of the largest magnitudes of non-zero blocks (a BF16 value), 0 where every block was
            zero.
        mean_square: float64 [cols], mean over tokens of each channel's square, None where the quantizer does not use
            it.
        tokens: number of tokens seen.
    """

    amax: float
    low: float
    mean_square: Tensor | None
    tokens: int


class InputRanges:
    """The statistic `ranges`: of the input that a fused group shares, in one lane.

    One kernel gathers all of it in one pass over the input. No method waits for the device before `state` or `result`.

    Args:
        wants_mean_square: whether to gather sums of squares.
        lane: the name of the lane.
        change: changes an input before it is observed, which then is of the same rank.
    """

    name: ClassVar[str] = "ranges"

    def __init__(
        self,
        wants_mean_square: bool = False,
        lane: str = "source",
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.lanes = (lane,)
        self._change = change
        self._wants_mean_square = wants_mean_square
        self._batch: list[_Gathered] = []
        self._counts: Tensor | None = None  # of the batch: int32 [copies, 32768], on the device
        self._recent: Tensor | None = None  # committed, of the same shape; goes to the histogram before it can overflow
        self._recent_blocks = 0
        self._histogram: Tensor | None = None
        self._amax: Tensor | None = None
        self._squares: list[Tensor] = []
        self._tokens = 0

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        """Observe an input of a batch, which counts from `commit` on.

        Args:
            seen: the input by lane: [sequences, tokens, cols] or [tokens, cols], any float dtype, device and strides,
                cols divisible by 16. It has no padding, and is not changed.
        """
        inputs = seen[self.lanes[0]].detach()
        inputs = inputs if self._change is None else self._change(inputs)
        shaped = inputs if inputs.ndim == 3 else inputs.reshape(1, -1, inputs.shape[-1])
        if self._counts is None:
            copies = torch.get_num_threads() if shaped.device.type == "cpu" else _COPIES
            self._counts = torch.zeros((copies, _BF16_PATTERNS), dtype=torch.int32, device=shaped.device)
        chosen = gather_with_kernel if has_kernel(shaped) else gather
        amax, squares = chosen(shaped, self._counts, self._wants_mean_square)
        tokens = shaped.shape[0] * shaped.shape[1]
        self._batch.append(_Gathered(amax, squares, tokens, tokens * (shaped.shape[2] // BLOCK)))

    def commit(self) -> None:
        """Count the observations since the last `commit` or `discard`."""
        if not self._batch or self._counts is None:
            return
        blocks = sum(gathered.blocks for gathered in self._batch)
        if self._recent is None or self._histogram is None:
            self._recent = torch.zeros_like(self._counts)
            self._histogram = torch.zeros(_BF16_PATTERNS, dtype=torch.int64, device=self._counts.device)
        if self._recent_blocks + blocks > INT32_MAX:
            self._histogram += self._recent.sum(0)
            self._recent.zero_()
            self._recent_blocks = 0
        self._recent += self._counts
        self._recent_blocks += blocks
        for gathered in self._batch:
            self._amax = gathered.amax if self._amax is None else torch.maximum(self._amax, gathered.amax)
            self._tokens += gathered.tokens
            if gathered.squares is not None:
                self._squares.append(gathered.squares)
        self.discard()

    def discard(self) -> None:
        """Forget the observations since the last `commit`."""
        self._batch = []
        if self._counts is not None:
            self._counts.zero_()

    def state(self) -> dict[str, Tensor]:
        """The committed data, on the CPU.

        Returns:
            `amax`: float32 [1], or [0] where nothing was observed. `histogram`: int64 [32768], counts of block amaxes
            by BF16 bit pattern. `squares`: float64 [sequences, cols], each sequence's sums of squares in the order of
            observation, or [0, 0]. `tokens`: int64 [1].
        """
        return {
            "amax": torch.empty(0) if self._amax is None else self._amax.reshape(1).cpu(),
            "histogram": self._counted().cpu(),
            "squares": torch.cat(self._squares).cpu() if self._squares else torch.empty((0, 0), dtype=torch.float64),
            "tokens": torch.tensor([self._tokens]),
        }

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Self:
        """See `Statistic.merged`."""
        made = cls(wants_mean_square=any(len(state["squares"]) for state in states))
        found = [state["amax"] for state in states if len(state["amax"])]
        made._amax = torch.cat(found).amax() if found else None
        made._histogram = _sum(state["histogram"] for state in states)
        made._squares = [state["squares"] for state in states if len(state["squares"])]
        made._tokens = sum(int(state["tokens"]) for state in states)
        return made

    def _counted(self) -> Tensor:
        """The committed histogram, int64 [32768], on the device."""
        parts = [] if self._histogram is None else [self._histogram]
        parts += [] if self._recent is None else [self._recent.sum(0)]
        return _sum(parts)

    def result(self, name: str) -> InputStatistics:
        """The statistics of everything committed.

        Args:
            name: of the fused group, for errors.
        Raises:
            CheckFailed: nothing was committed, or a value is not finite.
        """
        if self._amax is None:
            raise CheckFailed(f"calibration never reached {name}: the model's forward skips it.")
        amax = float(self._amax)
        if not math.isfinite(amax):
            raise CheckFailed(
                f"calibration found a NaN or an infinity at the input of {name}",
                hint="check the model, or calibrate with other samples",
            )
        mean_square = None
        if self._squares:
            total = torch.zeros_like(self._squares[0][0])
            for squares in self._squares:
                for square in squares:
                    total += square
            mean_square = total.cpu() / self._tokens  # on the CPU: a GPU multiplies by the reciprocal instead
        return InputStatistics(amax, low_percentile(self._counted()), mean_square, self._tokens)


@dataclass(frozen=True)
class _Gathered:
    amax: Tensor
    squares: Tensor | None
    tokens: int
    blocks: int


def _sum(histograms: Iterable[Tensor]) -> Tensor:
    """The sum of int64 [32768] each, in their order."""
    total: Tensor | None = None
    for histogram in histograms:
        total = histogram if total is None else total + histogram
    return torch.zeros(_BF16_PATTERNS, dtype=torch.int64) if total is None else total


def gather(inputs: Tensor, histogram: Tensor, wants_squares: bool) -> tuple[Tensor, Tensor | None]:
    """Statistics of inputs, in PyTorch: the reference for `format.kernels.gather_with_kernel`.

    Args:
        inputs: [sequences, tokens, cols], any float dtype, device and strides; cols divisible by 16.
        histogram: int32 [copies, 32768]. Every block's amax is counted under its BF16 bit pattern, in any copy.
        wants_squares: whether to compute sums of squares.
    Returns:
        the largest magnitude (float32 scalar), and each sequence's sums of squares (float64 [sequences, cols]) or None.
    """
    blocks = block_amax(inputs)
    patterns = blocks.to(torch.bfloat16).view(torch.int16).flatten().long().clamp_(min=0)
    # Not `bincount`, which waits for a GPU to tell the largest.
    histogram[0].scatter_add_(0, patterns, torch.ones_like(patterns, dtype=torch.int32))
    return blocks.amax().float(), sums_of_squares(inputs) if wants_squares else None


def sums_of_squares(inputs: Tensor) -> Tensor:
    """The sum over tokens of each channel's square, in an order that every device and kernel keeps.

    Args:
        inputs: [sequences, tokens, cols], any float dtype and strides.
    Returns:
        float64 [sequences, cols]: within a chunk of 64 tokens float32 squares are added token by token in float32, the
        chunks' sums then one by one in float64. Which sequences share a batch makes no difference.
    """
    sequences, tokens, cols = inputs.shape
    sums = torch.zeros((sequences, -(-tokens // CHUNK), cols), dtype=torch.float32, device=inputs.device)
    for token in range(min(CHUNK, tokens)):
        of_chunks = inputs[:, token::CHUNK].float()  # the last chunk may be too short to have this one
        sums[:, : of_chunks.shape[1]] += of_chunks * of_chunks
    total = torch.zeros((sequences, cols), dtype=torch.float64, device=inputs.device)
    for chunk in sums.unbind(1):
        total += chunk.double()
    return total


def block_amax(inputs: Tensor) -> Tensor:
    """The largest magnitude of every 16 neighbouring elements.

    Args:
        inputs: [..., cols], cols divisible by 16.
    Returns:
        [..., cols / 16], the same dtype.

    A reduction over so short an axis is slow everywhere. Pooling is fast on the CPU, halving four times on a GPU.
    """
    largest = inputs.abs()
    if largest.device.type == "cpu":
        rows = largest.reshape(1, -1, largest.shape[-1])
        return torch.nn.functional.max_pool1d(rows, BLOCK).reshape(*largest.shape[:-1], -1)
    for _ in range(BLOCK.bit_length() - 1):
        largest = torch.maximum(largest[..., 0::2], largest[..., 1::2])
    return largest


def low_percentile(histogram: Tensor, share: float = PERCENTILE) -> float:
    """The value below or at which a share of the non-zero counts lies.

    Args:
        histogram: int64 [32768], counts by BF16 bit pattern.
        share: 0.01 for the first percentile.
    Returns:
        a BF16 value, 0.0 where all counts are at zero.
    """
    counts = histogram.to("cpu", torch.int64).clone()
    counts[0] = 0
    total = int(counts.sum())
    if total == 0:
        return 0.0
    rank = max(1, math.ceil(total * share))
    pattern = int(torch.searchsorted(counts.cumsum(0), rank))
    return float(torch.tensor(pattern, dtype=torch.int16).view(torch.bfloat16))


def headroom_exponent(amax: float, low: float) -> int:
    """k of the headroom 2^k: max(2, floor(log2(16384 * low / amax))).

    Args:
        amax: the largest magnitude observed.
        low: the first percentile of block amaxes. For 0 (only zeros seen) k is 2.
    """
    if amax <= 0 or low <= 0:
        return SMALLEST_EXPONENT
    return max(SMALLEST_EXPONENT, math.frexp(NORMAL_RANGE * low / amax)[1] - 1)


def calibrated_amax(amax: float, low: float, headroom: str | float = "auto") -> float:
    """The amax for the stored input scale: observed amax times a power of two, which changes no code
    in E4M3's normal range."""
    factor = 2.0 ** headroom_exponent(amax, low) if isinstance(headroom, str) else headroom
    return amax * factor
