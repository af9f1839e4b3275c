"""The comparison of a matrix that keeps the codes of a quantized source with this source, a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.source import Checkpoint
from ..format.constants import BLOCK
from ..format.fp8 import quantize_rows
from ..format.microscaling import cast_rows
from ..recipe.matrices import Matrix
from ..stream.manifest import CastRecord
from ..weights.encoded import Encoded, encoded
from ..weights.stored import StoredMatrix
from .subject import Subject
from .tally import READ_ELEMENTS, Tally, read_rows


def tally_cast(subject: Subject, source: Checkpoint, matrix: StoredMatrix, record: CastRecord) -> Tally:
    """Count the codes and scales that are not those of the source, and the blocks of MXFP4 that lost bits.

    Args:
        record: of the matrix's group.
    """
    tally = Tally()
    scales = subject.checkpoint.read(matrix.parts["scales"].name)
    wanted_of = Matrix(matrix.module, matrix.tensor, matrix.scheme, matrix.rows, matrix.cols, "", "", "")
    height = max(1, READ_ELEMENTS // matrix.cols)
    for first in range(0, matrix.rows, height):
        rows = range(first, min(matrix.rows, first + height))
        weight = read_rows(source, matrix.tensor, rows)
        tally.amax = max(tally.amax, float(weight.abs().max()))
        codes = read_rows(subject.checkpoint, matrix.parts["codes"].name, rows).view(torch.uint8)
        own = encoded(source, wanted_of, rows)
        if own is None or own.form != record.source:
            tally.wrong_codes = matrix.rows * matrix.cols
            tally.first_code = f"the source is not stored in {record.source}"
            return tally
        expected_codes, expected_scales = _expected(tally, weight, own, record)
        tally.blocks += weight.numel() // BLOCK
        stored = scales[rows.start : rows.stop]
        stored = stored.view(torch.uint8) if matrix.scheme.has_block_scales else stored.float()
        _count(tally, expected_codes != codes, expected_scales != stored, first)
    return tally


def cast_faults(matrix: StoredMatrix, tally: Tally, cast: CastRecord) -> list[str]:
    """Codes and scales that are not the source's."""
    return [
        f"{matrix.module}: {count:,} bytes of {words} are not those of the {cast.source} source ({first})"
        for count, words, first in (
            (tally.wrong_codes, "codes", tally.first_code),
            (tally.wrong_scales, "scales", tally.first_scale),
        )
        if count
    ]


def changed_faults(
    subject: Subject, casts: Mapping[str, CastRecord], matrices: Sequence[StoredMatrix], tallies: Sequence[Tally]
) -> list[str]:
    """Groups whose manifest has another number of blocks that changed in a cast than the source gives."""
    sums: dict[str, tuple[int, int]] = {}
    records: dict[str, CastRecord] = {}
    for matrix, found in zip(matrices, tallies, strict=True):
        if matrix.module in casts:
            group = subject.fusions.name(matrix.module)
            shifted, rounded = sums.get(group, (0, 0))
            sums[group], records[group] = (shifted + found.shifted, rounded + found.rounded), casts[matrix.module]
    whole = {group.name for group in subject.sound_groups}
    return [
        f"{group}: the manifest counts {record.shifted:,} shifted and {record.rounded:,} rounded blocks, but the cast "
        f"of the source has {sums[group][0]:,} and {sums[group][1]:,}"
        for group, record in records.items()
        if group in whole and sums[group] != (record.shifted, record.rounded)
    ]


def cast_words(casts: Mapping[str, CastRecord], matrices: Sequence[StoredMatrix], tallies: Sequence[Tally]) -> str:
    """Words on the matrices that keep the codes of their source, after a comma. Empty where there are none."""
    if not casts:
        return ""
    forms = " and ".join(sorted({cast.source for cast in casts.values()}))
    found = [tally for matrix, tally in zip(matrices, tallies, strict=True) if matrix.module in casts]
    changed = sum(tally.rounded for tally in found)
    return f", {len(casts):,} with the codes of the {forms} source ({changed:,} blocks of them requantized)"


def _expected(tally: Tally, weight: Tensor, own: Encoded, record: CastRecord) -> tuple[Tensor, Tensor]:
    """The codes and scales of some rows, uint8, or float32 scales of FP8."""
    if record.exponent is None:
        return quantize_rows(weight, own.scales).view(torch.uint8), own.scales
    rows = cast_rows(weight, own.scales, record.exponent)
    tally.shifted += rows.shifted
    tally.rounded += rows.rounded
    return rows.packed, rows.scales.view(torch.uint8)


def _count(tally: Tally, codes: Tensor, scales: Tensor, first: int) -> None:
    """Add the bytes that differ, bool [rows, bytes] and [rows, scales], of rows from `first` on."""
    for is_wrong, count, words in ((codes, "wrong_codes", "first_code"), (scales, "wrong_scales", "first_scale")):
        found = is_wrong.nonzero()
        if len(found) and not getattr(tally, count):
            row, place = found[0].tolist()
            setattr(tally, words, f"first at row {first + row}, byte {place}")
        setattr(tally, count, getattr(tally, count) + len(found))
