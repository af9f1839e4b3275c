"""A tensor that the source stores as codes and scales, and the rows of it as its model computes with them.

Every form is codes times a scale that a rectangle of rows and columns shares: FP8 in blocks, rows or whole, MXFP4,
NVFP4 and INT4 in groups of columns. Arithmetic is float32, and the result is rounded to BF16 once.
Source: docs/formats.md, section "Quantized sources".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from ..checkpoint.headers import TensorInfo
from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FormName = Literal["FP8", "MXFP4", "MXFP8", "NVFP4", "INT4", "INT8"]
STRIP_ELEMENTS = 1 << 18  # decoded at a time: its float32 copies fit a processor's cache


@dataclass(frozen=True)
class Coded:
    """A stored tensor of codes, with its companions.

    Attributes:
        name: as the model has it.
        shape: as the model has it, with at least two axes.
        codes, scales: what is stored. Their leading axes are those of a stack of matrices.
        grid: the rows and columns that share a scale. Rectangles at the edges may be smaller.
        scalar: the global scale of NVFP4.
        is_divisor: whether that is a divisor.
        is_transposed: whether the model has rows and columns of each matrix the other way round.
    """

    name: str
    form: FormName
    shape: tuple[int, ...]
    codes: TensorInfo
    scales: TensorInfo
    grid: tuple[int, int]
    scalar: TensorInfo | None = None
    is_divisor: bool = False
    is_transposed: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the stored tensors that it is decoded from."""
        return tuple(info.name for info in (self.codes, self.scales, self.scalar) if info is not None)

    @property
    def matrices(self) -> int:
        """The number of matrices in the stack."""
        return math.prod(self.shape[:-2])

    @property
    def rows(self) -> int:
        """Rows of a matrix as it is stored."""
        return self.shape[-1] if self.is_transposed else self.shape[-2]

    @property
    def cols(self) -> int:
        """Columns of a matrix as it is stored."""
        return self.shape[-2] if self.is_transposed else self.shape[-1]

    @property
    def scale_rows(self) -> int:
        """Rows of scales of one matrix."""
        return -(-self.rows // self.grid[0])

    @property
    def scale_cols(self) -> int:
        """Scales of a row."""
        return -(-self.cols // self.grid[1])

    def scale_range(self, first: int, last: int) -> tuple[int, int]:
        """The rows of scales of some rows, counted through the stack, from the first to the one after the last."""
        return self._scale_row(first), self._scale_row(last - 1) + 1

    def _scale_row(self, row: int) -> int:
        matrix, inner = divmod(row, self.rows)
        return matrix * self.scale_rows + inner // self.grid[0]


@dataclass(frozen=True)
class StoredRows:
    """Neighbouring rows of a coded tensor, counted through the stack.

    Attributes:
        codes: uint8 [rows, bytes of a row].
        scales: of `Coded.scale_range`, in their dtype, [rows of scales, scales of a row].
        scalar: float32, one element.
    """

    coded: Coded
    first: int
    codes: Tensor
    scales: Tensor
    scalar: Tensor | None

    def strips(self) -> Iterator[Tensor]:
        """The decoded rows in order, some at a time.

        Yields:
            float32 [some rows, cols].
        Raises:
            InputError: a scale is no finite number.
        """
        import torch

        coded, height = self.coded, max(1, STRIP_ELEMENTS // self.coded.cols)
        scales = self._steps()
        begin = coded.scale_range(self.first, self.first + 1)[0]
        for at in range(0, len(self.codes), height):
            codes = self.codes[at : at + height]
            rows = torch.arange(self.first + at, self.first + at + len(codes))
            own = rows.div(coded.rows, rounding_mode="floor") * coded.scale_rows
            own += rows.remainder(coded.rows).div(coded.grid[0], rounding_mode="floor") - begin
            steps = scales[own]
            values = _values(coded.form, codes, coded.cols)
            if coded.cols % coded.grid[1] == 0:
                values.unflatten(1, (-1, coded.grid[1])).mul_(steps.unsqueeze(-1))
            else:
                values.mul_(steps.repeat_interleave(coded.grid[1], dim=1)[:, : coded.cols])
            yield values

    def _steps(self) -> Tensor:
        """The values of the codes' unit, float32."""
        scales = scale_values(self.scales)
        refuse_bad_scales(self.coded, scales)
        if self.scalar is None:
            return scales
        scalar = self.scalar.float().reshape(())
        return scales / scalar if self.coded.is_divisor else scales * scalar


def scale_values(stored: Tensor) -> Tensor:
    """Stored scales as float32: E8M0 bytes, E4M3 bytes or floats, any shape."""
    import torch

    from ..format.microscaling import decode_e8m0

    return decode_e8m0(stored) if stored.dtype in (torch.uint8, torch.float8_e8m0fnu) else stored.float()


def refuse_bad_scales(coded: Coded, values: Tensor) -> None:
    """Refuse scales that are no finite numbers.

    Args:
        values: float32, any shape.
    Raises:
        InputError: there is one.
    """
    import torch

    if bool(torch.isfinite(values).all()):
        return
    is_e8m0 = coded.scales.dtype in ("U8", "F8_E8M0")
    found = "the E8M0 byte 255, which is no number" if is_e8m0 else "a scale that is no finite number"
    raise InputError(f"{coded.scales.name} contains {found}", where=coded.scales.name, hint="download its shard again")


def _values(form: FormName, codes: Tensor, cols: int) -> Tensor:
    """Values of codes without their scales: uint8 [rows, bytes] to float32 [rows, cols]."""
    import torch

    # A table of all bytes is 15 to 25 times as fast as torch's conversions, measured on one core.
    found = torch.index_select(_table(form), 0, codes.flatten().int())
    return found.view(torch.float32).view(len(codes), -1)[:, :cols]


@cache
def _table(form: FormName) -> Tensor:
    """The values of a byte: float32 [256], or the bits of two of them, int64 [256]."""
    import torch

    from ..format.e2m1 import decode_e2m1, unpack_codes

    stored = torch.arange(256, dtype=torch.uint8)
    if form in ("FP8", "MXFP8"):
        return stored.view(torch.float8_e4m3fn).float()
    if form == "INT8":
        return stored.float() - 128
    pairs = unpack_codes(stored.unsqueeze(1))
    values = decode_e2m1(pairs) if form in ("MXFP4", "NVFP4") else pairs.float() - 8
    return values.contiguous().view(torch.int64).flatten()
