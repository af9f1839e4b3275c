"""Bad input ends with its exit code and one sentence that names what is wrong; nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from nvquant.recipe.load import parse_recipe
from safetensors.torch import load_file, save_file
from support import hostile
from support.commands import Command
from support.conversions import TinyModels, contents, edit_config, write_ids
from support.quantized_sources import edit_source, fp8_form, in_layers, write_source
from support.tiny_models import tiny_llama

Refused = Callable[..., str]
WEIGHT_ONLY = ("--recipe", "nvfp4-a16", "--device", "cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: where the default output would appear."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tiny: TinyModels, tmp_path: Path) -> Path:
    """A tiny Llama to break."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def refused(nvquant: Command, here: Path) -> Refused:
    """Run a command that must fail: returns its sentence."""

    def run(code: int, *arguments: object) -> str:
        before = contents(here.parent)
        ended = nvquant("convert", *arguments)
        assert ended.code == code, ended.stderr
        assert ended.stdout == ""
        assert "Traceback" not in ended.stderr
        lines = ended.stderr.splitlines()
        assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
        assert lines[-1].endswith(".")
        assert lines[-1].count(". ") <= 1
        if "layers are complete and kept" in lines[-1]:  # and nothing else is left
            shutil.rmtree(next(here.glob("*.partial")))
        assert contents(here.parent) == before
        assert list(here.iterdir()) == []
        return lines[-1]

    return run


@pytest.mark.parametrize("name", hostile.BREAKAGES)
def test_a_damaged_checkpoint_is_refused_by_name(refused: Refused, model: Path, name: str) -> None:
    named = hostile.BREAKAGES[name](model)
    assert named in refused(2, model, *WEIGHT_ONLY)


@pytest.mark.parametrize("name", ["nan_in_weight", "infinity_in_weight"])
def test_a_damaged_weight_ends_a_calibrated_run_too(refused: Refused, model: Path, ids: Path, name: str) -> None:
    named = hostile.BREAKAGES[name](model)
    options = ("--recipe", "nvfp4-full", "--calibration", ids, "--samples", 2, "--device", "cpu")
    assert named in refused(2, model, *options)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.1.input_layernorm.weight", 0),
        ("model.layers.0.self_attn.o_proj.weight", 0),  # of an earlier layer, and copied by the recipe
        ("model.embed_tokens.weight", 3),
    ],
)
def test_a_damaged_weight_that_is_not_quantized_is_named_too(
    refused: Refused, model: Path, ids: Path, name: str, row: int
) -> None:
    for shard in model.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name].reshape(-1, tensors[name].shape[-1])[row:, 5] = torch.nan
        save_file(tensors, shard, {"format": "pt"})
    sentence = refused(2, model, "--calibration", ids, "--samples", 2, "--device", "cpu", "--recipe", "nvfp4")
    assert f"{name} holds a NaN or an infinity at row {row}, column 5" in sentence


def test_a_missing_folder(refused: Refused, here: Path) -> None:
    assert "no-such-folder is not a folder" in refused(2, "./no-such-folder")


