"""A matrix of an MXFP4 source keeps every value and every code as NVFP4, in both layouts, and verify proves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.api.inputs import makes_folds
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.publish.provenance import cast_sentence, read_provenance
from nvquant.stream.manifest import MANIFEST_NAME
from nvquant.verify.structure import verify_structure
from safetensors.torch import load_file, save_file
from support.commands import run_command
from support.conversions import (
    COMPRESSED_TENSORS,
    MODELOPT,
    calibration_of,
    contents,
    converted,
    planned,
    random_samples,
    tensors_in,
    write_ids,
)
from support.quantized_sources import (
    E2M1,
    Stored,
    edit_source,
    fp8_form,
    in_layers,
    mxfp4_form,
    unpacked,
    write_source,
    write_twin,
)
from support.tiny_models import tiny_llama
from torch import Tensor

CLAIM = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
FORM = mxfp4_form(CLAIM)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few blocks of 32 a row."""
    return tiny_llama(tmp_path_factory.mktemp("wide") / "llama", hidden_size=192, intermediate_size=320, head_dim=48)


@pytest.fixture(scope="module")
def source(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama in MXFP4."""
    return write_source(wide, tmp_path_factory.mktemp("sources") / "source", FORM, in_layers)


@pytest.fixture(scope="module")
def twin(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same values in BF16."""
    return write_twin(wide, tmp_path_factory.mktemp("twins") / "twin", FORM, in_layers)


def value_of(tensors: Stored, module: str, layout: str) -> Tensor:
    """A matrix of NVFP4, in float64: code * block scale * global scale."""
    codes = tensors[f"{module}.weight_packed" if layout == COMPRESSED_TENSORS else f"{module}.weight"]
    scales = tensors[f"{module}.weight_scale"].float().double().repeat_interleave(16, dim=1)
    if layout == COMPRESSED_TENSORS:
        scale = 1 / tensors[f"{module}.weight_global_scale"].double()
    else:
        scale = tensors[f"{module}.weight_scale_2"].double()
    return E2M1[unpacked(codes)] * scales * scale


def casts_of(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    return {name: group.get("cast") for layer in manifest["layers"] for name, group in layer["groups"].items()}


def is_proved(output: Path, source: Path) -> str:
    """Every check passes. Returns the words of the check `weights`."""
    report = verify_structure(output, source)
    assert [(check.name, check.finding.faults) for check in report.checks if not check.passed] == []
    return next(check.finding.looked_at for check in report.checks if check.name == "weights")


@pytest.mark.parametrize("quantizer", ["rtn", "mse", "gptq"])
@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, MODELOPT])
def test_every_value_and_every_code_is_the_source_s(
    layout: str, quantizer: str, source: Path, twin: Path, tmp_path: Path
) -> None:
    output = converted(source, tmp_path / "out", "nvfp4-full", layout, quantizer)
    made, stored, wanted = tensors_in(output), tensors_in(source), tensors_in(twin)
    modules = [name.removesuffix(".weight") for name in wanted if in_layers(name)]
    assert len(modules) == 3 * 7
    for module in modules:
        assert torch.equal(value_of(made, module, layout), wanted[f"{module}.weight"].double()), module
        codes = made[f"{module}.weight_packed" if layout == COMPRESSED_TENSORS else f"{module}.weight"]
        assert torch.equal(codes, stored[f"{module}.weight_packed"]), module
    casts = casts_of(output)
    assert all(cast["source"] == "MXFP4" and cast["shifted"] == cast["rounded"] == 0 for cast in casts.values())
    assert "21 with the codes of the MXFP4 source (0 blocks of them requantized)" in is_proved(output, source)
    assert not [name for name in made if name not in wanted and name.rpartition(".")[0] not in modules]


def test_members_of_a_fused_group_share_the_power_of_two(wide: Path, tmp_path: Path) -> None:
    """gate and up, and q, k and v, differ in their own largest exponents."""

    def edit(tensors: Stored) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("up_proj.weight_scale", "q_proj.weight_scale")):
                tensor -= 3

    source = edit_source(write_source(wide, tmp_path / "source", FORM, in_layers), edit)
    made = tensors_in(converted(source, tmp_path / "out", "nvfp4-a16", quantizer="rtn"))
    exponents = {
        name: int((tensors_in(source)[name].int() - 127).max())
        for name in tensors_in(source)
        if name.endswith("weight_scale")
    }
    for layer in range(3):
        for members in (["mlp.gate_proj", "mlp.up_proj"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]):
            names = [f"model.layers.{layer}.{member}" for member in members]
            largest = max(exponents[f"{name}.weight_scale"] for name in names)
            for name in names:
                assert float(made[f"{name}.weight_global_scale"]) == 2.0 ** (8 - largest)
    assert exponents["model.layers.0.mlp.up_proj.weight_scale"] < exponents["model.layers.0.mlp.gate_proj.weight_scale"]
    is_proved(tmp_path / "out", source)


