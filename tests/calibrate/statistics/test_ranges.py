"""Statistics of inputs: exact, independent of order and grouping; head-room that changes no code."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.calibrate.statistics import ranges
from nvquant.calibrate.statistics.ranges import (
    InputRanges,
    InputStatistics,
    calibrated_amax,
    headroom_exponent,
    low_percentile,
    sums_of_squares,
)
from nvquant.errors import CheckFailed
from nvquant.format.activations import quantize_dequantize
from torch import Tensor

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=30)
NAME = "model.layers.0.mlp.down_proj"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activations(rows: int, cols: int = 64, seed: int = 0) -> Tensor:
    """[1, rows, cols], magnitudes over many powers of two, some blocks zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((1, rows, cols), generator=generator)
    values *= torch.randn((1, rows, 1), generator=generator).mul(2).exp()
    values[:, ::7, :16] = 0
    return values


def observed(*inputs: Tensor, wants_mean_square: bool = True) -> InputStatistics:
    return ranges_of(*inputs, wants_mean_square=wants_mean_square).result(NAME)


@pytest.mark.parametrize("dtype", DTYPES)
def test_observing_changes_nothing(dtype: torch.dtype) -> None:
    inputs = activations(9).to(dtype)
    before = inputs.clone()
    observed(inputs)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_is_exact_and_the_mean_square_nearly(dtype: torch.dtype) -> None:
    inputs = [activations(rows, seed=rows).to(dtype) for rows in (9, 1, 30)]
    rows = torch.cat(inputs, dim=1)[0].double().numpy()
    found = observed(*inputs)
    assert found.amax == np.abs(rows).max()
    assert found.tokens == 40
    assert found.mean_square is not None
    np.testing.assert_allclose(found.mean_square.numpy(), (rows**2).mean(0), rtol=2e-6)


def test_mean_squares_are_summed_in_the_order_of_the_samples() -> None:
    # Float64 steps by 4 above 2^54: three ones are lost one by one, but not when they come first.
    large, small = torch.full((1, 1, 16), 2.0**27), torch.ones(1, 1, 16)
    for order, total in (((large, small, small, small), 2.0**54), ((small, small, small, large), 2.0**54 + 4)):
        mean_square = observed(*order).mean_square
        assert mean_square is not None
        assert mean_square.tolist() == [total / 4] * 16


def test_mean_squares_are_not_taken_unless_wanted() -> None:
    assert observed(activations(4), wants_mean_square=False).mean_square is None


@PROPERTY
@given(st.permutations(range(6)), st.integers(1, 6))
def test_order_and_grouping_change_neither_amax_nor_percentile(order: list[int], size: int) -> None:
    sequences = torch.cat([activations(8, seed=seed) for seed in range(6)])
    one_by_one = observed(*(sequences[at : at + 1] for at in range(6)))
    grouped = observed(*(sequences[order[at : at + size]] for at in range(0, 6, size)))
    assert (one_by_one.amax, one_by_one.low, one_by_one.tokens) == (grouped.amax, grouped.low, grouped.tokens)


@PROPERTY
@given(st.integers(1, 6))
def test_grouping_changes_no_bit_of_the_mean_squares(size: int) -> None:
    sequences = torch.cat([activations(8, seed=seed) for seed in range(6)])
    one_by_one = observed(*(sequences[at : at + 1] for at in range(6))).mean_square
    grouped = observed(*(sequences[at : at + size] for at in range(0, 6, size))).mean_square
    assert one_by_one is not None
    assert torch.equal(one_by_one, grouped)


@pytest.mark.parametrize("strided", [False, True])
def test_two_dimensional_and_strided_inputs_count_alike(strided: bool) -> None:
    inputs = activations(12)
    shown = inputs.expand(2, -1, -1)[:1] if strided else inputs[0]
    assert observed(shown, wants_mean_square=False) == observed(inputs, wants_mean_square=False)


def percentile_in_numpy(values: Tensor, percent: float) -> float:
    blocks = values.abs().reshape(-1, 16).amax(-1).bfloat16().float().numpy()
    return float(np.percentile(blocks[blocks > 0], percent, method="inverted_cdf"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 24, 25, 26, 250, 999])
def test_the_first_percentile_is_that_of_the_nonzero_block_amaxes(rows: int, dtype: torch.dtype) -> None:
    inputs = activations(rows, seed=rows).to(dtype)
    assert observed(inputs).low == percentile_in_numpy(inputs.float(), 1)


