"""Quantization schemes: the tensors that store a matrix, its decoded values, the rounding of its inputs by a server.

A scheme has a name, which recipes and manifests use. A layout (layouts.py) gives the names of the stored tensors. Torch
is imported when a matrix is computed, so that plans stay light.
Sources: docs/formats.md, sections "Block scales" and "FP8"; vLLM 0.32.0, `compressed_tensors_w8a8_fp8.py` and
`ModelOptFp8LinearMethod`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .constants import BLOCK, E4M3_MAX, SCALE_RANGE

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = Literal["codes", "scales", "weight_global", "input_global", "input_scale"]
"""A stored tensor of a matrix. `codes` has the elements, `scales` the scales of blocks, rows or the matrix."""
INPUT_PARTS: frozenset[Part] = frozenset({"input_global", "input_scale"})
"""The parts that a server rounds inputs by."""
Inputs = Literal["unchanged", "calibrated", "dynamic"]
"""The rounding of inputs by a server: none, under a stored scale from calibration, or under a scale of each token."""


Arithmetic = Literal["w4a4", "w8a8", "weight_only"]
"""The computation of a server: inputs rounded as every scheme says (GPUs with FP4 units), rounded for FP8 alone (Hopper
and Ada), or never (Ampere)."""
ARITHMETICS: tuple[Arithmetic, ...] = ("w4a4", "w8a8", "weight_only")
ARITHMETIC_WORDS: Mapping[str, str] = {"w4a4": "W4A4", "w8a8": "W8A8", "weight_only": "weight-only"}
"""The name of each arithmetic in messages and reports."""


@dataclass(frozen=True)
class PartSpec:
    """The form of a stored tensor.

    Attributes:
        dtype: its name in safetensors.
        shape: () for a scalar, which a layout may store as [1].
    """

    dtype: str
    shape: tuple[int, ...]


class Scheme(Protocol):
    """A quantization scheme.

    Attributes:
        name: its name in recipes and manifests.
        words: its name in reports.
        bits: of an element of a weight.
        divides: the number by which a matrix's columns must be divisible.
        form: the scales of its weights and inputs, in words.
        inputs: the rounding of inputs by a server.
        headroom: factor between the observed amax of inputs and the one that a stored input scale is made of, or None
            where it follows from the distribution of the inputs.
        has_block_scales: whether a row has several E4M3 scales, which Marlin converts.
        scale_dtypes: in which other tools store scales too, and servers read them.
        shared: the parts that all members of a fused group store with the same value.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def words(self) -> str:
        """See the class."""
        ...

    @property
    def form(self) -> str:
        """See the class."""
        ...

    @property
    def bits(self) -> int:
        """See the class."""
        ...

    @property
    def divides(self) -> int:
        """See the class."""
        ...

    @property
    def inputs(self) -> Inputs:
        """See the class."""
        ...

    @property
    def headroom(self) -> float | None:
        """See the class."""
        ...

    @property
    def has_block_scales(self) -> bool:
        """See the class."""
        ...

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """See the class."""
        ...

    @property
    def shared(self) -> tuple[Part, ...]:
        """See the class."""
        ...

    def parts(self, rows: int, cols: int) -> dict[Part, PartSpec]:
        """The stored tensors of a matrix, in the order in which they are listed."""
        ...

    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of the matrix whose codes have this shape, which has two axes."""
        ...

    def decode(self, parts: Mapping[Part, Tensor], dtype: torch.dtype) -> Tensor:
        """The matrix that a checkpoint stores.

        Args:
            parts: its tensors on one device. Global scales are divisors, float32 scalars (`Layout.canonical`).
            dtype: of the result. Arithmetic is float32.
        Returns:
            [rows, cols].
        """
        ...

    def round_inputs(self, inputs: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        """Inputs as a server rounds them.

        Args:
            inputs: [..., cols], any float dtype.
            parts: the scale of inputs, where one is stored.
        Returns:
            the same shape and dtype. Inputs that stay unchanged are returned as they are.
        """
        ...

    def largest_input(self, parts: Mapping[Part, Tensor]) -> float:
        """The largest magnitude of an input that is not clipped, from the scale of inputs. Infinite without one."""
        ...


@dataclass(frozen=True)
class Nvfp4:
    """E2M1 codes, an E4M3 scale for every 16 columns, and a float32 global scale.

    Attributes:
        inputs: `calibrated` (W4A4), or `unchanged` (weight-only).
    """

    name: str
    words: str
    inputs: Inputs
    bits: int = 4
    divides: int = BLOCK
    headroom: float | None = None
    has_block_scales: bool = True
    scale_dtypes: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        """See `Scheme`."""
        inputs = "calibrated inputs" if self.inputs == "calibrated" else "unchanged inputs"
        return f"a scale for every {BLOCK} columns and {inputs}"

    @property
    def shared(self) -> tuple[Part, ...]:
        """See `Scheme`."""
        return ("weight_global", "input_global") if self.inputs == "calibrated" else ("weight_global",)

    def parts(self, rows: int, cols: int) -> dict[Part, PartSpec]:
        """See `Scheme.parts`."""
        found: dict[Part, PartSpec] = {
            "codes": PartSpec("U8", (rows, cols // 2)),
            "scales": PartSpec("F8_E4M3", (rows, cols // BLOCK)),
        }
        return found | {part: PartSpec("F32", ()) for part in self.shared}

    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, int]:
        """See `Scheme.shape_of`."""
        return codes[0], 2 * codes[1]

    def decode(self, parts: Mapping[Part, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Scheme.decode`."""
        from .blocks import dequantize_blocks

        return dequantize_blocks(parts["codes"], parts["scales"], parts["weight_global"], dtype)

    def round_inputs(self, inputs: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        """See `Scheme.round_inputs`."""
        from .activations import quantize_dequantize

        if self.inputs == "unchanged":
            return inputs
        return quantize_dequantize(inputs, parts["input_global"], inputs.dtype)

    def largest_input(self, parts: Mapping[Part, Tensor]) -> float:
        """See `Scheme.largest_input`."""
        divisor = float(parts["input_global"]) if "input_global" in parts else 0.0
        return SCALE_RANGE / divisor if divisor else math.inf


@dataclass(frozen=True)
class Fp8:
    """E4M3 codes under float32 scales.

    Attributes:
        is_by_row: whether each row (output channel) has a scale, or the matrix one.
        inputs: `dynamic` (a scale of each token), or `calibrated` (one stored scale).
    """

    is_by_row: bool
    inputs: Inputs
    name: str = "fp8"
    words: str = "FP8 W8A8"
    bits: int = 8
    divides: int = 16  # of the products of FP8 in cuBLAS, CUTLASS and torch._scaled_mm
    headroom: float | None = 2.0
    has_block_scales: bool = False
    scale_dtypes: tuple[str, ...] = ("BF16",)

    @property
    def form(self) -> str:
        """See `Scheme`."""
        weights = "a scale for each row" if self.is_by_row else "one scale"
        return f"{weights} and {'dynamic' if self.inputs == 'dynamic' else 'calibrated'} inputs"

    @property
    def shared(self) -> tuple[Part, ...]:
        """See `Scheme`. A server fuses rows with scales of their own, and requantizes unequal matrices to one scale."""
        parts: tuple[Part, ...] = () if self.is_by_row else ("scales",)
        return (*parts, "input_scale") if self.inputs == "calibrated" else parts

    def parts(self, rows: int, cols: int) -> dict[Part, PartSpec]:
        """See `Scheme.parts`."""
        found: dict[Part, PartSpec] = {
            "codes": PartSpec("F8_E4M3", (rows, cols)),
            "scales": PartSpec("F32", (rows, 1) if self.is_by_row else ()),
        }
        return found | ({"input_scale": PartSpec("F32", ())} if self.inputs == "calibrated" else {})

    def shape_of(self, codes: tuple[int, ...]) -> tuple[int, int]:
        """See `Scheme.shape_of`."""
        return codes[0], codes[1]

    def decode(self, parts: Mapping[Part, Tensor], dtype: torch.dtype) -> Tensor:
        """See `Scheme.decode`."""
        from .fp8 import dequantize_rows

        return dequantize_rows(parts["codes"], parts["scales"], dtype)

    def round_inputs(self, inputs: Tensor, parts: Mapping[Part, Tensor]) -> Tensor:
        """See `Scheme.round_inputs`."""
        from .fp8 import round_by_token, round_under

        rounded = round_by_token(inputs) if self.inputs == "dynamic" else round_under(inputs, parts["input_scale"])
        return rounded.to(inputs.dtype)

    def largest_input(self, parts: Mapping[Part, Tensor]) -> float:
        """See `Scheme.largest_input`."""
        return E4M3_MAX * float(parts["input_scale"]) if "input_scale" in parts else math.inf


NVFP4 = Nvfp4("nvfp4", "NVFP4 W4A4", "calibrated")
NVFP4_A16 = Nvfp4("nvfp4-a16", "NVFP4 weight-only", "unchanged")
FP8 = Fp8(is_by_row=True, inputs="dynamic")
FP8_STATIC = Fp8(is_by_row=False, inputs="calibrated")
SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (NVFP4, NVFP4_A16, FP8)}
"""The schemes by the names that a recipe may use. A layout may store another form of one (`Layout.schemes`)."""


def rounds_inputs(arithmetic: Arithmetic, scheme: Scheme) -> bool:
    """Whether a server with this arithmetic rounds the inputs of a matrix in a scheme."""
    if scheme.inputs == "unchanged" or arithmetic == "weight_only":
        return False
    return arithmetic == "w4a4" or scheme.bits == FP8.bits


def arithmetics_of(schemes: Iterable[Scheme]) -> tuple[Arithmetic, ...]:
    """The arithmetics in which the servers of a checkpoint may compute it, the one of its own schemes first."""
    rounded = {scheme.bits for scheme in schemes if scheme.inputs != "unchanged"}
    found: list[Arithmetic] = ["w4a4"] if NVFP4.bits in rounded else []
    found += ["w8a8"] if FP8.bits in rounded else []
    return (*found, "weight_only")
