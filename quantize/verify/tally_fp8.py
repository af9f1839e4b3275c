"""The comparison of an FP8 matrix's stored numbers with the source's, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.source import Checkpoint
from ..format.constants import BLOCK
from ..format.fp8 import dequantize_rows, fp8_scale, quantize_rows
from ..quantizers.fp8 import row_amax
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..weights.stored import StoredMatrix
from .subject import Subject
from .tally import READ_ELEMENTS, Tally, read_rows

RMSE_LIMIT = 0.08  # relative to the root mean square of the weights; rounding to three bits after the first costs 0.026


def tally_fp8(
    subject: Subject, source: Checkpoint, matrix: StoredMatrix, is_exact: bool, reshaping: Reshaping = UNCHANGED
) -> Tally:
    """Compare a sound FP8 matrix with the source's tensor of the same shape.

    Args:
        reshaping: folds that the source's matrix goes through first.
        is_exact: whether nvquant made it: other codes than the nearest are counted, and other scales than amax / 448 of
            each row.
    """
    tally = Tally()
    scales = subject.checkpoint.read(matrix.parts["scales"].name).float()
    is_by_row = scales.ndim == 2
    height = max(1, READ_ELEMENTS // matrix.cols)
    for first in range(0, matrix.rows, height):
        rows = range(first, min(matrix.rows, first + height))
        weight = reshaping.weight(matrix.module, read_rows(source, matrix.tensor, rows), first)
        codes = read_rows(subject.checkpoint, matrix.parts["codes"].name, rows)
        by = scales[first : rows.stop] if is_by_row else scales.reshape(())
        _tally_errors(tally, weight.float(), dequantize_rows(codes, by))
        if is_exact:
            _tally_codes(tally, weight, codes, by, first)
            if is_by_row:
                _tally_scales(tally, weight, by, first)
    return tally


def _tally_errors(tally: Tally, weight: Tensor, stored: Tensor) -> None:
    energy, error = weight.square().sum(1), (stored - weight).square().sum(1)
    tally.blocks += weight.numel() // BLOCK
    tally.energy += float(energy.sum(dtype=torch.float64))
    tally.product += float((stored * weight).sum(dtype=torch.float64))
    tally.error += float(error.sum(dtype=torch.float64))
    tally.amax = max(tally.amax, float(weight.abs().max()))
    good = int((error <= energy * RMSE_LIMIT**2).sum())
    tally.poor_blocks += (len(energy) - good) * (weight.shape[1] // BLOCK)


def _tally_codes(tally: Tally, weight: Tensor, codes: Tensor, scales: Tensor, first: int) -> None:
    nearest = quantize_rows(weight, scales)
    wrong = (nearest.float() != codes.float()).nonzero()
    if len(wrong) and not tally.wrong_codes:
        row, column = wrong[0].tolist()
        scale = float(scales[row] if scales.ndim else scales)
        was, is_now = float(weight[row, column]), float(codes[row, column].float()) * scale
        tally.first_code = f"first at row {first + row}, column {column}: {was:.6g} is stored as {is_now:.6g}"
    tally.wrong_codes += len(wrong)


def _tally_scales(tally: Tally, weight: Tensor, scales: Tensor, first: int) -> None:
    expected = fp8_scale(row_amax(weight))
    wrong = (expected != scales).flatten().nonzero()
    if len(wrong) and not tally.wrong_scales:
        row = int(wrong[0])
        tally.first_scale = f"first at row {first + row}: {float(scales[row]):.6g}, not {float(expected[row]):.6g}"
    tally.wrong_scales += len(wrong)
