"""What calibration learns about the inputs of quantized matrices, and the input global scale that follows.

Nothing depends on the order or the grouping of sequences: amax by max, mean squares as one float64 vector a sequence,
summed in the order of the samples, percentiles by a histogram over BF16 bit patterns. Source of the head-room rule:
docs/calibration.md, section "Input scales".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckFailed
from ..format.constants import BLOCK

# E4M3 spans 448 / 2^-6 = 28672 in its normal range; 16384 is the largest power of two inside.
NORMAL_RANGE = 16384.0
SMALLEST_EXPONENT = 2
PERCENTILE = 0.01
_BF16_PATTERNS = 1 << 15  # not negative


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the input that a fused group shares.

    Attributes:
        amax: the largest magnitude seen (float32 value).
        low: the first percentile of the largest magnitudes of non-zero blocks (a BF16 value); 0 where every block was
            zero.
        mean_square: float64 [cols], mean over tokens of each channel's square; None where the quantizer does not use
            it.
        tokens: number of tokens seen.
    """

    amax: float
    low: float
    mean_square: Tensor | None
    tokens: int


class InputObserver:
    """Gathers the statistics of one fused group's input, sequence by sequence."""

    def __init__(self, name: str, wants_mean_square: bool) -> None:
        self.name = name
        self._wants_mean_square = wants_mean_square
        self._amax: Tensor | None = None
        self._histogram: Tensor | None = None
        self._squares: list[Tensor] = []
        self._tokens = 0

    def observe(self, inputs: Tensor) -> None:
        """Take in the input of a batch.

        Args:
            inputs: [sequences, tokens, cols] or [tokens, cols], any float dtype and device; cols divisible by 16.
                Holds no padding.
        """
        flat = inputs.detach() if inputs.ndim == 3 else inputs.detach().reshape(1, -1, inputs.shape[-1])
        blocks = block_amax(flat)
        amax = blocks.amax().float()
        patterns = blocks.to(torch.bfloat16).view(torch.int16).flatten().int()
        counts = torch.bincount(patterns.clamp_(min=0), minlength=_BF16_PATTERNS)[:_BF16_PATTERNS]
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        self._histogram = counts if self._histogram is None else self._histogram.add_(counts)
        self._tokens += flat.shape[0] * flat.shape[1]
        if self._wants_mean_square:
            # Never in place on the input itself, which `float()` hands back where it is float32 already.
            self._squares.extend(sequence.float().square().sum(0).double() for sequence in flat)

    def result(self) -> InputStatistics:
        """The statistics of everything observed.

        Raises:
            CheckFailed: nothing was observed, or something that is not finite.
        """
        if self._amax is None or self._histogram is None:
            raise CheckFailed(f"calibration never reached {self.name}: the model's forward skips it.")
        amax = float(self._amax)
        if not math.isfinite(amax):
            raise CheckFailed(
                f"calibration met a NaN or an infinity at the input of {self.name}: check the model, or "
                f"calibrate with other samples."
            )
        mean_square = None
        if self._squares:
            total = torch.zeros_like(self._squares[0], device="cpu")
            for square in self._squares:
                total += square.cpu()
            mean_square = total / self._tokens
        return InputStatistics(amax, low_percentile(self._histogram), mean_square, self._tokens)


def block_amax(inputs: Tensor) -> Tensor:
    """The largest magnitude of every 16 neighbouring elements.

    Args:
        inputs: [..., cols], cols divisible by 16.
    Returns:
        [..., cols / 16], the same dtype.

    A reduction over so short an axis is slow everywhere: pooling is the fast way on the CPU, halving four times on a
    GPU.
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
        a BF16 value; 0.0 where all counts are at zero.
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
    """k of the head-room 2^k: max(2, floor(log2(16384 * low / amax))).

    Args:
        amax: the largest magnitude observed.
        low: the first percentile of block amaxes; for 0 (nothing but zeros seen) k is 2.
    """
    if amax <= 0 or low <= 0:
        return SMALLEST_EXPONENT
    return max(SMALLEST_EXPONENT, math.frexp(NORMAL_RANGE * low / amax)[1] - 1)


def calibrated_amax(amax: float, low: float, headroom: str | float = "auto") -> float:
    """The amax that the stored input scale is made from: observed amax times a power of two, which changes no
    code in E4M3's normal range."""
    factor = 2.0 ** headroom_exponent(amax, low) if isinstance(headroom, str) else headroom
    return amax * factor
