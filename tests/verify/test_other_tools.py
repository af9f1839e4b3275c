"""A checkpoint that llm-compressor made, with its own config, passes; its faults are found by bounds."""

from __future__ import annotations

import importlib.util
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.verify.structure import verify_structure

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)


def oneshot(source: Path, output: Path, scheme: str) -> None:
    """What llm-compressor's README does, on token ids; saved with its own config, side files copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own making
        import transformers
        from llmcompressor import oneshot as run
        from llmcompressor.modifiers.quantization import QuantizationModifier

        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        rows: Any = [{"input_ids": torch.arange(first, first + 60).view(1, -1)} for first in (20, 130)]
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
    assert "by bounds, since another tool made them" in details["weights"]
