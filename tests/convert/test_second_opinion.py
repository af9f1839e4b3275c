"""Two engines, one recipe, equal token ids: what is equal, where they differ, and why (docs/second-opinion.md)."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path

import pytest
import torch
from nvquant.calibrate.samples import CalibrationSet
from nvquant.checkpoint.source import open_checkpoint
from nvquant.convert.options import ConvertOptions, ConvertResult
from nvquant.convert.second_opinion import (
    PACKAGE,
    assert_holds_plan,
    check_memory,
    convert_with_llmcompressor,
    needed_bytes,
    quantize_and_save,
)
from nvquant.errors import CheckFailed, EnvironmentLack, InputError, NvquantError
from nvquant.format.blocks import dequantize_blocks
from nvquant.format.constants import ZERO_BLOCK_BYTE
from nvquant.format.e2m1 import unpack_codes
from nvquant.recipe.schema import QuantizeEntry, Recipe
from nvquant.stream.memory import available_host_bytes
from safetensors.torch import load_file, save_file
from support.conversions import (
    MODELOPT,
    TinyModels,
    calibration_of,
    converted,
    experts_in_bf16,
    planned,
    random_samples,
    tensors_in,
    write_ids,
)
from support.synthetic_gemma4 import write_synthetic_gemma4
from support.tiny_models import tiny_llama
from torch import Tensor

needs_llmcompressor = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="llm-compressor is not installed: pip install 'nvquant[llmcompressor]'",
)
ULPS = 2
# Both engines compute in float32 here; attention kernels differ (see the test with eager attention).
INPUT_DEVIATION = 2.0**-16


@dataclass
class Differences:
    """What differs between two checkpoints with the same tensors.

    Attributes:
        scale_bytes, codes: how many block scales and codes differ.
        global_ulps: the largest distance of weight global scales.
        input_deviation: the largest relative distance of input global scales, after the nearest power of two.
        headrooms: the exponents of these powers of two.
        unquantized: names of other tensors that differ.
    """

    scale_bytes: int = 0
    codes: int = 0
    global_ulps: int = 0
    input_deviation: float = 0.0
    headrooms: tuple[int, ...] = ()
    unquantized: tuple[str, ...] = ()


def differences(ours: Path, theirs: Path) -> Differences:
    """Compare tensor by tensor; names, dtypes and shapes are asserted."""
    a, b = tensors_in(ours), tensors_in(theirs)
    assert {name: (t.dtype, t.shape) for name, t in a.items()} == {name: (t.dtype, t.shape) for name, t in b.items()}
    found = Differences()
    for name in a:
        first, second = a[name].flatten(), b[name].flatten()
        if name.endswith(".weight_scale"):
            found.scale_bytes += int((first.view(torch.uint8) != second.view(torch.uint8)).sum())
        elif name.endswith(".weight_packed"):
            found.codes += int((unpack_codes(a[name]) != unpack_codes(b[name])).sum())
        elif name.endswith(".weight_global_scale"):
            ulps = int((first.view(torch.int32) - second.view(torch.int32)).abs())
            found.global_ulps = max(found.global_ulps, ulps)
        elif name.endswith(".input_global_scale"):
            ratio = float(second) / float(first)
            exponent = round(math.log2(ratio))
            found.headrooms += (exponent,)
            found.input_deviation = max(found.input_deviation, abs(ratio / 2**exponent - 1))
        elif not torch.equal(first.view(torch.uint8), second.view(torch.uint8)):
            found.unquantized += (name,)
    return found


def second_opinion(
    source: Path, output: Path, recipe: str | Recipe = "nvfp4-full", samples: Sequence[Tensor] | None = None
) -> ConvertResult:
    """Convert with llm-compressor; `samples` are those of `converted`."""
    plan = planned(source, recipe)
    calibration = None
    if plan.needs_calibration:
        ids = write_ids(output.with_name("ids.jsonl"), random_samples() if samples is None else samples)
        calibration = calibration_of(source, ids)
    return convert_with_llmcompressor(plan, ConvertOptions(output, "rtn"), calibration)


@needs_llmcompressor
def test_both_engines_write_the_same_codes_and_scales(tiny: TinyModels, tmp_path: Path) -> None:
    ours = converted(tiny("llama"), tmp_path / "ours")
    result = second_opinion(tiny("llama"), tmp_path / "theirs")
    found = differences(ours, tmp_path / "theirs")
    assert (found.scale_bytes, found.codes, found.unquantized) == (0, 0, ())
    assert found.global_ulps <= ULPS
    assert found.input_deviation <= INPUT_DEVIATION
    assert min(found.headrooms) >= 2
    assert (result.quantized, result.tensors) == (21, len(tensors_in(ours)))


@needs_llmcompressor
def test_with_equal_attention_input_scales_differ_by_our_headroom_alone(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llm-compressor calibrates with eager attention, whatever the model was loaded with; nvquant with sdpa."""
    monkeypatch.setattr("nvquant.calibrate.model_class.ATTENTION", "eager")
    ours = converted(tiny("qwen2"), tmp_path / "ours")
    second_opinion(tiny("qwen2"), tmp_path / "theirs")
    found = differences(ours, tmp_path / "theirs")
    assert found.input_deviation <= ULPS * 2**-23
    assert found.unquantized == ()


