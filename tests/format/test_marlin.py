"""Counting blocks that Marlin flushes, against the rule written out scale by scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.format.marlin import RULE_READ_FROM, count_flushed_blocks, scale_histogram

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def value_of(byte: int) -> float:
    return math.ldexp(8 + (byte & 7), (byte >> 3) - 10) if byte >> 3 else math.ldexp(byte & 7, -9)


BYTE_OF = {value_of(byte): byte for byte in range(127)}


def count(*scales: float) -> int:
    return count_flushed_blocks(scale_histogram(torch.tensor([BYTE_OF[scale] for scale in scales], dtype=torch.uint8)))


def flushed_by_the_rule(scales: list[float]) -> int:
    """Scale by scale: lift the largest as near to 448 as powers of two allow; what is then under 2^-6 is gone."""
    top = max(scales)
    lift = 1.0
    while top and top * lift * 2 <= 448:
        lift *= 2
    return sum(0 < scale * lift < 2**-6 for scale in scales)


@pytest.mark.parametrize(
    ("top", "flushed", "kept"),
    [(448.0, 7 * 2**-9, 2**-6), (224.0, 3 * 2**-9, 2**-7), (104.0, 2**-9, 2**-8), (240.0, 7 * 2**-9, 2**-6)],
)
def test_the_border_lies_where_the_format_notes_have_it(top: float, flushed: float, kept: float) -> None:
    assert count(top, kept) == 0
    assert count(top, flushed) == 1
    assert BYTE_OF[kept] == BYTE_OF[flushed] + 1, "nothing lies between the two"


def test_under_a_small_top_scale_nothing_is_flushed() -> None:
    everything = [value_of(byte) for byte in range(1, BYTE_OF[1.0] + 1)]
    assert count(*everything) == 0


def test_zero_scales_are_not_counted_and_alone_are_nothing() -> None:
    assert count(0.0, 0.0, 448.0) == 0
    assert count(0.0, 0.0) == 0
    assert count_flushed_blocks(torch.zeros(256, dtype=torch.int64)) == 0


def test_a_histogram_counts_bytes_of_either_dtype() -> None:
    scales = torch.tensor([[0x38, 0x7E], [0x01, 0x38]], dtype=torch.uint8)
    for form in (scales, scales.view(torch.float8_e4m3fn)):
        histogram = scale_histogram(form)
        assert (histogram.shape, histogram.dtype, int(histogram.sum())) == ((256,), torch.int64, 4)
        assert (histogram[0x38], histogram[0x7E], histogram[0x01]) == (2, 1, 1)


def test_members_of_a_fused_tensor_are_judged_together() -> None:
    gate, up = torch.tensor([0x7E] * 3, dtype=torch.uint8), torch.tensor([0x01] * 5, dtype=torch.uint8)
    assert count_flushed_blocks(scale_histogram(up)) == 0
    assert count_flushed_blocks(scale_histogram(gate) + scale_histogram(up)) == 5


@PROPERTY
@given(st.lists(st.integers(0, 126), min_size=1, max_size=40))
def test_the_count_is_that_of_the_rule(scales: list[int]) -> None:
    histogram = scale_histogram(torch.tensor(scales, dtype=torch.uint8))
    assert count_flushed_blocks(histogram) == flushed_by_the_rule([value_of(byte) for byte in scales])


def test_every_pair_of_scales_follows_the_rule() -> None:
    for top in range(1, 127):
        for low in range(1, min(top, 0x30)):
            histogram = torch.zeros(256, dtype=torch.int64)
            histogram[top], histogram[low] = 1, 3
            assert count_flushed_blocks(histogram) == flushed_by_the_rule([value_of(top), *[value_of(low)] * 3])


def test_the_rule_names_the_version_that_it_was_read_from() -> None:
    assert RULE_READ_FROM.startswith("vLLM 0.")
