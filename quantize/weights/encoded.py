"""Matrices of a quantized source whose codes a scheme can keep: the exact casts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.reordered import Reordered
from ..checkpoint.source import Checkpoint
from ..format.schemes import Fp8
from ..recipe.matrices import Matrix
from .coded import Coded, FormName
from .decoding import Decoding, scale_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """The scales of a matrix whose codes stay.

    Attributes:
        form: of the source.
        scales: on the CPU. Of MXFP4, the exponents, int32 [rows, cols / 32]. Of FP8, float32 [rows, 1].
    """

    form: FormName
    scales: Tensor


def cast_form(source: Checkpoint, matrix: Matrix) -> FormName | None:
    """The form of a source's matrix whose codes stay in the matrix's scheme, from headers alone. None where the matrix
    is quantized anew."""
    coded = _castable(source, matrix)
    return None if coded is None else coded.form


def group_form(source: Checkpoint, matrices: Sequence[Matrix]) -> FormName | None:
    """The one form of the matrices of a fused group, if all of them keep their codes."""
    forms = {cast_form(source, matrix) for matrix in matrices}
    return forms.pop() if len(forms) == 1 else None


def encoded(source: Checkpoint, matrix: Matrix, rows: range | None = None) -> Encoded | None:
    """The scales of a matrix whose codes stay, or None.

    Args:
        rows: some rows of the matrix. None for all.
    Raises:
        InputError: they cannot be read.
    """
    coded = _castable(source, matrix)
    if coded is None:
        return None
    import torch

    from ..format.microscaling import E8M0_BIAS

    assert isinstance(source.content, Decoding)
    rows = range(matrix.rows) if rows is None else rows
    first = matrix.first_row + rows.start + coded.rows * _place(matrix.index, coded.shape)
    begin, end = coded.scale_range(first, first + len(rows))
    stored = scale_rows(source.content.raw, coded, begin, end)
    if coded.form == "MXFP4":
        return Encoded(coded.form, stored.view(torch.uint8).int() - E8M0_BIAS)
    scales = stored.float()
    return Encoded(coded.form, scales.expand(len(rows), 1).contiguous() if coded.grid[0] > 1 else scales)


def _castable(source: Checkpoint, matrix: Matrix) -> Coded | None:
    if not isinstance(source.content, Decoding) or (isinstance(source, Reordered) and matrix.tensor in source.axes):
        return None
    coded, scheme = source.content.found.coded.get(matrix.tensor), matrix.scheme
    if coded is None or coded.is_transposed != matrix.is_transposed:
        return None
    if scheme.has_block_scales:
        return coded if coded.form == "MXFP4" else None
    is_fp8 = isinstance(scheme, Fp8) and scheme.is_by_row and coded.form == "FP8"
    return coded if is_fp8 and coded.grid in ((1, coded.cols), (coded.rows, coded.cols)) else None


def _place(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The number of a matrix in its stack."""
    place = 0
    for at, size in zip(index, shape, strict=False):
        place = place * size + at
    return place
