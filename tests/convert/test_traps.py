"""Gemma 4's traps: what goes wrong without an error message, and the test that would notice.

| trap | noticed by |
|---|---|
| layer_scalar is a buffer, and is left at 1 | test_layer_scalars_are_loaded_and_copied |
| test models with layer_scalar 1 hide that | test_layer_scalars_of_the_test_models_matter; |
|   | support_tests/test_tiny_models.py, test_losing_layer_scalar_changes_most_predictions |
| `.to(bfloat16)` on the whole model rounds the rotary tables | calibrate/test_skeleton.py, |
|   | test_rotary_tables_stay_float32_and_those_of_the_model; here test_rotary_tables_rounded_to_bf16_would_show |
| weights loaded as float32 by default | calibrate/test_skeleton.py, |
|   | test_sources_in_other_dtypes_are_loaded_in_the_dtype_of_the_walk |
| a cache in the recording pass | calibrate/test_record.py, test_no_cache_is_made; |
|   | here test_recorded_calls_can_be_repeated |
| shared_kv_states none, copied, or one for each layer | calibrate/test_record.py, |
|   | test_a_batch_has_one_store_of_shared_keys_and_values; calibrate/test_walk.py, |
|   | test_shared_keys_and_values_are_kept_only_where_a_later_layer_reads_them; |
|   | here test_a_store_for_each_layer_would_show |
| masks of another length or attention implementation | calibrate/test_record.py, |
|   | test_masks_are_those_of_each_length_and_at_most_two, test_sequences_of_equal_length_share_masks_and_tables |
| calibration within the sliding window | test_shipped_recipes_calibrate_beyond_the_sliding_window, |
|   | test_a_lost_window_would_show |
| `config.head_dim` read for all layers | test_both_forms_of_the_config_convert_alike |
| config.json rewritten by transformers | test_config.py, test_google_form_of_the_config_is_kept, |
|   | test_config_json_is_the_sources_key_by_key_with_one_key_more |
| every nn.Linear quantized | test_exactly_the_text_matrices_of_the_31b_are_quantized, |
|   | test_exactly_the_text_matrices_of_tiny_models_are_quantized |
| v_proj expected in each layer, or written | test_no_v_proj_is_written_where_k_is_v |
| q and k ignored by name on full layers | test_config.py, test_no_entry_names_q_or_k_without_v |
| regular expressions anchored on names that vLLM changes | test_config.py, |
|   | test_every_entry_may_begin_anywhere_in_a_name, test_exactly_the_quantized_matrices_are_read_as_such |
| a global scale of its own for each matrix of a fused group | test_a_fused_group_has_one_weight_and_one_input_scale |
| k_proj quantized for K only although V uses it too | test_a_matrix_that_is_k_and_v_is_weighed_by_its_input_alone |
| foldings that Gemma 4 does not bear | test_nothing_is_folded_into_norms_or_neighbours |
| raw text without BOS | calibrate/test_samples.py, |
|   | test_base_models_get_full_sequences_with_one_bos_and_no_other_special_token |
| prose given to a chat model | calibrate/test_samples.py, test_chat_models_get_their_template_with_one_bos |
| the text class loaded from a multimodal checkpoint | test_the_text_class_would_find_no_weight; |
|   | calibrate/test_skeleton.py, |
|   | test_it_is_the_base_model_of_the_class_that_config_names_and_holds_no_weight |
| 3-D experts left out unseen | test_experts_are_refused_unless_the_recipe_leaves_them_in_bf16, |
|   | test_the_share_of_experts_left_in_bf16_is_counted |
| experts that calibration seldom reaches | the same: no expert is calibrated |
| names of the state dict taken for those of the file | test_names_of_the_12b_are_those_of_its_shards |
| the tied head written out | test_a_tied_head_is_not_written |
"""

from __future__ import annotations

