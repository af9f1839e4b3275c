"""The two on-disk layouts of quantized matrices: the names of their tensors, and the form of their scalars.

Codes and block scales of NVFP4 are the same bytes in both. compressed-tensors stores its global scales as divisors
(2688 / amax) of shape [1], modelopt as multipliers (amax / 2688) of shape []. FP8 has the form that every reader of the
layout knows: a scale for each row and dynamic inputs in compressed-tensors, one scale and calibrated inputs in
modelopt.
Source: docs/formats.md, section "Layouts".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from .constants import E4M3_MAX, SCALE_RANGE
from .schemes import FP8, FP8_STATIC, NVFP4, NVFP4_A16, Part, PartSpec, Scheme

if TYPE_CHECKING:
    from torch import Tensor

FormatName = Literal["compressed-tensors", "modelopt"]
FORMAT_NAMES: tuple[FormatName, ...] = ("compressed-tensors", "modelopt")
GLOBAL_SCALES: tuple[Part, ...] = ("weight_global", "input_global")


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
        name: its name for `--format`.
        schemes: the form of each scheme, by the name that recipes use.
        scalar_shape: the shape of a stored scalar.
        divisor: whether global scales are divisors (2688 / amax) or multipliers (amax / 2688).
    """

    name: FormatName
    schemes: Mapping[str, Scheme] = field(repr=False, compare=False)
    scalar_shape: tuple[int, ...]
    divisor: bool
    _suffixes: Mapping[Scheme, Mapping[Part, str]] = field(repr=False, compare=False)

    def suffixes(self, scheme: Scheme) -> Mapping[Part, str]:
        """The last part of each tensor's name, which follows the module's name and a dot."""
        return self._suffixes[scheme]

    def specs(self, scheme: Scheme, rows: int, cols: int) -> dict[Part, tuple[str, PartSpec]]:
        """The suffix and the stored form of each part of a matrix."""
        names = self._suffixes[scheme]
        return {
            part: (names[part], spec if spec.shape else PartSpec(spec.dtype, self.scalar_shape))
            for part, spec in scheme.parts(rows, cols).items()
        }

    def stored_scalar(self, part: Part, amax: float) -> Tensor:
        """The float32 scalar that this layout stores for an amax.

        A global scale is 2688 / amax or amax / 2688, each from the amax itself. It is 1.0 for an amax of zero, and
        where 2688 / amax would overflow. Any other scale is amax / 448.
        """
        import torch

        from .fp8 import fp8_scale
        from .scales import global_scale

        value = torch.tensor(amax, dtype=torch.float32)
        if part not in GLOBAL_SCALES:
            return fp8_scale(value).reshape(self.scalar_shape)
        if self.divisor:
            return global_scale(value).reshape(self.scalar_shape)
        is_usable = bool(torch.isfinite(SCALE_RANGE * (1.0 / value)))
        return (value / SCALE_RANGE if is_usable else torch.ones(())).reshape(self.scalar_shape)

    def amax_of(self, part: Part, value: float) -> float:
        """The amax that a stored scalar stands for, without headroom taken off."""
        if part not in GLOBAL_SCALES:
            return E4M3_MAX * value
        return SCALE_RANGE / value if self.divisor else SCALE_RANGE * value

    def canonical(self, part: Part, stored: Tensor) -> Tensor:
        """A stored part in the form that `Scheme.decode` takes: global scales as divisors, scalars without an axis."""
        if part not in GLOBAL_SCALES:
            return stored.reshape(()) if part == "input_scale" else stored
        return stored.reshape(()) if self.divisor else 1.0 / stored.reshape(())


_NVFP4_IN_COMPRESSED_TENSORS: Mapping[Part, str] = {
    "codes": "weight_packed",
    "scales": "weight_scale",
    "weight_global": "weight_global_scale",
    "input_global": "input_global_scale",
}
_NVFP4_IN_MODELOPT: Mapping[Part, str] = {
    "codes": "weight",
    "scales": "weight_scale",
    "weight_global": "weight_scale_2",
    "input_global": "input_scale",
}
COMPRESSED_TENSORS = Layout(
    "compressed-tensors",
    {scheme.name: scheme for scheme in (NVFP4, NVFP4_A16, FP8)},
    (1,),
    True,
    {
        NVFP4: _NVFP4_IN_COMPRESSED_TENSORS,
        NVFP4_A16: _NVFP4_IN_COMPRESSED_TENSORS,
        FP8: {"codes": "weight", "scales": "weight_scale"},
    },
)
MODELOPT = Layout(
    "modelopt",
    {scheme.name: scheme for scheme in (NVFP4, NVFP4_A16, FP8_STATIC)},
    (),
    False,
    {
        NVFP4: _NVFP4_IN_MODELOPT,
        NVFP4_A16: _NVFP4_IN_MODELOPT,
        FP8_STATIC: {"codes": "weight", "scales": "weight_scale", "input_scale": "input_scale"},
    },
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (COMPRESSED_TENSORS, MODELOPT)}
