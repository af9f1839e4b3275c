"""Cholesky factors and inverses of triangular matrices, in place: a matrix of 21504 columns has 1.85 GB.

Blocks on the diagonal go to LAPACK or cuSOLVER. The rest is matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 2048


def factorise(matrix: Tensor, panel: int = PANEL) -> bool:
    """Replace the lower triangle of a symmetric matrix by its Cholesky factor L, with L·Lᵀ the matrix.

    Args:
        matrix: float32 [n, n]. What lies above the diagonal becomes zero.
        panel: columns at a time.
    Returns:
        False if the matrix is not positive definite. It is spoiled then.
    """
    size = len(matrix)
    for begin in range(0, size, panel):
        end = min(size, begin + panel)
        square = matrix[begin:end, begin:end]
        factor, failed = torch.linalg.cholesky_ex(square)
        if int(failed) or not bool(factor.isfinite().all()):
            return False
        square.copy_(factor)
        matrix[begin:end, end:] = 0
        if end == size:
            return True
        below = matrix[end:, begin:end]
        below.copy_(torch.linalg.solve_triangular(factor, below.t(), upper=False).t())
        for at in range(end, size, panel):  # the lower triangle alone
            matrix[at:, at : at + panel] -= below[at - end :] @ below[at - end : at - end + panel].t()
    return True


def invert(lower: Tensor, panel: int = PANEL) -> None:
    """Replace a lower triangular matrix by its inverse.

    With blocks A and D on the diagonal and C below A, the inverse has A⁻¹ and D⁻¹ there, and -D⁻¹·C·A⁻¹ below A⁻¹.

    Args:
        lower: float32 [n, n], zero above the diagonal.
        panel: the size from which on it is split.
    """
    size = len(lower)
    if size <= panel:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    middle = size // 2
    above, beside, below = lower[:middle, :middle], lower[middle:, :middle], lower[middle:, middle:]
    invert(above, panel)
    invert(below, panel)
    beside.copy_((below @ beside).neg_() @ above)