import json
import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.record import record_batches
from nvquant.calibrate.skeleton import load_outer, loaded_layer
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.calibrate.walk import run_layer
from nvquant.convert.matrices import group_scalars, quantize_group
from nvquant.errors import InputError
from nvquant.plan.forecast import census
from nvquant.quantizers import get_quantizer
from nvquant.quantizers.base import GroupInputs
from nvquant.quantizers.mse import sweep_blocks
from nvquant.recipe.load import load_recipe, shipped_recipes
from support import emulation, synthetic_gemma4
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Conversions,
    TinyModels,
    converted,
    layer_weights,
    planned,
    random_samples,
    raw,
    recipe_for,
    skeleton_of,
    tensors_in,
)
from support.tiny_models import tiny_gemma4_e2b
from torch import Tensor

GEMMA4 = ("gemma4", "gemma4_text", "gemma4_e2b", "gemma4_moe", "gemma4_unified")
LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)


def decoder_outputs(folder: Path, batch: Tensor, changes: Callable[[], dict[str, Any]] = dict) -> list[Tensor]:
    """Hidden states after each layer, by recording and replaying; `changes` gives other arguments for each call."""
    skeleton = skeleton_of(folder)
    load_outer(skeleton, batch)
    (recorded,) = record_batches(skeleton, [batch])
    hidden, outputs = recorded.hidden, []
    for number, call in enumerate(recorded.calls):
        changed = replace(call, kwargs=call.kwargs | changes())
        with loaded_layer(skeleton, number, layer_weights(skeleton, number)) as layer, torch.no_grad():
            hidden = run_layer(layer, hidden, changed)
        outputs.append(hidden)
    return outputs


def one(length: int) -> Tensor:
    return random_samples((length,))[0].unsqueeze(0)


