"""The quantized head has the codes of its source's rows, the embedding stays, and no config ties the two any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nvquant.convert.head
import pytest
import torch
import transformers
from nvquant.calibrate.output_head import head_input_bound, why_no_own_head
from nvquant.checkpoint.hub.repository import find_model
from nvquant.checkpoint.hub.source import open_hub_checkpoint
from nvquant.checkpoint.source import open_checkpoint, torch_dtype
from nvquant.convert.config import check_patterns, disagreements, quantization_config
from nvquant.convert.head import check_head
from nvquant.convert.options import ConvertOptions
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from nvquant.convert.relayout import relayout
from nvquant.errors import EnvironmentLack, InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.quantizers import get_quantizer, quantizer_for
from nvquant.recipe.heads import untied
from nvquant.recipe.load import load_recipe
from nvquant.recipe.matrices import matrix_entries
from nvquant.recipe.schema import Recipe
from nvquant.stream.manifest import MANIFEST_NAME
from safetensors.torch import load_file, save_file
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    TinyModels,
    calibration_of,
    contents,
    converted,
    edit_config,
    planned,
    random_samples,
    raw,
    tensors_in,
    write_ids,
)
from support.hub_models import hub_for_this_process
from support.launching import WarmRanks
from support.tiny_models import _build, _plain_values, save_tiny, tiny_llama

LAYOUT_NAMES = (COMPRESSED_TENSORS, MODELOPT)
HEADS = ("fp8", "nvfp4")
MODELS = ("llama", "untied", "qwen3", "gemma4")
EMBEDDINGS = {"gemma4": "model.language_model.embed_tokens.weight"}


def with_head(head: str, recipe: str = "nvfp4-a16") -> Recipe:
    return load_recipe(recipe).model_copy(update={"head": head})


@pytest.fixture(scope="module")
def model(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    own = tiny_llama(tmp_path_factory.mktemp("own") / "untied", tied=False)
    return lambda name: own if name == "untied" else tiny(name)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_that_of_the_whole_matrix_and_the_embedding_stays(
    model: Callable[[str], Path], tmp_path: Path, name: str, head: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvquant.convert.head, "HEAD_STRIP_BYTES", 60 * 64 * 2)  # nine strips, the last one shorter
    source = model(name)
    plan = planned(source, with_head(head), layout)
    output = converted(source, tmp_path / "out", with_head(head), layout, "mse")
    before, after = tensors_in(source), tensors_in(output)
    embedding = EMBEDDINGS.get(name, "model.embed_tokens.weight")
    matrix = plan.head
    assert matrix is not None and matrix.name == "lm_head"
    assert matrix.tensor == ("lm_head.weight" if name == "untied" else embedding)
    assert raw(after[embedding]) == raw(before[embedding])
    entries = matrix_entries(matrix, plan.layout)
    assert {tensor for tensor in after if "lm_head" in tensor} == {entry.name for entry in entries.values()}
    made = quantizer_for(matrix.scheme.name, get_quantizer("mse")).quantize([matrix], [before[matrix.tensor]], None)
    for part, tensor in made.parts["lm_head"].items():
        assert raw(after[entries[part].name]) == raw(tensor)
    parts = {part: plan.layout.canonical(part, after[entry.name]) for part, entry in entries.items()}
    decoded = matrix.scheme.decode(parts, torch.float32)
    weight = before[matrix.tensor].float()
    assert float((decoded - weight).norm() / weight.norm()) < (0.03 if head == "fp8" else 0.13)


@pytest.mark.parametrize("name", MODELS)
def test_no_config_ties_the_head(model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    output = converted(model(name), tmp_path / "out", with_head("fp8"))
    config = json.loads((output / "config.json").read_text())
    original = json.loads((model(name) / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    if "text_config" in original:
        assert config["text_config"].pop("tie_word_embeddings") is False
        original["text_config"].pop("tie_word_embeddings", None)
    for one in (config, original):
        one.pop("tie_word_embeddings", None)
        one.pop("quantization_config", None)
    assert config == original
    loaded = transformers.AutoConfig.from_pretrained(output)
    assert loaded.tie_word_embeddings is False and loaded.get_text_config().tie_word_embeddings is False


def test_a_config_in_a_config_is_untied_on_the_way_to_the_text_alone() -> None:
    inner = {"hidden_size": 8, "tie_word_embeddings": True}
    vision = {"tie_word_embeddings": True}
    assert untied({"text_config": inner, "vision_config": vision}) == {
        "text_config": {"hidden_size": 8, "tie_word_embeddings": False},
        "vision_config": vision,
        "tie_word_embeddings": False,
    }


def test_an_unquantized_head_is_not_in_the_manifest(model: Callable[[str], Path], tmp_path: Path) -> None:
    output = converted(model("untied"), tmp_path / "out", "nvfp4-a16")
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert "head" not in manifest and "head" not in manifest["recipe"]


def test_the_manifest_records_the_head_outside_of_the_layers(model: Callable[[str], Path], tmp_path: Path) -> None:
    output = converted(model("llama"), tmp_path / "out", with_head("fp8"), MODELOPT)
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert manifest["recipe"]["head"] == "fp8"
    assert manifest["calibration"] is None  # the bound of its inputs requires none
    record = manifest["head"]
    assert record["file"] == max(manifest["files"])
    group = record["group"]
    weight = tensors_in(model("llama"))["model.embed_tokens.weight"]
    assert group["weight_amax"] == float(weight.abs().max())
    norm = tensors_in(model("llama"))["model.norm.weight"].float()
    assert group["input_bound"] == pytest.approx(8 * float(norm.abs().max()), rel=0.02)
    assert group["input_bound"] >= 8 * float(norm.abs().max())
    scale = tensors_in(output)["lm_head.input_scale"]
    assert scale.shape == () and float(scale) == pytest.approx(group["input_bound"] / 448)


@pytest.mark.parametrize("name", ["llama", "untied", "qwen3", "gemma4", "gemma4_e2b", "gemma2", "gemma3_text", "phi3"])
def test_the_bound_of_the_head_s_inputs_holds(tiny: TinyModels, model: Callable[[str], Path], name: str) -> None:
    """Against transformers' own forward, whose norm gets vectors with one element as the worst inputs."""
    source = model(name)
    bound = head_input_bound(open_checkpoint(source), planned(source).prefix)
    assert bound is not None
    auto = (
        transformers.AutoModelForImageTextToText
        if name in ("gemma4", "gemma4_e2b")
        else transformers.AutoModelForCausalLM
    )
    whole: Any = auto.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[float] = []
    whole.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    norm = whole.get_decoder().norm
    norm.register_forward_pre_hook(lambda _, args: (1e6 * torch.eye(args[0].shape[-1])[None, : args[0].shape[1]],))
    with torch.no_grad():
        whole(input_ids=torch.arange(10, 74)[None], use_cache=False)
    assert seen[0] <= bound <= 1.02 * seen[0]