def test_a_hub_id_without_the_hub(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of "discard", where nobody listens
    sentence = refused(2, "google/gemma-4-31b")
    assert "There is no folder google/gemma-4-31b here" in sentence
    assert "Hub cannot be reached for model google/gemma-4-31b" in sentence
    assert "give a local folder" in sentence


def test_a_file_in_place_of_a_folder(refused: Refused, model: Path) -> None:
    assert "config.json is not a folder" in refused(2, model / "config.json")


def test_an_unknown_recipe_names_those_that_ship(refused: Refused, model: Path) -> None:
    sentence = refused(2, model, "--recipe", "nvfp5")
    assert "recipe 'nvfp5' does not exist" in sentence
    assert "nvfp4, nvfp4-a16, nvfp4-fp8, nvfp4-full" in sentence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: own\nquantise:\n  - modules: [mlp]\n    scheme: nvfp4\n", "own.yaml:"),
        ("name: own\nquantize:\n  - modules: [mlp]\n    scheme: nvfp4\nspeed: fast\n", "own.yaml:5: key 'speed'"),
        ("name: own\nquantize:\n  - modules: [mlp]\n    scheme: fp5\n", "own.yaml:4: key 'quantize.0.scheme'"),
        ("name: own\nquantize:\n  - modules: [nothing]\n    scheme: nvfp4\n", "'nothing' matches no matrix"),
        ("name: own\nquantize:\n  - modules: ['re:.*gate_proj']\n    scheme: nvfp4\n", "which vLLM fuses with it"),
        (
            "name: own\nquantize:\n  - modules: [mlp]\n    scheme: nvfp4\n"
            "  - modules: ['re:.*gate_proj']\n    scheme: fp8\n",
            "'re:.*gate_proj' matches model.layers.0.mlp.gate_proj, which an earlier entry already quantizes",
        ),
        (
            "name: own\nquantize:\n  - modules: ['re:.*q_proj']\n    scheme: fp8\n"
            "  - modules: ['re:.*(k|v)_proj']\n    scheme: nvfp4\n",
            "have different schemes, but vLLM fuses them: give them the same scheme",
        ),
        ("name: own\nquantize: [", "own.yaml:2: the text is not YAML"),
        (
            "name: own\nquantizer: best\nquantize:\n  - modules: [mlp]\n    scheme: nvfp4\n",
            "own.yaml:2: key 'quantizer': input should be 'rtn', 'mse' or 'gptq'",
        ),
    ],
)
def test_a_recipe_file_that_does_not_fit(
    refused: Refused, model: Path, tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert expected in refused(2, model, "--recipe", tmp_path / "own.yaml")


def test_a_missing_recipe_file(refused: Refused, model: Path) -> None:
    assert "my.yaml is missing" in refused(2, model, "--recipe", "my.yaml")


def test_an_unknown_quantizer_names_those_that_exist(refused: Refused, model: Path) -> None:
    assert "quantizer 'best' does not exist: choose rtn, mse or gptq" in refused(2, model, "--quantizer", "best")


def test_a_weight_only_recipe_with_gptq_requires_text_or_ids(
    refused: Refused, nvquant: Command, tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    """Six rows of ids are too few for the default number."""
    gptq = (*WEIGHT_ONLY, "--quantizer", "gptq")
    assert "has only 6 samples" in refused(2, tiny("llama"), *gptq, "--calibration", ids)
    ended = nvquant("convert", tiny("llama"), "-o", tmp_path / "out", *gptq, "--calibration", ids, "--samples", 6)
    assert ended.code == 0, ended.stderr


def test_a_stale_config_of_modelopt_over_plain_weights_may_be_removed(refused: Refused, model: Path) -> None:
    (model / "hf_quant_config.json").write_text("{}")
    sentence = refused(2, model, *WEIGHT_ONLY)
    assert "hf_quant_config.json names modelopt, but no tensor is quantized" in sentence
    assert "remove hf_quant_config.json if these are the model's original weights" in sentence


def broken_source(model: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The model in FP8 under E8M0 scales, with tensors changed."""
    form = fp8_form((128, 128), {"quant_method": "fp8"}, name="weight_scale_inv", dtype=torch.float8_e8m0fnu)
    return edit_source(write_source(model, folder, form, in_layers), edit)


def bad_byte(tensors: dict[str, torch.Tensor]) -> None:
    """E8M0's NaN in the last layer, behind what could be written before."""
    tensors["model.layers.2.mlp.down_proj.weight_scale_inv"].view(torch.uint8).fill_(255)


FAULTS_OF_SOURCES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a scale without its weight": (
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
        "model.layers.1.mlp.up_proj.weight_scale_inv is a scale or a part of quantized weights that the model lacks",
    ),
    "a weight without its scale": (
        lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale_inv"),
        "model.layers.1.mlp.up_proj.weight is stored as F8_E4M3 without a scale",
    ),
    "the E8M0 byte 255": (
        bad_byte,
        "model.layers.2.mlp.down_proj.weight_scale_inv contains the E8M0 byte 255, which is no number",
    ),
}


@pytest.mark.parametrize("fault", FAULTS_OF_SOURCES)
def test_a_broken_quantized_source_is_refused_by_name(
    fault: str, refused: Refused, model: Path, tmp_path: Path
) -> None:
    edit, words = FAULTS_OF_SOURCES[fault]
    sentence = refused(2, broken_source(model, tmp_path / "source", edit), *WEIGHT_ONLY)
    assert words in sentence
    assert "again" in sentence


@pytest.mark.parametrize("method", ["quark", "gptq"])
def test_an_unknown_method_of_quantization_is_named(method: str, refused: Refused, model: Path, tmp_path: Path) -> None:
    source = broken_source(model, tmp_path / "source", lambda tensors: None)
    edit_config(source, quantization_config={"quant_method": method})
    assert f"(quantization_config of config.json names {method}, which nvquant does not decode)" in refused(
        2, source, *WEIGHT_ONLY
    )


def test_an_output_of_ours_is_no_source(refused: Refused, nvquant: Command, tiny: TinyModels, tmp_path: Path) -> None:
    assert nvquant("convert", tiny("llama"), "-o", tmp_path / "out", *WEIGHT_ONLY).code == 0
    sentence = refused(2, tmp_path / "out", *WEIGHT_ONLY)
    assert f"{tmp_path / 'out'} is quantized already" in sentence
    assert "nvquant made it" in sentence
    assert "`nvquant relayout`" in sentence


def test_a_mixture_of_experts_says_what_to_do(refused: Refused, tiny: TinyModels) -> None:
    assert "`experts: bf16`" in refused(2, tiny("gemma4_moe"), *WEIGHT_ONLY)


def test_no_tokenizer_where_calibration_needs_one(refused: Refused, model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (tmp_path / "text.txt").write_text("Some words to calibrate with. " * 100)
    sentence = refused(2, model, "--calibration", tmp_path / "text.txt", "--device", "cpu")
    assert f"{model} has no tokenizer" in sentence


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("missing.jsonl", None, "missing.jsonl is not a file"),
        ("missing.txt", None, "missing.txt is not a file"),
        ("empty.jsonl", "", "empty.jsonl has no rows"),
        ("empty.txt", " \n", "empty.txt is empty"),
        ("broken.jsonl", '{"input_ids": [1, 2\n', "broken.jsonl"),
        ("short.jsonl", '{"input_ids": [5]}\n', "short.jsonl, row 1 has 1 tokens besides padding"),
        ("beyond.jsonl", '{"input_ids": [1, 2, 512]}\n', "token id 512, but the model's vocabulary has 512 entries"),
        ("negative.jsonl", '{"input_ids": [1, 2, -1]}\n', "negative.jsonl"),
        ("few.jsonl", '{"input_ids": [1, 2, 3]}\n', "few.jsonl has only 1 samples of 64 tokens, not 2"),
        ("unknown.pdf", "text", "unknown.pdf"),
    ],
)
def test_calibration_that_cannot_be(
    refused: Refused, model: Path, tmp_path: Path, name: str, text: str | None, expected: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    samples = 2 if name == "few.jsonl" else 1
    options = ("--samples", samples, "--sequence-length", 64, "--device", "cpu")
    assert expected in refused(2, model, "--calibration", tmp_path / name, *options)


def test_an_unknown_calibration_set(refused: Refused, model: Path) -> None:
    assert "--calibration nonsense is not a shipped set" in refused(2, model, "--calibration", "nonsense")


@pytest.mark.parametrize(
    "option",
    [
        ("--samples", "0"),
        ("--samples", "many"),
        ("--sequence-length", "1"),
        ("--batch-size", "0"),
        ("--memory-budget", "large"),
        ("--format", "gguf"),
        ("--device", "tpu"),
        ("--speed", "fast"),
    ],
)
def test_options_out_of_range_are_named(nvquant: Command, model: Path, here: Path, option: tuple[str, str]) -> None:
    ended = nvquant("convert", model, *option)
    assert ended.code == 2
    assert option[0] in ended.stderr.splitlines()[-1]
    assert ended.stderr.splitlines()[-1].startswith("Error: ")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden"])
def test_an_output_folder_that_is_not_ours(refused: Refused, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("text")
    assert f"{tmp_path / 'out'} exists, but nvquant did not write it" in refused(2, model, "-o", tmp_path / "out")


def test_a_partial_folder_that_is_not_ours(refused: Refused, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("text")
    assert "out.partial exists, but nvquant did not write it" in refused(2, model, "-o", tmp_path / "out")


def test_the_source_as_output(refused: Refused, model: Path) -> None:
    for output in (model, model.parent, f"{model}/", os.path.relpath(model)):
        assert "is the source itself, or contains it" in refused(2, model, "-o", output)


def test_an_output_inside_of_a_file(refused: Refused, model: Path) -> None:
    assert "cannot be created" in refused(2, model, "-o", model / "config.json" / "out", *WEIGHT_ONLY)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_too_little_disk_is_noticed_before_any_work(refused: Refused, model: Path, small_disk: Path) -> None:
    sentence = refused(2, model, "-o", small_disk / "out", "--calibration", "not-even-looked-at")
    assert f"{small_disk} has 1,048,576 free" in sentence
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("with_text", [False, True])
def test_an_architecture_that_transformers_does_not_know(
    refused: Refused, model: Path, ids: Path, tmp_path: Path, with_text: bool
) -> None:
    edit_config(model, architectures=["UnheardOfForCausalLM"], model_type="unheard_of", transformers_version="9.9")
    (tmp_path / "text.txt").write_text("Some words to calibrate with. " * 400)
    calibration = tmp_path / "text.txt" if with_text else ids
    options = ("--samples", 2, "--sequence-length", 24, "--device", "cpu")
    sentence = refused(3, model, "--calibration", calibration, *options)
    assert f"transformers {transformers.__version__}" in sentence
    assert "UnheardOfForCausalLM" in sentence
    assert "9.9" in sentence


@pytest.mark.parametrize(
    ("layers", "expected"), [(2, "config.json describes fewer decoder layers"), (4, "lacks model.layers.3.")]
)
def test_a_config_with_another_number_of_layers(
    refused: Refused, model: Path, ids: Path, layers: int, expected: str
) -> None:
    edit_config(model, num_hidden_layers=layers)
    assert expected in refused(2, model, "--calibration", ids, "--samples", 2, "--device", "cpu")


def test_shapes_of_another_config(refused: Refused, model: Path, ids: Path) -> None:
    edit_config(model, intermediate_size=256)
    sentence = refused(2, model, "--calibration", ids, "--samples", 2, "--device", "cpu")
    assert "mlp.gate_proj.weight has shape [128, 64], but config.json describes [256, 64]" in sentence


def test_a_model_that_is_no_decoder(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Encoder"]}))
    save_file({"head.weight": torch.ones(16, 16)}, folder / "model.safetensors")
    assert f"{folder}" in refused(2, folder, *WEIGHT_ONLY)


def test_the_first_mistake_is_reported_before_the_model_is_read(refused: Refused, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    hostile.nan_in_weight(source)
    write_ids(tmp_path / "none.jsonl", [])
    assert "none.jsonl" in refused(2, source, "--calibration", tmp_path / "none.jsonl", "--device", "cpu")


def test_code_that_auto_map_names_and_the_folder_lacks(refused: Refused, model: Path) -> None:
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    assert "lacks modeling_mine.py, which auto_map in config.json names: download" in refused(2, model)


def test_a_stale_quantization_config_over_plain_weights_may_be_removed(refused: Refused, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "fp8"})
    assert "remove quantization_config from config.json" in refused(2, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_and_not_the_input_that_it_spoils(
    refused: Refused, model: Path, ids: Path, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][3, 5] = value
            save_file(tensors, path, {"format": "pt"})
    sentence = refused(2, model, "--calibration", ids, "--samples", 2, "--device", "cpu", "--recipe", "nvfp4")
    assert f"{name} holds a NaN or an infinity at row 3, column 5" in sentence


def test_a_role_in_capitals_is_that_role() -> None:
    recipe = parse_recipe("name: mine\nquantize:\n  - {modules: [MLP], scheme: nvfp4}\n", "mine.yaml")
    assert recipe.quantize[0].modules == ("mlp",)


def test_a_wrong_command_line_comes_back_without_control_characters(nvquant: Command) -> None:
    ended = nvquant("plan", "model", "--reci\x1b[31mpe")
    assert ended.code == 2
    assert "No such option" in ended.stderr
    assert "\x1b" not in ended.stderr
