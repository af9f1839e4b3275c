"""The numbers of the format room, held against what public implementations gave; tests/data/README.md says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.format.activations import quantize_dequantize
from nvquant.format.blocks import dequantize_blocks, quantize_blocks, weight_amax
from nvquant.format.e2m1 import E2M1_VALUES, decode_e2m1, encode_e2m1, round_e2m1, unpack_codes
from nvquant.format.layouts import COMPRESSED_TENSORS, MODELOPT
from nvquant.format.scales import decode_e4m3, encode_e4m3, global_scale
from nvquant.quantizers.rtn import round_blocks
from torch import Tensor

Case = dict[str, Any]

VECTORS: Case = json.loads((Path(__file__).parents[1] / "data" / "reference_vectors.json").read_text())
WEIGHTS: list[Case] = [*VECTORS["weights"], *(m for group in VECTORS["fused_groups"] for m in group["members"])]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
FLOAT32_ARITHMETIC = "compressed-tensors 0.19.0, float32 arithmetic"
BFLOAT16_ARITHMETIC = "compressed-tensors 0.19.0, bfloat16 arithmetic (llm-compressor today)"
MODELOPT_NAME = "modelopt 0.47.0"


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


weight_cases, activation_cases = over(WEIGHTS), over(VECTORS["activations"])


def tensor(text: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype).reshape(shape)


def scalar(text: str) -> Tensor:
    return tensor(text, torch.float32)


def weight_of(case: Case) -> Tensor:
    return tensor(case["weight"], DTYPES[case["dtype"]], *case["shape"])


def expected(case: Case, implementation: str) -> Case:
    return next(entry for entry in case["expected"] if entry["implementation"] == implementation)


def amax_of(case: Case) -> Tensor:
    return scalar(case["shared_amax"]) if "shared_amax" in case else weight_amax(weight_of(case))


def ulps_apart(a: Tensor, b: Tensor) -> int:
    return abs(int(a.view(torch.int32)) - int(b.view(torch.int32)))


def blocks_of(matrix: Tensor) -> Tensor:
    return matrix.reshape(matrix.shape[0], -1, 16)


def special_blocks(case: Case, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of zeros, and other blocks whose scale is at most 2^-10, which E4M3 rounds to zero."""
    amax = blocks_of(weight_of(case).double()).abs().amax(-1)
    return amax == 0, (amax > 0) & (amax / 6 * scale.double() <= 2.0**-10)


@weight_cases
def test_global_scale_is_that_of_compressed_tensors(case: Case) -> None:
    scale = global_scale(amax_of(case))
    assert ulps_apart(scale, scalar(expected(case, FLOAT32_ARITHMETIC)["weight_global_scale"])) == 0


# Where 2688 / amax overflows, modelopt stores zero or a subnormal number; nvquant stores 1 in both layouts.
WITHOUT_SCALE = ("all_zero_bf16_4x16", "tiny_bf16_4x16", "small_f32_4x32")


@over([case for case in WEIGHTS if case["name"] not in WITHOUT_SCALE])
def test_stored_multiplier_is_within_two_ulp_of_modelopt(case: Case) -> None:
    wanted = scalar(expected(case, MODELOPT_NAME)["weight_scale_2"])
    assert ulps_apart(MODELOPT.stored_scalar("weight_global", float(amax_of(case))), wanted) <= 2


@over([case for case in WEIGHTS if case["name"] in WITHOUT_SCALE])
def test_a_matrix_too_small_for_a_scale_has_the_scale_one_in_both_layouts(case: Case) -> None:
    for layout in (COMPRESSED_TENSORS, MODELOPT):
        assert layout.stored_scalar("weight_global", float(amax_of(case))).item() == 1


@weight_cases
def test_scale_bytes_are_the_reference_bytes(case: Case) -> None:
    reference = expected(case, FLOAT32_ARITHMETIC)
    scale = scalar(reference["weight_global_scale"])
    found = quantize_blocks(weight_of(case), scale).scales.view(torch.uint8)
    wanted = tensor(reference["weight_scale"], torch.uint8, *found.shape)
    zero, underflow = special_blocks(case, scale)
    ordinary = ~(zero | underflow)
    assert torch.equal(found[ordinary], wanted[ordinary])
    assert (found[zero] == 0x20).all()
    assert (found[underflow] == 0x01).all()
    assert (wanted[zero | underflow] == 0x20).all(), "the reference is special exactly where these tests take it to be"


