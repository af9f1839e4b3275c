"""The plan of an output: tensors, bytes, files and their order, all from headers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.headers import DTYPE_BYTES, Header, TensorInfo
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.checkpoint.writer import build_header, order_entries
from nvquant.errors import InputError
from nvquant.format.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT
from nvquant.plan.plan import SHARD_LIMIT_BYTES, Plan, compute_plan
from nvquant.recipe.load import load_recipe, parse_recipe
from nvquant.recipe.schema import Recipe
from support.tiny_models import tiny_gemma4

Tiny = Callable[[str], Checkpoint]
MLP = parse_recipe("name: mine\nexperts: bf16\nquantize:\n  - modules: [mlp]\n    scheme: nvfp4\n", "my.yaml")
FULL = load_recipe("nvfp4-full").model_copy(update={"experts": "bf16"})

# Source tensors and bytes; matrices and bytes for MLP only, for all linears. Computed from shapes, not with this code.
TINY = {
    "gemma4": (116, 734_988, 18, 523_164, 41, 293_716),
    "gemma4_e2b": (295, 1_472_048, 24, 1_083_632, 50, 812_992),
    "gemma4_moe": (164, 1_334_124, 18, 1_122_300, 41, 892_852),
    "gemma4_unified": (96, 730_508, 18, 518_684, 41, 289_236),
}


def pretend(shapes: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of one shard that exists by its header only; (dtype, shape) by name."""
    tensors, at = {}, 1000
    for name, (dtype, shape) in shapes.items():
        size = DTYPE_BYTES[dtype]
        for n in shape:
            size *= n
        tensors[name] = TensorInfo(name, dtype, shape, at, at + size)
        at += size
    header = Header(Path("model.safetensors"), tensors, {}, 1000, at)
    files = dict.fromkeys(tensors, "model.safetensors")
    return Checkpoint(Path("/nowhere"), config or {}, {"model.safetensors": header}, files)


def layer(i: int, hidden: int = 32) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
    return {f"model.layers.{i}.{name}.weight": ("BF16", (hidden, hidden)) for name in names}


def planned(source: Checkpoint, recipe: Recipe = MLP, layout: str = "compressed-tensors") -> Plan:
    return compute_plan(source, recipe, LAYOUTS[layout], "model")


def refused(source: Checkpoint, recipe: Recipe = MLP, layout: str = "compressed-tensors") -> str:
    with pytest.raises(InputError) as caught:
        planned(source, recipe, layout)
    assert caught.value.exit_code == 2
    assert str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("model", TINY)
def test_tensors_and_bytes_of_tiny_models_are_those_computed_from_their_shapes(
    tiny: Tiny, model: str, layout: str
) -> None:
    tensors, source_bytes, mlp, mlp_bytes, full, full_bytes = TINY[model]
    infos = tiny(model).infos()
    assert (len(infos), sum(info.nbytes for info in infos.values())) == (tensors, source_bytes)
    for recipe, matrices, size in ((MLP, mlp, mlp_bytes), (FULL, full, full_bytes)):
        plan = planned(tiny(model), recipe, layout)
        assert (len(plan.matrices), plan.tensors, plan.tensor_bytes) == (matrices, tensors + 3 * matrices, size)


def test_the_wider_gemma4_has_its_computed_size_too(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_gemma4(tmp_path / "wider", wider=True))
    assert planned(source).tensor_bytes == 4_310_812
    assert planned(source, FULL).tensor_bytes == 2_473_940


def test_weight_only_drops_the_input_scalars(tiny: Tiny) -> None:
    weight_only = planned(tiny("gemma4"), load_recipe("nvfp4-a16"))
    full = planned(tiny("gemma4"), FULL)
    assert full.tensors - weight_only.tensors == 41
    assert full.tensor_bytes - weight_only.tensor_bytes == 4 * 41
    assert not any(name.endswith("input_global_scale") for name in weight_only.origins)


