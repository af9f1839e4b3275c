"""Conversions with error feedback: two lanes, site after site, and what the manifest keeps of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from nvquant.calibrate.statistics.moments import Moments
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.errors import InputError
from nvquant.quantizers import get_quantizer
from nvquant.quantizers.base import GroupInputs
from nvquant.quantizers.gptq import GPTQ
from nvquant.stream.manifest import FeedbackRecord, Manifest, read_manifest
from support import emulation
from support.conversions import (
    COMPRESSED_TENSORS,
    Conversions,
    TinyModels,
    as_recipe,
    calibration_of,
    converted,
    edit_tensors,
    planned,
    random_samples,
    raw,
    tensors_in,
    write_ids,
)
from support.tiny_models import tiny_llama
from torch import Tensor, nn

Seen = tuple[Tensor, Tensor]
"""All tokens' inputs of a matrix, before and after rounding, float32 [tokens, cols]."""


def inputs_of(model: nn.Module, modules: Sequence[str]) -> dict[str, Seen]:
    """The inputs of matrices in a model of transformers, over the samples of `random_samples`."""
    before: dict[str, list[Tensor]] = {name: [] for name in modules}
    after: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name in modules:
        module = model.get_submodule(name)
        for seen, is_first in ((before[name], True), (after[name], False)):

            def keep(_module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
                seen.append(args[0].flatten(0, -2).clone())

            module.register_forward_pre_hook(keep, prepend=is_first)
    with torch.no_grad():
        for ids in random_samples():
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    return {name: (torch.cat(before[name]), torch.cat(after[name])) for name in modules}


def in_transformers(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def manifest_of(folder: Path) -> Manifest:
    found = read_manifest(folder)
    assert isinstance(found, Manifest)
    return found


def feedback_of(folder: Path) -> Mapping[str, FeedbackRecord | None]:
    return {name: group.record.feedback for name, group in manifest_of(folder).groups.items()}


@pytest.mark.parametrize(
    ("name", "recipe"), [("llama", "nvfp4-full"), ("llama", "nvfp4-a16"), ("gemma4", "nvfp4-full")]
)
def test_every_group_is_solved_on_the_inputs_of_the_source_and_of_all_that_was_quantized_before_it(
    tiny: TinyModels, done: Conversions, name: str, recipe: str
) -> None:
    """The finished checkpoint in transformers gives each group those inputs once more."""
    plan, folder = planned(tiny(name), recipe), done(name, recipe, quantizer="gptq")
    leaders = [group.members[0] for group in plan.groups]
    source, path = inputs_of(in_transformers(tiny(name)), leaders), inputs_of(emulation.load_emulation(folder), leaders)
    stored, quantizer, alike, codes = tensors_in(folder), GPTQ(), 0, 0
    for group in plan.groups:
        (x, _), (moved, rounded) = source[group.members[0]], path[group.members[0]]
        gram = (rounded.double().t() @ rounded.double() / len(x)).float()
        cross = ((x - moved).double().t() @ rounded.double() / len(x)).float()
        inputs = GroupInputs(InputStatistics(1.0, 1.0, None, len(x)), Moments(gram, cross, False))
        matrices = [plan.matrices[member] for member in group.members]
        weights = [plan.source.read(matrix.tensor) for matrix in matrices]
        for member, parts in quantizer.quantize(matrices, weights, inputs).parts.items():
            found = stored[f"{member}.weight_packed"]
            alike += int((parts["codes"] == found).sum())
            codes += found.numel()
    assert alike > 0.97 * codes  # a value on the border of two codes may fall on either side, and moves later columns


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_products_with_the_inputs_change_less_than_with_mse(tiny: TinyModels, done: Conversions, name: str) -> None:
    plan = planned(tiny(name))
    modules = list(plan.matrices)
    before, losses = tensors_in(tiny(name)), {}
    for quantizer in ("mse", "gptq"):
        folder = done(name, quantizer=quantizer)
        seen = inputs_of(emulation.load_emulation(folder), modules)
        state, _ = emulation.decode_tensors(tensors_in(folder))
        losses[quantizer] = [
            float((seen[at][1] @ (state[f"{at}.weight"] - before[f"{at}.weight"].float()).t()).square().sum())
            for at in modules
        ]
    assert sum(losses["gptq"]) < 0.8 * sum(losses["mse"])
    assert sum(ours < theirs for theirs, ours in zip(*losses.values(), strict=True)) > 0.9 * len(modules)


def test_batches_of_two_give_nearly_the_same_codes(tiny: TinyModels, done: Conversions, tmp_path: Path) -> None:
    """Their products may be rounded otherwise, and a code on the border of two moves the row's later columns."""
    one = tensors_in(done("gemma4", quantizer="gptq"))
    two = tensors_in(converted(tiny("gemma4"), tmp_path / "out", quantizer="gptq", batch_size=2))
    packed = [key for key in one if key.endswith("weight_packed")]
    alike = sum(int((one[key] == two[key]).sum()) for key in packed)
    assert alike > 0.97 * sum(one[key].numel() for key in packed)


def test_columns_without_an_input_are_recorded_and_keep_their_weights(tmp_path: Path) -> None:
    dead = [3, 20, 21]

    def still(name: str, tensor: Tensor) -> Tensor:
        if name == "model.layers.1.input_layernorm.weight":
            tensor[dead] = 0
        return tensor

    source = edit_tensors(tiny_llama(tmp_path / "source"), still)
    folder = converted(source, tmp_path / "out", quantizer="gptq")
    records = feedback_of(folder)
    assert {name: record.dead_columns for name, record in records.items() if record is not None} == {
        name: len(dead) if name == "model.layers.1.self_attn.qkv_proj" else 0 for name in records
    }
    state, _ = emulation.decode_tensors(tensors_in(folder))
    before = tensors_in(source)
    for part in "qkv":
        name = f"model.layers.1.self_attn.{part}_proj.weight"
        weight = before[name].float()[:, dead]
        assert float((state[name][:, dead] - weight).norm() / weight.norm()) < 0.15


def test_the_manifest_keeps_damping_of_gptq_and_knows_none_of_other_quantizers(done: Conversions) -> None:
    for record in feedback_of(done("gemma4", quantizer="gptq")).values():
        assert record == FeedbackRecord(damping=0.03, pull_damping=0.1)
    text = (done("gemma4", quantizer="mse") / "nvquant_manifest.json").read_text()
    assert "feedback" not in text and set(feedback_of(done("gemma4", quantizer="mse")).values()) == {None}


def test_more_damping_than_the_quantizers_own_is_noticed() -> None:
    quantizer = GPTQ()
    assert not quantizer.has_more_damping(FeedbackRecord(damping=0.03, pull_damping=0.1))
    assert not quantizer.has_more_damping(FeedbackRecord(damping=0.03))
    assert quantizer.has_more_damping(FeedbackRecord(damping=0.3, pull_damping=0.1))
    assert quantizer.has_more_damping(FeedbackRecord(damping=0.03, pull_damping=1.0))


def test_the_result_counts_what_the_manifest_records(tiny: TinyModels, tmp_path: Path) -> None:
    plan, ids = planned(tiny("llama")), write_ids(tmp_path / "ids.jsonl", random_samples())
    result = convert(plan, ConvertOptions(tmp_path / "out", "gptq"), calibration_of(tiny("llama"), ids))
    records = [record for record in feedback_of(tmp_path / "out").values() if record is not None]
    assert result.error_feedback == {
        "groups": len(plan.groups),
        "more_damping": 0,
        "outgrown": sum(record.outgrown_blocks > 0 for record in records),
        "outgrown_blocks": sum(record.outgrown_blocks for record in records),
    }


def test_a_weight_only_recipe_calibrates_for_gptq_alone(tiny: TinyModels, tmp_path: Path) -> None:
    needs = {name: planned(tiny("llama"), "nvfp4-a16", quantizer=name).needs_calibration for name in ("mse", "gptq")}
    assert needs == {"mse": False, "gptq": True}
    with pytest.raises(InputError, match="nvfp4-a16 with quantizer gptq requires calibration samples") as caught:
        convert(planned(tiny("llama"), "nvfp4-a16"), ConvertOptions(tmp_path / "out", "gptq"), None)
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []
    folder = converted(tiny("llama"), tmp_path / "out", "nvfp4-a16", quantizer="gptq")
    manifest = json.loads((folder / "nvquant_manifest.json").read_text())
    assert manifest["calibration"]["tokens"] == 144
    assert {"input" in group for layer in manifest["layers"] for group in layer["groups"].values()} == {False}


def test_a_recipe_of_fp8_alone_has_nothing_for_gptq_and_walks_one_lane(tiny: TinyModels) -> None:
    recipe = as_recipe("nvfp4-fp8")
    only = recipe.model_copy(update={"quantize": tuple(one for one in recipe.quantize if one.scheme == "fp8")})
    plan = planned(tiny("llama"), only, COMPRESSED_TENSORS, "gptq")
    assert not plan.has_two_lanes and not plan.needs_calibration
    assert planned(tiny("llama"), recipe, COMPRESSED_TENSORS, "gptq").has_two_lanes


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_a_head_in_nvfp4_is_that_of_mse(tiny: TinyModels, tmp_path: Path, name: str) -> None:
    recipe = as_recipe("nvfp4-full").model_copy(update={"head": "nvfp4"})
    heads = []
    for quantizer in ("mse", "gptq"):
        folder = converted(tiny(name), tmp_path / quantizer, recipe, quantizer=quantizer)
        record = manifest_of(folder).head
        assert record is not None and record.group.feedback is None
        heads.append({key: raw(tensor) for key, tensor in tensors_in(folder).items() if key.startswith("lm_head.")})
    assert heads[0] == heads[1]
    assert get_quantizer("gptq").rows_claim == get_quantizer("mse").claim
