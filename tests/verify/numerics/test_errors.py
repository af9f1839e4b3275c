"""Errors of a layer, of a hidden state and of a matrix are what their definitions give."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.format.blocks import dequantize_blocks, quantize_blocks, weight_amax
from nvquant.format.scales import global_scale
from nvquant.format.schemes import NVFP4, NVFP4_A16, Part
from nvquant.verify.numerics import errors
from nvquant.verify.numerics.errors import LayerError, StreamError, matrix_numbers, relative_error
from nvquant.verify.numerics.served import ServedMatrix
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(before: Tensor, after: Tensor, got: Tensor) -> LayerError:
    error = LayerError()
    error.add(before, after, got)
    return error


@settings(max_examples=50, deadline=None)
@given(st.floats(-20, 20), st.integers(0, 1000))
def test_a_layers_error_does_not_depend_on_how_much_of_its_input_passes_by(share: float, seed: int) -> None:
    """Gemma 4 hands its input on times a scalar of the layer's."""
    x, added, noise = (random(2, 30, 64, seed=seed + i) for i in range(3))
    added -= (added[:, 1:] * x[:, 1:]).sum() / x[:, 1:].square().sum() * x  # what it adds is none of its input
    plain = error_of(x, added, added + 0.1 * noise).as_json()
    passing = error_of(x, share * x + added, share * x + added + 0.1 * noise).as_json()
    assert passing["relative_error"] == pytest.approx(plain["relative_error"], rel=1e-3)
    assert passing["cosine"] == pytest.approx(plain["cosine"], abs=1e-3)


def test_a_layers_error_is_root_of_error_over_what_it_adds() -> None:
    x, noise = random(1, 50, 32), random(1, 50, 32, seed=1)
    added = random(1, 50, 32, seed=2)
    added -= (added[:, 1:] * x[:, 1:]).sum() / x[:, 1:].square().sum() * x
    found = error_of(x, x + added, x + added + 0.3 * noise).as_json()
    wanted = float((0.3 * noise[:, 1:]).norm() / added[:, 1:].norm())
    assert found["relative_error"] == pytest.approx(wanted, rel=1e-4)
    assert found["sqnr_db"] == pytest.approx(-20 * math.log10(wanted), rel=1e-4)
    both = added[:, 1:], (added + 0.3 * noise)[:, 1:]
    share = (both[1] * x[:, 1:]).sum() / x[:, 1:].square().sum()
    assert found["cosine"] == pytest.approx(
        float(torch.cosine_similarity(both[0].flatten(), (both[1] - share * x[:, 1:]).flatten(), dim=0)), abs=0.02
    )


def test_batches_add_up() -> None:
    parts = [tuple(random(1, 20, 16, seed=10 * i + j) for j in range(3)) for i in range(3)]
    error = LayerError()
    for before, after, got in parts:
        error.add(before, after, got)
    singles = [error_of(*part) for part in parts]
    assert error.error == pytest.approx(sum(single.error for single in singles))
    assert error.energy == pytest.approx(sum(single.energy for single in singles))


def test_the_first_token_counts_for_nothing() -> None:
    before, after, got = (random(2, 20, 16, seed=i) for i in range(3))
    usual = error_of(before, after, got).as_json()
    stream = StreamError()
    stream.add(after, got)
    for tensor in (before, after, got):
        tensor[:, 0] = 1e6 * random(2, 16, seed=9)
    got[:, 0] *= 7
    assert error_of(before, after, got).as_json() == usual
    again = StreamError()
    again.add(after, got)
    assert again.relative == stream.relative


def test_an_exact_layer_has_no_error_and_no_noise_to_measure() -> None:
    x, y = random(1, 5, 16), random(1, 5, 16, seed=1)
    assert error_of(x, y, y.clone()).as_json() == {
        "relative_error": 0.0, "sqnr_db": None, "cosine": pytest.approx(1.0)
    }  # fmt: skip


def test_what_is_no_number_is_an_infinite_error_and_not_a_small_one() -> None:
    x, y, z = (random(1, 5, 16, seed=i) for i in range(3))
    z[0, 3, 3] = math.nan
    assert error_of(x, y, z).as_json()["relative_error"] == math.inf
    assert relative_error(1.0, 0.0) == math.inf
    assert relative_error(0.0, 0.0) == 0.0
    stream = StreamError()
    stream.add(y, z)
    assert stream.relative == math.inf


def served(divisor: Tensor, flushed: list[int], rounds: bool = False) -> ServedMatrix:
    mask = torch.zeros(256, dtype=torch.bool)
    mask[flushed] = True
    scalars: dict[Part, Tensor] = {"weight_global": divisor} | ({"input_global": divisor} if rounds else {})
    scheme = NVFP4 if rounds else NVFP4_A16
    return ServedMatrix(None, scheme, "group", scalars, mask)  # type: ignore[arg-type]


def test_a_matrixs_numbers_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "STRIP_ELEMENTS", 64)  # a row at a time
    weight = random(4, 64)
    divisor = global_scale(weight_amax(weight))
    weight[0, :16] = 0  # stays zero: not lost
    weight[1, 16:32] = float(6 * 2.0**-11 / divisor)  # its scale would lie below half of E4M3's smallest: lost, clamped
    weight[2, 32:48] *= 40  # its scale would lie beyond E4M3's largest
    packed = quantize_blocks(weight, divisor)
    decoded = dequantize_blocks(packed.packed, packed.scales, divisor, torch.float32)
    decoded[1, 16:32] = 0
    decoded[3, :16] = 0  # lost, although it need not be
    histogram = torch.zeros(256, dtype=torch.int64)
    histogram[[3, 9, 100]] = torch.tensor([2, 5, 9])
    found = asdict(matrix_numbers("m", 7, served(divisor, [3, 9]), weight, decoded, histogram))
    assert found["weight_error"] == pytest.approx(float((decoded - weight).norm() / weight.norm()), rel=1e-5)
    assert found == {
        "name": "m", "layer": 7, "scheme": "weight-only", "weight_error": found["weight_error"], "blocks": 16,
        "zero_blocks": 2, "clamped_blocks": 2, "flushed_blocks": 7,
    }  # fmt: skip
    assert matrix_numbers("m", 7, served(divisor, [], True), weight, decoded, histogram).scheme == "W4A4"


def test_without_a_source_a_matrix_has_no_error() -> None:
    decoded = random(2, 32)
    histogram = torch.zeros(256, dtype=torch.int64)
    found = asdict(matrix_numbers("m", 0, served(torch.tensor(1.0), []), None, decoded, histogram))
    assert found["weight_error"] is None
    assert (found["blocks"], found["zero_blocks"], found["clamped_blocks"]) == (4, 0, 0)