def test_a_matrix_becomes_four_tensors_of_these_dtypes_and_shapes(tiny: Tiny) -> None:
    name = "model.layers.0.mlp.down_proj."
    wanted = {
        "compressed-tensors": {
            "weight_packed": ("U8", (64, 64), "codes"),
            "weight_scale": ("F8_E4M3", (64, 8), "scales"),
            "weight_global_scale": ("F32", (1,), "weight_global"),
            "input_global_scale": ("F32", (1,), "input_global"),
        },
        "modelopt": {
            "weight": ("U8", (64, 64), "codes"),
            "weight_scale": ("F8_E4M3", (64, 8), "scales"),
            "weight_scale_2": ("F32", (), "weight_global"),
            "input_scale": ("F32", (), "input_global"),
        },
    }
    for layout, tensors in wanted.items():
        plan = planned(tiny("llama"), layout=layout)
        entries = {entry.name: entry for shard in plan.shards for entry in shard.entries}
        found = {
            key.removeprefix(name): (entries[key].dtype, entries[key].shape, plan.origins[key].part)
            for key in plan.origins
            if key.startswith(name)
        }
        assert found == tensors
        assert all(plan.origins[name + suffix].source == name + "weight" for suffix in tensors)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("model", ["llama", "qwen2", "phi3", "gemma4", "gemma4_e2b_unused_kv", "gemma4_moe"])
def test_every_source_tensor_is_copied_or_quantized_and_nothing_is_added(tiny: Tiny, model: str, layout: str) -> None:
    source = tiny(model)
    plan = planned(source, FULL, layout)
    infos = source.infos()
    sources = {matrix.tensor for matrix in plan.matrices.values()}
    entries = {entry.name: entry for shard in plan.shards for entry in shard.entries}
    assert set(entries) == set(plan.origins) and plan.tensors == len(entries)
    copied = {name for name, origin in plan.origins.items() if origin.part is None}
    assert copied == set(infos) - sources
    for name in copied:
        assert plan.origins[name].source == name
        assert (entries[name].dtype, entries[name].shape) == (infos[name].dtype, infos[name].shape)
    assert {plan.origins[name].source for name in set(entries) - copied} == sources
    assert {plan.matrices[member].weight_group for group in plan.groups for member in group.members} == {
        group.name for group in plan.groups
    }


def test_one_shard_a_decoder_layer_then_the_rest_numbered_throughout(tiny: Tiny) -> None:
    plan = planned(tiny("gemma4"), FULL)
    assert [shard.layer for shard in plan.shards] == [0, 1, 2, 3, 4, 5, None]
    assert [shard.file for shard in plan.shards] == [f"model-{i:05d}-of-00007.safetensors" for i in range(1, 8)]
    assert plan.layers == [0, 1, 2, 3, 4, 5]
    assert plan.prefix == "model.language_model.layers"
    for shard in plan.shards[:6]:
        origins = {plan.origins[entry.name].source for entry in shard.entries}
        assert origins == set(plan.tensors_by_layer()[shard.layer or 0])
        assert all(f"language_model.layers.{shard.layer}." in name for name in origins)
    assert any("vision_tower" in entry.name for entry in plan.shards[6].entries)


def test_layers_are_in_the_order_of_their_numbers_not_of_their_names() -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for i in sorted(range(12), key=str):  # 0, 1, 10, 11, 2, as safetensors sorts them
        shapes |= layer(i)
    plan = planned(pretend(shapes))
    assert plan.layers == list(range(12))
    assert plan.shards[2].entries[0].name.startswith("model.layers.2.")


def test_missing_layer_numbers_make_no_empty_shards() -> None:
    plan = planned(pretend(layer(3) | layer(7)))
    assert plan.layers == [3, 7]
    assert plan.tensors_by_layer() == {3: list(layer(3)), 7: list(layer(7))}