def wide(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[sequences, tokens, cols]: magnitudes over many powers of two, some blocks zero."""
    sequences, tokens, cols = shape
    return torch.cat([activations(tokens, cols, seed + number) for number in range(sequences)]).to(dtype)


def assert_equal(found: InputStatistics, wanted: InputStatistics) -> None:
    assert (found.amax, found.low, found.tokens) == (wanted.amax, wanted.low, wanted.tokens)
    assert (found.mean_square is None) == (wanted.mean_square is None)
    if found.mean_square is not None and wanted.mean_square is not None:
        assert torch.equal(found.mean_square, wanted.mean_square)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_observer_on_the_gpu_never_waits_and_gives_the_statistics_of_the_cpu(dtype: torch.dtype) -> None:
    inputs = [wide((2, 100, 528), dtype, seed) for seed in (0, 2, 4)]
    observer, there = InputRanges(True), [tensor.cuda() for tensor in inputs]
    observer.observe({"source": there[0]})  # loads the kernels
    observer.discard()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        for tensor in there:
            observer.observe({"source": tensor})
            observer.commit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(observer.result(NAME), observed(*inputs))


def test_without_the_extension_an_observer_gives_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [wide((2, 70, 48), torch.bfloat16, seed) for seed in (0, 2)]
    compiled = observed(*inputs)
    monkeypatch.setattr("nvquant.format.native.TARGETS", 0)
    assert_equal(observed(*inputs), compiled)


def test_only_what_was_committed_counts() -> None:
    kept, lost = wide((2, 30, 32), torch.float32), 100 * wide((2, 30, 32), torch.float32, 7)
    observer = InputRanges(True)
    observer.observe({"source": lost})
    with pytest.raises(CheckFailed, match="never reached"):
        observer.result(NAME)
    observer.discard()
    observer.commit()
    with pytest.raises(CheckFailed, match="never reached"):
        observer.result(NAME)
    observer.observe({"source": kept})
    observer.commit()
    observer.observe({"source": lost})
    assert_equal(observer.result(NAME), observed(kept))
    observer.discard()
    observer.commit()
    assert_equal(observer.result(NAME), observed(kept))


def test_a_batch_may_hold_several_inputs_of_the_group() -> None:
    first, second = wide((1, 30, 32), torch.float32), wide((1, 70, 32), torch.float32, 3)
    observer = InputRanges(True)
    observer.observe({"source": first})
    observer.observe({"source": second})
    observer.commit()
    assert_equal(observer.result(NAME), observed(first, second))


def test_counts_move_on_before_32_bits_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [wide((1, 30, 32), torch.float32, seed) for seed in range(5)]
    wanted = observed(*inputs)
    monkeypatch.setattr(ranges, "INT32_MAX", 100)  # each has 60 blocks
    assert_equal(observed(*inputs), wanted)
    monkeypatch.setattr(ranges, "INT32_MAX", 130)
    assert_equal(observed(*inputs), wanted)


def ranges_of(*inputs: Tensor, wants_mean_square: bool = True) -> InputRanges:
    observer = InputRanges(wants_mean_square)
    for tensor in inputs:
        observer.observe({"source": tensor})
        observer.commit()
    return observer


@PROPERTY
@given(st.lists(st.integers(0, 6), min_size=0, max_size=3), st.booleans())
def test_states_merge_to_the_ranges_of_one_process(cuts: list[int], wants_mean_square: bool) -> None:
    inputs = [wide((1, 9, 32), torch.float32, seed) for seed in range(6)]
    edges = [0, *sorted(cuts), 6]
    states = [
        ranges_of(*inputs[begin:end], wants_mean_square=wants_mean_square).state()
        for begin, end in itertools.pairwise(edges)
    ]
    whole = ranges_of(*inputs, wants_mean_square=wants_mean_square)
    merged = InputRanges.merged(states)
    assert_equal(merged.result(NAME), whole.result(NAME))
    assert_same_state(merged.state(), whole.state())


def assert_same_state(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_a_state_is_plain_tensors_on_the_cpu_in_the_order_of_observation() -> None:
    inputs = [wide((2, 9, 32), torch.bfloat16, seed) for seed in (0, 5)]
    state = ranges_of(*inputs).state()
    assert state["amax"].tolist() == [max(float(tensor.abs().max()) for tensor in inputs)]
    histogram = state["histogram"]
    assert (histogram.shape, histogram.dtype, histogram.sum()) == ((1 << 15,), torch.int64, 4 * 9 * 2)
    assert torch.equal(state["squares"], torch.cat([sums_of_squares(tensor) for tensor in inputs]))
    assert state["tokens"].tolist() == [36]
    assert {tensor.device for tensor in state.values()} == {torch.device("cpu")}


def test_a_state_without_an_observation_is_allowed_beside_another_only() -> None:
    empty = ranges_of().state()
    assert (empty["amax"].tolist(), empty["squares"].tolist(), empty["tokens"].tolist()) == ([], [], [0])
    assert empty["histogram"].sum() == 0
    inputs = wide((1, 9, 32), torch.float32)
    assert_equal(InputRanges.merged([empty, ranges_of(inputs).state(), empty]).result(NAME), observed(inputs))
    for states in ([], [empty], [empty, empty]):
        with pytest.raises(CheckFailed, match=r"never reached model\.layers\.0\.mlp\.down_proj"):
            InputRanges.merged(states).result(NAME)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_in_one_state_fails_all(value: float) -> None:
    damaged = wide((1, 9, 32), torch.float32)
    damaged[0, 3, 3] = value
    states = [ranges_of(wide((1, 9, 32), torch.float32)).state(), ranges_of(damaged).state()]
    with pytest.raises(CheckFailed, match="NaN or an infinity"):
        InputRanges.merged(states).result(NAME)


def test_only_the_chosen_lane_is_observed() -> None:
    ours, theirs = wide((1, 9, 32), torch.float32), wide((1, 9, 32), torch.float32, 3)
    observer = InputRanges(True, lane="quantized")
    assert observer.lanes == ("quantized",)
    observer.observe({"source": theirs, "quantized": ours})
    observer.commit()
    assert_equal(observer.result(NAME), observed(ours))


def histogram_of(values: list[float]) -> Tensor:
    patterns = torch.tensor(values).bfloat16().view(torch.int16).int()
    return torch.bincount(patterns, minlength=1 << 15)


@given(st.lists(st.sampled_from([0.0, 2.0**-130, 0.25, 0.5, 1.0, 3.0, 100.0]), max_size=300), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_at_or_below_which_the_share_lies(values: list[float], percent: int) -> None:
    found = low_percentile(histogram_of(values), percent / 100)
    nonzero = sorted(value for value in values if value)
    if not nonzero:
        assert found == 0.0
        return
    wanted = Fraction(percent, 100)
    assert Fraction(sum(value <= found for value in nonzero), len(nonzero)) >= wanted
    assert Fraction(sum(value < found for value in nonzero), len(nonzero)) < wanted


def test_inputs_of_zeros_have_no_percentile_and_the_least_headroom() -> None:
    found = observed(torch.zeros(1, 3, 32))
    assert (found.amax, found.low) == (0.0, 0.0)
    assert calibrated_amax(found.amax, found.low) == 0.0


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_finite_fail_whatever_comes_after(value: float, dtype: torch.dtype) -> None:
    damaged = activations(4).to(dtype)
    damaged[0, 2, 17] = value
    with pytest.raises(CheckFailed, match=r"NaN or an infinity at the input of model\.layers\.0\.mlp\.down_proj"):
        observed(damaged, activations(4).to(dtype))


def test_an_input_that_was_never_seen_fails() -> None:
    with pytest.raises(CheckFailed, match=r"never reached model\.layers\.0\.mlp\.down_proj"):
        observed()


HEADROOM = [
    # amax, first percentile, k
    (1.0, 1.0, 14),
    (1.0, 0.999, 13),
    (2.0, 1.0, 13),
    (8.0, 2.0**-8, 3),
    (8.0, 2.0**-8 * 0.999, 2),
    (1.0, 2.0**-12, 2),
    (1.0, 2.0**-12 * 1.9, 2),
    (1.0, 2.0**-11, 3),
    (1.0, 2.0**-20, 2),
    (100.0, 0.75, 6),  # log2(16384 * 0.75 / 100) = 6.94
    (0.0, 0.0, 2),
    (3.0, 0.0, 2),
]


@pytest.mark.parametrize(("amax", "low", "k"), HEADROOM)
def test_headroom_follows_the_rule(amax: float, low: float, k: int) -> None:
    assert headroom_exponent(amax, low) == k
    assert calibrated_amax(amax, low) == amax * 2.0**k
    if amax and low:
        assert k == max(2, math.floor(math.log2(16384 * low / amax)))


def test_a_recipes_own_headroom_wins() -> None:
    assert calibrated_amax(3.0, 1.0, 8.0) == 24.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_headroom_changes_no_code_while_block_scales_are_normal(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn((512, 256), generator=generator).to(dtype)
    inputs *= torch.rand((512, 1), generator=generator).add(0.02).to(dtype)
    inputs[:2] *= 1e-4  # fewer than one block in a hundred
    found = observed(inputs)
    k = headroom_exponent(found.amax, found.low)
    assert k > 2
    plain, roomy = (torch.tensor(2688.0 / amax) for amax in (found.amax, calibrated_amax(found.amax, found.low)))
    assert torch.equal(roomy * 2.0**k, plain)
    blocks = inputs.float().reshape(-1, 16)
    normal = (blocks.abs().amax(-1) / 6 * roomy) >= 2.0**-6
    assert 0.99 <= normal.float().mean() < 1
    ours, theirs = (quantize_dequantize(blocks, scale) for scale in (roomy, plain))
    assert torch.equal(ours[normal], theirs[normal])
    # What the head-room is for: inputs larger than all of calibration are not clipped.
    larger = 3 * blocks[blocks.abs().amax(-1).argmax()]
    assert quantize_dequantize(larger, roomy).abs().max() > 2 * quantize_dequantize(larger, plain).abs().max()
