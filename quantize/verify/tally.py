"""The comparison of a matrix's stored numbers with the source's, a few rows at a time.

The compiled kernel counts where all is right. PyTorch examines the remaining rows strip by strip, and describes the
faults in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.source import Checkpoint, tensor_bytes, torch_dtype
from ..format.constants import BLOCK
from ..format.e2m1 import E2M1_VALUES, round_e2m1
from ..format.native import Compared, compare_on_cpu, has_native
from ..format.scales import block_scale_bytes, decode_e4m3
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..weights.stored import StoredMatrix
from .subject import Subject

READ_ELEMENTS = 1 << 22  # at a time, of a thread
STRIP_ELEMENTS = 1 << 18  # of PyTorch's way: fits the cache with its few copies
RMSE_LIMIT = 0.25  # relative to the root mean square of the weights
GAIN_LIMITS = (0.9, 1.1)
# modelopt's multiplier turned into a divisor is off by two ulp, which moves what lies on the border of two codes.
BORDER_TOLERANCE = 2.0**-21
DIVISOR_TOLERANCE = 2.0**-23  # a reciprocal's reciprocal: twice half an ulp
_BYTES = torch.arange(256)
_LOW, _HIGH = (torch.tensor(E2M1_VALUES)[codes] for codes in (_BYTES & 15, _BYTES >> 4))


@dataclass(frozen=True)
class Rule:
    """The choices of one of nvquant's quantizers.

    Attributes:
        divisor: float32 scalar that block scales were made from.
        offsets: allowed distances of a block scale's byte from that of round-to-nearest.
    """

    divisor: Tensor
    offsets: range


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a matrix: the source's weights in their dtype, and what is stored of them."""

    first_row: int
    weight: Tensor
    packed: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Strip:
    """Some rows of a matrix, turned: each of the 16 rows here holds one position of all blocks.

    Attributes:
        first_row: number of the first of these rows in the matrix.
        blocks_a_row: blocks in a row of the matrix.
        source: float32 [16, n], the source's weights.
        codes: float32 [16, n], the E2M1 values that are stored.
        scales: uint8 [n], E4M3 bytes.
    """

    first_row: int
    blocks_a_row: int
    source: Tensor
    codes: Tensor
    scales: Tensor

    def position(self, block: int) -> tuple[int, int]:
        """Row and number of the block in it."""
        row, column = divmod(block, self.blocks_a_row)
        return self.first_row + row, column


@dataclass
class Tally:
    """Sums over the strips of a matrix.

    Attributes:
        error, energy, product: sums of (stored - source)^2, source^2 and stored * source.
        amax: the largest magnitude of the source.
        poor_blocks: blocks beyond the limits of the error.
        poor_rows, first_row: likewise rows, where they are counted, and the number of the first of them.
        shifted, rounded: of a cast, see `format.microscaling.CastRows`.
        wrong_codes, wrong_scales: their numbers, and the first of them in words.
    """

    blocks: int = 0
    error: float = 0.0
    energy: float = 0.0
    product: float = 0.0
    amax: float = 0.0
    poor_blocks: int = 0
    poor_rows: int = 0
    first_row: int = 0
    wrong_codes: int = 0
    first_code: str = ""
    wrong_scales: int = 0
    first_scale: str = ""
    shifted: int = 0
    rounded: int = 0

    def add(self, found: Compared, blocks: int) -> None:
        """Add what the compiled kernel counted in so many blocks, none of which it left open."""
        self.blocks += blocks
        self.energy += found.energy
        self.product += found.product
        self.error += found.error
        self.amax = max(self.amax, found.amax)
        self.poor_blocks += found.poor_blocks

    @property
    def relative_rmse(self) -> float:
        """Root of error over energy. For a matrix of zeros, 0 or infinity."""
        if self.energy:
            return math.sqrt(self.error / self.energy)
        return 0.0 if self.error == 0 else math.inf

    @property
    def gain(self) -> float:
        """The factor by which the stored weights are too large, in the least-squares sense."""
        return self.product / self.energy if self.energy else 1.0


def tally_matrix(
    subject: Subject, source: Checkpoint, matrix: StoredMatrix, rule: Rule | None, reshaping: Reshaping = UNCHANGED
) -> Tally:
    """Compare a sound matrix with the source's tensor of the same shape.

    Args:
        reshaping: folds that the source's matrix goes through first.
        rule: the allowed block scales. Others are counted, and the codes that are not the nearest. None counts neither.
    """
    tally = Tally()
    divisor = subject.divisor(matrix.module)
    for read in read_matrix(subject.checkpoint, source, matrix, reshaping):
        found = _compiled(read, divisor, rule)
        if found is not None and not found.unsettled_blocks:
            tally.add(found, read.scales.numel())
            continue
        for strip in strips_of(read):
            step = decode_e4m3(strip.scales) / divisor
            add_errors(tally, strip, step)
            if rule is not None:
                _tally_codes(tally, strip, step)
                _tally_scales(tally, strip, rule)
    return tally


