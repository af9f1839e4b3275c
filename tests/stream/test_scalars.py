"""The scalars that follow from a group's record, in both layouts."""

from __future__ import annotations

import pytest
import torch
from nvquant.format.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from nvquant.format.schemes import FP8, FP8_STATIC, NVFP4, NVFP4_A16
from nvquant.stream.manifest import GroupRecord, InputRecord
from nvquant.stream.scalars import scalar_amaxes, scalar_values

INPUT = InputRecord(observed_amax=3.0, low_percentile=0.5, calibrated_amax=12.0, tokens=9)


def record(scheme: str, amax: float = 0.75, inputs: InputRecord | None = INPUT) -> GroupRecord:
    return GroupRecord(scheme=scheme, members=("a",), weight_amax=amax, input=inputs)


def test_weights_get_the_headroom_of_the_quantizer_and_inputs_the_calibrated_amax() -> None:
    assert scalar_amaxes(NVFP4, record("nvfp4"), 2.0) == {"weight_global": 1.5, "input_global": 12.0}
    assert scalar_amaxes(FP8_STATIC, record("fp8"), 1.0) == {"scales": 0.75, "input_scale": 12.0}


def test_what_is_not_shared_has_no_scalar() -> None:
    assert scalar_amaxes(FP8, record("fp8"), 1.0) == {}
    assert scalar_amaxes(NVFP4_A16, record("nvfp4-a16"), 1.0) == {"weight_global": 0.75}
    assert scalar_amaxes(NVFP4, record("nvfp4", inputs=None), 1.0) == {"weight_global": 0.75}
    assert scalar_amaxes(FP8_STATIC, record("fp8", inputs=None), 1.0) == {"scales": 0.75}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_values_are_float32_scalars_in_the_shape_of_the_layout(layout: Layout) -> None:
    for name, form in layout.schemes.items():
        for value in scalar_values(layout, form, record(name), 1.0).values():
            assert (value.dtype, tuple(value.shape), value.device.type) == (torch.float32, layout.scalar_shape, "cpu")


def test_global_scales_are_divisors_or_multipliers_and_fp8_scales_multipliers() -> None:
    divisors = scalar_values(COMPRESSED_TENSORS, NVFP4, record("nvfp4"), 1.0)
    assert {part: float(value) for part, value in divisors.items()} == {"weight_global": 3584.0, "input_global": 224.0}
    multipliers = scalar_values(MODELOPT, NVFP4, record("nvfp4"), 1.0)
    assert torch.equal(multipliers["weight_global"], torch.tensor(0.75) / 2688)
    fp8 = scalar_values(MODELOPT, FP8_STATIC, record("fp8"), 1.0)
    assert {part: float(value) for part, value in fp8.items()} == {
        "scales": float(torch.tensor(0.75) / 448),
        "input_scale": float(torch.tensor(12.0) / 448),
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_zeros_stand_under_a_scale_of_one(layout: Layout) -> None:
    zeros = InputRecord(observed_amax=0.0, low_percentile=0.0, calibrated_amax=0.0)
    for name, form in layout.schemes.items():
        values = scalar_values(layout, form, record(name, 0.0, zeros), 2.0)
        assert {float(value) for value in values.values()} <= {1.0}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_a_stored_scalar_stands_for_its_amax(layout: Layout) -> None:
    for name, form in layout.schemes.items():
        amaxes = scalar_amaxes(form, record(name), 2.0)
        for part, value in scalar_values(layout, form, record(name), 2.0).items():
            assert layout.amax_of(part, float(value)) == pytest.approx(amaxes[part], rel=2**-22)