def test_a_span_of_18_is_requantized_counted_and_proved(wide: Path, tmp_path: Path) -> None:
    """Two blocks of 32 lie 18 octaves below the largest: the manifest, verify and the command's words count them."""

    def edit(tensors: Stored) -> None:
        scales = tensors["model.layers.1.mlp.down_proj.weight_scale"]
        largest = int(scales.max())
        scales[7, 2] = scales[9, 0] = largest - 18
        tensors["model.layers.1.mlp.down_proj.weight_packed"][7, 32:48] = 0x51  # 0.5 and 3: one of them has no half
        tensors["model.layers.1.mlp.down_proj.weight_packed"][9, :16] = 0x42  # 1 and 2

    source = edit_source(write_source(wide, tmp_path / "source", FORM, in_layers), edit)
    plan = planned(source, "nvfp4-a16", quantizer="rtn")
    result = convert(plan, ConvertOptions(tmp_path / "out", "rtn"), None)
    assert result.casts is not None
    assert (result.casts["matrices"], result.casts["shifted"], result.casts["rounded"]) == (21, 2, 2)
    cast = casts_of(tmp_path / "out")["model.layers.1.mlp.down_proj"]
    assert (cast["shifted"], cast["rounded"]) == (2, 2)
    assert "(2 blocks of them requantized)" in is_proved(tmp_path / "out", source)


def test_blocks_beyond_marlin_s_span_are_counted(wide: Path, tmp_path: Path) -> None:
    """14 octaves below the largest are kept by Marlin, and 15 are not."""
    for span, flushed in ((14, 0), (15, 2)):

        def edit(tensors: Stored, span: int = span) -> None:
            scales = tensors["model.layers.1.mlp.down_proj.weight_scale"]
            scales.clamp_(min=int(scales.max()) - 8)
            scales[7, 2] = int(scales.max()) - span
            tensors["model.layers.1.mlp.down_proj.weight_packed"][7, 32:48] = 0x51

        folder = tmp_path / str(span)
        source = edit_source(write_source(wide, folder / "source", FORM, in_layers), edit)
        output = converted(source, folder / "out", "nvfp4-a16")
        manifest = json.loads((output / MANIFEST_NAME).read_text())
        group = manifest["layers"][1]["groups"]["model.layers.1.mlp.down_proj"]
        assert (group["marlin_flushed_blocks"], group["cast"]["rounded"]) == (flushed, 0)


def test_only_part_of_a_fused_group_in_mxfp4_is_requantized(wide: Path, tmp_path: Path) -> None:
    """The other members have no codes to keep. The whole model then has the bytes of its twin."""
    gates_and_keys = ("gate_proj.weight", "k_proj.weight")

    def part(name: str) -> bool:
        return in_layers(name) and name.endswith(gates_and_keys)

    source = write_source(wide, tmp_path / "source", FORM, part)
    twin = write_twin(wide, tmp_path / "twin", FORM, part)
    output = converted(source, tmp_path / "out")
    assert set(casts_of(output).values()) == {None}
    left, right = contents(output), contents(converted(twin, tmp_path / "out-twin"))
    assert {name for name in left if left[name] != right.get(name)} == {MANIFEST_NAME}


def test_folds_are_made_only_by_request_and_requantize(source: Path, tmp_path: Path) -> None:
    plan = planned(source, quantizer="gptq")
    assert not makes_folds(plan, None)
    assert makes_folds(plan, "auto")
    output = converted(source, tmp_path / "out", quantizer="gptq", fold=True)
    assert None in casts_of(output).values()
    report = verify_structure(output, source)
    assert [(check.name, check.finding.faults) for check in report.checks if not check.passed] == []


def test_a_resumed_run_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole = converted(source, tmp_path / "whole", quantizer="gptq")

    class Stop(Exception):
        pass

    def stop(now: Any) -> None:
        if now.layers_done == 1:
            raise Stop

    plan = planned(source, quantizer="gptq")
    calibration = calibration_of(source, write_ids(tmp_path / "whole.jsonl", random_samples()))
    options = ConvertOptions(tmp_path / "out", "gptq")
    with pytest.raises(Stop):
        convert(plan, replace(options, progress=stop), calibration)
    assert convert(plan, options, calibration).layers_resumed >= 1
    assert contents(tmp_path / "out") == contents(whole)


