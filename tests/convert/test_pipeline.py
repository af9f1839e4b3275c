"""The pipeline on tiny models: what is written is what was planned, nothing else is touched, runs repeat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.statistics.ranges import calibrated_amax
from nvquant.checkpoint.headers import read_header
from nvquant.checkpoint.sidefiles import side_files
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import assert_as_planned, convert
from nvquant.convert.progress import Progress
from nvquant.errors import CheckFailed, InputError
from nvquant.stream.manifest import MANIFEST_NAME
from support import emulation
from support.conversions import (
    COMPRESSED_TENSORS,
    LENGTHS,
    MODELOPT,
    Conversions,
    TinyModels,
    calibration_of,
    cast_checkpoint,
    contents,
    converted,
    edit_config,
    planned,
    random_samples,
    raw,
    recipe_for,
    tensors_in,
)
from support.raw_safetensors import INDEX_NAME
from support.tiny_models import WRITERS, tiny_llama
from torch import Tensor, nn

LAYOUTS = (COMPRESSED_TENSORS, MODELOPT)
PARTS = {
    COMPRESSED_TENSORS: ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
    MODELOPT: ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WRITERS)
def test_the_output_holds_exactly_the_planned_tensors(
    tiny: TinyModels, done: Conversions, name: str, layout: str
) -> None:
    plan = planned(tiny(name), recipe_for(name, "nvfp4-full"), layout)
    folder = done(name, layout=layout)
    headers = {path.name: read_header(path) for path in folder.glob("*.safetensors")}
    assert sorted(headers) == [shard.file for shard in plan.shards]
    for shard in plan.shards:
        found = [(info.name, info.dtype, info.shape) for info in headers[shard.file].tensors.values()]
        assert found == [(entry.name, entry.dtype, entry.shape) for entry in shard.entries]
        assert (folder / shard.file).stat().st_size == shard.file_bytes
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == plan.tensor_bytes
    assert index["weight_map"] == {entry.name: shard.file for shard in plan.shards for entry in shard.entries}
    assert sum(tensor.nbytes for tensor in tensors_in(folder).values()) == plan.tensor_bytes


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *((name, "nvfp4-full") for name in WRITERS),
        *((n, r) for n in ("llama", "gemma4") for r in ("nvfp4", "nvfp4-a16")),
    ],
)
def test_what_is_not_quantized_is_copied_byte_for_byte_under_its_own_name(
    tiny: TinyModels, done: Conversions, name: str, recipe: str
) -> None:
    quantized = set(planned(tiny(name), recipe_for(name, recipe)).matrices)
    before, after = tensors_in(tiny(name)), tensors_in(done(name, recipe))
    copied = {key: tensor for key, tensor in before.items() if key.removesuffix(".weight") not in quantized}
    assert len(copied) == len(before) - len(quantized)
    for key, tensor in copied.items():
        assert (after[key].dtype, after[key].shape) == (tensor.dtype, tensor.shape)
        assert raw(after[key]) == raw(tensor)
    suffixes = PARTS[COMPRESSED_TENSORS][: 3 if recipe == "nvfp4-a16" else 4]
    assert set(after) - set(copied) == {f"{module}.{suffix}" for module in quantized for suffix in suffixes}


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b", "gemma4_moe"])
def test_the_vision_tower_is_among_what_is_copied(tiny: TinyModels, done: Conversions, name: str) -> None:
    before, after = tensors_in(tiny(name)), tensors_in(done(name))
    tower = [key for key in before if "vision" in key or "audio" in key]
    assert len(tower) > 20
    assert all(raw(before[key]) == raw(after[key]) for key in tower)


@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_both_layouts_hold_the_same_codes_and_scales(
    tiny: TinyModels, done: Conversions, name: str, quantizer: str
) -> None:
    one, other = (tensors_in(done(name, layout=layout, quantizer=quantizer)) for layout in LAYOUTS)
    for module in planned(tiny(name)).matrices:
        mine, theirs = ([tensors[f"{module}.{part}"] for part in PARTS[layout]] for tensors, layout in
                        ((one, COMPRESSED_TENSORS), (other, MODELOPT)))  # fmt: skip
        assert raw(mine[0]) == raw(theirs[0])
        assert raw(mine[1]) == raw(theirs[1])
        for divisor, multiplier in zip(mine[2:], theirs[2:], strict=True):
            assert (divisor.shape, multiplier.shape) == ((1,), ())
            assert float(divisor * multiplier) == pytest.approx(1, rel=3e-7)


@pytest.mark.parametrize(("quantizer", "bound"), [("rtn", 0.11), ("mse", 0.10), ("gptq", 0.2)])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma4", "gemma4_moe"])
def test_decoded_weights_are_near_the_source(
    tiny: TinyModels, done: Conversions, name: str, quantizer: str, bound: float
) -> None:
    state, _ = emulation.decode_tensors(tensors_in(done(name, quantizer=quantizer)))
    before = tensors_in(tiny(name))
    for module in planned(tiny(name), recipe_for(name, "nvfp4-full")).matrices:
        weight = before[f"{module}.weight"].float()
        assert (state[f"{module}.weight"] - weight).norm() / weight.norm() < bound


def test_mse_decodes_nearer_to_what_the_layers_compute_than_rtn(tiny: TinyModels, done: Conversions) -> None:
    def error(quantizer: str) -> float:
        state, _ = emulation.decode_tensors(tensors_in(done("llama", quantizer=quantizer)))
        before = tensors_in(tiny("llama"))
        modules = planned(tiny("llama")).matrices
        return sum(float((state[f"{at}.weight"] - before[f"{at}.weight"].float()).square().sum()) for at in modules)

    assert error("mse") < 0.95 * error("rtn")


@pytest.mark.parametrize(
    ("name", "quantizer"), [("gemma4", "mse"), ("gemma4_e2b", "rtn"), ("llama", "mse"), ("gemma4", "gptq")]
)
def test_two_runs_write_equal_folders(tiny: TinyModels, tmp_path: Path, name: str, quantizer: str) -> None:
    first, second = (
        converted(tiny(name), tmp_path / folder / "out", quantizer=quantizer)
        for folder in ("a", "b")
        if (tmp_path / folder).mkdir() is None
    )
    assert contents(first) == contents(second)


def test_padding_never_enters_a_statistic(tiny: TinyModels, tmp_path: Path) -> None:
    samples = random_samples()
    rows = [
        {"input_ids": [0] * 3 + ids.tolist() + [7] * 5, "attention_mask": [0] * 3 + [1] * len(ids) + [0] * 5}
        for ids in samples
    ]
    folders = []
    for name, lines in (("plain", [{"input_ids": ids.tolist()} for ids in samples]), ("padded", rows)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "ids.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        options = ConvertOptions(tmp_path / name / "out", "mse")
        convert(planned(tiny("gemma4")), options, calibration_of(tiny("gemma4"), file))
        folders.append(options.output)
    assert contents(folders[0]) == contents(folders[1])


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_batches_of_two_with_mixed_lengths_give_the_same_codes(
    tiny: TinyModels, done: Conversions, tmp_path: Path, name: str
) -> None:
    one = tensors_in(done(name))
    two = tensors_in(converted(tiny(name), tmp_path / "out", batch_size=2))
    for key, tensor in one.items():
        if key.endswith("input_global_scale"):  # the products of a batch of two may be rounded otherwise
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=0)
        else:
            assert raw(two[key]) == raw(tensor)
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["run"]["batch_size"] == 2


def test_a_source_in_float32_gives_the_bytes_of_the_same_values_in_bf16(
    tiny: TinyModels, done: Conversions, tmp_path: Path
) -> None:
    source = cast_checkpoint(shutil.copytree(tiny("gemma4"), tmp_path / "source"), torch.float32)
    one, other = (
        tensors_in(done("gemma4", quantizer="mse")),
        tensors_in(converted(source, tmp_path / "out", quantizer="mse")),
    )
    assert set(one) == set(other)
    for key, tensor in one.items():
        if tensor.dtype == torch.bfloat16:  # copied: as stored
            assert raw(other[key]) == raw(tensor.float())
        else:
            assert raw(other[key]) == raw(tensor)


def test_a_source_in_float16_is_converted_and_copied_as_float16(tmp_path: Path) -> None:
    source = cast_checkpoint(tiny_llama(tmp_path / "source"), torch.float16)
    output = converted(source, tmp_path / "out")
    state, scales = emulation.decode_tensors(tensors_in(output))
    before, after = tensors_in(source), tensors_in(output)
    assert len(scales) == 21
    assert {after[key].dtype for key in set(before) & set(after)} == {torch.float16}
    for key, tensor in before.items():
        error = (state[key] - tensor.float()).norm() / tensor.float().norm()
        assert error < (0.11 if key.endswith("_proj.weight") else 1e-9)


def test_a_single_file_without_index_gives_the_same_tensors(done: Conversions, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", shards=1)
    assert not (source / INDEX_NAME).exists()
    one, other = tensors_in(done("llama")), tensors_in(converted(source, tmp_path / "out"))
    assert {key: raw(tensor) for key, tensor in one.items()} == {key: raw(tensor) for key, tensor in other.items()}


def test_side_files_travel_as_they_are_and_nothing_else_does(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    (source / "original").mkdir()
    for name in ("original/consolidated.pth", "pytorch_model.bin", "notes.md", "LICENSE", "extra.safetensors"):
        (source / name).write_text("text")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    side = set(side_files(source))
    assert {"tokenizer.json", "LICENSE", "additional_chat_templates/tools.jinja", "generation_config.json"} <= side
    before, after = contents(source), contents(output)
    assert {name: after[name] for name in side} == {name: before[name] for name in side}
    shards = {path.name for path in output.glob("model-*-of-*.safetensors")}
    assert set(after) == side | shards | {"config.json", INDEX_NAME, MANIFEST_NAME}


def test_the_manifest_says_what_the_run_was_made_from_and_what_it_saw(tiny: TinyModels, done: Conversions) -> None:
    folder = done("gemma4", quantizer="mse")
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    assert (manifest["format"], manifest["quantizer"], manifest["recipe"]["name"]) == (
        COMPRESSED_TENSORS, "mse", "nvfp4-full",
    )  # fmt: skip
    assert manifest["run"] | {"versions": None} == {
        "device": "cpu", "dtype": "float32", "attention": "sdpa", "batch_size": 1, "versions": None,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    assert manifest["run"]["versions"]["torch"] == torch.__version__
    assert manifest["calibration"]["samples"] == len(LENGTHS)
    assert manifest["calibration"]["tokens"] == sum(LENGTHS)
    assert (manifest["calibration"]["sequence_length"], manifest["calibration"]["seed"]) == (4096, 0)
    assert set(manifest["source"]["shards"]) == {path.name for path in tiny("gemma4").glob("*.safetensors")}
    assert manifest["files"] == {path: digest for path, digest in contents(folder).items() if path.endswith("tensors")}
    groups = {name: group for layer in manifest["layers"] for name, group in layer["groups"].items()}
    assert sorted(groups) == sorted(group.name for group in planned(tiny("gemma4")).groups)
    tensors = tensors_in(folder)
    for group in groups.values():
        seen = group["input"]
        assert seen["tokens"] == sum(LENGTHS)
        assert 0 < seen["low_percentile"] <= seen["observed_amax"] * 1.004  # the percentile is rounded to BF16
        assert seen["calibrated_amax"] == calibrated_amax(seen["observed_amax"], seen["low_percentile"])
        for member in group["members"]:
            stored = float(tensors[f"{member}.input_global_scale"])
            assert stored == pytest.approx(2688 / seen["calibrated_amax"], rel=3e-7)


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_what_calibration_saw_is_what_the_whole_model_computes(tiny: TinyModels, done: Conversions, name: str) -> None:
    largest: dict[str, float] = {}

    def watch(at: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest[at] = max(largest.get(at, 0.0), float(args[0].abs().max()))

        return hook

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).eval()
    for at in planned(tiny(name)).matrices:
        model.get_submodule(at).register_forward_pre_hook(watch(at))
    with torch.no_grad():
        for ids in random_samples():
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    layers = json.loads((done(name, quantizer="mse") / MANIFEST_NAME).read_text())["layers"]
    groups = [group for layer in layers for group in layer["groups"].values()]
    seen = {member: group["input"]["observed_amax"] for group in groups for member in group["members"]}
    assert seen == largest


def test_the_manifest_names_no_path_host_or_time(tiny: TinyModels, tmp_path: Path) -> None:
    recipe = recipe_for("llama", "nvfp4-full")
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"set": str(tmp_path / "secret.jsonl")})}
    )
    output = converted(tiny("llama"), tmp_path / "out", recipe)
    text = (output / MANIFEST_NAME).read_text()
    for word in (str(tmp_path), str(tiny("llama").parent), os.uname().nodename, "secret"):
        assert word not in text

    def keys(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return (set(value) if isinstance(value, dict) else set()).union(*(keys(item) for item in inner))

    found = keys(json.loads(text))
    assert not {key for key in found if "time" in key} - {"mtime_ns"}  # a shard's, by which a resumed run knows it
    assert not {key for key in found if "date" in key or "host" in key or "path" in key or "user" in key}


def test_progress_is_told_for_every_layer_and_the_rest(tiny: TinyModels, tmp_path: Path) -> None:
    told: list[Progress] = []
    options = ConvertOptions(tmp_path / "out", "rtn", progress=told.append)
    result = convert(planned(tiny("llama"), "nvfp4-a16"), options, None)
    assert list(dict.fromkeys(now.phase for now in told)) == ["layers", "finishing the files", "finish"]
    assert {1, 2, 3} <= {now.layers_done for now in told}
    assert {now.layers for now in told} == {3}
    assert set(result.phases) >= {"import", "read", "quantize", "write", "copy", "finish"}
    measured = {"seconds": 0, "peak_host_bytes": 0, "peak_gpu_bytes": 0, "phases": {}}
    assert result.as_json() | measured == {
        "output": str(tmp_path / "out"), "tensors": 71, "tensor_bytes": result.tensor_bytes, "quantized": 21,
        "seconds": 0, "peak_host_bytes": 0, "peak_gpu_bytes": 0, "calibration": None,
        "marlin_flushed_blocks": result.marlin_flushed_blocks, "layers_resumed": 0, "was_finished": False,
        "error_feedback": None, "casts": None, "distillation": None, "phases": {},
    }  # fmt: skip


WEIGHT_ONLY = """
import sys
from nvquant.cli.main import main
try:
    main(["convert", *sys.argv[1:], "--recipe", "nvfp4-a16", "--format", "modelopt", "--device", "cpu"])
