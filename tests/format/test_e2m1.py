"""E2M1 codes: every value, every tie, saturation, the sign of zero, and two codes a byte."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.format.e2m1 import E2M1_VALUES, decode_e2m1, encode_e2m1, pack_codes, round_e2m1, unpack_codes

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=100)
TABLE = [
    (0x0, 0.0), (0x1, 0.5), (0x2, 1.0), (0x3, 1.5), (0x4, 2.0), (0x5, 3.0), (0x6, 4.0), (0x7, 6.0),
    (0x8, -0.0), (0x9, -0.5), (0xA, -1.0), (0xB, -1.5), (0xC, -2.0), (0xD, -3.0), (0xE, -4.0), (0xF, -6.0),
]  # fmt: skip
# Halfway between two neighbours, and the even one of the two codes.
TIES = [(0.25, 0x0), (0.75, 0x2), (1.25, 0x2), (1.75, 0x4), (2.5, 0x4), (3.5, 0x6), (5.0, 0x6)]


def encode(*values: float) -> list[int]:
    codes = encode_e2m1(torch.tensor(values, dtype=torch.float32))
    assert codes.dtype == torch.uint8
    return codes.tolist()


def next_float(value: float, towards: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(towards)).item()


@pytest.mark.parametrize(("code", "value"), TABLE)
def test_every_code_stands_for_its_value_and_comes_back(code: int, value: float) -> None:
    decoded = decode_e2m1(torch.tensor([code], dtype=torch.uint8)).item()
    assert (decoded, math.copysign(1, decoded)) == (value, math.copysign(1, value))
    assert encode(value) == [code]
    assert E2M1_VALUES[code] == value


@pytest.mark.parametrize(("tie", "even"), TIES)
def test_a_tie_goes_to_the_even_code_and_its_neighbours_to_the_nearer_one(tie: float, even: int) -> None:
    low = max(code for code, value in TABLE[:8] if value < tie)
    for sign, bit in ((1, 0), (-1, 8)):
        assert encode(sign * tie) == [even | bit]
        assert encode(sign * next_float(tie, 0), sign * next_float(tie, 9)) == [low | bit, (low + 1) | bit]


@pytest.mark.parametrize("beyond", [6.0000005, 7.0, 448.0, 1e30, torch.finfo(torch.float32).max])
def test_values_beyond_six_saturate(beyond: float) -> None:
    assert encode(beyond, -beyond) == [0x7, 0xF]


def test_minus_zero_and_what_rounds_to_it_keep_their_sign() -> None:
    tiny = torch.finfo(torch.float32).tiny
    assert encode(0.0, -0.0, 0.2, -0.2, tiny, -tiny, 1e-45, -1e-45) == [0, 8, 0, 8, 0, 8, 0, 8]
    assert round_e2m1(torch.tensor([-0.2, -0.0])).signbit().all()


def test_encoding_takes_any_shape_and_leaves_its_input_alone() -> None:
    values = torch.linspace(-8, 8, 60).reshape(3, 4, 5)
    before = values.clone()
    turned = values.transpose(0, 2)
    assert torch.equal(encode_e2m1(turned), encode_e2m1(values).transpose(0, 2))
    assert torch.equal(round_e2m1(turned), round_e2m1(values).transpose(0, 2))
    assert torch.equal(values, before)


def test_every_float_on_a_fine_grid_goes_to_the_nearest_value() -> None:
    grid = torch.arange(-4096, 4097, dtype=torch.float64) / 512  # holds every tie
    values = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64)
    distance = (grid.abs().clamp(max=6)[:, None] - values).abs()
    # The even code wins a tie: a penalty far below the grid's step for odd codes.
    nearest = (distance + 1e-6 * (torch.arange(8) % 2)).argmin(-1)
    codes = encode_e2m1(grid.float())
    assert torch.equal((codes & 7).long(), nearest)
    assert torch.equal((codes >> 3).bool(), grid.float().signbit())
    assert torch.equal(round_e2m1(grid.float()), decode_e2m1(codes))


def test_the_low_nibble_is_the_even_column() -> None:
    codes = torch.tensor([[0x1, 0x2, 0x3, 0x4], [0xF, 0x0, 0x8, 0x7]], dtype=torch.uint8)
    packed = torch.tensor([[0x21, 0x43], [0x0F, 0x78]], dtype=torch.uint8)
    assert torch.equal(pack_codes(codes), packed)
    assert torch.equal(unpack_codes(packed), codes)


@PROPERTY
@given(st.binary(min_size=8, max_size=48).filter(lambda data: len(data) % 8 == 0))
def test_packing_undoes_unpacking_and_the_reverse(data: bytes) -> None:
    packed = torch.tensor(list(data), dtype=torch.uint8).view(-1, 8)
    codes = unpack_codes(packed)
    assert torch.equal(pack_codes(codes), packed)
    assert torch.equal(unpack_codes(pack_codes(codes)), codes)
    assert int(codes.max()) < 16


@PROPERTY
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_finite_float_goes_to_a_nearest_value(value: float) -> None:
    found = round_e2m1(torch.tensor([value])).item()
    wanted = min(abs(min(max(value, -6.0), 6.0) - other) for other in E2M1_VALUES)
    assert abs(min(max(value, -6.0), 6.0) - found) == wanted
    assert math.copysign(1, found) == math.copysign(1, value)
