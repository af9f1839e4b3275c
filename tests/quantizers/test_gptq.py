"""The quantizer gptq itself: its target, its group, and inputs that it cannot use."""

from __future__ import annotations

import pytest
import torch
from nvquant.calibrate.statistics.moments import Moments
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.errors import CheckFailed
from nvquant.format.blocks import NonFiniteError, dequantize_blocks
from nvquant.format.scales import global_scale
from nvquant.format.schemes import NVFP4
from nvquant.quantizers.base import GroupInputs
from nvquant.quantizers.error_feedback import round_with_feedback
from nvquant.quantizers.gptq import GPTQ
from nvquant.recipe.matrices import Matrix
from torch import Tensor

COLS = 64


def moments(seed: int = 0, is_through: Tensor | None = None) -> Moments:
    """Of inputs that the quantized path moved, with the rounding of the input kept apart."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLS) + 0.2 * torch.randn(COLS, COLS, generator=generator)
    source = torch.randn(500, COLS, generator=generator) @ mix
    moved = source + 0.2 * torch.randn(500, COLS, generator=generator) @ mix - 0.05 * source
    rounded = moved + 0.05 * torch.randn(500, COLS, generator=generator)
    cross = (source - moved).t() @ rounded / 500
    gram = rounded.t() @ rounded / 500
    return Moments(gram, cross if is_through is None else is_through @ cross, is_through is not None)


def matrices(*rows: int) -> tuple[list[Matrix], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(count, COLS, generator=generator) for count in rows]
    made = [Matrix(name, name, NVFP4, count, COLS, "g", "g", "g") for name, count in zip("abc", rows, strict=False)]
    return made, weights


def inputs(found: Moments | None) -> GroupInputs:
    return GroupInputs(InputStatistics(1.0, 1.0, None, 500), found)


def test_the_target_is_the_ridge_regression_a_quarter_of_the_way() -> None:
    _, (weight,) = matrices(8)
    found = moments()
    assert found.cross is not None
    ridge = found.gram.double() + 0.1 * found.gram.diagonal().double().mean() * torch.eye(COLS, dtype=torch.float64)
    wanted = weight.double() + 0.25 * weight.double() @ found.cross.double() @ torch.linalg.inv(ridge)
    target, used = GPTQ().target(weight, found.gram, found)
    assert used == 0.1
    assert torch.allclose(target.double(), wanted, atol=1e-4)
    through, _ = GPTQ().target(weight, found.gram, moments(is_through=weight))
    assert torch.allclose(through, target, atol=1e-4)
    for quantizer, seen in ((GPTQ(pull=0.0), found), (GPTQ(), Moments(found.gram, None, False))):
        unmoved, none = quantizer.target(weight, found.gram, seen)
        assert torch.equal(unmoved, weight) and none is None


def test_a_group_is_solved_together_under_the_amax_of_its_target() -> None:
    group, weights = matrices(8, 24)
    found = moments()
    made = GPTQ().quantize(group, weights, inputs(found))
    target, _ = GPTQ().target(torch.cat(weights), found.gram, found)
    assert made.amax == float(target.abs().amax()) != float(torch.cat(weights).abs().amax())
    solved = round_with_feedback(target, found.gram, global_scale(target.abs().amax(), 2.0), 0.03)
    assert torch.equal(torch.cat([made.parts[name]["codes"] for name in "ab"]), solved.packed)
    scales = torch.cat([made.parts[name]["scales"].view(torch.uint8) for name in "ab"])
    assert torch.equal(scales, solved.scales.view(torch.uint8))
    assert [made.parts[name]["codes"].shape for name in "ab"] == [(8, 32), (24, 32)]


def test_rows_alone_are_rounded_to_nearest_without_inputs() -> None:
    (matrix,), (weight,) = matrices(8)
    amax = weight.abs().amax()
    parts = GPTQ().quantize_rows(matrix, weight, amax)
    decoded = dequantize_blocks(parts["codes"], parts["scales"], global_scale(amax, 2.0))
    assert float((decoded - weight).norm() / weight.norm()) < 0.11


def test_inputs_that_it_cannot_use_name_the_matrix_and_a_way_out() -> None:
    group, weights = matrices(8)
    for nothing in (None, inputs(None)):
        with pytest.raises(CheckFailed, match="gptq has no inputs of a: use --quantizer mse"):
            GPTQ().quantize(group, weights, nothing)
    broken = Moments(torch.full((COLS, COLS), torch.nan), None, False)
    with pytest.raises(CheckFailed, match="the Gram matrix of the inputs of a has no Cholesky factor: use --quantizer"):
        GPTQ().quantize(group, weights, inputs(broken))
    weights[0][3, 5] = torch.inf
    with pytest.raises(NonFiniteError, match="row 3, column 5"):
        GPTQ().quantize(group, weights, inputs(moments()))
