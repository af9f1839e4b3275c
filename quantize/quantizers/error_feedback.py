"""GPTQ on blocks of 16: round column after column, and let the later columns make up for the error.

docs/accuracy.md, section "gptq", has the order of the columns and the choice of a block's scale. The formulas are of
Frantar et al., "GPTQ" (arXiv 2210.17323): for a Hessian H with U upper triangular and UᵀU = H⁻¹, the error of column j,
divided by U_jj, times row j of U, is subtracted from the columns that follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..format.constants import BLOCK, E4M3_MAX
from ..format.e2m1 import encode_e2m1, pack_codes, round_e2m1
from ..format.kernels import FedBack, feed_back_with_kernel, has_kernel
from ..format.scales import block_scale_bytes, decode_e4m3, sixth
from .triangular import factorise, invert

OFFSETS = range(-2, 8)
"""Candidates for a block's scale: distances of their E4M3 bytes from that of amax / 6 of the updated columns."""
LARGEST_BYTE = 0x7E
PANEL = 128  # columns whose errors reach the columns behind them in one product
_ROWS = 1024  # of a copy at a time
MOST_RETRIES = 4
RAISED = 10.0  # factor of the damping after a failed factorisation


@dataclass(frozen=True)
class Solved:
    """Rounded weights.

    Attributes:
        packed: uint8 [rows, cols / 2], two E2M1 codes a byte, the even column in the low nibble.
        scales: float8_e4m3fn [rows, cols / 16].
        outgrown: blocks whose updated weights outgrew the largest block scale, and were clipped.
        damping: the one that succeeded, see `damped_factor`.
    """

    packed: Tensor
    scales: Tensor
    outgrown: int
    damping: float


class NoFactor(Exception):
    """A matrix has no Cholesky factor, whatever its damping."""


def damped_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
    """The lower Cholesky factor of a matrix with a part of its mean diagonal added to the diagonal.

    Args:
        gram: float32 [n, n], symmetric. It is not changed.
        damping: the part. After a failed factorisation it is ten times as large, four times at most.
        order: int64 [n], a new order of rows and columns. None for that of `gram`.
    Returns:
        the factor, and the damping that succeeded.
    Raises:
        NoFactor: no factorisation succeeded.
    """
    mean = float(gram.diagonal().double().mean()) or 1.0
    for retry in range(MOST_RETRIES + 1):
        used = damping * RAISED**retry
        damped = gram.clone() if order is None else _reordered(gram, order)
        damped.diagonal().add_(used * mean)
        if factorise(damped):
            return damped, used
    raise NoFactor


