"""The comparison of a distilled matrix with the source's: its codes are the quantizer's, and its block scales have
moved since.

For each block, one of the quantizer's scales must make every code the nearest one, and the stored scale must be within
the recorded factor of it. For error feedback, whose codes and scales verify cannot recompute, its own limits hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.source import Checkpoint
from ..format.constants import ZERO_BLOCK_BYTE
from ..format.e2m1 import round_e2m1
from ..format.scales import block_scale_bytes, decode_e4m3
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..weights.stored import StoredMatrix
from .subject import Subject
from .tally import BORDER_TOLERANCE, Rule, Strip, Tally, add_errors, read_matrix, strips_of

TOLERANCE = 1e-5  # of a logarithm
_LARGEST_BYTE = 0x7E


def tally_distilled(
    subject: Subject,
    source: Checkpoint,
    matrix: StoredMatrix,
    rule: Rule,
    change: float,
    reshaping: Reshaping = UNCHANGED,
) -> Tally:
    """Compare a sound matrix with the source's tensor of the same shape. `Tally.wrong_scales` counts blocks.

    Args:
        rule: the block scales that the quantizer may choose.
        change: the largest |ln(after / before)| of a block scale.
        reshaping: folds that the source's matrix goes through first.
    """
    tally = Tally()
    divisor = subject.divisor(matrix.module)
    for read in read_matrix(subject.checkpoint, source, matrix, reshaping):
        for strip in strips_of(read):
            add_errors(tally, strip, decode_e4m3(strip.scales) / divisor)
            wrong = ~_explained(strip, rule, change)
            count = int(wrong.sum())
            if count and not tally.wrong_scales:
                row, number = strip.position(int(wrong.nonzero()[0]))
                tally.first_scale = f"first at row {row}, block {number}"
            tally.wrong_scales += count
    return tally


def _explained(strip: Strip, rule: Rule, change: float) -> Tensor:
    """Whether each block is the quantizer's with a scale that moved within the bound, bool [n]."""
    stored, amax = decode_e4m3(strip.scales), strip.source.abs().amax(0)
    nearest = block_scale_bytes(amax, rule.divisor).int()
    explained = (amax == 0) & (strip.scales == ZERO_BLOCK_BYTE) & (strip.codes == 0).all(0)
    for offset in (*rule.offsets, *(() if 0 in rule.offsets else (0,))):
        tried = nearest + offset
        scales = decode_e4m3(tried.clamp(1, _LARGEST_BYTE).to(torch.uint8))
        is_near = (stored / scales).log().abs() <= change + TOLERANCE
        at = (is_near & (tried >= 1) & (tried <= _LARGEST_BYTE) & (amax > 0) & ~explained).nonzero().flatten()
        if len(at):
            explained[at] = _are_nearest(strip.source[:, at], strip.codes[:, at], scales[at] / rule.divisor)
    return explained


def _are_nearest(source: Tensor, codes: Tensor, step: Tensor) -> Tensor:
    """Whether all codes of each block are the nearest under a step, or as near to within an ulp or two."""
    scaled = source / step
    excess = (scaled - codes).abs_() - (scaled - round_e2m1(scaled)).abs_()
    return (excess <= scaled.abs() * BORDER_TOLERANCE).all(0)