@weight_cases
def test_packed_codes_are_the_reference_codes(case: Case) -> None:
    reference = expected(case, FLOAT32_ARITHMETIC)
    scale = scalar(reference["weight_global_scale"])
    packed = quantize_blocks(weight_of(case), scale).packed
    zero, underflow = special_blocks(case, scale)
    found, wanted = (
        blocks_of(unpack_codes(codes).clone())
        for codes in (packed, tensor(reference["weight_packed"], torch.uint8, *packed.shape))
    )
    # A stored -0.0 has code 8 here, as in hardware, and code 0 there; a negative that rounds to zero has 8 in both.
    minus_zero = blocks_of((weight_of(case) == 0) & weight_of(case).signbit())
    assert ((found == 8) & (wanted == 0))[minus_zero].all()
    found[minus_zero] = 0
    assert torch.equal(found[~underflow], wanted[~underflow])
    assert not (found[zero] & 7).any()


@weight_cases
def test_decoded_matrix_is_the_reference_matrix(case: Case) -> None:
    reference = expected(case, FLOAT32_ARITHMETIC)
    scale = scalar(reference["weight_global_scale"])
    quantized = quantize_blocks(weight_of(case), scale)
    found = blocks_of(dequantize_blocks(quantized.packed, quantized.scales, scale))
    wanted = blocks_of(tensor(reference["dequantized"], torch.float32, *case["shape"]))
    underflow = special_blocks(case, scale)[1]
    assert torch.equal(found[~underflow], wanted[~underflow])
    step = 2.0**-9 / scale
    nearest = decode_e2m1(encode_e2m1(blocks_of(weight_of(case).float())[underflow] / step)) * step
    assert torch.equal(found[underflow], nearest)


@weight_cases
def test_the_rtn_quantizer_gives_the_reference_bytes(case: Case) -> None:
    reference = expected(case, FLOAT32_ARITHMETIC)
    scale = scalar(reference["weight_global_scale"])
    by_name = round_blocks(weight_of(case), scale)
    direct = quantize_blocks(weight_of(case), scale)
    assert torch.equal(by_name.packed, direct.packed)
    assert torch.equal(by_name.scales.view(torch.uint8), direct.scales.view(torch.uint8))


@over([case for case in WEIGHTS if expected(case, FLOAT32_ARITHMETIC)["dequantized_server"] != "same"])
def test_a_servers_order_of_decoding_differs_by_an_ulp_at_most(case: Case) -> None:
    reference = expected(case, FLOAT32_ARITHMETIC)
    scale = scalar(reference["weight_global_scale"])
    quantized = quantize_blocks(weight_of(case), scale)
    ours = dequantize_blocks(quantized.packed, quantized.scales, scale)
    server = tensor(reference["dequantized_server"], torch.float32, *case["shape"])
    torch.testing.assert_close(ours, server, rtol=2.0**-22, atol=0)