@needs_llmcompressor
def test_multimodal_model_with_two_schemes_is_quantized_alike(tiny: TinyModels, tmp_path: Path) -> None:
    entries = (
        QuantizeEntry(modules=("mlp",), scheme="nvfp4"),
        QuantizeEntry(modules=("attention",), scheme="nvfp4-a16"),
    )
    recipe = Recipe(name="two", quantize=entries)
    ours = converted(tiny("gemma4"), tmp_path / "ours", recipe)
    result = second_opinion(tiny("gemma4"), tmp_path / "theirs", recipe)
    found = differences(ours, tmp_path / "theirs")
    assert (found.scale_bytes, found.codes, found.unquantized) == (0, 0, ())
    assert found.global_ulps <= ULPS
    assert found.input_deviation <= INPUT_DEVIATION
    assert (result.quantized, len(found.headrooms)) == (41, 18)
    assert (ours / "config.json").read_bytes() == (tmp_path / "theirs" / "config.json").read_bytes()


@needs_llmcompressor
def test_fp8_beside_nvfp4_is_quantized_alike(tiny: TinyModels, tmp_path: Path) -> None:
    ours = converted(tiny("llama"), tmp_path / "ours", "nvfp4-fp8")
    result = second_opinion(tiny("llama"), tmp_path / "theirs", "nvfp4-fp8")
    found = differences(ours, tmp_path / "theirs")
    assert (found.scale_bytes, found.codes, found.unquantized) == (0, 0, ())
    assert found.global_ulps <= ULPS
    assert (result.quantized, len(found.headrooms)) == (21, 9)
    assert (ours / "config.json").read_bytes() == (tmp_path / "theirs" / "config.json").read_bytes()


@needs_llmcompressor
def test_weight_only_recipe_needs_no_samples_and_gives_the_same_files(tiny: TinyModels, tmp_path: Path) -> None:
    ours = converted(tiny("llama"), tmp_path / "ours", "nvfp4-a16")
    result = second_opinion(tiny("llama"), tmp_path / "theirs", "nvfp4-a16")
    found = differences(ours, tmp_path / "theirs")
    assert (found.scale_bytes, found.codes, found.unquantized) == (0, 0, ())
    assert found.global_ulps <= ULPS
    assert result.calibration is None


@needs_llmcompressor
def test_only_blocks_below_e4m3s_smallest_scale_are_quantized_differently(tmp_path: Path) -> None:
    """A block whose scale underflows: llm-compressor takes 0.125 and loses the block, nvquant takes 2^-9."""
    source, name = tiny_llama(tmp_path / "source", shards=1), "model.layers.0.mlp.down_proj"
    tensors = load_file(source / "model.safetensors")
    weight = tensors[f"{name}.weight"]
    weight[0, :16] = 0
    weight[1, :16] = weight.abs().max() * 2**-20
    weight[1, 16:32] = weight.abs().max() * 2**-23
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    ours = tensors_in(converted(source, tmp_path / "ours", "nvfp4-a16"))
    second_opinion(source, tmp_path / "theirs", "nvfp4-a16")
    theirs = tensors_in(tmp_path / "theirs")

    first, second = (t[f"{name}.weight_scale"].view(torch.uint8) for t in (ours, theirs))
    assert (first != second).nonzero().tolist() == [[1, 0], [1, 1]]
    assert int(first[0, 0]) == int(second[0, 0]) == ZERO_BLOCK_BYTE
    assert first[1, :2].tolist() == [1, 1]
    assert second[1, :2].tolist() == [ZERO_BLOCK_BYTE] * 2
    codes = [unpack_codes(t[f"{name}.weight_packed"])[1, :32] for t in (ours, theirs)]
    assert codes[0].unflatten(0, (2, 16)).bool().any(1).tolist() == [True, False]
    assert not codes[1].any()