@pytest.mark.parametrize("name", GEMMA4)
def test_layer_scalars_are_loaded_and_copied(tiny: TinyModels, done: Conversions, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    before, after = tensors_in(tiny(name)), tensors_in(done(name))
    for number in range(len(skeleton.layers)):
        stored = f"{skeleton.layer_prefix}.{number}.layer_scalar"
        with loaded_layer(skeleton, number, layer_weights(skeleton, number)) as layer:
            assert torch.equal(layer.layer_scalar, before[stored].float())
        assert raw(after[stored]) == raw(before[stored])


@pytest.mark.parametrize("name", GEMMA4)
def test_layer_scalars_of_the_test_models_matter(tiny: TinyModels, name: str) -> None:
    scalars = [float(value) for key, value in tensors_in(tiny(name)).items() if key.endswith("layer_scalar")]
    assert len(scalars) >= 6
    assert all(0.2 < value < 0.8 for value in scalars)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma4"])
def test_rotary_tables_rounded_to_bf16_would_show(tiny: TinyModels, name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.bfloat16).eval()
    with torch.no_grad():
        right = model(input_ids=one(40), use_cache=False).logits
        wrong = model.to(torch.bfloat16)(input_ids=one(40), use_cache=False).logits
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b"])
def test_recorded_calls_can_be_repeated(tiny: TinyModels, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    load_outer(skeleton, one(40))
    (recorded,) = record_batches(skeleton, [one(40)])
    runs = []
    for _ in range(2):
        hidden = recorded.hidden
        for number, call in enumerate(recorded.calls):
            with loaded_layer(skeleton, number, layer_weights(skeleton, number)) as layer, torch.no_grad():
                hidden = run_layer(layer, hidden, call)
        runs.append(hidden)
    assert torch.equal(*runs)


def test_a_store_for_each_layer_would_show(tiny: TinyModels) -> None:
    with pytest.raises(InputError, match=r"does not run by itself \(KeyError: .sliding_attention"):
        decoder_outputs(tiny("gemma4_e2b"), one(24), lambda: {"shared_kv_states": UserDict()})
    with pytest.raises(InputError, match=r"does not run by itself \(TypeError"):
        decoder_outputs(tiny("gemma4"), one(24), lambda: {"shared_kv_states": None})


def test_shipped_recipes_calibrate_beyond_the_sliding_window(tiny: TinyModels) -> None:
    window = synthetic_gemma4.config()["text_config"]["sliding_window"]
    recipes = [load_recipe(name) for name in shipped_recipes()]
    lengths = [
        recipe.calibration.sequence_length for recipe in recipes if planned(tiny("gemma4"), recipe).needs_calibration
    ]
    assert len(lengths) >= 2
    assert all(length >= 2 * window for length in lengths)


@pytest.mark.parametrize(("length", "shows"), [(12, False), (40, True)])
def test_a_lost_window_would_show(tiny: TinyModels, length: int, shows: bool) -> None:
    right = decoder_outputs(tiny("gemma4"), one(length))[0]
    windowless = decoder_outputs(tiny("gemma4"), one(length), lambda: {"attention_mask": None})[0]
    assert torch.equal(right, windowless) != shows


def test_both_forms_of_the_config_convert_alike(tiny: TinyModels, done: Conversions, tmp_path: Path) -> None:
    source = tmp_path / "source"
    transformers.AutoConfig.from_pretrained(tiny("gemma4")).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    assert "global_head_dim" not in config["text_config"]
    config["architectures"] = ["Gemma4ForConditionalGeneration"]
    (source / "config.json").write_text(json.dumps(config))
    for shard in tiny("gemma4").glob("model*"):
        (source / shard.name).hardlink_to(shard)
    ours, theirs = tensors_in(converted(source, tmp_path / "out")), tensors_in(done("gemma4"))
    assert {key: raw(value) for key, value in ours.items()} == {key: raw(value) for key, value in theirs.items()}


@pytest.mark.parametrize(
    ("recipe", "matrices", "tensors", "size"),
    [
        ("nvfp4", 180, 1728, 32_633_255_032),
        ("nvfp4-full", 410, 2418, 20_446_509_992),
        ("nvfp4-a16", 410, 2008, 20_446_508_352),
    ],
)
def test_exactly_the_text_matrices_of_the_31b_are_quantized(
    synthetic_31b: Path, recipe: str, matrices: int, tensors: int, size: int
) -> None:
    for layout in LAYOUTS:
        plan = planned(synthetic_31b, recipe, layout)
        assert (len(plan.matrices), plan.tensors, plan.tensor_bytes) == (matrices, tensors, size)
        assert not [module for module in plan.matrices if not module.startswith("model.language_model.layers.")]


@pytest.fixture(scope="module")
def synthetic_31b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_gemma4.write_synthetic_gemma4(tmp_path_factory.mktemp("synthetic"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "mlp", "full", "mlp_bytes", "full_bytes"),
    [
        ("gemma4", 18, 41, 523_164, 293_716),
        ("gemma4_e2b", 24, 50, 1_083_632, 812_992),
        ("gemma4_moe", 18, 41, 1_122_300, 892_852),
        ("gemma4_unified", 18, 41, 518_684, 289_236),
    ],
)
def test_exactly_the_text_matrices_of_tiny_models_are_quantized(
    tiny: TinyModels, name: str, mlp: int, full: int, mlp_bytes: int, full_bytes: int, layout: str
) -> None:
    for recipe, count, size in (("nvfp4", mlp, mlp_bytes), ("nvfp4-full", full, full_bytes)):
        plan = planned(tiny(name), recipe_for(name, recipe), layout)
        assert (len(plan.matrices), plan.tensor_bytes) == (count, size)
        for module in plan.matrices:
            assert re.fullmatch(r"model\.language_model\.layers\.\d+\.(mlp|self_attn)\.[a-z]+_proj", module)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["gemma4", "gemma4_text", "gemma4_moe", "gemma4_unified"])
def test_no_v_proj_is_written_where_k_is_v(tiny: TinyModels, done: Conversions, name: str, layout: str) -> None:
    before, after = tensors_in(tiny(name)), tensors_in(done(name, layout=layout))
    full = sorted(
        {key.partition(".self_attn.")[0] for key in before if ".layers.5.self_attn." in key and "vision" not in key}
    )
    assert len(full) == 1
    assert [key for key in after if key.startswith(f"{full[0]}.self_attn.k_proj.")]
    assert not [key for key in after if key.startswith(f"{full[0]}.self_attn.v_proj")]
    modules = {key.rpartition(".")[0] for key in before}
    assert {key.rpartition(".")[0] for key in after} == modules


def test_unused_keys_and_values_of_e2b_are_copied_and_not_waited_for(tmp_path: Path) -> None:
    source = tiny_gemma4_e2b(tmp_path / "source", unused_kv=True)
    before, after = tensors_in(source), tensors_in(converted(source, tmp_path / "out"))
    for number in (5, 6, 7):
        for part in ("k_proj", "v_proj", "k_norm"):
            key = f"model.language_model.layers.{number}.self_attn.{part}.weight"
            assert raw(after[key]) == raw(before[key])
        assert f"model.language_model.layers.{number}.self_attn.q_proj.weight_packed" in after


SCALARS = {
    COMPRESSED_TENSORS: ("weight_global_scale", "input_global_scale"),
    MODELOPT: ("weight_scale_2", "input_scale"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "quantizer"), [("llama", "rtn"), ("gemma4", "rtn"), ("gemma4", "mse"), ("phi3", "rtn")]
)
def test_a_fused_group_has_one_weight_and_one_input_scale(
    tiny: TinyModels, done: Conversions, name: str, quantizer: str, layout: str
) -> None:
    before, after = tensors_in(tiny(name)), tensors_in(done(name, layout=layout, quantizer=quantizer))
    sizes = set()
    for group in planned(tiny(name)).groups:
        sizes.add(len(group.members))
        for scalar in SCALARS[layout]:
            assert len({raw(after[f"{member}.{scalar}"]) for member in group.members}) == 1
        amax = max(float(before[f"{member}.weight"].abs().max()) for member in group.members)
        room = 2 if quantizer == "mse" else 1
        expected = torch.tensor(2688 / (room * amax) if layout == COMPRESSED_TENSORS else room * amax / 2688)
        found = after[f"{group.members[0]}.{SCALARS[layout][0]}"].reshape(())
        torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0)
    assert sizes == ({1} if name == "phi3" else {1, 2, 3})


