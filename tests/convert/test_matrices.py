"""The output of a fused group: bytes by name, the record, and the scalars that follow from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.checkpoint.writer import TensorEntry
from nvquant.convert.matrices import (
    GroupOutput,
    group_scalars,
    groups_of_layer,
    is_scalar,
    made_shapes,
    quantize_group,
    refuse_damaged,
)
from nvquant.errors import NonFiniteError
from nvquant.format.blocks import quantize_blocks, weight_amax
from nvquant.format.fp8 import fp8_scale, quantize_rows
from nvquant.format.scales import global_scale
from nvquant.plan.plan import Plan
from nvquant.quantizers import get_quantizer
from nvquant.quantizers.base import GroupInputs
from nvquant.recipe.groups import FusedGroup
from support.conversions import COMPRESSED_TENSORS, MODELOPT, TinyModels, planned, raw
from torch import Tensor

LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)
MODELS = ("llama", "gemma4")
GATE_UP, QKV = "model.layers.1.mlp.gate_up_proj", "model.layers.1.self_attn.qkv_proj"
INPUTS = InputStatistics(3.0, 0.5, None, 9)


def mixed(tiny: TinyModels, name: str, layout: str) -> Plan:
    return planned(tiny(name), "nvfp4-fp8", layout)


def group_of(plan: Plan, name: str) -> FusedGroup:
    return next(group for group in plan.selection.groups if group.name == name)


def weights_of(plan: Plan, group: FusedGroup) -> dict[str, Tensor]:
    return {plan.matrices[module].tensor: plan.source.read(plan.matrices[module].tensor) for module in group.members}


def made(plan: Plan, group: FusedGroup, quantizer: str = "rtn", inputs: InputStatistics | None = None) -> GroupOutput:
    statistics = None if inputs is None else GroupInputs(inputs)
    return quantize_group(plan, group, weights_of(plan, group), statistics, get_quantizer(quantizer))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_announced_tensors_are_made_with_their_shapes(tiny: TinyModels, name: str, layout: str) -> None:
    plan = mixed(tiny, name, layout)
    shapes = made_shapes(plan, plan.selection.groups)
    entries = {entry.name: entry for shard in plan.shards for entry in shard.entries}
    seen: set[str] = set()
    for group in plan.selection.groups:
        output = made(plan, group, inputs=INPUTS)
        assert {of: tuple(t.shape) for of, t in output.tensors.items()} == {
            of: shape for of, (owner, shape) in shapes.items() if owner == group.name
        }
        scalars = group_scalars(plan, group, output.record, get_quantizer("rtn"))
        assert not scalars.keys() & output.tensors.keys()
        for of, tensor in output.tensors.items():
            assert tensor.dtype == torch.uint8
            assert tensor.numel() == entries[of].nbytes
        for of, scalar in scalars.items():
            assert (tuple(scalar.shape), scalar.dtype) == (entries[of].shape, torch.float32)
        seen |= scalars.keys() | output.tensors.keys()
    copied = {info for info in plan.source.infos() if info.removesuffix(".weight") not in plan.matrices}
    assert seen == entries.keys() - copied


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_of_an_nvfp4_group_are_codes_and_block_scales_under_one_global_scale(
    tiny: TinyModels, layout: str
) -> None:
    plan = mixed(tiny, "llama", layout)
    group = group_of(plan, GATE_UP)
    weights = weights_of(plan, group)
    output = made(plan, group, inputs=INPUTS)
    amax = max(weight_amax(weight) for weight in weights.values())
    names = plan.layout.suffixes(plan.matrices[group.members[0]].scheme)
    for module in group.members:
        expected = quantize_blocks(weights[f"{module}.weight"], global_scale(amax))
        assert raw(output.tensors[f"{module}.{names['codes']}"]) == raw(expected.packed)
        assert raw(output.tensors[f"{module}.{names['scales']}"]) == raw(expected.scales)
    assert output.record.weight_amax == float(amax)


def test_the_bytes_of_an_fp8_group_are_codes_and_the_scales_of_its_rows(tiny: TinyModels) -> None:
    plan = mixed(tiny, "llama", COMPRESSED_TENSORS)
    group = group_of(plan, QKV)
    weights = weights_of(plan, group)
    output = made(plan, group)
    for module in group.members:
        weight = weights[f"{module}.weight"]
        scales = fp8_scale(weight.float().abs().amax(1, keepdim=True))
        assert raw(output.tensors[f"{module}.weight"]) == raw(quantize_rows(weight, scales))
        assert raw(output.tensors[f"{module}.weight_scale"]) == raw(scales)
    assert output.record.as_json() == {
        "scheme": "fp8",
        "members": list(group.members),
        "weight_amax": max(float(weight_amax(weight)) for weight in weights.values()),
    }
    assert group_scalars(plan, group, output.record, get_quantizer("mse")) == {}


def test_a_fused_fp8_group_of_modelopt_shares_both_scales(tiny: TinyModels) -> None:
    plan = mixed(tiny, "llama", MODELOPT)
    group = group_of(plan, QKV)
    weights = weights_of(plan, group)
    output = made(plan, group, "mse", INPUTS)
    scale = fp8_scale(torch.stack([weight_amax(weight) for weight in weights.values()]).amax())
    assert set(output.tensors) == {f"{module}.weight" for module in group.members}
    for module in group.members:
        assert raw(output.tensors[f"{module}.weight"]) == raw(quantize_rows(weights[f"{module}.weight"], scale))
    scalars = group_scalars(plan, group, output.record, get_quantizer("mse"))
    assert output.record.input is not None
    assert output.record.input.calibrated_amax == 2 * INPUTS.amax  # FP8's headroom under `auto`
    for module in group.members:
        assert torch.equal(scalars[f"{module}.weight_scale"], scale)  # without the headroom of mse
        assert torch.equal(scalars[f"{module}.input_scale"], torch.tensor(6.0) / 448)


def test_scalars_follow_from_the_record_alone(tiny: TinyModels) -> None:
    plan = mixed(tiny, "llama", COMPRESSED_TENSORS)
    group = group_of(plan, GATE_UP)
    record = made(plan, group, "rtn", INPUTS).record.model_copy(update={"weight_amax": 1.0})
    for quantizer, expected in (("rtn", 2688.0), ("mse", 1344.0)):
        scalars = group_scalars(plan, group, record, get_quantizer(quantizer))
        assert {float(scalars[f"{module}.weight_global_scale"]) for module in group.members} == {expected}


def test_marlins_blocks_are_counted_for_block_scales_only(tiny: TinyModels) -> None:
    plan = mixed(tiny, "llama", COMPRESSED_TENSORS)
    assert "marlin_flushed_blocks" in made(plan, group_of(plan, GATE_UP)).record.as_json()
    assert "marlin_flushed_blocks" not in made(plan, group_of(plan, QKV)).record.as_json()


def test_a_scalar_is_one_value_that_is_no_row_and_no_code() -> None:
    assert is_scalar("weight_global", TensorEntry("a", "F32", (1,)))
    assert is_scalar("scales", TensorEntry("a", "F32", ()))
    assert not is_scalar("scales", TensorEntry("a", "F32", (1, 1)))  # the scale of a matrix of one row
    assert not is_scalar("codes", TensorEntry("a", "U8", (1,)))


def test_groups_of_a_layer_are_told_apart_by_whole_numbers(tiny: TinyModels) -> None:
    plan = mixed(tiny, "llama", COMPRESSED_TENSORS)
    (group,) = groups_of_layer([replace(group_of(plan, QKV), name="model.layers.10.x")], "model.layers", 10)
    assert groups_of_layer([group], "model.layers", 1) == []
    assert len(groups_of_layer(plan.selection.groups, "model.layers", 1)) == 4


def test_a_damaged_tensor_of_any_shape_is_named() -> None:
    refuse_damaged({"a": torch.ones(3, 4), "codes": torch.full((4,), 255, dtype=torch.uint8), "scalar": torch.ones(())})
    stack = torch.ones(2, 3, 4)
    stack[1, 1, 2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^stack holds a NaN or an infinity at row 4, column 2"):
        refuse_damaged({"a": torch.ones(3, 4), "stack": stack})
