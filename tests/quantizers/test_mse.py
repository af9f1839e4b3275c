"""The mse quantizer against a search over all 126 scales, written out without the library's tricks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.format.blocks import BlockQuantized, weight_amax
from nvquant.format.e2m1 import decode_e2m1, unpack_codes
from nvquant.format.scales import decode_e4m3, global_scale
from nvquant.quantizers.mse import CLAIM, OFFSETS, block_importance, sweep_blocks
from nvquant.quantizers.rtn import round_blocks
from torch import Tensor

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=25)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDPOINTS = (E2M1[1:] + E2M1[:-1]) / 2
SCALES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
LOWEST, HIGHEST = 0.85, 1.8
KINDS = ("gaussian", "laplace", "student")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
    ),
]


def data(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, cols, generator=generator)
    if kind == "laplace":
        uniform = torch.rand(rows, cols, generator=generator) - 0.5
        return -0.02 * uniform.sign() * (1 - 2 * uniform.abs()).log()
    if kind == "student":  # four degrees of freedom
        return 0.02 * normal / torch.randn(4, rows, cols, generator=generator).square().mean(0).sqrt()
    return 0.02 * normal


def mean_squares(cols: int, seed: int = 1) -> Tensor:
    return torch.randn(cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def importance_of(cols: int, mean_square: Tensor | None) -> Tensor:
    """Float32 [blocks, 16], each block's mean 1."""
    if mean_square is None:
        return torch.ones(cols // 16, 16)
    blocks = mean_square.view(-1, 16)
    mean = blocks.mean(-1, keepdim=True)
    return torch.where(mean > 0, blocks / mean, 1.0).float()


def round_by_table(ratio: Tensor) -> Tensor:
    """Nearest E2M1 magnitude by comparison with the midpoints; a tie goes to the code with an even number."""
    below = torch.bucketize(ratio, MIDPOINTS)  # a midpoint itself stays below
    at_midpoint = (ratio[..., None] == MIDPOINTS).any(-1)
    return E2M1[below + (at_midpoint & (below % 2 == 1))]


def errors(weight: Tensor, scale: Tensor, importance: Tensor, byte: Tensor) -> Tensor:
    """Weighted squared error of each block under the scale `byte` (uint8, one a block): float32 [rows, blocks].

    Each step is rounded to float32, and the sum is taken over neighbouring pairs, as the quantizer says it does.
    """
    blocks = weight.float().view(weight.shape[0], -1, 16).abs()
    step = (SCALES[byte.int()] / scale)[..., None]
    error = round_by_table(blocks / step) * step - blocks
    terms = error * error * importance
    while terms.shape[-1] > 1:
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


def search(weight: Tensor, scale: Tensor, importance: Tensor, everything: bool = False) -> tuple[Tensor, Tensor]:
    """Best scale byte of each block and its error; all 126 candidates, or those from 0.85 to 1.8 times amax / 6."""
    blocks = weight.float().view(weight.shape[0], -1, 16)
    amax = blocks.abs().amax(-1)
    wanted = amax / 6 * scale
    nearest = wanted.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    best, best_error = nearest.clone(), torch.full_like(wanted, torch.inf)
    for byte in range(1, 127):
        value = SCALES[byte]
        inside = (value >= (wanted * LOWEST).clamp(min=2.0**-9)) & (value <= (wanted * HIGHEST).clamp(max=448.0))
        error = errors(weight, scale, importance, torch.full_like(nearest, byte))
        better = (inside | (nearest == byte) | torch.tensor(everything)) & (error < best_error)
        best, best_error = torch.where(better, byte, best), torch.where(better, error, best_error)
    return torch.where(amax == 0, 0x20, best).to(torch.uint8), torch.where(amax == 0, 0.0, best_error)


def mse(weight: Tensor, mean_square: Tensor | None = None) -> tuple[BlockQuantized, Tensor]:
    scale = global_scale(weight_amax(weight), CLAIM.headroom)
    return sweep_blocks(weight, scale, mean_square), scale


def scale_bytes(quantized: BlockQuantized) -> Tensor:
    return quantized.scales.view(torch.uint8)


@cache
def case(kind: str, weighted: bool) -> tuple[Tensor, Tensor | None, BlockQuantized, Tensor]:
    weight = data(kind, 48, 128)
    mean_square = mean_squares(128) if weighted else None
    return weight, mean_square, *mse(weight, mean_square)


weighted_or_not = pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
kinds = pytest.mark.parametrize("kind", KINDS)


@weighted_or_not
@kinds
def test_scales_are_those_of_the_brute_force_bit_for_bit(kind: str, weighted: bool) -> None:
    weight, mean_square, quantized, scale = case(kind, weighted)
    best, _ = search(weight, scale, importance_of(128, mean_square))
    assert torch.equal(scale_bytes(quantized), best)


@weighted_or_not
@kinds
def test_codes_are_the_nearest_under_the_chosen_scales(kind: str, weighted: bool) -> None:
    weight, _, quantized, scale = case(kind, weighted)
    step = (decode_e4m3(quantized.scales) / scale)[..., None]
    wanted = torch.copysign(round_by_table(weight.view(48, -1, 16).abs() / step), weight.view(48, -1, 16))
    assert torch.equal(decode_e2m1(unpack_codes(quantized.packed)).view(48, -1, 16), wanted)


@weighted_or_not
@kinds
def test_no_block_is_worse_than_rounded_to_nearest_and_most_are_better(kind: str, weighted: bool) -> None:
    weight, mean_square, quantized, scale = case(kind, weighted)
    importance = importance_of(128, mean_square)
    ours = errors(weight, scale, importance, scale_bytes(quantized))
    nearest = errors(weight, scale, importance, scale_bytes(round_blocks(weight, scale)))
    assert (ours <= nearest).all()
    assert (ours < nearest).float().mean() > 0.5
    assert ours.sum() < 0.95 * nearest.sum()


def gap_to_all_126(kind: str, mean_square: Tensor | None) -> float:
    """How much larger the error is than the least under any E4M3 scale, as a share of it."""
    weight = data(kind, 192, 128, seed=5)
    importance = importance_of(128, mean_square)
    quantized, scale = mse(weight, mean_square)
    found = errors(weight, scale, importance, scale_bytes(quantized)).double().sum()
    least = search(weight, scale, importance, everything=True)[1].double().sum()
    return float(found / least) - 1


@kinds
def test_all_126_scales_would_gain_almost_nothing_more(kind: str) -> None:
    assert 0 <= gap_to_all_126(kind, None) < 0.001


@kinds
def test_with_very_uneven_importance_all_126_would_gain_at_most_a_percent(kind: str) -> None:
    # Log-normal mean squares of deviation 1. A column that matters may want a scale below 0.85 * amax / 6.
    assert 0 <= gap_to_all_126(kind, mean_squares(128)) < 0.01


def test_halving_the_global_scale_changes_no_rounding() -> None:
    weight = data("gaussian", 32, 64)
    amax = weight_amax(weight)
    plain, roomy = round_blocks(weight, global_scale(amax)), round_blocks(weight, global_scale(amax, 2.0))
    assert torch.equal(plain.packed, roomy.packed)
    assert torch.equal(scale_bytes(plain), scale_bytes(roomy) + 8), "one exponent lower, the same mantissas"


def test_the_largest_block_has_head_room_above_amax_over_six() -> None:
    # At 10 / 7 of amax / 6 the fifteen others are exact, and the largest is off by a twentieth.
    row, even = torch.tensor([[4.2] + [3.0] * 15]), torch.ones(1, 16)
    quantized, scale = mse(row)
    assert decode_e4m3(quantized.scales).item() == 320.0, "amax / 6 is 224"
    no_room = global_scale(row.amax())
    confined = sweep_blocks(row, no_room)
    assert decode_e4m3(confined.scales).item() <= 448.0
    found = errors(row, scale, even, scale_bytes(quantized)).item()
    assert found < 0.1 * errors(row, no_room, even, scale_bytes(confined)).item()


@pytest.mark.parametrize("block", [[3.0] * 16, [1.5] * 16, [6.0, 3.0, 1.5] + [0.0] * 13])
def test_ties_go_to_the_smaller_scale(block: list[float]) -> None:
    # Under the global scale 32 and amax / 6 in [0.25, 1], several scales decode all elements without an error.
    weight, scale = torch.tensor([block]), torch.tensor(32.0)
    quantized = sweep_blocks(weight, scale)
    importance = torch.ones(1, 16)
    best = scale_bytes(quantized)
    exact = [b for b in range(1, 127) if not errors(weight, scale, importance, torch.full_like(best, b)).item()]
    wanted = float(weight.amax() / 6 * scale)
    allowed = [b for b in exact if LOWEST * wanted <= SCALES[b].item() <= HIGHEST * wanted]
    assert best.item() == min(allowed)


def test_two_exact_scales_in_range_are_a_real_tie() -> None:
    weight, scale = torch.tensor([[6.0] * 16]), torch.tensor(32.0)
    exact = [b for b in range(1, 127) if not errors(weight, scale, torch.ones(1, 16), torch.tensor([[b]])).item()]
    inside = [b for b in exact if LOWEST * 32 <= SCALES[b].item() <= HIGHEST * 32]
    assert [SCALES[b].item() for b in inside] == [32.0, 48.0]
    assert decode_e4m3(sweep_blocks(weight, scale).scales).item() == 32.0


@pytest.mark.parametrize(
    ("block", "byte"),
    [
        ([24, 23, 6, 24, 19, 17, 20, 4, 0, 17, 0, 13, 12, 18, 17, 10], 123),
        ([15, 10, 4, 9, 4, 12, 1, 13, 6, 9, 15, 8, 3, 9, 0, 8], 123),
    ],
)
def test_sums_over_neighbouring_pairs_decide_between_equal_errors(block: list[int], byte: int) -> None:
    # Two scales have the same error in real numbers; added half to half, float32 would prefer another one.
    quantized, scale = mse(torch.tensor([block]).float())
    assert scale_bytes(quantized).item() == byte
    assert search(torch.tensor([block]).float(), scale, torch.ones(1, 16))[0].item() == byte


@kinds
def test_no_importance_is_the_same_as_equal_importance(kind: str) -> None:
    weight = data(kind, 16, 64)
    plain, scale = mse(weight)
    for value in (1.0, 0.3, 1e-12):
        even = sweep_blocks(weight, scale, torch.full((64,), value, dtype=torch.float64))
        assert torch.equal(scale_bytes(even), scale_bytes(plain))
        assert torch.equal(even.packed, plain.packed)


def test_importance_moves_the_scale_towards_the_column_that_matters() -> None:
    # Under the scale 32 / 32 the 6 is exact and the 5 a tie; under 40 / 32 the 5 is exact.
    row, scale = torch.tensor([[6.0, 5.0] + [0.0] * 14]), torch.tensor(32.0)
    for column, byte_value in ((0, 32.0), (1, 40.0)):
        mean_square = torch.zeros(16, dtype=torch.float64)
        mean_square[column] = 0.1
        assert decode_e4m3(sweep_blocks(row, scale, mean_square).scales).item() == byte_value


def test_importance_is_relative_within_its_block_and_even_where_all_inputs_were_zero() -> None:
    mean_square = torch.cat([torch.zeros(16), torch.arange(16.0), 1e-30 * torch.arange(16.0)]).double()
    importance = block_importance(48, mean_square)
    assert (importance.shape, importance.dtype) == ((16, 3), torch.float32)
    assert (importance[:, 0] == 1).all()
    torch.testing.assert_close(importance[:, 1], torch.arange(16.0) / 7.5)
    torch.testing.assert_close(importance[:, 2], importance[:, 1])
    assert torch.equal(block_importance(32, None), torch.ones(16, 2))


def test_a_block_of_zero_importance_is_treated_as_even() -> None:
    weight = data("gaussian", 16, 32)
    mean_square = torch.cat([torch.zeros(16), torch.ones(16)]).double()
    plain, scale = mse(weight)
    assert torch.equal(scale_bytes(sweep_blocks(weight, scale, mean_square)), scale_bytes(plain))


def test_importance_follows_its_column_across_strips() -> None:
    weight = data("gaussian", 300, 1024)  # larger than a strip of 2^18 elements
    mean_square = mean_squares(1024)
    whole, scale = mse(weight, mean_square)
    for rows in (slice(0, 2), slice(254, 258), slice(298, 300)):
        part = sweep_blocks(weight[rows].clone(), scale, mean_square)
        assert torch.equal(scale_bytes(whole)[rows], scale_bytes(part))
        assert torch.equal(whole.packed[rows], part.packed)


def test_zeros_get_the_zero_byte_and_a_zero_matrix_stays_finite() -> None:
    weight = data("gaussian", 2, 32)
    weight[0, :16] = 0
    quantized, _ = mse(weight)
    assert scale_bytes(quantized)[0, 0] == 0x20
    assert not quantized.packed[0, :8].any()
    quantized, scale = mse(torch.zeros(2, 32))
    assert (scale.item(), scale_bytes(quantized).unique().tolist()) == (1.0, [0x20])


def test_blocks_far_below_the_top_keep_a_scale_of_at_least_the_smallest() -> None:
    weight = data("gaussian", 4, 32)
    weight[0] = 1e-12
    weight[3, 3] = 1e4
    quantized, scale = mse(weight)
    best, _ = search(weight, scale, torch.ones(2, 16))
    assert torch.equal(scale_bytes(quantized), best)
    assert (scale_bytes(quantized)[0] == 1).all()


def test_candidates_reach_from_085_to_18_around_every_scale() -> None:
    for byte in range(9, 119):
        low, high = SCALES[byte - 1 : byte + 1].mean(), SCALES[byte : byte + 2].mean()
        wanted = torch.linspace(low, high, 33)
        inside = (SCALES >= wanted[:, None] * LOWEST) & (SCALES <= wanted[:, None] * HIGHEST)
        candidates = [bool(byte + OFFSETS[0] <= b <= byte + OFFSETS[-1]) for b in range(127)]
        assert not (inside & ~torch.tensor(candidates)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_values_in_any_dtype_give_equal_bytes(dtype: torch.dtype) -> None:
    weight = data("gaussian", 8, 64).to(dtype)
    before = weight.clone()
    quantized, scale = mse(weight, mean_squares(64))
    wanted = sweep_blocks(weight.float(), scale, mean_squares(64))
    assert torch.equal(quantized.packed, wanted.packed)
    assert torch.equal(scale_bytes(quantized), scale_bytes(wanted))
    assert torch.equal(weight, before)


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.booleans(), st.sampled_from([1e-20, 1.0, 1e20]))
def test_brute_force_agrees_on_random_rows(seed: int, kind: str, weighted: bool, factor: float) -> None:
    weight = data(kind, 1, 32, seed) * factor
    mean_square = mean_squares(32, seed) if weighted else None
    quantized, scale = mse(weight, mean_square)
    assert torch.equal(scale_bytes(quantized), search(weight, scale, importance_of(32, mean_square))[0])


@pytest.mark.parametrize("device", DEVICES)
@weighted_or_not
@kinds
def test_every_device_gives_the_bytes_of_the_cpu(kind: str, weighted: bool, device: str) -> None:
    weight, mean_square, wanted, scale = case(kind, weighted)
    for dtype in (torch.float32, torch.bfloat16):
        reference = wanted if dtype == torch.float32 else sweep_blocks(weight.to(dtype), scale, mean_square)
        found = sweep_blocks(weight.to(device, dtype), scale, mean_square)
        assert torch.equal(found.packed.cpu(), reference.packed)
        assert torch.equal(scale_bytes(found).cpu(), scale_bytes(reference))
