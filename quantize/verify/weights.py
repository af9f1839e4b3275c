"""The quantized matrices against the source's weights.

For nvquant's own quantizers the check is exact: every code is the nearest one under the scale that is stored, and
every block scale is one that the quantizer may choose. Other tools compute in another order or choose scales by other
rules, so for theirs the error must stay within limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..checkpoint.headers import TensorInfo
from ..checkpoint.source import Checkpoint
from ..format.blocks import dequantize_blocks
from ..format.constants import BLOCK
from ..format.scales import global_scale
from ..quantizers.base import Quantizer
from ..quantizers.mse import CLAIM, sweep_blocks
from ..reshape.reshaping import Reshaping
from ..stream.manifest import Manifest
from ..weights.stored import StoredMatrix
from .against import with_own_head
from .folds import folds_of
from .moved import scale_change
from .recorded import cast_of, claim_of, own_quantizer
from .report import Finding, counted
from .subject import Subject
from .tally import GAIN_LIMITS, RMSE_LIMIT, Rule, Tally, read_rows, tally_matrix
from .tally_cast import cast_faults, cast_words, changed_faults, tally_cast
from .tally_distilled import tally_distilled
from .tally_fed_back import BLOCK_LIMIT as FED_BACK_LIMIT
from .tally_fed_back import BLOCK_SHARE as FED_BACK_SHARE
from .tally_fed_back import tally_fed_back
from .tally_fp8 import RMSE_LIMIT as FP8_RMSE_LIMIT
from .tally_fp8 import tally_fp8
from .threads import map_in_threads

BLOCK_SHARE = 0.99
COMPARED_ROWS = 8
AMAX_FACTOR = 2.0  # of the target and the source. Measured on SmolLM2-135M after 2,048 tokens: 0.95 to 1.03
MUCH_BETTER = 0.97  # of the error; what is nearer is not worth a word
_NO_TENSOR = TensorInfo("", "", (), 0, 0)


def check_weights(subject: Subject, source: Checkpoint) -> Finding:
    """Check that every quantized matrix is its source's after the recorded folds: the nearest code to every element, or
    errors within limits.

    For nvquant's rtn and mse, each element is the nearest E2M1 value under its stored scale, or the largest where it
    is clipped. Each block scale is rtn's own, or among mse's candidates. For FP8, each element is the nearest E4M3
    value, and each row scale is amax / 448. Each group's amax is that of the manifest.

    For gptq, whose codes depend on the inputs, the relative RMSE of a matrix is at most 0.25 and its gain 0.9 to 1.1.
    The relative RMSE of every row, and of 99.9 % of the blocks, is at most 0.5. Each group's amax is that of the
    manifest within a factor of 2. Its FP8 matrices and its head are exact, as above.

    After distillation of rtn's and mse's, each block is the quantizer's with another block scale, within the recorded
    change, and the relative RMSE of a matrix is at most 0.25 and its gain 0.9 to 1.1. Error feedback keeps its limits.

    A matrix that keeps the codes of a quantized source has these codes and their scales, bit for bit, and as many
    blocks that lost bits as the manifest counts.

    For other tools, the relative RMSE is at most 0.25 and the least-squares gain 0.9 to 1.1, of the matrix and of 99 %
    of its blocks. In FP8, the relative RMSE is at most 0.08, of the matrix and of its rows.
    """
    source = with_own_head(source, subject)
    infos = source.infos()
    quantizer = own_quantizer(subject)
    matrices = [
        m for m in subject.sound.values() if infos.get(f"{m.module}.weight", _NO_TENSOR).shape == (m.rows, m.cols)
    ]
    reshaping = folds_of(subject, source)
    rules = {matrix.module: _rule(subject, matrix, quantizer) for matrix in matrices}
    fed_back = {matrix.module for matrix in matrices if _is_fed_back(subject, matrix)}
    casts = {matrix.module: cast for matrix in matrices if (cast := cast_of(subject, matrix.module)) is not None}

    def tally(matrix: StoredMatrix) -> Tally:
        if matrix.module in casts:
            return tally_cast(subject, source, matrix, casts[matrix.module])
        if matrix.module in fed_back:
            return tally_fed_back(subject, source, matrix, reshaping)
        return _tally(subject, source, matrix, rules[matrix.module], reshaping)

    tallies = map_in_threads(tally, matrices, subject.progress, "comparing weights")
    faults: list[str] = []
    amaxes: dict[str, float] = {}
    for matrix, found in zip(matrices, tallies, strict=True):
        if matrix.module in casts:
            faults += cast_faults(matrix, found, casts[matrix.module])
        elif matrix.module in fed_back:
            faults += _fed_back_faults(matrix, found)
        else:
            faults += _quantized_faults(subject, matrix, found, is_exact=rules[matrix.module] is not None)
        group = subject.fusions.name(matrix.module)
        amaxes[group] = max(found.amax, amaxes.get(group, 0.0))
    if quantizer is not None:
        faults += changed_faults(subject, casts, matrices, tallies)
        faults += _amax_faults(subject, amaxes, {subject.fusions.name(module) for module in fed_back})
    how = _how(quantizer, len(matrices), len(fed_back)) + cast_words(casts, matrices, tallies)
    elements = sum(found.blocks for found in tallies) * BLOCK
    number = counted(len(matrices), "matrix", "matrices")
    beside = _beside_mse(subject, source, matrices) if subject.manifest is None and not faults else ""
    return Finding(f"{number}, {elements:,} elements, {how}{_worst(matrices, tallies)}{beside}", faults)


def _how(quantizer: Quantizer | None, matrices: int, fed_back: int) -> str:
    """Words on how the matrices were compared."""
    if fed_back:
        return f"{matrices - fed_back:,} exact, {fed_back:,} by the limits for error feedback"
    return f"exact for {quantizer.name}" if quantizer is not None else "by limits, because another tool made them"


def _tally(
    subject: Subject, source: Checkpoint, matrix: StoredMatrix, rule: Rule | None, reshaping: Reshaping
) -> Tally:
    if rule is not None and _has_moved(subject, matrix):
        return tally_distilled(subject, source, matrix, rule, scale_change(subject, matrix.module), reshaping)
    if matrix.scheme.has_block_scales:
        return tally_matrix(subject, source, matrix, rule, reshaping)
    return tally_fp8(subject, source, matrix, rule is not None, reshaping)


def _has_moved(subject: Subject, matrix: StoredMatrix) -> bool:
    """Whether distillation changed block scales of a matrix, as far as the manifest records it."""
    return matrix.scheme.has_block_scales and scale_change(subject, matrix.module) > 0


def _worst(matrices: Sequence[StoredMatrix], tallies: Sequence[Tally]) -> str:
    """Words on the matrix with the largest error. An error that is no number is the largest."""
    if not matrices:
        return ""
    rmse = [math.inf if math.isnan(tally.relative_rmse) else tally.relative_rmse for tally in tallies]
    at = rmse.index(max(rmse))
    return f", largest relative RMSE {tallies[at].relative_rmse:.4f} ({matrices[at].module})"


def _beside_mse(subject: Subject, source: Checkpoint, matrices: Sequence[StoredMatrix]) -> str:
    """Words on how much of another tool's error nvquant's mse would leave, on a few rows of every matrix."""
    headroom = CLAIM.headroom
    energy = error = least = 0.0
    for matrix in matrices:
        if not matrix.scheme.has_block_scales:
            continue
        rows = range(matrix.rows // 2, min(matrix.rows, matrix.rows // 2 + COMPARED_ROWS))
        weight = read_rows(source, f"{matrix.module}.weight", rows).float()
        packed, scales = (read_rows(subject.checkpoint, matrix.parts[part].name, rows) for part in ("codes", "scales"))
        divisor = subject.divisor(matrix.module)
        searched = sweep_blocks(weight, divisor / headroom)
        stored = dequantize_blocks(packed, scales, divisor)
        best = dequantize_blocks(searched.packed, searched.scales, divisor / headroom)
        energy += float(weight.square().sum())
        error += float((stored - weight).square().sum())
        least += float((best - weight).square().sum())
    if not energy or not least < MUCH_BETTER**2 * error:
        return ""
    return (
        f", quantizer mse would reduce the relative RMSE from {math.sqrt(error / energy):.4f} to "
        f"{math.sqrt(least / energy):.4f} on {COMPARED_ROWS} rows of each"
    )


def _rule(subject: Subject, matrix: StoredMatrix, quantizer: Quantizer | None) -> Rule | None:
    """The quantizer's allowed choices for a matrix, where the manifest has its group's amax."""
    if quantizer is None or not isinstance(subject.manifest, Manifest):
        return None
    group = subject.manifest.groups.get(subject.fusions.name(matrix.module))
    if group is None:
        return None
    claim = claim_of(subject, group, quantizer)
    if claim.scale_offsets is None:
        return None
    return Rule(global_scale(torch.tensor(group.record.weight_amax), claim.headroom), claim.scale_offsets)


def _is_fed_back(subject: Subject, matrix: StoredMatrix) -> bool:
    """Whether the recorded quantizer claims neither scales nor codes of a matrix that stand in the manifest."""
    quantizer = own_quantizer(subject)
    if quantizer is None or not isinstance(subject.manifest, Manifest):
        return False
    group = subject.manifest.groups.get(subject.fusions.name(matrix.module))
    has_scales = matrix.scheme.has_block_scales and cast_of(subject, matrix.module) is None
    return has_scales and group is not None and claim_of(subject, group, quantizer).codes == "any"


def _quantized_faults(subject: Subject, matrix: StoredMatrix, tally: Tally, is_exact: bool) -> list[str]:
    if not is_exact:
        return _bound_faults(matrix, tally)
    return _distilled_faults(matrix, tally) if _has_moved(subject, matrix) else _exact_faults(matrix, tally)


def _exact_faults(matrix: StoredMatrix, tally: Tally) -> list[str]:
    faults = []
    if tally.wrong_codes:
        share = f"{tally.wrong_codes:,} of {tally.blocks * BLOCK:,} elements"
        faults.append(f"{matrix.module}: {share} are not the nearest under their stored scale ({tally.first_code})")
    if tally.wrong_scales:
        count = f"{tally.blocks:,} block" if matrix.scheme.has_block_scales else f"{matrix.rows:,} row"
        share = f"{tally.wrong_scales:,} of {count} scales"
        faults.append(f"{matrix.module}: {share} differ from the quantizer's ({tally.first_scale})")
    return faults


def _distilled_faults(matrix: StoredMatrix, tally: Tally) -> list[str]:
    faults = _matrix_faults(matrix, tally, RMSE_LIMIT)
    if tally.wrong_scales:
        faults.append(
            f"{matrix.module}: {tally.wrong_scales:,} of {tally.blocks:,} blocks are not the quantizer's with a block "
            f"scale within the recorded change ({tally.first_scale})"
        )
    return faults


def most_poor_blocks(blocks: int, good: float = BLOCK_SHARE) -> float:
    """The number of blocks of a sound matrix that may exceed the limits: all but the share of good ones, and two
    standard deviations of such a count, because a small matrix has a few by chance."""
    share = (1 - good) * blocks
    return share + 2 * math.sqrt(share)


def _fed_back_faults(matrix: StoredMatrix, tally: Tally) -> list[str]:
    faults = _matrix_faults(matrix, tally, RMSE_LIMIT)
    if tally.poor_rows:
        faults.append(
            f"{matrix.module}: {tally.poor_rows:,} of {matrix.rows:,} rows exceed the limit of error {FED_BACK_LIMIT} "
            f"(first row {tally.first_row})"
        )
    if not faults and tally.poor_blocks > most_poor_blocks(tally.blocks, FED_BACK_SHARE):
        faults.append(
            f"{matrix.module}: {tally.poor_blocks:,} of {tally.blocks:,} blocks exceed the limit of error "
            f"{FED_BACK_LIMIT}, more than 0.1 %"
        )
    return faults


def _matrix_faults(matrix: StoredMatrix, tally: Tally, limit: float) -> list[str]:
    gain, rmse = tally.gain, tally.relative_rmse
    if rmse <= limit and GAIN_LIMITS[0] <= gain <= GAIN_LIMITS[1]:
        return []
    return [
        f"{matrix.module}: relative RMSE {rmse:.3g} and gain {gain:.3g}, the limits are {limit} and "
        f"{GAIN_LIMITS[0]} to {GAIN_LIMITS[1]}"
    ]


def _bound_faults(matrix: StoredMatrix, tally: Tally) -> list[str]:
    limit = RMSE_LIMIT if matrix.scheme.has_block_scales else FP8_RMSE_LIMIT
    faults = _matrix_faults(matrix, tally, limit)
    if faults:
        return faults
    if matrix.scheme.has_block_scales and tally.poor_blocks > most_poor_blocks(tally.blocks):
        faults.append(
            f"{matrix.module}: {tally.poor_blocks:,} of {tally.blocks:,} blocks exceed the limits of error and gain, "
            f"more than 1 %"
        )
    elif not matrix.scheme.has_block_scales and tally.poor_blocks > _most_poor_in_rows(matrix, tally):
        rows = tally.poor_blocks * BLOCK // matrix.cols
        faults.append(f"{matrix.module}: {rows:,} of {matrix.rows:,} rows exceed the limit of error {limit}")
    return faults


def _most_poor_in_rows(matrix: StoredMatrix, tally: Tally) -> float:
    """The number of blocks in rows of a sound FP8 matrix that may exceed the limit. None under a scale of each row,
    because E4M3 is then near to every element that matters in its row. Under one scale, small rows lose bits."""
    return most_poor_blocks(tally.blocks) if "scales" in matrix.scheme.shared else 0


def _amax_faults(subject: Subject, amaxes: dict[str, float], fed_back: set[str]) -> list[str]:
    """Groups whose weights in the source have another amax than the one that their global scale was made from. Weights
    of the target of error feedback are near the source's, but not equal.

    Args:
        fed_back: the groups with error feedback.
    """
    groups = subject.manifest.groups if isinstance(subject.manifest, Manifest) else {}

    def is_as_recorded(name: str) -> bool:
        found, recorded = amaxes[name], groups[name].record.weight_amax
        return found / AMAX_FACTOR <= recorded <= found * AMAX_FACTOR if name in fed_back else found == recorded

    return [
        f"{group.name}: the source's amax is {amaxes[group.name]:.6g}, the manifest has "
        f"{groups[group.name].record.weight_amax:.6g}"
        for group in subject.sound_groups
        if group.name in amaxes and group.name in groups and not is_as_recorded(group.name)
    ]