@pytest.mark.slow
@needs_llmcompressor
def test_a_real_model_comes_out_of_both_engines_alike(smollm2: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 49152, (128,), generator=generator) for _ in range(4)]
    ours = converted(smollm2, tmp_path / "ours", samples=samples)
    result = second_opinion(smollm2, tmp_path / "theirs", samples=samples)
    found = differences(ours, tmp_path / "theirs")
    assert (found.scale_bytes, found.codes, found.unquantized) == (0, 0, ())
    assert found.global_ulps <= ULPS
    assert found.input_deviation <= INPUT_DEVIATION
    assert result.quantized == len(found.headrooms) == 210


@pytest.mark.slow
@needs_llmcompressor
@pytest.mark.thorough
def test_in_bfloat16_it_rounds_scales_by_one_step_at_most_and_loses_no_accuracy(smollm2: Path, tmp_path: Path) -> None:
    """As on a GPU: llm-compressor computes in the dtype of the loaded weights, nvquant in float32 whatever that is."""
    plan = planned(smollm2, "nvfp4-a16")
    ours = converted(smollm2, tmp_path / "ours", "nvfp4-a16")
    (tmp_path / "theirs").mkdir()
    quantize_and_save(plan, None, ConvertOptions(tmp_path / "theirs", "rtn"), torch.bfloat16, tmp_path / "theirs")
    source, a, b = (tensors_in(folder) for folder in (smollm2, ours, tmp_path / "theirs"))
    blocks, changed, errors = 0, 0, [0.0, 0.0]
    for number, module in enumerate(plan.matrices):
        first, second = (t[f"{module}.weight_scale"].view(torch.uint8).int() for t in (a, b))
        assert int((first - second).abs().max()) <= 1
        blocks, changed = blocks + first.numel(), changed + int((first != second).sum())
        scales = [float(t[f"{module}.weight_global_scale"]) for t in (a, b)]
        assert abs(scales[1] / scales[0] - 1) < 2**-7
        for at, tensors in enumerate((a, b) if number % 10 == 0 else ()):
            stored = [tensors[f"{module}.{leaf}"] for leaf in ("weight_packed", "weight_scale", "weight_global_scale")]
            decoded = dequantize_blocks(stored[0], stored[1], stored[2])
            errors[at] += float((decoded - source[f"{module}.weight"].float()).double().square().sum())
    assert 0.01 < changed / blocks < 0.05
    assert abs(errors[1] / errors[0] - 1) < 1e-3