def decoded(case: Case, reference: Case) -> Tensor:
    rows, cols = case["shape"]
    return dequantize_blocks(
        tensor(reference["weight_packed"], torch.uint8, rows, cols // 2),
        tensor(reference["weight_scale"], torch.uint8, rows, cols // 16),
        scalar(reference["weight_global_scale"]),
    )


@weight_cases
def test_compressed_tensors_bytes_decode_to_its_values(case: Case) -> None:
    reference = expected(case, FLOAT32_ARITHMETIC)
    assert torch.equal(decoded(case, reference), tensor(reference["dequantized"], torch.float32, *case["shape"]))


@over(
    [
        case
        for case in WEIGHTS
        if any("bfloat16" in e["implementation"] and "same_as" not in e for e in case["expected"])
    ]
)
def test_llm_compressors_bytes_decode_to_its_values_but_for_bfloat16_rounding(case: Case) -> None:
    reference = expected(case, BFLOAT16_ARITHMETIC)
    wanted = tensor(reference["dequantized"], torch.float32, *case["shape"])
    finite = torch.isfinite(wanted)  # near bfloat16's end its arithmetic overflows
    torch.testing.assert_close(decoded(case, reference)[finite], wanted[finite], rtol=2.0**-7, atol=0)


@weight_cases
def test_modelopt_bytes_decode_to_modelopts_values(case: Case) -> None:
    reference = expected(case, MODELOPT_NAME)
    rows, cols = case["shape"]
    bytes_from = reference if "weight" in reference else expected(case, FLOAT32_ARITHMETIC)
    packed = tensor(bytes_from.get("weight") or bytes_from["weight_packed"], torch.uint8, rows, cols // 2)
    scales = decode_e4m3(tensor(bytes_from["weight_scale"], torch.uint8, rows, cols // 16))
    if scales.isnan().any():
        assert case["name"] == "all_zero_bf16_4x16", "modelopt writes NaN scales for a matrix of zeros only"
        return
    step = (scales * scalar(reference["weight_scale_2"])).unsqueeze(-1)
    found = (blocks_of(decode_e2m1(unpack_codes(packed))) * step).view(rows, cols)
    assert torch.equal(found, tensor(reference["dequantized"], torch.float32, rows, cols))


@pytest.mark.parametrize("name", ["extreme_outlier_f32_8x32", "scale_ties_f32_4x64"])
def test_an_underflowing_scale_is_clamped_as_modelopt_clamps_it(name: str) -> None:
    case = next(case for case in WEIGHTS if case["name"] == name)
    reference = expected(case, MODELOPT_NAME)
    scale = scalar(expected(case, FLOAT32_ARITHMETIC)["weight_global_scale"])
    quantized = quantize_blocks(weight_of(case), scale)
    assert bytes(quantized.scales.view(torch.uint8).flatten().tolist()).hex() == reference["weight_scale"]
    theirs = tensor(reference["dequantized"], torch.float32, *case["shape"])
    ours = dequantize_blocks(quantized.packed, quantized.scales, scale)
    torch.testing.assert_close(ours, theirs, rtol=2.0**-21, atol=0)


@activation_cases
def test_inputs_are_rounded_as_the_server_rounds_them(case: Case) -> None:
    reference = next(entry for entry in case["expected"] if "dequantized_bf16" in entry)
    inputs = tensor(case["x"], DTYPES[case["dtype"]], *case["shape"])
    found = quantize_dequantize(inputs, scalar(case["input_global_scale"]))
    assert torch.equal(found, tensor(reference["dequantized"], torch.float32, *case["shape"]))
    wanted = tensor(reference["dequantized_bf16"], torch.bfloat16, *case["shape"])
    assert torch.equal(found.to(torch.bfloat16), wanted)


@activation_cases
def test_the_servers_codes_and_scales_decode_to_the_same_inputs(case: Case) -> None:
    reference = next(entry for entry in case["expected"] if "dequantized_bf16" in entry)
    rows, cols = case["shape"]
    scale = scalar(case["input_global_scale"])
    found = dequantize_blocks(
        tensor(reference["packed"], torch.uint8, rows, cols // 2),
        tensor(reference["block_scale"], torch.uint8, rows, cols // 16),
        scale,
    )
    inputs = tensor(case["x"], DTYPES[case["dtype"]], rows, cols)
    assert torch.equal(found, quantize_dequantize(inputs, scale))


@pytest.mark.parametrize("entry", VECTORS["scalars"], ids=[entry["amax"] for entry in VECTORS["scalars"]])
def test_each_layout_stores_its_scalar_bit_for_bit(entry: Case) -> None:
    amax = float(scalar(entry["amax"]))
    divisor, multiplier = (
        COMPRESSED_TENSORS.stored_scalar("weight_global", amax),
        MODELOPT.stored_scalar("weight_global", amax),
    )
    assert (divisor.shape, multiplier.shape) == ((1,), ())
    assert ulps_apart(divisor, scalar(entry["global_scale"])) == 0
    assert ulps_apart(multiplier, scalar(entry["scale_2"])) == 0
    assert abs(float(divisor.double()) * float(multiplier.double()) - 1) <= 2.0**-21


def test_tables_of_all_codes_are_the_reference_tables() -> None:
    assert [str(value) for value in E2M1_VALUES] == [str(value) for value in VECTORS["tables"]["e2m1_values_by_code"]]
    wanted = torch.tensor(VECTORS["tables"]["e4m3fn_value_by_byte_0_to_126"])
    codes = torch.arange(127, dtype=torch.uint8)
    assert torch.equal(decode_e4m3(codes), wanted)
    assert torch.equal(encode_e4m3(wanted), codes)
    values = torch.tensor(VECTORS["tables"]["e2m1_values_by_code"])
    assert encode_e2m1(values).tolist() == list(range(16))
    assert torch.equal(round_e2m1(values).view(torch.int32), values.view(torch.int32))
