"""MXFP4 becomes NVFP4 without a change of any value as long as E4M3 has the blocks' scales."""

from __future__ import annotations

import pytest
import torch
from nvquant.format.blocks import dequantize_blocks
from nvquant.format.microscaling import cast_rows, decode_e8m0, largest_exponent
from torch import Tensor

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
ROWS, COLS = 8, 64


def mxfp4(exponents: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random codes [rows, cols], and their values under scales of 2^exponents [rows, cols / 32], in BF16."""
    codes = torch.randint(0, 16, (ROWS, COLS), generator=torch.Generator().manual_seed(seed))
    scales = exponents.double().exp2().repeat_interleave(32, dim=1)
    values = (torch.tensor(VALUES, dtype=torch.float64)[codes] * scales).bfloat16()
    return codes, values


def codes_of(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()


def spread(span: int, largest: int = 5) -> Tensor:
    """Exponents of blocks from `largest` down by `span`."""
    exponents = largest - torch.arange(ROWS * COLS // 32).reshape(ROWS, -1) % (span + 1)
    exponents[-1, -1] = largest - span
    return exponents.int()


def decoded(packed: Tensor, scales: Tensor, exponent: int) -> Tensor:
    """By nvquant's reader of NVFP4, which other tests hold to compressed-tensors and modelopt."""
    return dequantize_blocks(packed, scales, torch.tensor(2.0**-exponent))


def test_e8m0_bytes_are_powers_of_two() -> None:
    stored = torch.tensor([0, 1, 126, 127, 128, 254, 255], dtype=torch.uint8)
    wanted = torch.tensor([2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127, torch.nan])
    assert torch.equal(decode_e8m0(stored).nan_to_num(-1.0), wanted.nan_to_num(-1.0))
    assert torch.equal(decode_e8m0(stored[:-1].view(torch.float8_e8m0fnu)), wanted[:-1])


@pytest.mark.parametrize("largest", [-90, -3, 5, 100])
@pytest.mark.parametrize("span", range(18))
def test_a_span_of_17_exponents_changes_no_value_and_no_code(span: int, largest: int) -> None:
    exponents = spread(min(span, ROWS * COLS // 32 - 1), largest)
    exponents[0, 0], exponents[-1, -1] = largest, largest - span
    codes, values = mxfp4(exponents)
    exponent = largest_exponent(values, exponents)
    assert exponent == largest
    made = cast_rows(values, exponents, exponent - 8)
    assert (made.shifted, made.rounded) == (0, 0)
    assert torch.equal(codes_of(made.packed), codes)
    assert torch.equal(decoded(made.packed, made.scales, exponent - 8), values.float())
    assert float(made.scales.float().max()) == 256.0


def test_a_block_below_the_span_keeps_its_values_where_smaller_codes_have_them() -> None:
    """18 octaves: codes of whole numbers halve. Others lose bits, and are counted."""
    exponents = torch.full((ROWS, 2), 5, dtype=torch.int32)
    exponents[1] = exponents[2] = 5 - 18
    codes, values = mxfp4(exponents)
    codes[1] = torch.tensor([2, 4, 6, 7, 0, 10, 12, 8] * 8)  # 1, 2, 4, 6, 0, -1, -4, -0
    codes[2] = torch.tensor([1, 3, 5, 7] * 16)  # 0.5, 1.5, 3, 6: a half of 0.5 or of 1.5 is no code
    values = (
        torch.tensor(VALUES, dtype=torch.float64)[codes] * exponents.double().exp2().repeat_interleave(32, 1)
    ).bfloat16()
    made = cast_rows(values, exponents, 5 - 8)
    assert (made.shifted, made.rounded) == (4, 4)
    found = decoded(made.packed, made.scales, 5 - 8)
    assert torch.equal(found[[0, 1, 3, 4, 5, 6, 7]], values[[0, 1, 3, 4, 5, 6, 7]].float())
    step = 2.0 ** (5 - 8 - 9)
    assert float((found[2] - values[2].float()).abs().max()) <= step / 4
    assert made.scales[2].view(torch.uint8).tolist() == [0x01] * 4


def test_blocks_of_zeros_bound_nothing() -> None:
    exponents = torch.zeros((ROWS, 2), dtype=torch.int32)
    exponents[3], exponents[4] = 100, -100
    _, values = mxfp4(exponents)
    values[3:5] = 0
    assert largest_exponent(values, exponents) == 0
    made = cast_rows(values, exponents, -8)
    assert (made.shifted, made.rounded) == (0, 0)
    assert torch.equal(decoded(made.packed, made.scales, -8), values.float())
    assert made.scales[3:5].view(torch.uint8).unique().tolist() == [0x20]
    assert largest_exponent(torch.zeros(ROWS, COLS), exponents) is None