def _reordered(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in another order, with one copy."""
    made = torch.empty_like(gram)
    for begin in range(0, len(order), _ROWS):
        made[begin : begin + _ROWS] = gram[order[begin : begin + _ROWS]][:, order]
    return made


class InverseFactor:
    """U, upper triangular, with UᵀU the inverse of a damped matrix: one factorisation and one triangular inverse.

    With J the reversal of the order and L the factor of J·H·J, U is J·L⁻¹·J. Only some rows of it are needed at a time.

    Attributes:
        damping: the one that succeeded.

    Args:
        gram, damping: see `damped_factor`, which also has the errors.
        order: int64 [n] of the rows and columns of H in those of `gram`.
    """

    def __init__(self, gram: Tensor, damping: float, order: Tensor) -> None:
        self._reversed, self.damping = damped_factor(gram, damping, order.flip(0))
        invert(self._reversed)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows of U, float32 [end - begin, n]."""
        size = len(self._reversed)
        return self._reversed[size - end : size - begin].flip(0, 1)


def column_order(diagonal: Tensor) -> Tensor:
    """Blocks of 16 by falling trace, and the columns inside a block by falling diagonal.

    Args:
        diagonal: float32 [cols] of the Gram matrix.
    Returns:
        int64 [cols], the columns in the order in which they are rounded.
    """
    blocks = diagonal.double().view(-1, BLOCK)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    order = blocks.sum(1).argsort(descending=True, stable=True)
    return (inside + BLOCK * torch.arange(len(blocks), device=diagonal.device).unsqueeze(1))[order].flatten()


def round_with_feedback(weight: Tensor, gram: Tensor, scale: Tensor, damping: float) -> Solved:
    """Round a matrix to NVFP4 so that its products with the inputs change least.

    Args:
        weight: float32 [rows, cols], the stacked matrices of a fused group. cols divisible by 16.
        gram: float32 [cols, cols], the mean of x·xᵀ over the inputs as the server rounds them.
        scale: float32 scalar, the global scale (divisor) of the fused group.
        damping: see `damped_factor`.
    Raises:
        NoFactor: see `damped_factor`.
    """
    cols = weight.shape[1]
    order = column_order(gram.diagonal())
    inverse = InverseFactor(gram, damping, order)
    turned = weight.t()[order].contiguous()
    codes = torch.empty(turned.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty((cols // BLOCK, weight.shape[0]), dtype=torch.uint8, device=weight.device)
    errors = torch.empty((PANEL, weight.shape[0]), device=weight.device)
    outgrown = torch.zeros((), dtype=torch.int32, device=weight.device)
    for begin in range(0, cols, PANEL):
        end = min(cols, begin + PANEL)
        upper = inverse.rows(begin, end)
        for at in range(begin, end, BLOCK):
            inside, behind = slice(at, at + BLOCK), slice(at + BLOCK, end)
            own, error = upper[at - begin : at - begin + BLOCK], errors[at - begin : at - begin + BLOCK]
            into = FedBack(codes[inside], scales[at // BLOCK], error, outgrown)
            round_block(turned[inside], own[:, inside], scale, into)
            turned[behind].addmm_(own[:, behind].t(), error, alpha=-1)
        turned[end:].addmm_(upper[:, end:].t(), errors[: end - begin], alpha=-1)
    place = order.argsort()
    blocks = (order[::BLOCK] // BLOCK).argsort()
    packed = pack_codes(codes[place].t())
    stored = scales[blocks].t().contiguous().view(torch.float8_e4m3fn)
    return Solved(packed.contiguous(), stored, int(outgrown), inverse.damping)


def round_block(block: Tensor, upper: Tensor, scale: Tensor, into: FedBack) -> None:
    """Round a block under each candidate scale, its errors fed forward inside it, and keep the cheapest for each row.

    Args:
        block: float32 [16, rows], the updated columns.
        upper: float32 [16, 16], the block's part of U.
        scale: float32 scalar, the global scale (divisor).
        into: contiguous tensors for the result. `outgrown` is added to.
    """
    if has_kernel(block) and block.is_contiguous():
        feed_back_with_kernel(block, upper, scale, OFFSETS, into)
        return
    found = round_block_in_torch(block, upper, scale)
    for part, value in zip(into[:3], found[:3], strict=True):
        part.copy_(value)
    into.outgrown.add_(found.outgrown)


def round_block_in_torch(block: Tensor, upper: Tensor, scale: Tensor) -> FedBack:
    """`round_block` in PyTorch: the reference for the kernels."""
    amax = block.abs().amax(0)
    nearest = block_scale_bytes(amax, scale)
    offsets = torch.tensor(OFFSETS, dtype=torch.int16, device=block.device).unsqueeze(1)
    candidates = (nearest.to(torch.int16) + offsets).clamp_(1, LARGEST_BYTE).to(torch.uint8)
    step = decode_e4m3(candidates).div_(scale)  # [candidates, rows]
    left = block.unsqueeze(1).repeat(1, len(OFFSETS), 1)
    errors, cost = torch.empty_like(left), torch.zeros_like(step)
    for column in range(BLOCK):
        rounded = round_e2m1(left[column] / step).mul_(step)
        error = torch.sub(left[column], rounded, out=errors[column]).div_(upper[column, column])
        cost += error * error
        left[column + 1 :] -= upper[column, column + 1 :, None, None] * error
    best = cost.argmin(0)
    chosen = best.view(1, 1, -1).expand(BLOCK, 1, -1)
    step_of_best = step.gather(0, best.unsqueeze(0))
    return FedBack(
        encode_e2m1(left.gather(1, chosen).squeeze(1) / step_of_best),
        candidates.gather(0, best.unsqueeze(0)).squeeze(0),
        errors.gather(1, chosen).squeeze(1),
        (sixth(amax).mul_(scale) > E4M3_MAX).sum(),
    )
