"""A quantized source gives the bytes that its decoded twin in BF16 gives, in every way of running. verify proves the
output against the quantized source itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nvquant.checkpoint.hub.repository import find_model
from nvquant.checkpoint.hub.source import open_hub_checkpoint
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.options import ConvertOptions
from nvquant.convert.output import partial_folder
from nvquant.convert.pipeline import convert
from nvquant.convert.progress import Progress
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.publish.provenance import read_provenance, source_facts
from nvquant.recipe.load import load_recipe
from nvquant.report.measured import accuracy_table
from nvquant.stream.manifest import MANIFEST_NAME
from nvquant.verify.contents import describe_checkpoint
from nvquant.verify.numerics.document import Numerics
from nvquant.verify.numerics.stage import NumericsOptions, NumericsStage
from nvquant.verify.structure import verify_structure
from nvquant.verify.subject import open_subject
from nvquant.verify.threads import tell_nobody
from nvquant.weights.decoding import decoded
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    calibration_of,
    contents,
    converted,
    edit_config,
    planned,
    random_samples,
    tensors_in,
    write_ids,
)
from support.hub_models import hub_for_this_process
from support.hub_server import HubServer
from support.quantized_sources import Form, fp8_form, in_layers, integer_form, nvfp4_form, write_source, write_twin
from support.tiny_models import save_tiny, tiny_llama

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
BLOCKS = fp8_form((128, 128), FP8)
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}},
}
FORMS = {
    "FP8 blocks": BLOCKS,
    "FP8 blocks under UE8M0": fp8_form((128, 128), FP8, name="scale", dtype=torch.float8_e8m0fnu),
    "FP8 rows": fp8_form(
        (1, 0), {"quant_method": "compressed-tensors", "format": "float-quantized"}, name="weight_scale"
    ),
    "one FP8 scale": fp8_form(
        None,
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        name="weight_scale",
        shape=lambda scales: scales.reshape(()),
        extras={"input_scale": torch.tensor(0.25)},
    ),
}
OTHERS = {
    "INT4": integer_form(4, 32, INT4),
    "NVFP4": nvfp4_form({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, is_modelopt=False),
    "NVFP4 of modelopt": nvfp4_form({"quant_method": "modelopt", "quant_algo": "NVFP4"}, is_modelopt=True),
}
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices have 1.5 and 2.5 blocks of 128 on a side."""
    return tiny_llama(
        tmp_path_factory.mktemp("wide") / "llama", hidden_size=192, intermediate_size=320, head_dim=48, num_layers=3
    )


