"""Global scales and E4M3 block scales, against literals, torch's own cast and the definition."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.format.scales import block_scale_bytes, decode_e4m3, encode_e4m3, global_scale

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=200)
FLOAT32 = torch.finfo(torch.float32)


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def e4m3_value(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    return math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)


@pytest.mark.parametrize(
    ("byte", "value"),
    [
        *((0x00, 0.0), (0x01, 2**-9), (0x07, 7 * 2**-9), (0x08, 2**-6), (0x20, 0.125), (0x38, 1.0), (0x39, 1.125)),
        *((0x76, 224.0), (0x77, 240.0), (0x7D, 416.0), (0x7E, 448.0)),
    ],
)
def test_e4m3_bytes_stand_for_their_values_and_come_back(byte: int, value: float) -> None:
    assert decode_e4m3(torch.tensor([byte], dtype=torch.uint8)).item() == value == e4m3_value(byte)
    assert encode_e4m3(torch.tensor([value])).tolist() == [byte]


def test_the_two_nan_bytes_decode_to_nan() -> None:
    assert decode_e4m3(torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).isnan().all()


def test_e4m3_encoding_is_torchs_cast_on_all_values_midpoints_and_their_neighbours() -> None:
    values = torch.tensor([e4m3_value(byte) for byte in range(127)])
    midpoints = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, midpoints])
    zero, top = torch.zeros(()), torch.tensor(448.0)
    grid = torch.cat([points, torch.nextafter(points, zero), torch.nextafter(points, top)]).clamp(0, 448)
    assert torch.equal(encode_e4m3(grid), grid.to(torch.float8_e4m3fn).view(torch.uint8))
    even = torch.tensor([byte if byte % 2 == 0 else byte + 1 for byte in range(126)], dtype=torch.uint8)
    assert torch.equal(encode_e4m3(midpoints), even), "ties go to the even byte"


def test_e4m3_encoding_is_torchs_cast_on_a_fine_grid() -> None:
    # Every float32 in [0, 448] whose low 12 bits are zero, and as many with other low bits.
    high = torch.arange(0, 0x43E00000, 1 << 12, dtype=torch.int32)
    for low in (0, 0xABC):
        grid = (high + low).view(torch.float32)
        assert torch.equal(encode_e4m3(grid), grid.to(torch.float8_e4m3fn).view(torch.uint8))


@PROPERTY
@given(st.floats(0, 448, width=32))
def test_e4m3_encoding_takes_a_nearest_value(value: float) -> None:
    found = decode_e4m3(encode_e4m3(torch.tensor([value]))).item()
    assert abs(found - value) == min(abs(e4m3_value(byte) - value) for byte in range(127))


@pytest.mark.parametrize(
    ("amax", "scale"), [(1.0, 2688.0), (2688.0, 1.0), (6.0, 448.0), (0.0, 1.0), (5e-36, 1.0), (7e-46, 1.0)]
)
def test_global_scale_is_2688_over_amax_and_one_where_that_overflows(amax: float, scale: float) -> None:
    found = global_scale(torch.tensor(amax))
    assert (found.item(), found.dtype, found.shape) == (scale, torch.float32, ())


@PROPERTY
@given(st.floats(2.0**-116, FLOAT32.max, width=32))
def test_global_scale_takes_the_reciprocal_first(amax: float) -> None:
    reciprocal = float32(1 / amax)
    assert global_scale(torch.tensor(amax)).item() == float32(2688 * reciprocal)


@PROPERTY
@given(st.floats(2.0**-100, 2.0**120, width=32), st.sampled_from([1.0, 2.0, 4.0, 16.0]))
def test_headroom_that_is_a_power_of_two_only_moves_the_exponent(amax: float, headroom: float) -> None:
    plain, roomy = global_scale(torch.tensor(amax)), global_scale(torch.tensor(amax), headroom)
    assert roomy.item() == plain.item() / headroom
    assert roomy.item() == global_scale(torch.tensor(amax * headroom)).item()


def test_global_scale_of_a_bfloat16_amax_is_computed_in_float32() -> None:
    amax = torch.tensor(0.10498046875, dtype=torch.bfloat16)
    assert global_scale(amax).item() == float32(2688 * float32(1 / amax.item()))


@pytest.mark.parametrize(
    ("amax", "scale", "byte"),
    [
        (0.0, 1.0, 0x20),  # a block of zeros
        (0.0, 1e30, 0x20),
        (6.0, 1.0, 0x38),
        (2688.0, 1.0, 0x7E),
        (2688.0, 2.0, 0x7E),  # would be 896: saturates
        (1e30, 1e5, 0x7E),
        (6 * 2.0**-9, 1.0, 0x01),
        (6 * 2.0**-10, 1.0, 0x01),  # rounds to zero: clamped to 2^-9
        (FLOAT32.tiny, 1.0, 0x01),
        (1e-45, 1.0, 0x01),  # a sixth of it is zero even in float32
        (6 * 1.0625, 1.0, 0x38),  # a tie: to the even byte
        (6 * 1.1875, 1.0, 0x3A),
    ],
)
def test_block_scale_bytes_are_clamped_and_rounded_to_even(amax: float, scale: float, byte: int) -> None:
    found = block_scale_bytes(torch.tensor([amax]), torch.tensor(scale))
    assert (found.tolist(), found.dtype) == ([byte], torch.uint8)


@PROPERTY
@given(st.floats(2.0**-40, 2.0**40, width=32), st.floats(2.0**-40, 2.0**40, width=32))
def test_block_scale_divides_by_six_before_it_multiplies(amax: float, scale: float) -> None:
    wanted = min(max(float32(float32(amax / 6) * scale), 2.0**-9), 448.0)
    found = block_scale_bytes(torch.tensor([amax]), torch.tensor(scale))
    assert torch.equal(found, torch.tensor([wanted]).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize(
    ("amax", "scale", "byte"),
    [(0.000494902953505516, 497.256591796875, 19), (0.00040063573396764696, 497.256591796875, 16)],
)
def test_the_order_of_division_and_product_decides_at_a_tie(amax: float, scale: float, byte: int) -> None:
    assert block_scale_bytes(torch.tensor([amax]), torch.tensor(scale)).item() == byte
    other_way = torch.tensor([float32(float32(amax * scale) / 6)]).to(torch.float8_e4m3fn).view(torch.uint8)
    assert other_way.item() != byte


def test_block_scale_bytes_leave_their_input_alone() -> None:
    amax = torch.tensor([0.0, 1.0, 6.0])
    block_scale_bytes(amax, torch.tensor(3.0))
    assert amax.tolist() == [0.0, 1.0, 6.0]
