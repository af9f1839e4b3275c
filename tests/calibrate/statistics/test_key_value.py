"""The amax of keys and values: exact in any order, committed batches only, merged without loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.calibrate.statistics.key_value import KeyValueAmax
from nvquant.errors import CheckFailed
from torch import Tensor

NAME = "model.layers.0.self_attn.k"


def observed(*tensors: Tensor) -> KeyValueAmax:
    statistic = KeyValueAmax()
    for tensor in tensors:
        statistic.observe({"source": tensor})
        statistic.commit()
    return statistic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_amax_is_exact_and_a_float32(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensor[1, 2, 3, 4] = -7.3
    found = observed(tensor[:, :, :2], tensor.transpose(1, 2))
    assert found.result(NAME) == float(tensor.abs().max())
    assert found.state()["amax"].dtype == torch.float32


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(st.permutations(range(5)), st.integers(0, 5))
def test_order_and_parts_change_nothing(order: list[int], cut: int) -> None:
    tensors = [torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    turned = [tensors[at] for at in order]
    states = [observed(*turned[:cut]).state(), observed(*turned[cut:]).state(), observed().state()]
    assert KeyValueAmax.merged(states).result(NAME) == observed(*tensors).result(NAME)


def test_only_committed_batches_count() -> None:
    statistic = observed(torch.ones(3))
    statistic.observe({"source": torch.full((3,), 9.0)})
    assert statistic.result(NAME) == 1.0
    statistic.discard()
    statistic.commit()
    assert statistic.result(NAME) == 1.0


def test_a_site_that_was_never_reached_fails() -> None:
    for statistic in (observed(), KeyValueAmax.merged([]), KeyValueAmax.merged([observed().state()])):
        with pytest.raises(CheckFailed, match=r"never reached model\.layers\.0\.self_attn\.k"):
            statistic.result(NAME)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_whatever_comes_after(value: float) -> None:
    damaged = observed(torch.tensor([1.0, value]), torch.ones(2))
    merged = KeyValueAmax.merged([observed(torch.ones(2)).state(), damaged.state()])
    for statistic in (damaged, merged):
        with pytest.raises(CheckFailed, match=r"NaN or an infinity in model\.layers\.0\.self_attn\.k"):
            statistic.result(NAME)