def tiny_cohere(folder: Path) -> Path:
    """Its norms are LayerNorms."""
    config = transformers.CohereConfig(**_plain_values("llama"))
    return save_tiny(_build("CohereForCausalLM", config, 0), folder, tokenizer="llama", shards=1, base=False)


def test_a_head_behind_another_norm_is_refused_where_its_inputs_need_a_scale(tmp_path: Path) -> None:
    source = tiny_cohere(tmp_path / "source")
    with pytest.raises(InputError) as caught:
        check_head(planned(source, with_head("fp8"), MODELOPT))
    assert str(caught.value) == (
        "recipe nvfp4-a16: the modelopt layout stores a scale of the head's inputs, but CohereForCausalLM does not "
        "read them from an RMSNorm, which would bound them: use --format compressed-tensors."
    )
    for head, layout in (("fp8", COMPRESSED_TENSORS), ("nvfp4", MODELOPT)):
        check_head(planned(source, with_head(head), layout))


def test_a_classifier_and_a_model_without_a_head_are_refused(model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    edit_config(source, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"^recipe nvfp4-a16: source has no output head .*: remove the key `head`\.$"):
        planned(source, with_head("fp8"))
    edit_config(source, tie_word_embeddings=True, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(InputError) as caught:
        check_head(planned(source, with_head("nvfp4")))
    assert str(caught.value) == (
        "recipe nvfp4-a16: the head of source cannot be quantized (LlamaForSequenceClassification has no output head "
        "that is a linear layer): remove the key `head`."
    )


def test_a_head_that_the_class_ties_whatever_the_config_has_is_refused(
    model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(model("llama"), with_head("fp8"))
    assert why_no_own_head(plan.source, plan.output_config, "lm_head") is None
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    always = lambda self, all_submodels=False: tied  # noqa: E731
    monkeypatch.setattr(transformers.LlamaForCausalLM, "get_expanded_tied_weights_keys", always)
    with pytest.raises(InputError, match=r"LlamaForCausalLM ties its head to the embedding even if"):
        check_head(plan)


def test_real_classes_that_tie_whatever_the_config_has_are_found(tmp_path: Path) -> None:
    """T5's config sets its own flag again."""
    config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    from nvquant.checkpoint.source import Checkpoint

    source = Checkpoint(tmp_path, stored, {}, {})
    assert why_no_own_head(source, untied(stored), "lm_head") == (
        "ties its head to the embedding even if tie_word_embeddings is false"
    )


def test_a_layout_without_the_scheme_is_refused(model: Callable[[str], Path]) -> None:
    layout = LAYOUTS[MODELOPT]
    less = replace(layout, schemes={name: form for name, form in layout.schemes.items() if name != "fp8"})
    with pytest.raises(InputError, match="the modelopt layout has no form for scheme fp8: choose the other layout"):
        compute_plan(open_checkpoint(model("llama")), with_head("fp8"), less, "model")


def test_an_unknown_class_may_quantize_a_head_of_its_own_but_untie_none(tmp_path: Path) -> None:
    tied, own = tiny_llama(tmp_path / "tied"), tiny_llama(tmp_path / "own", tied=False)
    for source in (tied, own):
        edit_config(source, architectures=["UnheardOfForCausalLM"])
    check_head(planned(own, with_head("nvfp4")))
    with pytest.raises(EnvironmentLack, match="does not know the architecture UnheardOfForCausalLM"):
        check_head(planned(tied, with_head("nvfp4")))


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-full", "nvfp4-a16", "nvfp4-fp8"])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_vllm_s_rules_give_the_head_its_scheme_under_every_name(
    tiny: TinyModels, name: str, recipe: str, head: str, layout: str
) -> None:
    plan = planned(tiny(name), with_head(head, recipe), layout)
    check_patterns(plan)
    config = quantization_config(plan)
    assert disagreements(plan, config) == []
    # Without the head in the plan, the same config disagrees in the head and nowhere else.
    assert [layer for layer, *_ in disagreements(planned(tiny(name), recipe, layout), config)] in (["lm_head"], [])


@pytest.mark.parametrize(("head", "layout"), [("fp8", MODELOPT), ("nvfp4", COMPRESSED_TENSORS)])
def test_a_resumed_run_gives_the_same_bytes(tiny: TinyModels, tmp_path: Path, head: str, layout: str) -> None:
    class EndedEarly(Exception):
        pass

    def end_early(now: Progress) -> None:
        if now.layers_done == 1:
            raise EndedEarly

    source, recipe = tiny("gemma4"), with_head(head, "nvfp4")
    expected = contents(converted(source, tmp_path / "expected", recipe, layout))
    calibration = calibration_of(source, write_ids(tmp_path / "expected.jsonl", random_samples()))
    plan, output = planned(source, recipe, layout), tmp_path / "out"
    with pytest.raises(EndedEarly):
        convert(plan, ConvertOptions(output, "rtn", progress=end_early), calibration)
    shard = next(shard.file for shard in plan.shards if shard.is_head)
    (partial_folder(output) / shard).unlink(missing_ok=True)
    assert convert(plan, ConvertOptions(output, "rtn"), calibration).layers_resumed
    assert contents(output) == expected


def test_a_finished_head_is_not_made_again(tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe, output = tiny("llama"), with_head("nvfp4"), tmp_path / "out"
    plan = planned(source, recipe)
    expected = contents(converted(source, tmp_path / "expected", recipe))
    original = nvquant.convert.pipeline.write_json

    def fail(path: Path, value: Any) -> None:
        if path.name == MANIFEST_NAME:
            raise KeyboardInterrupt
        original(path, value)

    monkeypatch.setattr(nvquant.convert.pipeline, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, ConvertOptions(output, "rtn"), None)
    monkeypatch.undo()
    monkeypatch.setattr(nvquant.convert.head.HeadMaker, "write", None)
    convert(plan, ConvertOptions(output, "rtn"), None)
    assert contents(output) == expected


def test_several_ranks_give_the_same_bytes(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nquantize: [{modules: [mlp], scheme: nvfp4-a16}]\nhead: fp8\nquantizer: rtn\n")
    source = tiny("gemma4")
    expected = contents(converted(source, tmp_path / "expected", load_recipe(str(recipe)), MODELOPT))
    job = {"source": source, "output": tmp_path / "out", "ids": None, "recipe": str(recipe), "layout": MODELOPT}
    with WarmRanks(tmp_path) as launch:
        assert [rank.code for rank in launch(3, **job, quantizer="rtn")] == [0, 0, 0]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("low_disk", [False, True], ids=["downloaded", "low-disk"])
@pytest.mark.parametrize(
    ("recipe", "head", "layout"),
    [
        ("nvfp4-a16", "nvfp4", COMPRESSED_TENSORS),
        ("nvfp4", "nvfp4", COMPRESSED_TENSORS),
        ("nvfp4-a16", "fp8", MODELOPT),
    ],
)
def test_the_rows_of_a_head_on_the_hub_come_once(
    tiny: TinyModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    low_disk: bool,
    recipe: str,
    head: str,
    layout: str,
) -> None:
    chosen = with_head(head, recipe)
    expected = contents(converted(tiny("llama"), tmp_path / "local", chosen, layout))
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as hub:
        hub.add("model", "Org/Model", tiny("llama"))
        source = open_hub_checkpoint(find_model("Org/Model"), low_disk)
        plan = compute_plan(source, chosen, LAYOUTS[layout], source.name)
        ids = write_ids(tmp_path / "local.jsonl", random_samples())
        calibration = calibration_of(source.folder, ids) if plan.needs_calibration else None
        convert(plan, ConvertOptions(tmp_path / "out", "rtn"), calibration)
        begins = {file: header.data_start for file, header in source.shards.items()}
        twice = [(file, begin) for file, begin, _ in hub.sent_twice("Org/Model") if begin >= begins[file]]
        # The proof of the bound reads the norm and a few rows before the run.
        assert len(twice) <= (2 if layout == MODELOPT and low_disk else 0)
    made = contents(tmp_path / "out")
    assert {**made, MANIFEST_NAME: ""} == {**expected, MANIFEST_NAME: ""}


def test_a_damaged_head_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvquant.convert.head, "HEAD_STRIP_BYTES", 64 * 2 * 100)
    source = tiny_llama(tmp_path / "source", tied=False, shards=1)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][321, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head.weight holds a NaN or an infinity at row 321, column 5"):
        converted(source, tmp_path / "out", with_head("nvfp4"))


def test_the_head_keeps_its_layout_s_bytes_in_the_other(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = with_head("nvfp4")
    made = converted(tiny("llama"), tmp_path / "ct", recipe)
    relayout(open_checkpoint(made), LAYOUTS[MODELOPT], tmp_path / "moved")
    wanted, found = (
        tensors_in(converted(tiny("llama"), tmp_path / "mo", recipe, MODELOPT)),
        tensors_in(tmp_path / "moved"),
    )
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(t) for name, t in wanted.items()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "moved", tmp_path / "mo")]
    assert configs[0] == configs[1]


def test_the_source_s_equal_copy_of_a_tied_head_is_replaced(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", shards=1)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    after = tensors_in(converted(source, tmp_path / "out", with_head("fp8")))
    assert after["lm_head.weight"].dtype == torch_dtype("F8_E4M3")
    assert raw(after["model.embed_tokens.weight"]) == raw(tensors["model.embed_tokens.weight"])
