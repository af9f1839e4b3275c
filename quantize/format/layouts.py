"""The two on-disk layouts of an NVFP4 matrix: the names of its tensors, and the form of its scalars.

Packed codes and block scales are the same bytes in both. compressed-tensors stores global scales as divisors (2688 /
amax) of shape [1], modelopt as multipliers (amax / 2688) of shape [].
Source: docs/formats.md, section "Layouts".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FormatName = Literal["compressed-tensors", "modelopt"]
FORMAT_NAMES: tuple[FormatName, ...] = ("compressed-tensors", "modelopt")


@dataclass(frozen=True)
class Layout:
    """Names of the tensors of one matrix, each a suffix to the module's name.

    Attributes:
        name: its name for `--format`.
        packed: U8 [rows, cols / 2].
        scales: F8_E4M3 [rows, cols / 16].
        weight_global, input_global: F32 scalars of shape `scalar_shape`.
        divisor: whether the scalars are divisors (2688 / amax) or multipliers (amax / 2688).
    """

    name: FormatName
    packed: str
    scales: str
    weight_global: str
    input_global: str
    scalar_shape: tuple[int, ...]
    divisor: bool

    @property
    def suffixes(self) -> tuple[str, str, str, str]:
        """All four suffixes, in the order packed, scales, weight global scale, input global scale."""
        return self.packed, self.scales, self.weight_global, self.input_global


COMPRESSED_TENSORS = Layout(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", (1,), True
)
MODELOPT = Layout("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", (), False)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (COMPRESSED_TENSORS, MODELOPT)}