def test_a_matrix_that_is_k_and_v_is_weighed_by_its_input_alone(tiny: TinyModels) -> None:
    """K passes a norm and rotary angles, V does not: only what both share, the input, may weigh an error."""
    plan = planned(tiny("gemma4"))
    group = next(group for group in plan.groups if group.name.endswith("layers.5.self_attn.qkv_proj"))
    assert [member.rpartition(".")[2] for member in group.members] == ["q_proj", "k_proj"]
    weights = {f"{member}.weight": plan.source.read(f"{member}.weight") for member in group.members}
    squares = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quantizer = get_quantizer("mse")
    done = quantize_group(plan, group, weights, GroupInputs(InputStatistics(1.0, 1.0, squares, 10)), quantizer)
    name = group.members[1]
    scale = group_scalars(plan, group, done.record, quantizer)[f"{name}.weight_global_scale"].reshape(())
    alone = sweep_blocks(weights[f"{name}.weight"], scale, squares)
    assert raw(done.tensors[f"{name}.weight_packed"]) == raw(alone.packed)
    assert raw(done.tensors[f"{name}.weight_scale"]) == raw(alone.scales)


@pytest.mark.parametrize("name", GEMMA4)
def test_nothing_is_folded_into_norms_or_neighbours(tiny: TinyModels, done: Conversions, name: str) -> None:
    before, after = tensors_in(tiny(name)), tensors_in(done(name, quantizer="mse"))
    norms = [key for key in before if "norm" in key]
    assert len(norms) > 20
    assert all(raw(after[key]) == raw(before[key]) for key in norms)
    state, _ = emulation.decode_tensors(after)
    for module in planned(tiny(name), recipe_for(name, "nvfp4-full")).matrices:
        weight, decoded = before[f"{module}.weight"].float(), state[f"{module}.weight"]
        for axis in (0, 1):  # no row and no column was multiplied by anything
            gain = (decoded * weight).sum(axis) / weight.square().sum(axis)
            assert (gain - 1).abs().max() < 0.15
            assert (gain.mean() - 1).abs() < 0.03


