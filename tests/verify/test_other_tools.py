"""A checkpoint that llm-compressor made, with its own config, passes; what is worse in it than it need be is said."""

from __future__ import annotations

import importlib.util
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.checkpoint.source import open_checkpoint
from nvquant.verify.numerics.stage import NumericsOptions
from nvquant.verify.run import Verification, VerifyOptions
from nvquant.verify.structure import verify_structure
from support.conversions import random_samples, write_ids
from verify.breaking import edit_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)


def oneshot(source: Path, output: Path, scheme: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """What llm-compressor's README does, on token ids; saved with its own config, side files copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own making
        import transformers
        from llmcompressor import oneshot as run
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        rows: Any = [{"input_ids": ids[None]} for ids in random_samples((60,) * 24)]
        loader = torch.utils.data.DataLoader(rows, batch_size=None)
        calibration = {"dataset": loader, "pipeline": "basic"} if scheme == "NVFP4" else {"pipeline": "datafree"}
        recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
        run(model=model, processor=object(), recipe=recipe, **calibration)
        model.save_pretrained(output, save_compressed=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, output / name)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_a_checkpoint_of_llm_compressor_passes(scheme: str, models: dict[str, Path], tmp_path: Path) -> None:
    oneshot(models["llama"], tmp_path / "out", scheme)
    report = verify_structure(tmp_path / "out", models["llama"])
    details = {check.name: check.detail for check in report.checks}
    assert [check.detail for check in report.checks if not check.passed] == []
    assert details["manifest"] == "not applicable: no manifest, so another tool made this checkpoint"
    assert "by limits, because another tool made them" in details["weights"]


def details(checkpoint: Path, source: Path, tmp_path: Path) -> dict[str, str]:
    """What each check of structure and numerics says; all pass."""
    samples = random_samples((60,) * 4, seed=1)  # not those that `oneshot` calibrates with
    ids = write_ids(tmp_path / "ids.jsonl", samples)
    options = VerifyOptions(("structure", "numerics"), NumericsOptions(ids, samples=4, min_top1=0.2))
    verification = Verification(checkpoint, open_checkpoint(source), options, lambda done, total, phase: None)
    checks = list(verification.run())
    assert [check.detail for check in checks if not check.passed] == []
    return {check.name: check.detail for check in checks}


def test_what_it_does_worse_is_said_in_words(models: dict[str, Path], tmp_path: Path) -> None:
    """Loaded in FP32, as is usual on a CPU: twice the bytes for the same values; no head-room; no search for scales."""
    oneshot(models["llama"], tmp_path / "out", "NVFP4", torch.float32)
    found = details(tmp_path / "out", models["llama"], tmp_path)
    assert re.search(r", 8 stored in FP32 with [\d,]+ unnecessary bytes$", found["untouched"])
    assert re.search(r"12 inputs, \d+ beyond their calibrated amax \(up to 1\.\d\d times\)", found["inputs"])
    searched = re.search(r"mse would reduce the relative RMSE from (0\.\d+) to (0\.\d+) on", found["weights"])
    assert searched is not None
    assert 0.07 < float(searched[2]) < float(searched[1]) < 0.11


def test_of_ones_own_output_no_such_thing_is_said(
    good: Callable[[str], Path], models: dict[str, Path], tmp_path: Path
) -> None:
    found = details(good("llama-mo"), models["llama"], tmp_path)
    assert "FP32" not in found["untouched"]
    assert "beyond" not in found["inputs"]
    assert "would reduce" not in found["weights"]


@pytest.mark.parametrize("leaf", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_stored_wider_must_have_the_same_values(leaf: str, models: dict[str, Path], tmp_path: Path) -> None:
    oneshot(models["llama"], tmp_path / "out", "NVFP4A16", torch.float32)
    with edit_tensors(tmp_path / "out") as tensors:
        tensors[leaf].data[4 * 5] ^= 1  # less than BF16 can tell
    report = verify_structure(tmp_path / "out", models["llama"])
    assert [check.name for check in report.checks if not check.passed] == ["untouched"]
    (failed,) = (check for check in report.checks if not check.passed)
    assert f"{leaf} differs from the source, from byte 10 of " in failed.detail