except SystemExit as end:
    assert end.code == 0, end.code
assert "torch" in sys.modules
assert "transformers" not in sys.modules
assert "accelerate" not in sys.modules
"""


def test_a_weight_only_recipe_needs_no_transformers(tiny: TinyModels, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WEIGHT_ONLY, tiny("gemma4"), "-o", tmp_path / "out"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "hf_quant_config.json").exists()


def test_an_output_that_is_not_as_planned_is_found_out(tiny: TinyModels, tmp_path: Path) -> None:
    plan = planned(tiny("llama"), "nvfp4-a16")
    output = converted(tiny("llama"), tmp_path / "out", "nvfp4-a16")
    assert_as_planned(plan, output)
    shutil.copyfile(output / "model-00001-of-00004.safetensors", output / "model-00002-of-00004.safetensors")
    with pytest.raises(CheckFailed, match="the output is not readable"):
        assert_as_planned(plan, output)
    with pytest.raises(CheckFailed, match=r"the tensors of model-00001-of-00004\.safetensors differ from the plan"):
        assert_as_planned(planned(tiny("llama"), "nvfp4-full"), converted(tiny("llama"), tmp_path / "b", "nvfp4-a16"))


@pytest.mark.parametrize("layers", [2, 4])
def test_a_config_with_another_number_of_layers_is_refused(tmp_path: Path, layers: int) -> None:
    source = edit_config(tiny_llama(tmp_path / "source"), num_hidden_layers=layers)
    with pytest.raises(InputError, match=r"stores model\.layers\.2\.|lacks model\.layers\.3\."):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def quantized_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in model.named_modules() if hasattr(part, "quantization_scheme")}


@pytest.mark.parametrize(("name", "matrices"), [("llama", 21), ("gemma4_text", 41)])
def test_transformers_loads_the_output_and_computes_what_its_bytes_say(
    done: Conversions, name: str, matrices: int
) -> None:
    folder = done(name, quantizer="mse")
    state, rounds = emulation.decode_tensors(tensors_in(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    linears = quantized_linears(model)
    assert set(linears) == set(rounds)
    assert len(linears) == matrices
    checked = []

    def check(at: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = rounds[at](args[0].float())
            expected = inputs @ state[f"{at}.weight"].T
            # In BF16 a few codes differ. Inputs that were not rounded give 0.08, another scale 0.057.
            assert (output.float() - expected).norm() / expected.norm() < 0.05
            checked.append(at)

        return hook

    ids = random_samples((24,))[0].unsqueeze(0)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)  # the first call decodes the weights
        for at, linear in linears.items():
            torch.testing.assert_close(linear.weight.float(), state[f"{at}.weight"], rtol=2**-7, atol=0)
            linear.register_forward_hook(check(at))
        model(input_ids=ids, use_cache=False)
    assert sorted(checked) == sorted(linears)


@pytest.mark.parametrize("name", ["llama", "gemma4_text"])
def test_transformers_gives_the_logits_of_the_decoded_weights(done: Conversions, name: str) -> None:
    folder = done(name, "nvfp4-a16")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = random_samples((40,))[0].unsqueeze(0)
    with torch.no_grad():
        ours = model(input_ids=ids, use_cache=False).logits.float()
        expected = emulation.load_emulation(folder)(input_ids=ids, use_cache=False).logits
    assert (ours - expected).norm() / expected.norm() < 0.05
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
