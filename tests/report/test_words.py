"""Numbers with the digits that mean something."""

from __future__ import annotations

import math

import pytest
from nvquant.quoting import one_line, visible
from nvquant.report.charts import Axis, layer_ticks, value_axis, value_ticks
from nvquant.report.words import number, percent, size, with_error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.08312, "0.0831"),
        (32.14, "32.1"),
        (1728, "1,728"),
        (2.13e-6, "2.1e-6"),
        (1234567.8, "1.2e6"),
        (16352.0, "16,352"),
        (0, "0"),
        (0.0, "0"),
        (-0.5, "-0.500"),
        (99.96, "100"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
        (-math.inf, "minus infinite"),
        (None, "–"),  # noqa: RUF001
        ("3", "–"),  # noqa: RUF001
        (True, "–"),  # noqa: RUF001
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.892, "89.2 %"),
        (1.0, "100.0 %"),
        (0.99996, "99.996 %"),
        (0.00002, "0.002 %"),
        (0.0, "0.0 %"),
        (1e-9, "0.0000 %"),
    ],
)
def test_nearly_all_is_not_shown_as_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_value_has_the_decimals_of_its_error() -> None:
    assert with_error(0.0831, 0.00332) == "0.0831 ± 0.0033"
    assert with_error(0.00021, 8.4e-6) == "0.000210 ± 0.000008"
    assert with_error(2.5, None) == "2.50" and with_error(math.nan, 0.1) == "not a number"
    assert with_error(2.5, 0.0) == "2.50"


def test_bytes_are_counted_in_thousands() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_300_000, 32_633_255_032)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "1.30 MB",
        "32.6 GB",
    ]


def test_nothing_invisible_is_left() -> None:
    assert visible("a\x00b\x1b[0m\u202e\ud800\r\nc\td") == "a\\x00b\\x1b[0m\\u202e\\ud800\nc\td"
    assert one_line(" a\n\n b ") == "a b"


def test_axes_are_logarithmic_where_values_lie_far_apart() -> None:
    assert value_axis([0.01, 0.5], 280).is_log
    assert not value_axis([0.04, 0.05], 280).is_log
    assert not value_axis([0.0, 0.5], 280).is_log
    for values in ([0.01, 0.5], [1e-7, 30.0], [0.04, 0.05], [0.0, 0.0], [], [3.0], [-0.1, 0.1]):
        axis = value_axis(values, 280)
        ticks = value_ticks(axis)
        assert 2 <= len(ticks) <= 9
        assert all(0 < axis.at(value) < 280 for value in [*values, *ticks])
    assert value_ticks(Axis(0.0, 1.0, 200, 10)) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_layers_are_named_as_often_as_there_is_room() -> None:
    assert layer_ticks([0], 940) == [0]
    assert layer_ticks(list(range(4)), 940) == [0, 1, 2, 3]
    assert layer_ticks(list(range(126)), 340) == [0, 25, 50, 75, 100, 125]
    assert len(layer_ticks(list(range(1000)), 340)) <= 8
    assert len(layer_ticks([-3, 2**64], 940)) <= 20  # numbers out of a file
