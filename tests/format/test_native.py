"""The CPU's compiled kernels against the reference in PyTorch: the same bytes, whatever the instruction set, the
number of threads and the matrix."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.errors import NonFiniteError
from nvquant.format import native
from nvquant.format.blocks import BlockQuantized, dequantize_blocks, quantize_blocks, weight_amax
from nvquant.format.e2m1 import encode_e2m1, pack_codes
from nvquant.format.native import TARGETS, Compared, amax_on_cpu, compare_on_cpu, has_native, quantize_on_cpu
from nvquant.format.scales import global_scale
from nvquant.quantizers import get_quantizer
from nvquant.quantizers.mse import HIGHEST, LOWEST, OFFSETS, block_importance, sweep_blocks, sweep_scales
from nvquant.quantizers.rtn import round_blocks
from torch import Tensor

pytestmark = pytest.mark.skipif(TARGETS == 0, reason="nvquant was installed without a C compiler")
PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=40)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
targets = pytest.mark.parametrize(
    "target",
    [
        pytest.param(number, id=name, marks=pytest.mark.skipif(number >= TARGETS, reason=f"the processor lacks {name}"))
        for number, name in enumerate(("plain", "avx2", "avx512"))
    ],
)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
SWEEP = (LOWEST, HIGHEST, OFFSETS[0], OFFSETS[-1])


def noise(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)


def mean_squares(cols: int, seed: int = 1) -> Tensor:
    return torch.randn(cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()


def reference(weight: Tensor, scale: Tensor, importance: Tensor | None) -> BlockQuantized:
    """The sweep in PyTorch."""
    weights = block_importance(weight.shape[1], None) if importance is None else importance
    return quantize_blocks(weight, scale, lambda blocks, _: sweep_scales(blocks, scale, weights))


def assert_same(found: tuple[Tensor, Tensor], wanted: BlockQuantized) -> None:
    assert torch.equal(found[1], wanted.scales.view(torch.uint8))
    assert torch.equal(found[0], wanted.packed)


def assert_both_quantizers_agree(weight: Tensor, scale: Tensor, target: int = -1) -> None:
    assert_same(quantize_on_cpu(weight, scale, target=target), quantize_blocks(weight, scale))
    for importance in (None, block_importance(weight.shape[1], mean_squares(weight.shape[1]))):
        found = quantize_on_cpu(weight, scale, importance, SWEEP, target)
        assert_same(found, reference(weight, scale, importance))


@targets
@dtypes
def test_random_matrices_of_any_size_have_the_bytes_of_the_reference(dtype: torch.dtype, target: int) -> None:
    for rows, cols in ((1, 16), (1, 240), (1, 256), (1, 272), (3, 48), (17, 528), (33, 1024), (5, 4112)):
        weight = noise(rows, cols, rows, dtype)
        scale = global_scale(weight_amax(weight), 2.0)
        assert_both_quantizers_agree(weight, scale, target)


@targets
def test_blocks_of_every_finite_bfloat16_pattern_have_the_bytes_of_the_reference(target: int) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[patterns.isfinite()]
    ordered = finite.sort().values  # blocks of neighbours
    mixed = finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]
    for weight in (ordered, mixed, finite):
        matrix = weight[: len(weight) // 64 * 64].view(-1, 64)
        for scale in (1.0, 2688.0, 1e-30, 3e38, 1e-38, 37.5):
            assert_both_quantizers_agree(matrix, torch.tensor(scale), target)


@targets
def test_a_block_that_holds_one_pattern_and_nothing_else_has_the_bytes_of_the_reference(target: int) -> None:
    patterns = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[patterns.isfinite()]
    alone = torch.zeros(len(finite), 16, dtype=torch.bfloat16)
    alone[:, 5] = -finite
    for matrix in (finite[:, None].expand(-1, 16), alone):
        assert_both_quantizers_agree(matrix, torch.tensor(448.0), target)


def edge_matrices() -> dict[str, Tensor]:
    ties = torch.randint(-24, 25, (64, 64), generator=torch.Generator().manual_seed(2)) / 4.0
    same_amax = ties.clone()
    same_amax.view(-1, 16)[:, ::5] = 6.0
    same_amax.view(-1, 16)[::2, ::3] = -6.0
    sparse = noise(64, 64)
    sparse[::3] = 0
    sparse[1::3, 16:32] = -0.0
    return {
        "zeros": torch.zeros(7, 32),
        "sparse": sparse,
        "ties": ties,
        "several elements of the largest magnitude": same_amax,
        "float32 subnormals": noise(32, 64) * 1e-37 * 1e-4,
        "huge": noise(32, 64) * 1e38 * 40,
        "one outlier": torch.cat([noise(32, 64) * 1e-7, torch.full((1, 64), 1e4)]),
        "wide range": noise(64, 256) * torch.logspace(-30, 30, 64)[:, None],
    }


@targets
@pytest.mark.parametrize("name", edge_matrices())
@pytest.mark.parametrize("scale", [None, 32.0, 1e-36, 1e36, 1.9999998807907104])
def test_edge_matrices_have_the_bytes_of_the_reference(name: str, scale: float | None, target: int) -> None:
    weight = edge_matrices()[name]
    chosen = global_scale(weight_amax(weight), 2.0) if scale is None else torch.tensor(scale)
    assert_both_quantizers_agree(weight, chosen, target)


@targets
def test_float16_subnormals_have_the_bytes_of_the_reference(target: int) -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weight = patterns[patterns.isfinite()].view(-1, 32)
    for scale in (1.0, 0.04, 2.0**20):
        assert_both_quantizers_agree(weight, torch.tensor(scale), target)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    element = st.one_of(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0]),
    )
    rows, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    values = draw(st.lists(element, min_size=rows * blocks * 16, max_size=rows * blocks * 16))
    return torch.tensor(values, dtype=torch.float32).view(rows, -1)


@PROPERTY
@given(matrices())
def test_arbitrary_floats_have_the_bytes_of_the_reference(weight: Tensor) -> None:
    assert_both_quantizers_agree(weight, global_scale(weight_amax(weight), 2.0))


@pytest.mark.parametrize("first", [-1, 1], ids=["below and at", "above"])
def test_dividing_by_two_multiplications_rounds_every_quotient_as_division_does(first: int) -> None:
    # Near a midpoint only can a quotient that is an ulp off change its code; exponents change nothing.
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    count = 1 << 20
    for begin in range(0, 1 << 23, count):
        step = torch.arange(begin, begin + count, dtype=torch.int32).add_(0x3F800000).view(torch.float32).view(-1, 16)
        at = (midpoints[:, None] * step[:, None, :]).view(torch.int32)  # [tiles, 8, 16]
        x = torch.cat([at + first, at + first + 1], 1).view(torch.float32)
        packed = torch.empty(len(x), 16, 8, dtype=torch.uint8)
        native._module.encode(TARGETS - 1, x.data_ptr(), step.data_ptr(), len(x), packed.data_ptr())
        wanted = pack_codes(encode_e2m1(x / step[:, None, :]).transpose(1, 2))
        assert torch.equal(packed, wanted)


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, threads: int) -> None:
    weight = noise(700, 1072, 4, dtype)
    assert weight.numel() > 4 * native._QUANTIZED, "the matrix is worth several threads"
    scale, before = global_scale(weight_amax(weight), 2.0), torch.get_num_threads()
    nearest, swept, largest = quantize_blocks(weight, scale), reference(weight, scale, None), weight.abs().max().float()
    torch.set_num_threads(threads)
    try:
        assert_same(quantize_on_cpu(weight, scale), nearest)
        assert_same(quantize_on_cpu(weight, scale, None, SWEEP), swept)
        assert amax_on_cpu(torch.cat([weight] * 3)) == largest
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_may_quantize_at_once() -> None:
    matrices = [noise(200 + seed, 2048, seed) for seed in range(8)]
    scale = torch.tensor(1e4)
    wanted = [reference(matrix, scale, None) for matrix in matrices]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda matrix: quantize_on_cpu(matrix, scale, None, SWEEP), matrices))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same(ours, theirs)


def test_a_child_process_has_threads_of_its_own() -> None:
    weight, before = noise(700, 1072), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quantize_on_cpu(weight, torch.tensor(1e4))
        child = os.fork()
        if child == 0:
            quantize_on_cpu(weight, torch.tensor(1e4))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_worker_is_raised() -> None:
    def work(_worker: int, item: int) -> None:
        if item == 3:
            raise ValueError("item 3")

    with pytest.raises(ValueError, match="item 3"):
        native._share(6, work, 2)


@dtypes
def test_strided_matrices_are_read_by_their_strides_and_left_as_they_were(dtype: torch.dtype) -> None:
    weight = noise(48, 64, dtype=dtype)
    scale, before = global_scale(weight_amax(weight)), weight.clone()
    wanted = quantize_blocks(weight, scale)
    assert_same(quantize_on_cpu(weight.t().contiguous().t(), scale), wanted)
    assert_same(quantize_on_cpu(torch.stack([weight, weight], -1)[..., 0], scale), wanted)
    assert torch.equal(weight, before)
    assert weight_amax(weight.t()) == weight_amax(weight)


@targets
@dtypes
def test_amax_is_found_wherever_it_lies(dtype: torch.dtype, target: int) -> None:
    for cols in (1, 7, 64, 1000):
        for column in {0, cols // 2, cols - 1}:
            row = torch.full((1, cols), 0.5, dtype=dtype)
            row[0, column] = -2.5
            amax = amax_on_cpu(row, target)
            assert (amax.item(), amax.dtype, amax.shape) == (2.5, torch.float32, ())
    assert amax_on_cpu(torch.full((2, 3), -0.0, dtype=dtype), target).item() == 0.0


@targets
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_amax(bad: float, dtype: torch.dtype, target: int) -> None:
    weight = noise(3, 64, dtype=dtype)
    weight[2, 33] = bad
    assert not amax_on_cpu(weight, target).isfinite()
    with pytest.raises(NonFiniteError, match="row 2, column 33"):
        weight_amax(weight)


BOUNDS = (0.25**2, 0.9, 1.1)


def compared(weight: Tensor, stored: BlockQuantized, scale: Tensor, offsets: range, target: int = -1) -> Compared:
    rule = (float(scale), offsets[0], offsets[-1])
    scales = stored.scales.view(torch.uint8)
    return compare_on_cpu(weight, stored.packed, scales, float(scale), BOUNDS, rule, target)


@targets
@dtypes
@pytest.mark.parametrize("offsets", [range(1), OFFSETS], ids=["rtn", "mse"])
def test_what_a_quantizer_made_is_settled_and_its_errors_are_those_of_decoding(
    dtype: torch.dtype, offsets: range, target: int
) -> None:
    for rows, cols in ((1, 16), (3, 80), (40, 336)):  # whole tiles of 16 blocks, and parts of one
        weight = noise(rows, cols, rows, dtype)
        weight[0, :16] = 0
        scale = global_scale(weight_amax(weight) if rows > 1 else torch.tensor(1.0), 2.0)
        stored = quantize_blocks(weight, scale) if len(offsets) == 1 else reference(weight, scale, None)
        found = compared(weight, stored, scale, offsets, target)
        exact, decoded = weight.double(), dequantize_blocks(stored.packed, stored.scales, scale).double()
        assert found.unsettled_blocks == 0
        assert found.amax == float(exact.abs().max())
        assert found.energy == pytest.approx(float(exact.square().sum()), rel=1e-5)
        assert found.product == pytest.approx(float((exact * decoded).sum()), rel=1e-5)
        assert found.error == pytest.approx(float((exact - decoded).square().sum()), rel=1e-4)
        blocks, others = exact.reshape(-1, 16), decoded.reshape(-1, 16)
        energy, product = blocks.square().sum(1), (blocks * others).sum(1)
        is_good = (blocks - others).square().sum(1) <= energy * BOUNDS[0]
        is_good &= (product >= energy * BOUNDS[1]) & (product <= energy * BOUNDS[2])
        assert found.poor_blocks == int((~is_good).sum())


@targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_that_is_changed_is_left_to_the_reference(dtype: torch.dtype, target: int) -> None:
    weight = noise(2, 336, dtype=dtype)
    scale = global_scale(weight_amax(weight), 2.0)
    stored = quantize_blocks(weight, scale)
    scales = stored.scales.view(torch.uint8)
    for part, nibbles in ((stored.packed, (1, 16)), (scales, (1,))):
        flat = part.flatten()
        for at in range(len(flat)):
            for change in nibbles:
                before = int(flat[at])
                part.view(-1)[at] = before ^ change
                assert compared(weight, stored, scale, range(1), target).unsettled_blocks == 1, (at, change)
                part.view(-1)[at] = before
    assert compared(weight, stored, scale, range(1), target).unsettled_blocks == 0


@targets
def test_poor_blocks_are_counted_without_a_rule(target: int) -> None:
    weight = noise(4, 336)
    scale = global_scale(weight_amax(weight))
    stored = quantize_blocks(weight, scale)
    arguments = (stored.packed, stored.scales.view(torch.uint8), float(scale), BOUNDS, None, target)
    assert compare_on_cpu(weight, *arguments).poor_blocks == 0
    weight[2] *= 1.2
    weight[3, 16:32] *= -1
    found = compare_on_cpu(weight, *arguments)
    assert (found.poor_blocks, found.unsettled_blocks) == (22, 0)
    for bad in (0x7F, 0x80, 0xFF):
        stored.scales.view(torch.uint8)[1, 3] = bad
        assert compare_on_cpu(weight, *arguments).unsettled_blocks == 1


@targets
@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_left_to_the_reference(bad: float, dtype: torch.dtype, target: int) -> None:
    weight = noise(3, 64, dtype=dtype)
    scale = global_scale(weight_amax(weight))
    stored = quantize_blocks(weight, scale)
    weight[2, 33] = bad
    assert compared(weight, stored, scale, range(1), target).unsettled_blocks == 1
    arguments = (stored.packed, stored.scales.view(torch.uint8), float(scale), BOUNDS, None, target)
    assert compare_on_cpu(weight, *arguments).unsettled_blocks == 1


def test_only_tensors_that_the_kernels_know_are_taken() -> None:
    assert all(has_native(torch.zeros(2, 16, dtype=dtype)) for dtype in DTYPES)
    assert not has_native(torch.zeros(2, 16, dtype=torch.float64))
    assert not has_native(torch.zeros(0, 16))
    assert not has_native(torch.zeros(2, 16, device="meta"))


@pytest.mark.parametrize("name", ["rtn", "mse"])
def test_without_the_extension_quantizers_give_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = noise(40, 96)
    scale = global_scale(weight_amax(weight), get_quantizer(name).claim.headroom)

    def quantized() -> BlockQuantized:
        return round_blocks(weight, scale) if name == "rtn" else sweep_blocks(weight, scale, mean_squares(96))

    compiled = quantized()
    monkeypatch.setattr(native, "TARGETS", 0)
    assert not has_native(weight)
    plain = quantized()
    assert_same((compiled.packed, compiled.scales.view(torch.uint8)), plain)
    assert weight_amax(weight) == weight.abs().max()
