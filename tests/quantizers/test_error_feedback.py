"""Rounding with error feedback, against a slow reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.format.blocks import dequantize_blocks
from nvquant.format.e2m1 import round_e2m1
from nvquant.format.scales import block_scale_bytes, decode_e4m3, global_scale
from nvquant.quantizers.error_feedback import (
    LARGEST_BYTE,
    OFFSETS,
    InverseFactor,
    NoFactor,
    column_order,
    damped_factor,
    round_with_feedback,
)
from nvquant.quantizers.mse import sweep_blocks
from torch import Tensor

DAMPING = 0.03


def problem(rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs whose columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    inputs = torch.randn(4 * cols, cols, generator=generator) @ mix
    inputs *= torch.exp(torch.randn(cols, generator=generator))
    return torch.randn(rows, cols, generator=generator), inputs.t() @ inputs / len(inputs)


def divisor_of(weight: Tensor) -> Tensor:
    return global_scale(weight.abs().amax(), 2.0)


def reference(weight: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    """Optimal brain quantization, column after column, with the inverse of what is left computed anew at each step.

    Everything is float64 but the choice of scales and codes, which is the format's.
    """
    order = column_order(gram.diagonal())
    hessian = gram.double()[order][:, order]
    hessian += DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram), dtype=torch.float64)
    left = weight.double()[:, order]
    result = torch.empty_like(left)
    for at in range(0, len(gram), 16):
        nearest = block_scale_bytes(left[:, at : at + 16].float().abs().amax(1), scale).to(torch.int16)
        tried = [try_step(left, hessian, at, (nearest + offset).clamp(1, LARGEST_BYTE), scale) for offset in OFFSETS]
        best = torch.stack([cost for cost, _, _ in tried]).argmin(0)
        for row, choice in enumerate(best.tolist()):
            result[row, at : at + 16] = tried[choice][1][row]
            left[row] = tried[choice][2][row]
    return result[:, order.argsort()]


def try_step(weight: Tensor, hessian: Tensor, at: int, code: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block under one scale for each row: the cost of each row, its rounded values, all columns after the updates."""
    step = (decode_e4m3(code.to(torch.uint8)) / scale).double()
    left, cost, values = weight.clone(), torch.zeros(len(weight), dtype=torch.float64), []
    for column in range(at, at + 16):
        inverse = torch.linalg.inv(hessian[column:, column:])
        rounded = round_e2m1((left[:, column] / step).float()).double() * step
        error = left[:, column] - rounded
        cost += error.square() / inverse[0, 0]
        left[:, column:] -= (error / inverse[0, 0]).unsqueeze(1) * inverse[0]
        values.append(rounded)
    return cost, torch.stack(values, 1), left


def loss(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Mean square of the change of the products with the inputs."""
    error = (rounded - weight).double()
    return float(((error @ gram.double()) * error).sum())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(5, 32), (3, 144), (16, 48)]))
def test_codes_are_those_of_the_slow_reference(seed: int, shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape, seed)
    scale = divisor_of(weight)
    solved = round_with_feedback(weight, gram, scale, DAMPING)
    found = dequantize_blocks(solved.packed, solved.scales, scale)
    expected = reference(weight, gram, scale)
    # A value on the border of two codes may fall on either side in float32, and moves the row's later columns.
    rows_alike = ((found - expected).abs() < 1e-5).all(1).float().mean()
    assert solved.damping == DAMPING
    assert rows_alike >= 0.6
    assert loss(weight, found, gram) == pytest.approx(loss(weight, expected, gram), rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_products_change_less_than_with_the_best_scales_alone(seed: int) -> None:
    weight, gram = problem(64, 256, seed)
    scale = divisor_of(weight)
    solved = round_with_feedback(weight, gram, scale, DAMPING)
    searched = sweep_blocks(weight, scale, gram.diagonal().double())
    ours = loss(weight, dequantize_blocks(solved.packed, solved.scales, scale), gram)
    alone = loss(weight, dequantize_blocks(searched.packed, searched.scales, scale), gram)
    assert ours < 0.75 * alone


def test_independent_columns_are_rounded_to_nearest_with_the_best_scale() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    scale = divisor_of(weight)
    solved = round_with_feedback(weight, torch.eye(64), scale, DAMPING)
    found = dequantize_blocks(solved.packed, solved.scales, scale)
    steps = (decode_e4m3(solved.scales) / scale).repeat_interleave(16, 1)
    assert torch.equal(found, round_e2m1(weight / steps) * steps)


def test_dead_columns_keep_their_weights() -> None:
    weight, gram = problem(4, 64, 5)
    dead = torch.tensor([3, 17, 40])
    gram[dead], gram[:, dead] = 0, 0
    solved = round_with_feedback(weight, gram, divisor_of(weight), DAMPING)
    found = dequantize_blocks(solved.packed, solved.scales, divisor_of(weight))[:, dead]
    assert (found - weight[:, dead]).abs().max() < 0.5
    assert (found != 0).any()


def test_a_gram_matrix_without_a_factor_gets_more_damping() -> None:
    broken = torch.eye(16)
    broken[0, 0] = -0.1
    factor, used = damped_factor(broken.clone(), 0.03)
    assert used == pytest.approx(0.3)
    damped = broken + 0.3 * broken.diagonal().mean() * torch.eye(16)
    assert torch.allclose(factor @ factor.t(), damped)
    assert round_with_feedback(torch.ones(1, 16), broken, torch.tensor(1.0), 0.03).damping == used
    with pytest.raises(NoFactor):
        damped_factor(torch.full((16, 16), torch.nan), 0.03)


def test_the_inverse_factor_is_upper_triangular_and_its_square_the_inverse() -> None:
    _, gram = problem(1, 96, 3)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    before = gram.clone()
    upper = InverseFactor(gram, DAMPING, order).rows(0, 96)
    assert torch.equal(gram, before)
    damped = gram.double()[order][:, order] + DAMPING * gram.diagonal().double().mean() * torch.eye(
        96, dtype=torch.float64
    )
    assert torch.equal(upper, upper.triu())
    assert torch.allclose((upper.double().t() @ upper.double()) @ damped, torch.eye(96, dtype=torch.float64), atol=1e-3)


def test_blocks_come_by_falling_trace_and_columns_by_falling_diagonal() -> None:
    diagonal = torch.arange(32.0) % 16
    diagonal[16:] += 1
    order = column_order(diagonal)
    assert order.tolist() == [*range(31, 15, -1), *range(15, -1, -1)]


def test_updated_weights_that_outgrow_the_largest_scale_are_counted() -> None:
    weight, gram = problem(4, 32, 2)
    solved = round_with_feedback(weight, gram, global_scale(weight.abs().amax() / 8), DAMPING)
    assert solved.outgrown > 0
    solved = round_with_feedback(weight, gram, divisor_of(weight), DAMPING)
    assert solved.outgrown == 0
