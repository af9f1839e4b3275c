"""The errors of a decoder layer's output, of a hidden state and of a matrix, against the source's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...format.constants import BLOCK, E4M3_MAX, E4M3_MIN
from .document import MatrixLoss
from .served import ServedMatrix

STRIP_ELEMENTS = 1 << 24


@dataclass
class LayerError:
    """Sums over tokens, float64, of the contribution that a layer adds to its input, for the reference and the other.

    A layer's contribution is its output less the multiple of its input that is nearest to it. Most models pass the
    input on as it is, some (Gemma 4) times a factor. Without that, a fault in a layer would drown in the stream that
    only passes by. The first token of a sequence is skipped, because its activations are thousands of times larger in
    many models and would dominate all others.
    """

    error: float = 0.0
    energy: float = 0.0
    product: float = 0.0
    energy_got: float = 0.0

    def add(self, before: Tensor, after: Tensor, got: Tensor) -> None:
        """Take in a batch, each [sequences, tokens, hidden size]: input and output of the reference's layer, and the
        output of the other for that same input."""
        x, y, z = (tensor[..., 1:, :].float() for tensor in (before, after, got))
        share = _dot(x, y) / max(_dot(x, x), 1e-30)
        y_added, z_added = y - share * x, z - share * x
        self.error += _dot(z - y, z - y)
        self.energy += _dot(y_added, y_added)
        self.product += _dot(y_added, z_added)
        self.energy_got += _dot(z_added, z_added)

    def as_json(self) -> dict[str, Any]:
        """Relative error (root of error over energy), the same in dB of signal to noise, and the cosine."""
        relative = relative_error(self.error, self.energy)
        norms = math.sqrt(self.energy * self.energy_got)
        return {
            "relative_error": relative,
            "sqnr_db": -20 * math.log10(relative) if 0 < relative < math.inf else None,
            "cosine": self.product / norms if norms else None,
        }


@dataclass
class StreamError:
    """Sums over tokens, float64, of the difference between two hidden states. The first tokens are skipped."""

    error: float = 0.0
    energy: float = 0.0

    def add(self, reference: Tensor, got: Tensor) -> None:
        """Take in a batch, both [sequences, tokens, hidden size]."""
        y, z = reference[..., 1:, :].float(), got[..., 1:, :].float()
        self.error += _dot(z - y, z - y)
        self.energy += _dot(y, y)

    @property
    def relative(self) -> float:
        """Root of error over energy."""
        return relative_error(self.error, self.energy)


def relative_error(error: float, energy: float) -> float:
    """Root of error over energy. Without energy, 0 or infinity."""
    if math.isnan(error) or energy <= 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / energy)


def _dot(one: Tensor, other: Tensor) -> float:
    # float32 products summed a row at a time, rows in float64: exact enough, and quick on every GPU
    return float((one * other).sum(-1).double().sum())


def matrix_numbers(name: str, layer: int, served: ServedMatrix, source: Tensor | None, decoded: Tensor,
                   histogram: Tensor | None) -> MatrixLoss:  # fmt: skip
    """The effect of quantization on a matrix, in numbers.

    Args:
        source: its weight in the source, [rows, cols], any float dtype. None where there is no source.
        decoded: as a server decodes it, no block flushed.
        histogram: of its block scales, int64 [256]. None of FP8.
    Returns:
        Relative error, and counts of blocks. A zero block is one whose elements are all stored as zero although the
        source's are not. A clamped one would need a block scale beyond E4M3's range.
    """
    error = energy = 0.0
    zero = clamped = 0
    for weight, stored in _strips(source, decoded):
        amax = weight.abs().amax(-1)
        zero += int(((stored.abs().amax(-1) == 0) & (amax > 0)).sum())
        if "weight_global" in served.scalars:
            wanted = amax / 6 * served.scalars["weight_global"].to(amax.device)
            clamped += int(((wanted > E4M3_MAX + 16) | ((wanted < E4M3_MIN / 2) & (amax > 0))).sum())
        energy += _dot(weight, weight)
        error += _dot(stored - weight, stored - weight)
    return MatrixLoss(
        name=name,
        layer=layer,
        scheme=served.scheme.words.rpartition(" ")[2],
        weight_error=None if source is None else relative_error(error, energy),
        blocks=decoded.numel() // BLOCK,
        zero_blocks=zero,
        clamped_blocks=clamped,
        flushed_blocks=0 if histogram is None else int(histogram[served.flushed].sum()),
    )


def _strips(source: Tensor | None, decoded: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Strips of rows as blocks, float32 [blocks, 16] each."""
    if source is None:
        return
    height = max(1, STRIP_ELEMENTS // decoded.shape[1])
    for begin in range(0, decoded.shape[0], height):
        rows = slice(begin, begin + height)
        yield source[rows].float().reshape(-1, BLOCK), decoded[rows].float().reshape(-1, BLOCK)