@pytest.fixture(scope="module")
def made(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A quantized source and its twin by the name of a form."""
    root = tmp_path_factory.mktemp("sources")

    def get(name: str) -> tuple[Path, Path]:
        source, twin = root / f"{name}-source", root / f"{name}-twin"
        if not source.exists():
            write_source(wide, source, (FORMS | OTHERS)[name], in_layers)
            write_twin(wide, twin, (FORMS | OTHERS)[name], in_layers)
        return source, twin

    return get


def same_but_for_the_source(one: Path, other: Path) -> None:
    """Equal files, and manifests that differ in the source alone."""
    left, right = contents(one), contents(other)
    assert {name for name in left if left[name] != right.get(name)} == {MANIFEST_NAME}
    assert set(left) == set(right)
    manifests = [json.loads((folder / MANIFEST_NAME).read_text()) for folder in (one, other)]
    for manifest in manifests:
        manifest.pop("source")
        (manifest["calibration"] or {}).pop("name", None)
        for layer in manifest["layers"]:
            assert layer["source_sha256"]
    assert manifests[0] == manifests[1]


def is_proved(output: Path, source: Path) -> None:
    """Every check of the structure passes, against the source as it is stored."""
    report = verify_structure(output, source)
    assert [(check.name, check.finding.faults) for check in report.checks if not check.passed] == []
    assert {"weights", "untouched", "config_source", "names"} <= {check.name for check in report.checks}


def has_no_trace_of(form: Form, output: Path) -> None:
    """No companion and no claim of the source in the output."""
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"] != dict(form.claim)
    assert "quantization_config" not in json.dumps({k: v for k, v in config.items() if k != "quantization_config"})
    names = tensors_in(output)
    assert not [name for name in names if name.endswith(("_inv", ".scale", "activation_scale", "_scales", "_blocks"))]


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
@pytest.mark.parametrize("name", FORMS)
def test_a_quantized_source_gives_the_bytes_of_its_twin(name: str, layout: str, made: Made, tmp_path: Path) -> None:
    source, twin = made(name)
    output = converted(source, tmp_path / "out", "nvfp4-full", layout)
    same_but_for_the_source(output, converted(twin, tmp_path / "twin", "nvfp4-full", layout))
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert manifest["source"]["decoded"] == "FP8"
    is_proved(output, source)
    has_no_trace_of(FORMS[name], output)


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
@pytest.mark.parametrize("name", OTHERS)
def test_int4_and_nvfp4_sources_give_the_bytes_of_their_twins(
    name: str, layout: str, made: Made, tmp_path: Path
) -> None:
    """Names of the source's companions occur in the output too, so every part of it is nvquant's own."""
    source, twin = made(name)
    output = converted(source, tmp_path / "out", "nvfp4", layout, "mse")
    same_but_for_the_source(output, converted(twin, tmp_path / "twin", "nvfp4", layout, "mse"))
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert manifest["source"]["decoded"] == name.partition(" ")[0]
    is_proved(output, source)
    kept = [key for key in tensors_in(output) if ".self_attn." in key]
    assert sorted(kept) == [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(3) for p in "koqv"]


def test_hf_quant_config_alone_claims_modelopt(made: Made, tmp_path: Path) -> None:
    """NVIDIA publishes such models. The file does not come along."""
    source, twin = made("NVFP4 of modelopt")
    alone = tmp_path / "source"
    shutil.copytree(source, alone)
    config = json.loads((alone / "config.json").read_text())
    config.pop("quantization_config")
    (alone / "config.json").write_text(json.dumps(config, indent=2))
    (alone / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    output = converted(alone, tmp_path / "out", "nvfp4-a16")
    left, right = contents(output), contents(converted(twin, tmp_path / "twin", "nvfp4-a16"))
    assert {name for name in left if left[name] != right.get(name)} == {MANIFEST_NAME}
    is_proved(output, alone)


def test_attention_that_the_recipe_leaves_is_written_in_bf16(made: Made, tmp_path: Path) -> None:
    """By mse, with one thread of copies beside the walk."""
    source, twin = made("FP8 blocks")
    output = converted(source, tmp_path / "out", "nvfp4", quantizer="mse")
    same_but_for_the_source(output, converted(twin, tmp_path / "twin", "nvfp4", quantizer="mse"))
    is_proved(output, source)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(tensors_in(output)[name], tensors_in(twin)[name])


def test_folds_and_gptq_see_the_decoded_source(made: Made, tmp_path: Path) -> None:
    """The channels of the residual stream come in another order, which cuts blocks of the source apart."""
    source, twin = made("FP8 blocks")
    output = converted(source, tmp_path / "out", quantizer="gptq", fold=True)
    left, right = contents(output), contents(converted(twin, tmp_path / "twin", quantizer="gptq", fold=True))
    # The manifest lists folds in the order of the tensors in the source's files, which sort by dtype.
    assert {name for name in left if left[name] != right.get(name)} == {MANIFEST_NAME}
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    assert manifest["residual"]["order"]
    is_proved(output, source)


def test_an_interrupted_run_resumes_to_the_same_bytes(made: Made, tmp_path: Path) -> None:
    source, twin = made("FP8 blocks")
    plan = planned(source, quantizer="rtn")
    calibration = calibration_of(source, write_ids(tmp_path / "ids.jsonl", random_samples()))
    options = ConvertOptions(tmp_path / "out", "rtn")

    class Stop(Exception):
        pass

    def stop(now: Progress) -> None:
        if now.layers_done == 1:
            raise Stop

    with pytest.raises(Stop):
        convert(plan, replace(options, progress=stop), calibration)
    assert partial_folder(tmp_path / "out").exists()
    assert convert(plan, options, calibration).layers_resumed >= 1
    same_but_for_the_source(tmp_path / "out", converted(twin, tmp_path / "twin"))


def test_verify_notices_a_source_with_another_scale(made: Made, tmp_path: Path) -> None:
    """The decoding is repeated: one scale of one block moves the matrix that it belongs to, and the copy of another."""
    source, _ = made("FP8 blocks")
    output = converted(source, tmp_path / "out", "nvfp4")
    for module, check in (("mlp.down_proj", "weights"), ("self_attn.o_proj", "untouched")):
        other = tmp_path / module
        other.mkdir()
        for path in source.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        name = f"model.layers.2.{module}.weight_scale_inv"
        opened = open_checkpoint(other)
        blob = bytearray(opened.path(name).read_bytes())
        blob[opened.info(name).begin + 2] ^= 0x40
        opened.path(name).write_bytes(blob)
        failed = {found.name for found in verify_structure(output, other).checks if not found.passed}
        assert check in failed


def measured(output: Path, source: Path, ids: Path) -> Numerics:
    """The numbers of an output beside its source."""
    options = NumericsOptions(text=ids, samples=4, sequence_length=64)
    stage = NumericsStage(open_subject(output), open_checkpoint(source), options, tell_nobody)
    assert [check.name for check in stage.run() if not check.passed] == []
    assert stage.numbers is not None
    return stage.numbers


def test_report_and_card_name_the_decoded_source(made: Made, tmp_path: Path) -> None:
    """The numbers are those against the twin, and no word calls the reference BF16."""
    source, twin = made("FP8 blocks")
    output = converted(source, tmp_path / "out", "nvfp4", quantizer="mse")
    ids = write_ids(tmp_path / "ids.jsonl", random_samples((40, 40, 40, 40)))
    numbers, of_twin = measured(output, source, ids), measured(output, twin, ids)
    assert (numbers.kl, numbers.perplexity_source) == (of_twin.kl, of_twin.perplexity_source)
    table, other = accuracy_table(numbers), accuracy_table(of_twin)
    assert table is not None and other is not None
    assert (table.rows[0][0], other.rows[0][0]) == ("decoded FP8 source", "BF16 source")
    assert numbers.as_json()["source_form"] == "FP8"
    described = describe_checkpoint(open_subject(output), decoded(open_checkpoint(source)))
    assert described["source_form"] == "FP8"
    stored = sum(info.nbytes for info in open_checkpoint(source).infos().values())
    assert described["source_bytes"] == stored
    facts = dict(source_facts(read_provenance(output, "org/base")))
    assert facts["Source's form"] == "FP8, decoded before quantization"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.mark.parametrize("low_disk", [False, True], ids=["downloaded", "low-disk"])
def test_a_quantized_model_of_the_hub_is_decoded_on_its_way(
    hub: HubServer, low_disk: bool, made: Made, tmp_path: Path
) -> None:
    source, twin = made("FP8 blocks")
    hub.add("model", "Org/Model", source)
    opened = open_hub_checkpoint(find_model("Org/Model"), low_disk)
    plan = compute_plan(opened, load_recipe("nvfp4"), LAYOUTS[COMPRESSED_TENSORS], opened.name)
    calibration = calibration_of(source, write_ids(tmp_path / "ids.jsonl", random_samples()))
    convert(plan, ConvertOptions(tmp_path / "out", "rtn"), calibration)
    local = converted(twin, tmp_path / "twin", "nvfp4")
    left, right = contents(tmp_path / "out"), contents(local)
    assert {name for name in left if left[name] != right.get(name)} == {MANIFEST_NAME}


def test_a_nested_claim_and_a_model_of_several_parts(tmp_path: Path, wide: Path) -> None:
    """The claim stands where the text model's config is, as in multimodal models."""
    source = write_source(wide, tmp_path / "source", BLOCKS, in_layers)
    config = json.loads((source / "config.json").read_text())
    claim = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    edit_config(source, text_config={"quantization_config": claim})
    assert planned(source).output_config["text_config"] == {}


def test_a_deepseek_with_partial_blocks_gives_the_bytes_of_its_twin(tmp_path: Path) -> None:
    """Latent attention, whose `kv_a_proj_with_mqa` has 1.125 blocks of rows, in dense layers."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        q_lora_rank=144,
        kv_lora_rank=128,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    bf16 = save_tiny(model.eval(), tmp_path / "bf16", tokenizer="llama", shards=1, base=False)
    matrices = [name for name in tensors_in(bf16) if in_layers(name) or name.endswith("_with_mqa.weight")]
    assert tensors_in(bf16)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (144, 192)
    source = write_source(bf16, tmp_path / "source", BLOCKS, matrices.__contains__)
    twin = write_twin(bf16, tmp_path / "twin", BLOCKS, matrices.__contains__)
    output = converted(source, tmp_path / "out", "nvfp4")
    same_but_for_the_source(output, converted(twin, tmp_path / "out-twin", "nvfp4"))
    is_proved(output, source)
