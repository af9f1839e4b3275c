"""Quantizing a matrix and decoding it: what is refused, what is invariant, and how near the result is."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.errors import InputError, NonFiniteError, ShapeError
from nvquant.format import blocks
from nvquant.format.blocks import BlockQuantized, check_blocks, dequantize_blocks, quantize_blocks, weight_amax
from nvquant.format.e2m1 import E2M1_VALUES, decode_e2m1, encode_e2m1, unpack_codes
from nvquant.format.scales import block_scale_bytes, decode_e4m3, global_scale
from torch import Tensor

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=60)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")],
    ),
]
devices = pytest.mark.parametrize("device", DEVICES)


def noise(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).mul(0.02).to(dtype)


def quantize(weight: Tensor) -> tuple[BlockQuantized, Tensor]:
    scale = global_scale(weight_amax(weight))
    return quantize_blocks(weight, scale), scale


def decode(weight: Tensor) -> Tensor:
    quantized, scale = quantize(weight)
    return dequantize_blocks(quantized.packed, quantized.scales, scale)


def same(a: BlockQuantized, b: BlockQuantized) -> bool:
    scales = torch.equal(a.scales.cpu().view(torch.uint8), b.scales.cpu().view(torch.uint8))
    return scales and torch.equal(a.packed.cpu(), b.packed.cpu())


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Small float32 matrices of mixed magnitudes, with zeros, outliers and equal values."""
    rows, block_count = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    element = st.one_of(
        st.floats(-1, 1, width=32), st.just(0.0), st.sampled_from([0.25, -0.75, 1e-6, -300.0]), st.just(-0.0)
    )
    count = rows * block_count * 16
    values = draw(st.lists(element, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(rows, -1)


def test_a_block_is_written_as_worked_out_by_hand() -> None:
    row = [6.0, -6.0, 3.0, 0.5, 0.0, 1.0, -1.5, 2.0, 4.0, -0.5, 0.25, 0.75, 5.0, -3.0, 2.5, 3.5]
    weight = torch.tensor([row, [0.0] * 16])
    quantized = quantize_blocks(weight, torch.tensor(1.0))
    assert bytes(quantized.packed[0].tolist()).hex(" ") == "f7 15 20 4b 96 20 d6 64"
    assert quantized.packed[1].tolist() == [0] * 8
    assert quantized.scales.view(torch.uint8).tolist() == [[0x38], [0x20]]
    rounded = [6.0, -6.0, 3.0, 0.5, 0.0, 1.0, -1.5, 2.0, 4.0, -0.5, 0.0, 1.0, 4.0, -3.0, 2.0, 4.0]
    assert dequantize_blocks(quantized.packed, quantized.scales, torch.tensor(1.0))[0].tolist() == rounded


@devices
def test_result_has_the_stored_shapes_dtypes_and_device(device: str) -> None:
    quantized, _ = quantize(noise(3, 48).to(device))
    assert (quantized.packed.shape, quantized.packed.dtype) == ((3, 24), torch.uint8)
    assert (quantized.scales.shape, quantized.scales.dtype) == ((3, 3), torch.float8_e4m3fn)
    assert quantized.packed.device.type == quantized.scales.device.type == device
    assert quantized.packed.is_contiguous() and quantized.scales.is_contiguous()


@pytest.mark.parametrize("shape", [(4, 15), (4, 17), (4, 24), (4, 1), (16,), (2, 4, 16)])
def test_other_shapes_than_whole_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"has shape {list(shape)}")) as caught:
        quantize_blocks(torch.zeros(shape), torch.tensor(1.0))
    assert isinstance(caught.value, InputError)
    assert (caught.value.exit_code, caught.value.shape) == (2, shape)
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has shape"):
        check_blocks(torch.zeros(shape), "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_zeros_stays_finite(dtype: torch.dtype) -> None:
    quantized, scale = quantize(torch.zeros(4, 32, dtype=dtype))
    assert scale.item() == 1
    assert (quantized.scales.view(torch.uint8) == 0x20).all()
    assert not quantized.packed.any()
    assert not dequantize_blocks(quantized.packed, quantized.scales, scale).any()


@devices
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_refused_with_its_place(bad: float, dtype: torch.dtype, device: str) -> None:
    weight = noise(5, 32, dtype=dtype)
    weight[3, 17] = bad
    weight[4, 2] = bad
    with pytest.raises(
        NonFiniteError, match=r"up_proj\.weight holds a NaN or an infinity at row 3, column 17"
    ) as caught:
        weight_amax(weight.to(device), "up_proj.weight")
    assert (caught.value.row, caught.value.column, caught.value.exit_code) == (3, 17, 2)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_amax_is_a_float32_scalar_whatever_the_sign(dtype: torch.dtype, device: str) -> None:
    for row, wanted in (([1.0, -3.0], 3.0), ([-1.0, 2.5], 2.5), ([-0.0, -0.0], 0.0)):
        amax = weight_amax(torch.tensor([row], dtype=dtype, device=device))
        assert (amax.item(), amax.dtype, amax.shape, amax.device.type) == (wanted, torch.float32, (), device)


def test_meta_tensors_give_shapes_without_work() -> None:
    weight = torch.empty(21504, 5376, dtype=torch.bfloat16, device="meta")
    quantized = quantize_blocks(weight, global_scale(weight_amax(weight)))
    assert (quantized.packed.shape, quantized.packed.device.type) == ((21504, 2688), "meta")
    assert (quantized.scales.shape, quantized.scales.dtype) == ((21504, 336), torch.float8_e4m3fn)


def test_empty_matrices_give_empty_results() -> None:
    for rows, cols in ((0, 16), (4, 0)):
        weight = torch.empty(rows, cols)
        quantized = quantize_blocks(weight, global_scale(weight_amax(weight)))
        assert (quantized.packed.shape, quantized.scales.shape) == ((rows, cols // 2), (rows, cols // 16))


@devices
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_left_as_it_was(rows: int, dtype: torch.dtype, device: str) -> None:
    weight = noise(rows, 16, dtype=dtype).to(device)
    before = weight.clone()
    quantize(weight)
    assert torch.equal(weight, before)


@devices
def test_equal_values_in_any_dtype_give_equal_bytes(device: str) -> None:
    halves = noise(8, 64).to(torch.bfloat16).to(torch.float16)
    weight = halves.to(torch.bfloat16).float()  # values that bfloat16, float16 and float32 all hold
    assert torch.equal(weight.to(torch.float16).float(), weight)
    reference = quantize(weight)[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same(quantize(weight.to(dtype).to(device))[0], reference)


@devices
def test_strides_do_not_matter(device: str) -> None:
    weight = noise(64, 48).to(device)
    assert same(quantize(weight.t().contiguous().t())[0], quantize(weight)[0])
    assert same(quantize(torch.stack([weight, weight], -1)[..., 0])[0], quantize(weight)[0])


@devices
@pytest.mark.parametrize(("rows", "cols"), [(300, 1024), (3, (1 << 18) + 16), (1025, 256)])
def test_a_matrix_larger_than_a_strip_is_quantized_row_by_row(rows: int, cols: int, device: str) -> None:
    assert rows * cols > blocks._STRIP_ELEMENTS["cpu"], "the case is larger than a strip"
    weight = noise(rows, cols, dtype=torch.bfloat16).to(device)
    whole, scale = quantize(weight)
    for row in (0, 1, rows // 2, (1 << 18) // cols % rows, rows - 2, rows - 1):
        assert same(
            quantize_blocks(weight[row : row + 1], scale),
            BlockQuantized(whole.packed[row : row + 1], whole.scales[row : row + 1]),
        )
    assert (rows, cols) != (300, 1024) or torch.equal(
        whole.packed, torch.cat([quantize_blocks(row[None], scale).packed for row in weight])
    )


def test_scales_are_chosen_strip_by_strip_with_the_index_of_the_first_block() -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    scale = torch.tensor(1.0)

    def choose(elements: Tensor, first: int) -> Tensor:
        seen.append((first, tuple(elements.shape)))
        assert torch.equal(elements[:, 0], weight.view(-1, 16)[first])
        return block_scale_bytes(elements.abs().amax(0), scale)

    weight = noise(300, 1024)
    assert same(quantize_blocks(weight, scale, choose), quantize_blocks(weight, scale))
    assert seen == [(0, (16, 256 * 64)), (256 * 64, (16, 44 * 64))]


@devices
def test_every_device_gives_the_bytes_of_the_cpu(device: str) -> None:
    weight = noise(64, 512, seed=3) * torch.logspace(-3, 3, 64)[:, None]
    quantized, scale = quantize(weight)
    assert same(quantize(weight.to(device))[0], quantized)
    decoded = dequantize_blocks(quantized.packed.to(device), quantized.scales.to(device), scale)
    assert torch.equal(decoded.cpu(), dequantize_blocks(quantized.packed, quantized.scales, scale))


def test_decoding_takes_scales_as_bytes_too_and_casts_last() -> None:
    quantized, scale = quantize(noise(4, 32))
    wanted = dequantize_blocks(quantized.packed, quantized.scales, scale)
    assert torch.equal(dequantize_blocks(quantized.packed, quantized.scales.view(torch.uint8), scale), wanted)
    halves = dequantize_blocks(quantized.packed, quantized.scales, scale, torch.bfloat16)
    assert torch.equal(halves, wanted.to(torch.bfloat16))


@PROPERTY
@given(matrices())
def test_every_decoded_value_is_the_nearest_under_its_stored_scale_or_clipped(weight: Tensor) -> None:
    quantized, scale = quantize(weight)
    step = (decode_e4m3(quantized.scales) / scale).repeat_interleave(16, -1).double()
    grid = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    ratio = (weight.double() / step).abs().clamp(max=6)
    codes = decode_e2m1(unpack_codes(quantized.packed)).double().abs()
    nearest = (ratio[..., None] - grid).abs().amin(-1)
    # The quotient is rounded to float32 before it is rounded to a code: an ulp decides at most near ties.
    assert ((ratio - codes).abs() <= nearest + 6 * 2.0**-23).all()


@PROPERTY
@given(matrices(), st.integers(-20, 20))
def test_a_power_of_two_changes_only_the_global_scale(weight: Tensor, power: int) -> None:
    quantized, scale = quantize(weight)
    scaled, scaled_scale = quantize(weight * 2.0**power)
    assert same(scaled, quantized)
    assert scaled_scale.item() == (scale.item() / 2.0**power if weight.any() else 1.0)


@PROPERTY
@given(matrices(), st.randoms(use_true_random=False))
def test_rows_permute(weight: Tensor, random: object) -> None:
    order = list(range(len(weight)))
    random.shuffle(order)  # type: ignore[attr-defined]
    quantized = quantize(weight)[0]
    assert same(quantize(weight[order])[0], BlockQuantized(quantized.packed[order], quantized.scales[order]))


@PROPERTY
@given(matrices())
def test_the_sign_of_a_matrix_is_the_sign_of_its_codes(weight: Tensor) -> None:
    quantized, negated = quantize(weight)[0], quantize(-weight)[0]
    assert torch.equal(negated.packed, quantized.packed ^ 0x88)


def test_quantizing_the_decoded_matrix_again_changes_nothing() -> None:
    weight = noise(16, 64)
    quantized, scale = quantize(weight)
    decoded = dequantize_blocks(quantized.packed, quantized.scales, scale)
    full = (encode_e2m1(decoded.view(16, -1, 16).abs().amax(-1) / (decode_e4m3(quantized.scales) / scale)) == 7).all()
    assert full, "the largest element of each block has code 7, so its scale comes out again"
    assert same(quantize_blocks(decoded, scale), quantized)


def test_relative_error_on_gaussian_weights_is_that_of_the_format() -> None:
    weight = noise(256, 256, seed=1)
    error = (decode(weight) - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert 0.09 < error < 0.10