def test_the_rest_is_split_at_five_gigabytes_and_a_larger_tensor_stands_alone() -> None:
    gigabyte = 1_000_000_000 // 2
    sizes = {"a": 3, "b": 3, "c": 6, "d": 1, "e": 4, "f": 1}
    shapes = layer(0) | {f"rest.{name}": ("BF16", (size, gigabyte)) for name, size in sizes.items()}
    plan = planned(pretend(shapes))
    rest = [[entry.name.removeprefix("rest.") for entry in shard.entries] for shard in plan.shards[1:]]
    assert rest == [["a"], ["b"], ["c"], ["d", "e"], ["f"]]
    assert SHARD_LIMIT_BYTES == 5_000_000_000
    assert [shard.file for shard in plan.shards] == [f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]


def test_a_shards_file_is_its_header_and_its_data_wide_dtypes_first(tiny: Tiny) -> None:
    plan = planned(tiny("gemma4"))
    for shard in plan.shards:
        assert shard.entries == order_entries(shard.entries)
        assert shard.file_bytes == len(build_header(shard.entries)) + shard.tensor_bytes
    assert plan.file_bytes == sum(shard.file_bytes for shard in plan.shards)
    assert plan.tensor_bytes == sum(entry.nbytes for shard in plan.shards for entry in shard.entries)


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
def test_a_source_that_stores_the_outputs_names_is_refused(layout: Any) -> None:
    names = layout.suffixes(layout.schemes["nvfp4"])
    for suffix in (names[part] for part in ("scales", "weight_global", "input_global")):
        shapes = layer(0) | {f"model.layers.0.mlp.up_proj.{suffix}": ("F32", (1,))}
        assert "choose a source that is not quantized" in refused(pretend(shapes), layout=layout.name)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_schemes_fit_into_either_layout(layout: str) -> None:
    text = (
        "name: two\nquantize:\n  - modules: [mlp]\n    scheme: nvfp4\n  - modules: [attention]\n    scheme: nvfp4-a16\n"
    )
    recipe = parse_recipe(text, "two.yaml")
    assert planned(pretend(layer(0)), recipe, layout).tensors == 3 * 4 + 1 * 3


def test_a_scheme_that_a_layout_cannot_express_is_refused() -> None:
    without = replace(MODELOPT, schemes={name: form for name, form in MODELOPT.schemes.items() if name != "fp8"})
    with pytest.raises(InputError) as caught:
        compute_plan(pretend(layer(0)), load_recipe("nvfp4-fp8"), without, "a-model")
    assert str(caught.value) == (
        "recipe nvfp4-fp8: the modelopt layout has no form for scheme fp8: choose the other layout with --format, or "
        "another scheme."
    )
    assert caught.value.exit_code == 2


def test_a_model_without_decoder_layers_is_refused() -> None:
    assert "whose text matrices are none: choose a recipe that quantizes other matrices, or another model" in refused(
        pretend({"lm_head.weight": ("BF16", (32, 32))})
    )


def test_another_stack_of_layers_is_copied_with_the_rest() -> None:
    shapes = layer(0) | layer(1) | {"mtp.layers.0.mlp.up_proj.weight": ("BF16", (32, 32))}
    plan = planned(pretend(shapes))
    assert plan.layers == [0, 1]
    assert [entry.name for entry in plan.shards[-1].entries] == ["mtp.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("model", ["llama", "gemma4", "gemma4_e2b_unused_kv", "gemma4_moe", "gemma4_unified"])
def test_every_tensor_lies_in_one_layer_or_in_the_rest(tiny: Tiny, model: str) -> None:
    plan = planned(tiny(model), FULL)
    by_layer = plan.tensors_by_layer()
    assert list(by_layer) == plan.layers
    rest = {plan.origins[entry.name].source for shard in plan.shards if shard.layer is None for entry in shard.entries}
    placed = [name for names in by_layer.values() for name in names]
    assert sorted([*placed, *rest]) == sorted(tiny(model).files)


def test_the_plan_is_a_function_of_names_and_shapes_alone(tiny: Tiny) -> None:
    once, again = planned(tiny("gemma4")), planned(tiny("gemma4"))
    assert once == again
    assert re.fullmatch(r"model-\d{5}-of-00007\.safetensors", once.shards[0].file)
    assert json.dumps([shard.file for shard in once.shards]) == json.dumps([shard.file for shard in again.shards])
