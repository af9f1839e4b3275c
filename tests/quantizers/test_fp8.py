"""FP8 to nearest: a scale for each row, or one for a fused group."""

from __future__ import annotations

import pytest
import torch
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.errors import NonFiniteError
from nvquant.format.fp8 import dequantize_rows, fp8_scale
from nvquant.format.schemes import FP8, FP8_STATIC, Scheme
from nvquant.quantizers import QUANTIZERS, quantizer_for
from nvquant.quantizers.base import QuantizedGroup
from nvquant.quantizers.fp8 import Fp8Nearest, row_amax
from nvquant.recipe.matrices import Matrix
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(scheme: Scheme, *weights: Tensor) -> QuantizedGroup:
    group = [
        Matrix(name, f"{name}.weight", scheme, *weight.shape, "g", "g", "g")
        for name, weight in zip("abc", weights, strict=False)
    ]
    return Fp8Nearest().quantize(group, weights, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_its_amax_over_448_as_its_scale(dtype: torch.dtype) -> None:
    weight = (noise(24, 64) * torch.logspace(-3, 2, 24)[:, None]).to(dtype)
    made = quantized(FP8, weight)
    parts = made.parts["a"]
    amax = weight.float().abs().amax(1, keepdim=True)
    assert set(parts) == {"codes", "scales"}
    assert (parts["scales"].dtype, parts["scales"].shape) == (torch.float32, (24, 1))
    assert torch.equal(parts["scales"], amax / torch.tensor(448.0))
    assert made.amax == float(amax.max())
    assert torch.equal(parts["codes"].float(), (weight.float() / parts["scales"]).to(torch.float8_e4m3fn).float())
    error = dequantize_rows(parts["codes"], parts["scales"]) - weight.float()
    assert bool((error.abs() <= amax * 2**-4).all())  # half a step of the largest octave


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_group_in_the_form_of_one_scale_shares_it(dtype: torch.dtype) -> None:
    weights = [(noise(16, 32, seed=at) * factor).to(dtype) for at, factor in enumerate((1.0, 7.0, 0.1))]
    made = quantized(FP8_STATIC, *weights)
    amax = max(float(weight.float().abs().max()) for weight in weights)
    assert made.amax == amax
    scale = fp8_scale(torch.tensor(amax))
    for name, weight in zip("abc", weights, strict=True):
        assert set(made.parts[name]) == {"codes"}  # the scale follows from the group's record
        assert torch.equal(made.parts[name]["codes"].float(), (weight.float() / scale).to(torch.float8_e4m3fn).float())
    assert float(made.parts["b"]["codes"].float().abs().max()) == 448.0
    assert float(made.parts["c"]["codes"].float().abs().max()) < 448.0


def test_rows_of_a_fused_group_have_scales_of_their_own() -> None:
    small, large = noise(8, 32), 1000 * noise(8, 32, seed=1)
    alone, together = quantized(FP8, small).parts["a"], quantized(FP8, small, large).parts["a"]
    assert torch.equal(alone["scales"], together["scales"])
    assert torch.equal(alone["codes"].view(torch.uint8), together["codes"].view(torch.uint8))


@pytest.mark.parametrize("scheme", [FP8, FP8_STATIC], ids=lambda scheme: scheme.form)
def test_zeros_stay_zeros_under_a_scale_of_one(scheme: Scheme) -> None:
    made = quantized(scheme, torch.zeros(4, 32))
    assert made.amax == 0.0
    assert not made.parts["a"]["codes"].float().any()
    if "scales" in made.parts["a"]:
        assert torch.equal(made.parts["a"]["scales"], torch.ones(4, 1))
    one_row = torch.zeros(4, 32)
    one_row[2] = noise(32)
    codes = quantized(scheme, one_row).parts["a"]["codes"].float()
    assert codes[2].any()
    assert not codes[[0, 1, 3]].any()


def test_rows_too_small_for_a_scale_become_zeros_and_stay_finite() -> None:
    weight = torch.full((2, 32), 1e-45)
    made = quantized(FP8, weight)
    assert bool(made.parts["a"]["scales"].isfinite().all())
    assert bool((made.parts["a"]["scales"] > 0).all())
    assert bool(made.parts["a"]["codes"].float().isfinite().all())


def test_the_largest_finite_numbers_do_not_overflow() -> None:
    weight = torch.full((2, 32), torch.finfo(torch.float32).max)
    weight[0] *= -1
    parts = quantized(FP8, weight).parts["a"]
    assert torch.equal(parts["codes"].float(), torch.tensor([[-448.0], [448.0]]).expand(2, 32))


@pytest.mark.parametrize("scheme", [FP8, FP8_STATIC], ids=lambda scheme: scheme.form)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_is_refused_with_its_place(scheme: Scheme, value: float, dtype: torch.dtype) -> None:
    weight = noise(8, 32).to(dtype)
    weight[5, 17] = value
    with pytest.raises(NonFiniteError, match=r"^b\.weight holds a NaN or an infinity at row 5, column 17"):
        quantized(scheme, noise(8, 32).to(dtype), weight)


def test_the_amax_of_a_row_counts_both_signs() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.5], [0.0, -0.0]], dtype=torch.bfloat16)
    assert row_amax(weight).tolist() == [[3.0], [2.0], [0.0]]
    assert row_amax(weight).dtype == torch.float32


def test_it_needs_no_statistics_and_is_the_quantizer_of_fp8_under_any_choice() -> None:
    quantizer = Fp8Nearest()
    assert (quantizer.needs, quantizer.lane, quantizer.by_site) == (frozenset(), "source", False)
    assert (quantizer.claim.headroom, list(quantizer.claim.scale_offsets)) == (1.0, [0])
    assert all(quantizer_for("fp8", chosen) == quantizer for chosen in QUANTIZERS.values())
    weight = noise(8, 32)
    inputs = InputStatistics(1.0, 0.5, torch.rand(32, dtype=torch.float64), 4)
    group = [Matrix("a", "a.weight", FP8, 8, 32, "g", "g", "g")]
    without = quantized(FP8, weight).parts["a"]["codes"].view(torch.uint8)
    assert torch.equal(quantizer.quantize(group, [weight], inputs).parts["a"]["codes"].view(torch.uint8), without)
