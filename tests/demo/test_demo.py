"""The embedded default of the main job: a real model through the whole chain, by the command that the README names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.source import open_checkpoint
from support.shared import made_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def run(folder: Path) -> None:
        shutil.copytree(smollm2, folder / smollm2.name)
        command = [sys.executable, "-m", "nvquant", "demo", "-o", str(folder), "--recipe", "nvfp4-full"]
        done = subprocess.run([*command, "--samples", "4", "--json"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "demo.json").write_text(done.stdout)

    document: dict[str, Any] = json.loads((made_once(tmp_path_factory, "demo", run) / "demo.json").read_text())
    return document


def test_source_is_a_real_bf16_checkpoint_with_the_right_end_of_turn(smollm2: Path) -> None:
    checkpoint = open_checkpoint(smollm2)
    assert {info.dtype for info in checkpoint.infos().values()} == {"BF16"}
    assert len(checkpoint.files) == 30 * 9 + 2  # layers, embedding, final norm; the head is tied and absent
    tokenizer = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert checkpoint.config["eos_token_id"] == 2
    assert "quantization_config" not in checkpoint.config


def test_demo_converts_every_text_matrix_as_planned(demo: dict[str, Any]) -> None:
    assert demo["plan"]["quantized"] == demo["convert"]["quantized"] == 210
    assert demo["plan"]["tensor_bytes"] == demo["convert"]["tensor_bytes"]


def test_demo_verifies_against_the_source(demo: dict[str, Any]) -> None:
    assert demo["verify"]["passed"]
    assert "weights" in {check["name"] for check in demo["verify"]["checks"]}


def test_demo_measures_a_loss_that_w4a4_explains(demo: dict[str, Any]) -> None:
    numbers = demo["verify"]["numerics"]
    w4a4, weight_only = (numbers["arithmetics"][name] for name in ("w4a4", "weight_only"))
    assert 0 < weight_only["kl"]["mean"] < w4a4["kl"]["mean"] < 0.6
    assert numbers["perplexity_source"] < weight_only["perplexity"] < w4a4["perplexity"]
    assert 0.5 < w4a4["top1"]["agreement"] < 1


def test_demo_leaves_a_report(demo: dict[str, Any]) -> None:
    assert "SmolLM2".lower() in Path(demo["report"]).read_text(encoding="utf-8").lower()


def test_demo_answers(demo: dict[str, Any]) -> None:
    assert demo["answer"]["text"] == " Paris"
