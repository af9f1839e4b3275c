"""The curve, exactly: the order of the steps, and the forecast between the measured ends."""

from __future__ import annotations

import pytest
from nvquant.errors import InputError
from nvquant.sweep.choice import Form, Ladder, Point, curve, schemes_at
from nvquant.sweep.targets import Target, chosen, only_target, targets_of

NO_FILES = {"file_bytes": lambda point: point.tensor_bytes + 10}


def ladder(name: str, weights: int, kl4: float, kl8: float) -> Ladder:
    """A group whose NVFP4, FP8 and BF16 take 1, 2 and 4 bytes a weight, and one more for a scalar but in BF16."""
    return Ladder(
        name,
        weights,
        (
            Form("nvfp4", kl4, weights + 1, weights),
            Form("fp8", kl8, 2 * weights + 1, 2 * weights),
            Form("bf16", 0.0, 4 * weights, 4 * weights),
        ),
    )


A, B, C = ladder("a", 100, 0.5, 0.1), ladder("b", 10, 0.11, 0.01), ladder("c", 100, 0.2, 0.04)


def points() -> list[Point]:
    return curve([A, B, C], 0.9, 0.3, 1000)


def test_steps_come_by_gain_a_byte_and_fp8_comes_before_no_quantization() -> None:
    # FP8: b gains .1 in 10 bytes, a .4 in 100, c .16 in 100. BF16: b .01 in 19, a .1 in 199, c .04 in 199.
    steps = [(point.group, point.scheme) for point in points()]
    assert steps == [(None, None), ("b", "fp8"), ("a", "fp8"), ("c", "fp8"), ("b", "bf16"), ("a", "bf16")]


def test_a_group_gets_fp8_first_even_if_it_gains_more_without_quantization() -> None:
    late = ladder("late", 10, 0.51, 0.5)
    steps = [(point.group, point.scheme) for point in curve([late, C], 1.0, 0.5, 0)]
    assert steps == [(None, None), ("c", "fp8"), ("late", "fp8"), ("late", "bf16")]


def test_bytes_and_bits_are_those_of_the_forms() -> None:
    found = points()
    assert [point.tensor_bytes for point in found] == [1000, 1010, 1110, 1210, 1229, 1428]
    assert found[0].bits == 8.0
    assert found[1].bits == 8 * (100 + 20 + 100) / 210
    assert found[-1].bits == 8 * (400 + 40 + 200) / 210


def test_the_forecast_is_linear_between_the_measured_ends() -> None:
    kl = [point.kl for point in points()]
    shares = [0.1 / 0.66, 0.5 / 0.66, 1.0]  # of the gains by FP8
    expected = [0.9, *(0.3 + 0.6 * (1 - share) for share in shares), 0.3 * (1 - 0.01 / 0.15), 0.3 * 0.04 / 0.15]
    assert kl == pytest.approx(expected, rel=1e-12)


def test_one_group_at_least_stays_quantized() -> None:
    assert schemes_at([A, B, C], points()[-1]) == {"a": "bf16", "b": "bf16", "c": "fp8"}


def test_a_recipe_of_fp8_has_steps_to_no_quantization_alone() -> None:
    forms = [Ladder(one.name, one.weights, one.forms[1:]) for one in (A, B)]
    found = curve(forms, 0.3, 0.3, 1000)
    assert [(point.group, point.scheme) for point in found] == [(None, None), ("b", "bf16")]
    assert found[-1].kl == pytest.approx(0.3 * 0.1 / 0.11)


def test_groups_without_a_gain_come_last_and_the_forecast_still_falls() -> None:
    idle = ladder("idle", 100, 0.1, 0.2)
    assert [point.group for point in curve([idle, C], 0.5, 0.2, 0)] == [None, "c", "c", "idle"]
    flat = [ladder("x", 10, 0.0, 0.0), ladder("y", 10, 0.0, 0.0)]
    assert [point.kl for point in curve(flat, 0.4, 0.2, 0)] == pytest.approx([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("target", "step"),
    [
        (Target("bits", 8.0), 0),
        (Target("bits", 8 * 220 / 210), 1),
        (Target("bits", 12.0), 1),
        (Target("bits", 99.0), 5),
        (Target("size", 1119), 1),
        (Target("size", 1120), 2),
        (Target("kl", 1.0), 0),
        (Target("kl", 0.85), 1),
        (Target("kl", 0.3), 3),
    ],
)
def test_a_budget_chooses_the_best_point_within_it(target: Target, step: int) -> None:
    assert chosen(points(), target, **NO_FILES) == points()[step]


@pytest.mark.parametrize(
    ("target", "reach"),
    [
        (Target("bits", 7.9), r"--target-bits 7.9 is impossible, .* from 8 to 24.38 bits a weight"),
        (Target("size", 1009), r"--target-size .*GB is impossible, .* from 1,010 to 1,438 bytes"),
        (Target("kl", 0.01), r"--max-kl 0.01 is impossible, .* from 0.08 to 0.9 nats"),
    ],
)
def test_an_impossible_budget_is_refused_with_the_possible_range(target: Target, reach: str) -> None:
    with pytest.raises(InputError, match=reach):
        chosen(points(), target, **NO_FILES)


def test_budgets_are_positive_and_a_conversion_has_one() -> None:
    assert only_target(None, None, None) is None
    assert only_target(None, 24_000_000_000, None) == Target("size", 24_000_000_000)
    with pytest.raises(InputError, match=r"--target-bits 5 and --max-kl 0.1 are two budgets for one conversion"):
        only_target(5, None, 0.1)
    for wrong in ([0.0], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(InputError, match="is not a positive number"):
            targets_of(wrong, [], [])
    names = [target.suffix for target in targets_of([5.5], [24_000_000_000], [0.1])]
    assert names == ["5.5bits", "24gb", "kl0.1"]