@needs_llmcompressor
def test_stdout_is_one_json_document_with_the_keys_of_the_other_engine(tiny: TinyModels, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.jsonl", random_samples((16, 16)))
    command = [sys.executable, "-m", "nvquant", "convert", str(tiny("llama")), "--recipe", "nvfp4", "--json"]
    command += ["--engine", "llmcompressor", "--quantizer", "rtn", "--device", "cpu", "-o", str(tmp_path / "out")]
    command += ["--calibration", str(ids), "--samples", "2", "--sequence-length", "16"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    assert set(json.loads(run.stdout)) == {field.name for field in dataclass_fields(ConvertResult)}
    assert "\r" not in run.stderr
    assert len(run.stderr.splitlines()) < 10


@needs_llmcompressor
def test_its_failure_is_one_sentence_and_leaves_nothing(tiny: TinyModels, tmp_path: Path) -> None:
    beyond = torch.tensor([1, 10**6, 2])
    calibration = CalibrationSet("beyond.jsonl", (beyond,), 3, "0" * 64, "ids")
    with pytest.raises(NvquantError, match=r"llm-compressor \S+ failed \(IndexError: index out of range"):
        convert_with_llmcompressor(planned(tiny("llama")), ConvertOptions(tmp_path / "out", "rtn"), calibration)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named_with_its_install_line(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny("llama"), "nvfp4-a16")
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    monkeypatch.setattr(sys, "path", [])
    importlib.invalidate_caches()
    with pytest.raises(EnvironmentLack, match=r"pip install 'nvquant\[llmcompressor\]'"):
        convert_with_llmcompressor(plan, ConvertOptions(tmp_path / "out", "rtn"), None)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (MODELOPT, {}, "writes the compressed-tensors layout only"),
        (None, {"quantizer": "mse"}, "its own observers, which do not include nvquant's mse: use --quantizer rtn"),
        (None, {"batch_size": 2}, "one sequence at a time: drop --batch-size"),
    ],
)
def test_what_it_does_not_do_is_refused(
    tiny: TinyModels, tmp_path: Path, layout: str | None, options: dict[str, object], message: str
) -> None:
    plan = planned(tiny("llama"), layout=layout) if layout else planned(tiny("llama"))
    request = ConvertOptions(tmp_path / "out", **{"quantizer": "rtn", **options})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        convert_with_llmcompressor(plan, request, None)


def test_a_mixture_of_experts_is_refused(tiny: TinyModels, tmp_path: Path) -> None:
    plan = planned(tiny("gemma4_moe"), experts_in_bf16("nvfp4"))
    with pytest.raises(InputError, match="a mixture of experts: use --engine nvquant"):
        convert_with_llmcompressor(plan, ConvertOptions(tmp_path / "out", "rtn"), None)


def test_a_model_beyond_the_memory_is_refused_with_both_sizes(tmp_path: Path) -> None:
    plan = planned(write_synthetic_gemma4(tmp_path / "huge", layers=600), "nvfp4-a16")
    needed, free = needed_bytes(plan, None, torch.float32), available_host_bytes()
    assert free is not None and needed > 600 * 10**9 > free
    with pytest.raises(InputError, match=r"needs 1,[\d,]+ bytes of host memory, but [\d,]+ are free"):
        check_memory(plan, None, "cpu", torch.float32)


def test_memory_counts_weights_in_the_compute_dtype(tiny: TinyModels) -> None:
    plan = planned(tiny("llama"), "nvfp4-a16")
    elements = sum(math.prod(info.shape) for info in plan.source.infos().values())
    needed = needed_bytes(plan, None, torch.float32)
    assert 4 * elements < needed < 8 * elements
    assert needed == 2 * needed_bytes(plan, None, torch.bfloat16)


NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.up_proj"


def _changed_norm(tensors: dict[str, Tensor]) -> None:
    tensors[NORM].view(torch.int16)[3] += 1


def _wide_norm(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM].float()


def _lost_norm(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


def _unquantized_matrix(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight"] = torch.zeros((128, 64), dtype=torch.bfloat16)


def _infinite_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.input_global_scale"].fill_(torch.inf)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_changed_norm, f"{NORM}, but its values differ from the source's"),
        (_wide_norm, rf"{NORM} as F32 \[64\], but the plan has BF16 \[64\]"),
        (_lost_norm, f"did not save {NORM}"),
        (_unquantized_matrix, rf"{UP}.weight as BF16 \[128, 64\], but the plan has nothing"),
        (_infinite_scale, f"{UP}.input_global_scale as inf"),
    ],
)
def test_what_was_saved_is_held_against_the_plan(
    tiny: TinyModels, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    plan = planned(tiny("llama"))
    saved = _saved(tiny, tmp_path / "good")
    assert_holds_plan(plan, open_checkpoint(saved))
    tensors = tensors_in(saved)
    edit(tensors)
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckFailed, match=message):
        assert_holds_plan(plan, open_checkpoint(saved))


def _saved(tiny: TinyModels, folder: Path) -> Path:
    """A good output in one file, as llm-compressor writes it."""
    tensors = tensors_in(converted(tiny("llama"), folder))
    for path in [*folder.glob("model-*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
