from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from nvquant.checkpoint.source import INDEX_NAME, SINGLE_NAME, open_checkpoint
from nvquant.cli.main import cli
from nvquant.convert.config import output_configs
from nvquant.convert.relayout import RelayoutResult, relayout
from nvquant.convert.relayout_source import HF_QUANT_CONFIG
from nvquant.errors import InputError
from nvquant.format.layouts import GLOBAL_SCALES, LAYOUTS
from nvquant.format.schemes import NVFP4
from nvquant.recipe.schema import QuantizeEntry, Recipe
from nvquant.stream.manifest import MANIFEST_NAME
from nvquant.verify.structure import verify_structure
from safetensors.torch import load_file, save_file
from support.commands import run_command
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Conversions,
    TinyModels,
    contents,
    converted,
    edit_config,
    planned,
    raw,
    tensors_in,
)
from torch import Tensor

OTHER = {COMPRESSED_TENSORS: MODELOPT, MODELOPT: COMPRESSED_TENSORS}
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def conversions(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    """Converted tiny models; shared, so only to be read."""
    return Conversions(tiny, tmp_path_factory.mktemp("converted"))


def laid_out(folder: Path, layout: str, output: Path) -> RelayoutResult:
    return relayout(open_checkpoint(folder), LAYOUTS[layout], output)


def foreign(folder: Path, copy: Path) -> Path:
    """A copy as another tool would have left it: without nvquant's manifest."""
    shutil.copytree(folder, copy)
    (copy / MANIFEST_NAME).unlink()
    return copy


def merged(folder: Path, edit: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> Path:
    """Give a checkpoint's tensors new values or names, in place; it is one file without an index afterwards."""
    tensors = tensors_in(folder)
    edit(tensors)
    for path in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    return folder


def files_and_manifest(folder: Path) -> tuple[dict[str, str], Any]:
    """sha256 of every file, and the manifest; without the name of the calibration file, which differs here."""
    files = contents(folder)
    del files[MANIFEST_NAME]
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    if manifest["calibration"]:
        del manifest["calibration"]["name"]
    return files, manifest


@pytest.mark.parametrize("layout", OTHER)
@pytest.mark.parametrize(
    ("model", "recipe", "quantizer"),
    [
        ("llama", "nvfp4-full", "rtn"),
        ("llama", "nvfp4-full", "mse"),
        ("qwen2", "nvfp4", "rtn"),
        ("gemma4", "nvfp4-full", "rtn"),
        ("gemma4_e2b", "nvfp4-a16", "rtn"),
        ("gemma4_moe", "nvfp4", "rtn"),
    ],
)
def test_relayout_of_ours_gives_the_files_of_a_direct_conversion(
    conversions: Conversions, tmp_path: Path, model: str, recipe: str, quantizer: str, layout: str
) -> None:
    result = laid_out(conversions(model, recipe, layout, quantizer), OTHER[layout], tmp_path / "out")
    direct = conversions(model, recipe, OTHER[layout], quantizer)
    assert files_and_manifest(tmp_path / "out") == files_and_manifest(direct)
    assert (result.scalars, result.unequal_groups) == ("exact", 0)
    assert result.tensors == len(tensors_in(direct))


def test_round_trip_of_ours_gives_the_same_files(conversions: Conversions, tmp_path: Path) -> None:
    start = conversions("llama", "nvfp4-full", COMPRESSED_TENSORS, "mse")
    laid_out(start, MODELOPT, tmp_path / "there")
    laid_out(tmp_path / "there", COMPRESSED_TENSORS, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(start)


@pytest.mark.parametrize("layout", OTHER)
def test_another_tools_checkpoint_keeps_its_bytes_and_has_its_scalars_inverted(
    conversions: Conversions, tmp_path: Path, layout: str
) -> None:
    source = foreign(conversions("llama", layout=layout), tmp_path / "source")
    result = laid_out(source, OTHER[layout], tmp_path / "out")
    ours, theirs = (LAYOUTS[name].suffixes(NVFP4) for name in (layout, OTHER[layout]))
    parts = {leaf: part for part, leaf in ours.items()}
    before, after = tensors_in(source), tensors_in(tmp_path / "out")
    assert len(before) == len(after)
    for name, tensor in before.items():
        module, _, leaf = name.rpartition(".")
        part = parts.get(leaf) if f"{module}.{ours['weight_global']}" in before else None
        new = after[f"{module}.{theirs[part]}" if part else name]
        if part in GLOBAL_SCALES:
            assert new.shape == LAYOUTS[OTHER[layout]].scalar_shape
            assert abs(float(new.double() * tensor.double()) - 1) <= 2**-21, name
        else:
            assert raw(new) == raw(tensor), name
    assert result.scalars == "reciprocal"
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_modelopts_checkpoint_becomes_what_compressed_tensors_own_converter_makes_of_it(
    conversions: Conversions, tmp_path: Path
) -> None:
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4")
    source = foreign(conversions("llama", layout=MODELOPT), tmp_path / "source")
    laid_out(source, COMPRESSED_TENSORS, tmp_path / "out")
    expected = converters.ModelOptNvfp4Converter(targets=[r"re:.*_proj$"]).process(tensors_in(source))
    found = tensors_in(tmp_path / "out")
    assert {name: raw(tensor) for name, tensor in found.items()} == {
        name: raw(tensor) for name, tensor in expected.items()
    }


def test_one_file_without_index_stays_one_and_side_files_travel(conversions: Conversions, tmp_path: Path) -> None:
    source = merged(foreign(conversions("llama"), tmp_path / "source"))
    laid_out(source, MODELOPT, tmp_path / "out")
    kept = contents(source)
    del kept["config.json"], kept[SINGLE_NAME]
    found = contents(tmp_path / "out")
    assert kept.items() <= found.items()
    assert set(found) - set(kept) == {"config.json", HF_QUANT_CONFIG, SINGLE_NAME}


def test_hf_quant_config_is_left_behind_with_the_modelopt_layout(conversions: Conversions, tmp_path: Path) -> None:
    laid_out(conversions("llama", layout=MODELOPT), COMPRESSED_TENSORS, tmp_path / "out")
    assert not (tmp_path / "out" / HF_QUANT_CONFIG).exists()


def test_kv_cache_scales_are_renamed_with_their_values(conversions: Conversions, tmp_path: Path) -> None:
    """In the form of modelopt's exporter: scales beside k_proj and v_proj, told of by hf_quant_config.json alone."""
    source = foreign(conversions("llama", layout=MODELOPT), tmp_path / "source")
    scales = {f"model.layers.{n}.self_attn.{kv}_proj.{kv}_scale": torch.rand(()) for n in range(3) for kv in "kv"}
    merged(source, lambda tensors: tensors.update(scales))
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    nested = json.loads((source / HF_QUANT_CONFIG).read_text())
    nested["quantization"]["kv_cache_quant_algo"] = "FP8"
    (source / HF_QUANT_CONFIG).write_text(json.dumps(nested))

    laid_out(source, COMPRESSED_TENSORS, tmp_path / "out")
    laid_out(tmp_path / "out", MODELOPT, tmp_path / "back")

    there, back = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "back")
    for name, value in scales.items():
        assert torch.equal(there[name.replace("k_proj.", "").replace("v_proj.", "")], value.reshape(1))
        assert torch.equal(back[name], value)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["kv_cache_scheme"]["num_bits"] == 8
    assert json.loads((tmp_path / "back" / HF_QUANT_CONFIG).read_text()) == nested


def test_groups_that_do_not_share_their_scalars_are_counted(conversions: Conversions, tmp_path: Path) -> None:
    source = foreign(conversions("llama"), tmp_path / "source")
    merged(source, lambda tensors: tensors[f"{UP}.input_global_scale"].mul_(2))
    assert laid_out(source, MODELOPT, tmp_path / "out").unequal_groups == 1


def test_a_manifest_that_contradicts_a_scalar_is_refused_and_its_absence_is_not(
    conversions: Conversions, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(conversions("llama"), source)
    shard = source / open_checkpoint(source).files[f"{UP}.weight_global_scale"]
    tensors = load_file(shard)
    tensors[f"{UP}.weight_global_scale"] *= 1.5
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(
        InputError, match=f"{UP}.weight_global_scale is .*, which differs from the amax in {MANIFEST_NAME}"
    ):
        laid_out(source, MODELOPT, tmp_path / "out")
    (source / MANIFEST_NAME).unlink()
    assert laid_out(source, MODELOPT, tmp_path / "out").scalars == "reciprocal"


def _other_quantization(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.pre_quant_scale"] = torch.ones(128)


def _fp8_matrix(tensors: dict[str, Tensor]) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
        del tensors[f"{GATE}.{leaf}"]
    tensors[f"{GATE}.weight"] = torch.ones((128, 64), dtype=torch.float8_e4m3fn)


def _quantized_head(tensors: dict[str, Tensor]) -> None:
    for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
        tensors[f"lm_head.{leaf}"] = tensors[f"{GATE}.{leaf}"].clone()


def _dead_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{GATE}.weight_global_scale"].zero_()


def _narrow_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{GATE}.weight_scale"] = tensors[f"{GATE}.weight_scale"][:, :-1].contiguous()


def _both_layouts(tensors: dict[str, Tensor]) -> None:
    theirs = LAYOUTS[MODELOPT].suffixes(NVFP4)
    for part, leaf in LAYOUTS[COMPRESSED_TENSORS].suffixes(NVFP4).items():
        tensors[f"{GATE}.{theirs[part]}"] = tensors.pop(f"{GATE}.{leaf}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_other_quantization, r"pre_quant_scale \(F32\) belongs to another quantization"),
        (_fp8_matrix, r"gate_proj.weight \(F8_E4M3\) belongs to another quantization"),
        (_quantized_head, r"lm_head in NVFP4 \(head\)"),
        (_dead_scale, "gate_proj.weight_global_scale is 0.0, which has no reciprocal"),
        (_narrow_scales, r"weight_scale is F8_E4M3 \[128, 3\], but NVFP4 stores F8_E4M3 \[128, 4\]"),
        (_both_layouts, "in both layouts"),
    ],
)
def test_what_the_other_layout_cannot_hold_is_refused_before_anything_is_written(
    conversions: Conversions, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    source = merged(foreign(conversions("llama"), tmp_path / "source"), edit)
    with pytest.raises(InputError, match=message):
        laid_out(source, MODELOPT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_what_is_no_nvfp4_checkpoint_is_refused_by_what_it_is(
    tiny: TinyModels, conversions: Conversions, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not quantized: convert it with `nvquant convert --format`"):
        laid_out(tiny("llama"), MODELOPT, tmp_path / "out")
    fp8 = edit_config(shutil.copytree(tiny("llama"), tmp_path / "fp8"), quantization_config={"quant_method": "fp8"})
    with pytest.raises(InputError, match=r"quant_method fp8\), but not in NVFP4"):
        laid_out(fp8, MODELOPT, tmp_path / "out")
    with pytest.raises(InputError, match="is already in the modelopt layout"):
        laid_out(conversions("llama", layout=MODELOPT), MODELOPT, tmp_path / "out")


MIXED = Recipe(
    name="mixed",
    quantize=(
        QuantizeEntry(modules=("mlp",), scheme="nvfp4"),
        QuantizeEntry(modules=("attention",), scheme="nvfp4-a16"),
    ),
)


@pytest.mark.parametrize("layout", OTHER)
@pytest.mark.parametrize("model", ["llama", "gemma4"])
def test_a_mixture_of_both_nvfp4_schemes_is_carried_over(
    tiny: TinyModels, tmp_path: Path, model: str, layout: str
) -> None:
    made, direct = (converted(tiny(model), tmp_path / name, MIXED, name, "mse") for name in (layout, OTHER[layout]))
    result = laid_out(made, OTHER[layout], tmp_path / "out")
    assert files_and_manifest(tmp_path / "out") == files_and_manifest(direct)
    assert result.scalars == "exact"
    laid_out(foreign(made, tmp_path / "foreign"), OTHER[layout], tmp_path / "by reciprocals")
    assert failed(tmp_path / "by reciprocals", tiny(model)) == set()


def failed(folder: Path, source: Path) -> set[str]:
    return {check.name for check in verify_structure(folder, source).checks if not check.passed}


FORMS = {
    COMPRESSED_TENSORS: "a scale for each row and dynamic inputs",
    MODELOPT: "one scale and calibrated inputs",
}


@pytest.mark.parametrize("layout", OTHER)
@pytest.mark.parametrize("is_ours", [True, False])
def test_fp8_is_refused_with_the_form_that_the_other_layout_lacks(
    conversions: Conversions, tmp_path: Path, layout: str, is_ours: bool
) -> None:
    source = conversions("llama", "nvfp4-fp8", layout)
    source = source if is_ours else merged(foreign(source, tmp_path / "source"), _scales_in_bf16)
    with pytest.raises(InputError) as caught:
        laid_out(source, OTHER[layout], tmp_path / "out")
    assert str(caught.value) == (
        f"{source} stores model.layers.0.self_attn.k_proj and 11 more in FP8 W8A8 with {FORMS[layout]}, which "
        f"nvquant does not write in the {OTHER[layout]} layout: convert the source again with --format {OTHER[layout]}."
    )
    assert not (tmp_path / "out").exists()


def _scales_in_bf16(tensors: dict[str, Tensor]) -> None:
    """As other tools store them."""
    for name, tensor in tensors.items():
        if "self_attn" in name and name.endswith("_scale"):
            tensors[name] = tensor.bfloat16()


def test_the_command_refuses_fp8_with_exit_code_2(
    conversions: Conversions, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = conversions("llama", "nvfp4-fp8")
    ended = run_command(capfd, "relayout", source, "--format", MODELOPT, "-o", tmp_path / "out")
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].endswith(f"convert the source again with --format {MODELOPT}.")


def test_a_kv_cache_other_than_fp8_is_refused(conversions: Conversions, tmp_path: Path) -> None:
    source = foreign(conversions("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_config(source, quantization_config={**config, "kv_cache_scheme": {"num_bits": 4, "type": "float"}})
    with pytest.raises(InputError, match="does not quantize the KV cache in FP8"):
        laid_out(source, MODELOPT, tmp_path / "out")


def test_an_output_that_is_not_ours_is_left_alone(conversions: Conversions, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="nvquant did not write it"):
        laid_out(conversions("llama"), MODELOPT, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_the_config_does_not_depend_on_the_order_of_shards(tiny: TinyModels) -> None:
    """What lets a relayout, which sees its own shards only, write the config of the direct conversion."""
    plan = planned(tiny("gemma4"))
    assert len(plan.source.shards) > 1
    turned = replace(plan.source, shards=dict(reversed(plan.source.shards.items())))
    assert list(turned.infos()) != list(plan.source.infos())
    assert output_configs(replace(plan, source=turned)) == output_configs(plan)


def test_command_writes_one_json_document(conversions: Conversions, tmp_path: Path) -> None:
    source, output = conversions("llama"), tmp_path / "out"
    run = CliRunner().invoke(cli, ["relayout", str(source), "--format", MODELOPT, "-o", str(output), "--json"])
    assert run.exit_code == 0
    document = json.loads(run.stdout)
    assert (document["format"], document["quantized"], document["scalars"]) == (MODELOPT, 21, "exact")
    assert Path(document["output"]) == output


MEASURE = """
import sys
from pathlib import Path
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.checkpoint.writer import TensorEntry, build_header
from nvquant.stream.memory import peak_host_bytes
from nvquant.convert.relayout import relayout
from nvquant.format.layouts import MODELOPT

def checkpoint(folder, rows):
    folder.mkdir()
    name, cols = "model.layers.0.mlp.down_proj.", 16384
    entries = [TensorEntry(name + "weight_global_scale", "F32", (1,)), TensorEntry(name + "weight_packed", "U8",
        (rows, cols // 2)), TensorEntry(name + "weight_scale", "F8_E4M3", (rows, cols // 16))]
    header = build_header(entries)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header + torch.ones(1).numpy().tobytes())
        file.truncate(len(header) + sum(entry.nbytes for entry in entries))
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "compressed-tensors"}}')
    return open_checkpoint(folder)

root = Path(sys.argv[1])
relayout(checkpoint(root / "small", 16), MODELOPT, root / "small-out")
before = peak_host_bytes()
result = relayout(checkpoint(root / "large", 32768), MODELOPT, root / "large-out")
print(result.tensor_bytes, peak_host_bytes() - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    written_bytes, growth_bytes = map(int, run.stdout.split())
    assert written_bytes > 300_000_000
    assert growth_bytes < 64_000_000
