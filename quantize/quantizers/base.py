"""The interface of a quantizer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..format.blocks import BlockQuantized


class Quantizer(Protocol):
    """Turns a matrix into codes and block scales under a given global scale.

    Attributes:
        name: its name in recipes and for `--quantizer`.
        headroom: factor by which block scales may exceed amax / 6, applied to the global scale (a power of two).
        uses_mean_square: whether `quantize` weighs columns by the mean square of their inputs.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def headroom(self) -> float:
        """See the class."""
        ...

    @property
    def uses_mean_square(self) -> bool:
        """See the class."""
        ...

    def quantize(self, weight: Tensor, scale: Tensor, mean_square: Tensor | None = None) -> BlockQuantized:
        """Quantize one matrix.

        Args:
            weight: [rows, cols], bfloat16, float16 or float32, finite, cols divisible by 16.
            scale: float32 scalar, the global scale (divisor) shared by the fused group.
            mean_square: float64 [cols], the mean square of each input channel over the calibration tokens, or
                None without calibration.
        Returns:
            packed codes and block scales on the weight's device.
        """
        ...