def broken(output: Path, folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(output, folder)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        edit(tensors)
        save_file(tensors, shard, {"format": "pt"})
    return folder


def flip_code(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight_packed"
    if name in tensors:
        tensors[name][3, 4] ^= 1


def flip_scale(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight_scale"
    if name in tensors:
        tensors[name].view(torch.uint8)[3, 4] ^= 1


@pytest.mark.parametrize(("edit", "words"), [(flip_code, "codes"), (flip_scale, "scales")])
def test_verify_notices_one_changed_byte(
    edit: Callable[[dict[str, Tensor]], None], words: str, source: Path, tmp_path: Path
) -> None:
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    report = verify_structure(broken(output, tmp_path / "broken", edit), source)
    faults = next(check.finding.faults for check in report.checks if check.name == "weights")
    assert faults == [
        f"model.layers.1.mlp.down_proj: 1 bytes of {words} are not those of the MXFP4 source (first at row 3, byte 4)"
    ]


def test_verify_notices_a_source_that_is_not_mxfp4_and_a_wrong_count(source: Path, twin: Path, tmp_path: Path) -> None:
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    faults = next(c.finding.faults for c in verify_structure(output, twin).checks if c.name == "weights")
    assert "the source is not stored in MXFP4" in faults[0]
    path = output / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["layers"][0]["groups"]["model.layers.0.mlp.down_proj"]["cast"]["rounded"] = 1
    path.write_text(json.dumps(manifest))
    faults = next(c.finding.faults for c in verify_structure(output, source).checks if c.name == "weights")
    assert faults == [
        "model.layers.0.mlp.down_proj: the manifest counts 0 shifted and 1 rounded blocks, but the cast of the source "
        "has 0 and 0"
    ]


def test_plan_and_card_count_the_matrices_that_keep_their_codes(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(run_command(capfd, "plan", source, "--recipe", "nvfp4", "--json").stdout)
    assert (document["source_form"], document["casts"], document["quantized"]) == ("MXFP4", 9, 9)
    before = sum(group["bytes_in"] for group in document["groups"])
    assert before == sum(info.nbytes for info in open_checkpoint(source).infos().values())
    words = run_command(capfd, "plan", source, "--recipe", "nvfp4").stdout
    assert "The source is stored in MXFP4. nvquant decodes it, and writes unquantized tensors in BF16." in words
    assert "9 of the quantized matrices keep their MXFP4 codes." in words
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    assert cast_sentence(read_provenance(output, None)) == (
        "21 matrices keep the MXFP4 codes of the source, and no value of them changed."
    )


FP8_FORMS = {
    "rows": fp8_form((1, 0), {"quant_method": "compressed-tensors"}, name="weight_scale", dtype=torch.bfloat16),
    "one scale": fp8_form(
        None,
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        name="weight_scale",
        shape=lambda scales: scales.reshape(()),
        extras={"input_scale": torch.tensor(0.25)},
    ),
    "blocks": fp8_form((128, 128), {"quant_method": "fp8"}),
}


@pytest.mark.parametrize("form", ["rows", "one scale"])
def test_fp8_attention_of_an_fp8_source_stays_as_it_is(form: str, wide: Path, tmp_path: Path) -> None:
    """Codes byte for byte, and the scale of each row; MLPs become NVFP4 as those of the twin."""
    source = write_source(wide, tmp_path / "source", FP8_FORMS[form], in_layers)
    twin = write_twin(wide, tmp_path / "twin", FP8_FORMS[form], in_layers)
    output = converted(source, tmp_path / "out", "nvfp4-fp8")
    of_twin = tensors_in(converted(twin, tmp_path / "out-twin", "nvfp4-fp8"))
    made, stored = tensors_in(output), tensors_in(source)
    moved = 0
    for name, tensor in made.items():
        if ".self_attn." not in name:
            assert torch.equal(tensor.view(torch.uint8), of_twin[name].view(torch.uint8)), name
        elif name.endswith("_proj.weight"):
            assert torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)), name
            moved += int((tensor.view(torch.uint8) != of_twin[name].view(torch.uint8)).sum())
        else:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[name].float().expand_as(tensor)), name
    assert moved > 0 or form == "rows"  # what quantizing anew would have changed
    assert "12 with the codes of the FP8 source" in is_proved(output, source)
    assert {cast["source"] for name, cast in casts_of(output).items() if "self_attn" in name} == {"FP8"}
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"


def test_verify_notices_a_changed_byte_of_kept_fp8(wide: Path, tmp_path: Path) -> None:
    source = write_source(wide, tmp_path / "source", FP8_FORMS["rows"], in_layers)
    output = converted(source, tmp_path / "out", "nvfp4-fp8")

    def edit(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.self_attn.o_proj.weight"
        if name in tensors:
            tensors[name].view(torch.uint8)[3, 4] ^= 1

    report = verify_structure(broken(output, tmp_path / "broken", edit), source)
    faults = next(check.finding.faults for check in report.checks if check.name == "weights")
    assert faults == [
        "model.layers.1.self_attn.o_proj: 1 bytes of codes are not those of the FP8 source (first at row 3, byte 4)"
    ]


@pytest.mark.parametrize(("form", "layout"), [("blocks", COMPRESSED_TENSORS), ("rows", MODELOPT), ("blocks", MODELOPT)])
def test_fp8_that_the_layout_s_form_cannot_express_is_quantized_anew(
    form: str, layout: str, wide: Path, tmp_path: Path
) -> None:
    """Scales of blocks, or of rows where the layout has one scale: the bytes are those of the twin."""
    source = write_source(wide, tmp_path / "source", FP8_FORMS[form], in_layers)
    twin = write_twin(wide, tmp_path / "twin", FP8_FORMS[form], in_layers)
    output = converted(source, tmp_path / "out", "nvfp4-fp8", layout)
    left, right = contents(output), contents(converted(twin, tmp_path / "out-twin", "nvfp4-fp8", layout))
    assert {name for name in left if left[name] != right.get(name)} == {MANIFEST_NAME}
    assert set(casts_of(output).values()) == {None}
    is_proved(output, source)


def test_plan_shows_attention_in_bf16_and_kept_in_fp8(
    wide: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_source(wide, tmp_path / "source", FP8_FORMS["rows"], in_layers)
    document = json.loads(run_command(capfd, "plan", source, "--recipe", "nvfp4", "--json").stdout)
    other = json.loads(run_command(capfd, "plan", source, "--recipe", "nvfp4-fp8", "--json").stdout)
    elements = 3 * (2 * 192 * 192 + 2 * 96 * 192)
    assert document["fp8_attention"] == {
        "matrices": 12,
        "kept": 12,
        "stored_bytes": elements + 2 * 3 * (192 + 96 + 96 + 192),
        "bf16_bytes": 2 * elements,
        "fp8_bytes": elements + 4 * 3 * (192 + 96 + 96 + 192),
        "recipe": "nvfp4-fp8",
    }
    assert other["fp8_attention"] is None
    assert (document["casts"], other["casts"]) == (0, 12)
    assert document["tensor_bytes"] - other["tensor_bytes"] == (
        document["fp8_attention"]["bf16_bytes"] - document["fp8_attention"]["fp8_bytes"]
    )
    words = run_command(capfd, "plan", source, "--recipe", "nvfp4").stdout
    assert "12 attention matrices grow from FP8 to BF16" in words
    assert "Recipe nvfp4-fp8 keeps their codes" in words
    assert "12 of the quantized matrices keep their FP8 codes." in (
        run_command(capfd, "plan", source, "--recipe", "nvfp4-fp8").stdout
    )
    blocks = write_source(wide, tmp_path / "blocks", FP8_FORMS["blocks"], in_layers)
    document = json.loads(run_command(capfd, "plan", blocks, "--recipe", "nvfp4", "--json").stdout)
    assert (document["fp8_attention"]["matrices"], document["fp8_attention"]["kept"]) == (12, 0)
    assert "Recipe nvfp4-fp8 quantizes them to FP8" in run_command(capfd, "plan", blocks, "--recipe", "nvfp4").stdout
    assert json.loads(run_command(capfd, "plan", wide, "--json").stdout)["fp8_attention"] is None


def test_a_distillation_of_kept_codes_is_refused_before_and_after_the_conversion(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("convert", source, "-o", tmp_path / "out", "--recipe", "nvfp4-a16", "--distill", "4096", "--device", "cpu")
    ended = run_command(capfd, *words)
    assert ended.code == 2
    assert "keeps its MXFP4 codes and scales, and a distillation would change them. Drop the option." in ended.stderr
    assert list(tmp_path.iterdir()) == []
    output = converted(source, tmp_path / "out", "nvfp4-a16")
    words = ("distill", output, "--against", source, "-o", tmp_path / "distilled", "--device", "cpu")
    ended = run_command(capfd, *words)
    assert ended.code == 2
    assert "keeps the codes and scales of its MXFP4 source, which distillation would change" in ended.stderr
    assert not (tmp_path / "distilled").exists()
