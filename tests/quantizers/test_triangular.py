"""Factors and inverses in place are those of the library, whatever the panels."""

from __future__ import annotations

import pytest
import torch
from nvquant.quantizers.triangular import factorise, invert
from torch import Tensor


def positive(size: int, seed: int = 0) -> Tensor:
    values = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values.t() @ values / len(values) + 0.1 * torch.eye(size)).float()


@pytest.mark.parametrize("size", [1, 7, 64, 100, 257])
@pytest.mark.parametrize("panel", [16, 64, 1000])
def test_a_factor_and_its_inverse_are_those_in_float64(size: int, panel: int) -> None:
    matrix = positive(size)
    expected = torch.linalg.cholesky(matrix.double())
    assert factorise(matrix, panel)
    assert torch.allclose(matrix.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(matrix, matrix.tril())
    invert(matrix, panel)
    assert torch.allclose(matrix.double(), torch.linalg.inv(expected), rtol=1e-3, atol=1e-5)
    assert torch.equal(matrix, matrix.tril())


@pytest.mark.parametrize("at", [0, 40, 99])
@pytest.mark.parametrize("panel", [16, 1000])
def test_a_matrix_that_is_not_positive_definite_is_refused(at: int, panel: int) -> None:
    matrix = positive(100)
    matrix[at, at] = -1.0
    assert not factorise(matrix, panel)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    matrix = positive(40)
    matrix[30, 30] = value
    assert not factorise(matrix, 16)