def test_the_text_class_would_find_no_weight(tiny: TinyModels) -> None:
    text_names = set(skeleton_of(tiny("gemma4_text")).model.state_dict())
    stored = set(tensors_in(tiny("gemma4")))
    assert not {f"model.{name}" for name in text_names} & stored
    assert type(skeleton_of(tiny("gemma4")).model).__name__ == "Gemma4Model"


def test_experts_are_refused_unless_the_recipe_leaves_them_in_bf16(
    tiny: TinyModels, done: Conversions, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"mixture of experts .*experts: bf16"):
        converted(tiny("gemma4_moe"), tmp_path / "out")
    before, after = tensors_in(tiny("gemma4_moe")), tensors_in(done("gemma4_moe"))
    experts = [key for key in before if ".experts." in key or ".router." in key]
    assert len(experts) == 6 * 5
    assert all(raw(after[key]) == raw(before[key]) for key in experts)


def test_the_share_of_experts_left_in_bf16_is_counted(tiny: TinyModels) -> None:
    lines = census(planned(tiny("gemma4_moe"), recipe_for("gemma4_moe", "nvfp4-full")))
    (experts,) = [line for line in lines if line.name == "experts"]
    assert (experts.scheme, experts.tensors) == ("BF16", 12)
    assert experts.bytes_in == experts.bytes_out == 6 * 8 * 3 * 32 * 64 * 2


def test_names_of_the_12b_are_those_of_its_shards(tiny: TinyModels, done: Conversions) -> None:
    before, after = tensors_in(tiny("gemma4_unified")), tensors_in(done("gemma4_unified"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gemma4_unified"))
    renamed = set(before) - set(model.state_dict())
    assert len(renamed) >= 8
    assert renamed <= set(after)
    assert all(raw(after[key]) == raw(before[key]) for key in renamed)
    assert not (set(model.state_dict()) - set(before)) & set(after)


@pytest.mark.parametrize("name", [*GEMMA4, "llama", "gemma2"])
def test_a_tied_head_is_not_written(tiny: TinyModels, done: Conversions, name: str) -> None:
    assert not [key for key in tensors_in(done(name)) if "lm_head" in key]
    embeddings = [key for key in tensors_in(tiny(name)) if key.endswith("embed_tokens.weight")]
    assert [key for key in tensors_in(done(name)) if key.endswith("embed_tokens.weight")] == embeddings


def test_a_head_of_its_own_is_copied(tiny: TinyModels, done: Conversions) -> None:
    before, after = tensors_in(tiny("phi3")), tensors_in(done("phi3"))
    assert raw(after["lm_head.weight"]) == raw(before["lm_head.weight"])


def test_every_trap_of_the_table_has_its_test() -> None:
    """The names in the table above are names of tests."""
    tests = Path(__file__).parents[1]
    files = ["convert/test_traps.py", *re.findall(r"\w*/?test_\w+\.py", __doc__ or "")]
    defined: set[str] = set()
    for name in dict.fromkeys(files):
        path = next(
            path for path in (tests / name, tests / "convert" / name, tests / "calibrate" / name) if path.exists()
        )
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", __doc__ or ""))
    assert len(named) > 30
    assert not named - defined
