"""The algebra of folds: factors are inverse to each other, norms are exact in their dtype, and nothing dead moves."""

from __future__ import annotations

import pytest
import torch
from nvquant.reshape.folds import LARGEST, STEPS, Fold, Heads, Place, power, solve
from nvquant.reshape.reshaping import UNCHANGED, Reshaping
from torch import Tensor

ALL = torch.arange(-LARGEST, LARGEST + 1, dtype=torch.int8)


def exponents(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-20, 21, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def test_a_power_is_exact_for_whole_octaves_and_near_for_eighths() -> None:
    wanted = torch.exp2(ALL.double() / STEPS)
    assert torch.equal(power(ALL)[ALL % STEPS == 0].double(), wanted[ALL % STEPS == 0])
    assert bool(((power(ALL).double() / wanted - 1).abs() < 2.0**-24).all())


@pytest.mark.parametrize("adds_one", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_columns_make_up_for_the_rounding_of_a_norm(adds_one: bool, dtype: torch.dtype) -> None:
    norm = (torch.randn(160, generator=torch.Generator().manual_seed(1)) * 0.5 + (0 if adds_one else 1)).to(dtype)
    fold = Fold(Place(("g",), ("m",), norm="n", adds_one=adds_one), exponents(160))
    stored, one = fold.norm(norm), float(adds_one)
    assert stored.dtype == dtype
    product = (stored.double() + one) * fold.columns(norm).double()
    assert torch.allclose(product, norm.double() + one, rtol=2.0**-22, atol=0)
    assert torch.allclose(fold.inputs(norm) * fold.columns(norm), torch.ones(160), rtol=2.0**-22)
    # The fold is the one that was wanted, as near as the dtype permits.
    wanted = (norm.double() + one) / torch.exp2(fold.exponents.double() / STEPS)
    assert (
        torch.equal(stored, (wanted - one).to(dtype))
        or float((stored.double() - (wanted - one)).abs().max()) <= float(wanted.abs().max()) * torch.finfo(dtype).eps
    )


def test_an_element_of_zero_stays_and_its_column_too() -> None:
    norm = torch.tensor([0.0, 2.0, 1e-38], dtype=torch.bfloat16)
    fold = Fold(Place(("g",), ("m",), norm="n"), torch.tensor([8, 8, LARGEST], dtype=torch.int8))
    assert fold.norm(norm).tolist()[:2] == [0.0, 1.0]
    assert fold.columns(norm).tolist()[:2] == [1.0, 2.0]
    assert fold.inputs(norm).isfinite().all()
    assert fold.columns(norm).isfinite().all()


def test_a_norm_that_would_overflow_stays() -> None:
    norm = torch.tensor([3e38], dtype=torch.bfloat16)
    fold = Fold(Place(("g",), ("m",), norm="n"), torch.tensor([-LARGEST], dtype=torch.int8))
    assert torch.equal(fold.norm(norm), norm)
    assert fold.columns(norm).tolist() == [1.0]


def test_heads_share_the_factors_of_the_values_that_they_read() -> None:
    heads = Heads(groups=2, queries=3, size=4)
    rows = torch.arange(8.0)
    spread = heads.spread(rows)
    assert spread.view(2, 3, 4)[1, 2].tolist() == [4, 5, 6, 7]
    assert torch.equal(heads.gathered(spread), rows)


def test_factors_make_channels_and_columns_alike_and_have_the_geometric_mean_one() -> None:
    inputs = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 100 + 0.01
    weights = torch.rand(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.01
    found = solve(inputs**2, weights**2, 0.5).double()
    wanted = 0.5 * torch.log2(inputs / weights)
    assert torch.allclose(found / STEPS, wanted - wanted.mean(), atol=0.5 / STEPS + 1e-9)
    assert abs(float(found.mean())) < 0.5
    # With a strength of one half, inputs and columns have one size afterwards.
    product = torch.log2(inputs / weights) - 2 * found / STEPS
    assert float(product.std()) < 0.1


def test_channels_and_columns_of_zeros_stay_and_do_not_count() -> None:
    inputs = torch.tensor([0.0, 4.0, 1.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert solve(inputs, weights, 1.0).tolist() == [0, 4, 0, -4]  # octaves 1 and 0 around their mean
    assert solve(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), 1.0).tolist() == [0, 0, 0]


def test_the_largest_factor_is_bounded() -> None:
    inputs = torch.tensor([1e30, 1e-30], dtype=torch.float64)
    assert solve(inputs, torch.ones(2, dtype=torch.float64), 1.0).tolist() == [LARGEST, -LARGEST]


def test_a_matrix_gets_the_factors_of_its_rows_wherever_its_part_begins() -> None:
    place = Place(("down",), ("d",), maker="up", first_row=3)
    fold = Fold(place, torch.tensor([8, -8, 16, 0], dtype=torch.int8))
    reshaping = Reshaping([fold])
    weight = torch.ones(9, 2)
    whole = reshaping.weight("up", weight)
    assert whole[:, 0].tolist() == [1, 1, 1, 0.5, 2, 0.25, 1, 1, 1]
    for first in range(9):
        for last in range(first, 10):
            assert torch.equal(reshaping.weight("up", weight[first:last], first), whole[first:last])
    assert reshaping.weight("d", torch.ones(2, 4))[0].tolist() == [2, 0.5, 4, 1]
    assert weight.eq(1).all()


def test_a_folded_matrix_goes_back_to_the_scale_of_the_source() -> None:
    maker = Fold(Place(("down",), ("d",), maker="up", first_row=3), torch.tensor([8, -8, 16, 3], dtype=torch.int8))
    reader = Fold(Place(("mlp",), ("up",), norm="n"), torch.tensor([5, -9], dtype=torch.int8))
    norm = torch.tensor([0.7, 1.3], dtype=torch.bfloat16)
    reshaping = Reshaping([maker, reader], lambda _name: norm)
    weight = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    folded = reshaping.weight("up", weight)
    kept = folded.clone()
    torch.testing.assert_close(reshaping.unfolded("up", folded), weight, rtol=1e-6, atol=0)
    assert torch.equal(folded, kept)
    assert not torch.allclose(folded, weight)


def test_without_a_fold_the_given_tensors_come_back() -> None:
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    assert UNCHANGED.unfolded("any", weight) is weight
    assert UNCHANGED.weight("any", weight) is weight
    assert UNCHANGED.input_factor("any") is None
    assert UNCHANGED.tensors({"a": weight})["a"] is weight
