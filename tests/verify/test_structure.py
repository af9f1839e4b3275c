"""Every check passes on good checkpoints, and each fails, alone, on the fault that it is there for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.relayout import relayout
from nvquant.errors import InputError
from nvquant.format.layouts import LAYOUTS
from nvquant.verify.report import Report
from nvquant.verify.structure import AGAINST, ALONE, verify_structure
from support.hostile import FILE_LIES, FOLDER_LIES, Breakage
from verify.breaking import MANIFEST, Fault, edit_json, sign
from verify.checkpoints import GOOD, Copy
from verify.faults import FAULTS

NEEDS_MANIFEST = ("hashes", "input_scales", "weight_scales")


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def detail(report: Report, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_checkpoint_passes_every_check(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy(name)
    report = verify_structure(made.folder, made.source)
    assert [check.detail for check in report.checks if not check.passed] == []
    expected = [check for check in ALONE if check != "fp8" or "fp8" in GOOD[name][2].partition(" kv:")[0]]
    against = [check for check in AGAINST if check not in ("folds", "distilled") or check[:4] in GOOD[name][2]]
    assert [check.name for check in report.checks] == ["headers", *expected, *against]
    alone = verify_structure(made.folder)
    assert alone.passed
    assert [check.name for check in alone.checks] == ["headers", *expected]


@pytest.mark.parametrize("name", ["llama-mo", "gemma4-ct", "gemma4-a16-mo"])
def test_without_a_manifest_it_passes_by_bounds_and_says_so(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy(name)
    (made.folder / MANIFEST).unlink()
    report = verify_structure(made.folder, made.source)
    assert failed(report) == set()
    for check in NEEDS_MANIFEST:
        assert detail(report, check).startswith("not applicable: no manifest")
    assert "by limits, because another tool made them" in detail(report, "weights")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama-ct", "modelopt"),
        ("gemma4-mo", "compressed-tensors"),
        ("llama-gptq-ct", "modelopt"),
        ("gemma4-gptq-mo", "compressed-tensors"),
    ],
)
def test_a_relayout_passes_every_check(name: str, target: str, copy: Callable[[str], Copy], tmp_path: Path) -> None:
    made = copy(name)
    relayout(open_checkpoint(made.folder), LAYOUTS[target], tmp_path / "relayout")
    assert failed(verify_structure(tmp_path / "relayout", made.source)) == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fails_exactly_its_checks(fault: Fault, copy: Callable[[str], Copy]) -> None:
    made = copy(fault.on)
    words = fault.apply(made.folder)
    report = verify_structure(made.folder, made.source)
    assert failed(report) == set(fault.fails)
    assert words in detail(report, fault.fails[0])
    alone = verify_structure(made.folder)
    assert failed(alone) == fault.fails_alone
    if fault.first == "alone":
        assert words in detail(alone, fault.fails[0])


def test_every_check_has_a_fault_that_it_alone_finds() -> None:
    assert {fault.fails for fault in FAULTS if len(fault.fails) == 1} | {("headers",)} >= {
        (name,) for name in ["headers", *ALONE, *AGAINST] if name not in NEEDS_COMPANY
    }
    assert {name for fault in FAULTS for name in fault.fails} >= NEEDS_COMPANY


# What these find shows elsewhere too: a bad scale or code does not decode to the source's weights, a side file that
# does not parse is not the source's, what must not be quantized is no target of the config either, and neither a config
# that does not fit its tensors nor a NaN was in the source.
NEEDS_COMPANY = {
    "architecture",
    "unquantized",
    "protected",
    "tokenizer",
    "block_scales",
    "fp8",
    "global_scales",
    "fused_groups",
    "weight_scales",
}


@pytest.mark.parametrize("name", [name for name in FILE_LIES if name != "header_over_100_mb"])
def test_a_file_that_lies_fails_headers_and_nothing_else_is_run(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    words = FILE_LIES[name](made.folder)
    report = verify_structure(made.folder, made.source)
    assert [check.name for check in report.checks] == ["headers"]
    assert not report.passed
    assert words in detail(report, "headers")


# A shard that is gone takes with it what the manifest records of it and what the source has.
_MORE = {"missing_shard": {"hashes", "names"}}
_NO_CHECKPOINT = ("pickle_weights_only", "no_weights", "missing_config", "config_is_not_json", "config_is_a_list")


@pytest.mark.parametrize("name", [name for name in FOLDER_LIES if name not in _NO_CHECKPOINT])
def test_an_index_that_lies_fails_index(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    words = FOLDER_LIES[name](made.folder)
    sign_if_there(made.folder)
    report = verify_structure(made.folder, made.source)
    assert failed(report) == {"index"} | _MORE.get(name, set())
    assert words in detail(report, "index")


def sign_if_there(folder: Path) -> None:
    with edit_json(folder / MANIFEST) as manifest:
        present = all((folder / name).exists() for name in manifest["files"])
    if present:
        sign(folder)


@pytest.mark.parametrize("name", _NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_refused(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    breakage: Breakage = FOLDER_LIES[name]
    breakage(made.folder)
    with pytest.raises(InputError):
        verify_structure(made.folder)


def test_what_is_not_quantized_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="is not quantized"):
        verify_structure(models["llama"])


def test_another_quantization_is_refused(copy: Callable[[str], Copy], models: dict[str, Path], tmp_path: Path) -> None:
    made = copy("llama-ct")
    other = tmp_path / "gptq"
    other.mkdir()
    for path in made.source.iterdir():
        (other / path.name).hardlink_to(path)
    (other / "config.json").unlink()
    (other / "config.json").write_text((made.source / "config.json").read_text())
    with edit_json(other / "config.json") as config:
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(InputError, match=r"is quantized, but not to NVFP4 \(quant_method gptq\)"):
        verify_structure(other)


def _weight_only(folder: Path) -> None:
    with edit_json(folder / "config.json") as config:
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None


def _by_blocks(folder: Path) -> None:
    blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    with edit_json(folder / "config.json") as config:
        groups = config["quantization_config"]["config_groups"].values()
        next(group for group in groups if group["weights"]["num_bits"] == 8)["weights"] = blocks


def _by_channel(folder: Path) -> None:
    for name, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        with edit_json(folder / name) as config:
            for entry in config[key]["quantized_layers"].values():
                entry["quant_algo"] = entry["quant_algo"].replace("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


@pytest.mark.parametrize(
    ("name", "edit", "declared"),
    [
        ("llama-fp8-foreign", _weight_only, "another scheme"),
        ("llama-fp8-foreign", _by_blocks, "another scheme"),
        ("llama-fp8-mo", _by_channel, "FP8_PER_CHANNEL_PER_TOKEN"),
    ],
)
def test_forms_of_fp8_that_verify_does_not_read_are_refused(
    name: str, edit: Callable[[Path], None], declared: str, copy: Callable[[str], Copy]
) -> None:
    made = copy(name)
    edit(made.folder)
    with pytest.raises(InputError, match=rf"mixes NVFP4 with other formats .* declares {declared}\), which verify"):
        verify_structure(made.folder)


def test_a_quantized_source_is_refused(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    with pytest.raises(InputError, match="is quantized already"):
        verify_structure(made.folder, made.folder)