def read_matrix(
    checkpoint: Checkpoint, source: Checkpoint, matrix: StoredMatrix, reshaping: Reshaping = UNCHANGED
) -> Iterator[Rows]:
    """A matrix with block scales and the source's tensor after folds, some complete rows at a time."""
    height = max(1, READ_ELEMENTS // matrix.cols)
    for first in range(0, matrix.rows, height):
        rows = range(first, min(matrix.rows, first + height))
        weight = reshaping.weight(matrix.module, read_rows(source, f"{matrix.module}.weight", rows), first)
        packed, scales = (read_rows(checkpoint, matrix.parts[part].name, rows) for part in ("codes", "scales"))
        yield Rows(first, weight, packed, scales.view(torch.uint8))


def _compiled(read: Rows, divisor: Tensor, rule: Rule | None) -> Compared | None:
    """The counts of the compiled kernel. None where it is missing, or the stored divisor is not the rule's, whose codes
    it would expect."""
    made_from = divisor if rule is None else rule.divisor
    if not has_native(read.weight) or not abs(float(divisor / made_from) - 1) <= DIVISOR_TOLERANCE:
        return None
    return compare_on_cpu(
        *(read.weight, read.packed, read.scales, float(divisor)),
        bounds=(RMSE_LIMIT**2, *GAIN_LIMITS),
        rule=None if rule is None else (float(made_from), rule.offsets[0], rule.offsets[-1]),
    )


def strips_of(read: Rows) -> Iterator[Strip]:
    """Strips of complete rows, decoded but for their scales."""
    cols = read.weight.shape[1]
    height = max(1, STRIP_ELEMENTS // cols)
    for first in range(0, len(read.weight), height):
        rows = slice(first, first + height)
        weight = read.weight[rows].reshape(-1, BLOCK)
        packed = read.packed[rows].reshape(-1, BLOCK // 2).t().int().contiguous()
        codes = torch.empty(BLOCK, packed.shape[1])
        for at in range(BLOCK // 2):
            torch.index_select(_LOW, 0, packed[at], out=codes[2 * at])
            torch.index_select(_HIGH, 0, packed[at], out=codes[2 * at + 1])
        turned = weight.t().to(torch.float32, memory_format=torch.contiguous_format)
        yield Strip(read.first_row + first, cols // BLOCK, turned, codes, read.scales[rows].flatten())


def read_rows(checkpoint: Checkpoint, name: str, rows: range) -> Tensor:
    """Some rows of a tensor of a checkpoint, in its dtype."""
    info = checkpoint.info(name)
    tensor = torch.empty((len(rows), *info.shape[1:]), dtype=torch_dtype(info.dtype))
    checkpoint.read_into(name, tensor_bytes(tensor), rows.start * (info.nbytes // info.shape[0]))
    return tensor


def add_errors(tally: Tally, strip: Strip, step: Tensor) -> None:
    """Add the errors of a strip, and the blocks beyond the limits.

    Args:
        step: float32 [n], the value of a code of one in each block.
    """
    stored = strip.codes * step
    energy = strip.source.square().sum(0)
    product = (stored * strip.source).sum(0)
    error = stored.sub_(strip.source).square_().sum(0)
    tally.blocks += len(energy)
    tally.energy += float(energy.sum(dtype=torch.float64))
    tally.product += float(product.sum(dtype=torch.float64))
    tally.error += float(error.sum(dtype=torch.float64))
    low, high = torch.aminmax(strip.source)
    tally.amax = max(tally.amax, -float(low), float(high))
    good = (
        (error <= energy * RMSE_LIMIT**2) & (product >= energy * GAIN_LIMITS[0]) & (product <= energy * GAIN_LIMITS[1])
    )
    tally.poor_blocks += len(good) - int(good.sum())


def _tally_codes(tally: Tally, strip: Strip, step: Tensor) -> None:
    """Count the codes that are not the nearest: what rounding gives again, or as near to within an ulp or two."""
    scaled = strip.source / step
    nearest = round_e2m1(scaled)
    if torch.equal(nearest, strip.codes):
        return
    excess = (scaled - strip.codes).abs_() - (scaled - nearest).abs_()
    wrong = ~(excess <= scaled.abs() * BORDER_TOLERANCE)
    count = int(wrong.sum())
    if count and not tally.wrong_codes:
        block, lane = wrong.t().nonzero()[0].tolist()
        row, column = strip.position(block)
        was, is_now = float(strip.source[lane, block]), float(strip.codes[lane, block] * step[block])
        tally.first_code = f"first at row {row}, column {column * BLOCK + lane}: {was:.6g} is stored as {is_now:.6g}"
    tally.wrong_codes += count


def _tally_scales(tally: Tally, strip: Strip, rule: Rule) -> None:
    """Count the block scales that the rule does not allow. That of a block of zeros is fixed."""
    amax = strip.source.abs().amax(0)
    nearest = block_scale_bytes(amax, rule.divisor)
    offset = strip.scales.to(torch.int16) - nearest.to(torch.int16)
    wrong = ~((offset == 0) | ((offset >= rule.offsets[0]) & (offset <= rule.offsets[-1]) & (amax > 0)))
    count = int(wrong.sum())
    if count and not tally.wrong_scales:
        block = int(wrong.nonzero()[0])
        row, number = strip.position(block)
        stored, rounded = int(strip.scales[block]), int(nearest[block])
        tally.first_scale = f"first at row {row}, block {number}: 0x{stored:02X}, where rounding gives 0x{rounded:02X}"
    tally.wrong_scales += count
