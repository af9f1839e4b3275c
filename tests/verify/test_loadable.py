"""Headers are counted before a stage that takes minutes, whichever stages were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvquant.cli.main import main
from nvquant.verify.loadable import check_complete
from nvquant.verify.subject import open_subject
from verify.breaking import LAYER, Tensors, edit_json, edit_tensors
from verify.checkpoints import GOOD, Copy

UP, O_ = f"{LAYER}.mlp.up_proj", f"{LAYER}.self_attn.o_proj"
# Name of the good checkpoint, what is done to its tensors, the check that fails, and its words.
Edit = Callable[[Tensors], Any]
LACKING: dict[str, tuple[str, Edit, str, str]] = {
    "block scales": ("llama-ct", lambda t: t.pop(f"{UP}.weight_scale"), "matrices", f"{UP} lacks weight_scale"),
    "weight global scale": (
        "llama-mo", lambda t: t.pop(f"{UP}.weight_scale_2"), "matrices", f"{UP} lacks weight_scale_2",
    ),
    "one input scale": ("llama-ct", lambda t: t.pop(f"{UP}.input_global_scale"), "matrices", f"{UP} lacks input"),
    "every input scale": (
        "llama-mo",
        lambda t: [t.pop(name) for name in list(t) if name.endswith("input_scale")],
        "complete",
        "lacks input_scale, which its scheme NVFP4 W4A4 requires",
    ),
    "scales of rows": ("llama-fp8-ct", lambda t: t.pop(f"{O_}.weight_scale"), "matrices", f"{O_} lacks weight_scale"),
    "one input scale of FP8": ("llama-fp8-mo", lambda t: t.pop(f"{O_}.input_scale"), "matrices", f"{O_} lacks input"),
    "an FP8 matrix": (
        "llama-fp8-mo",
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{O_}.")],
        "complete",
        f"{O_}.weight is not stored",
    ),
    "shape": ("llama-a16-ct", lambda t: setattr(t[f"{UP}.weight_scale"], "shape", [4, 128]), "matrices", "has shape"),
    "dtype": ("llama-a16-ct", lambda t: setattr(t[f"{UP}.weight_scale"], "dtype", "U8"), "matrices", "is U8"),
    "a whole matrix": (
        "llama-a16-ct",
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{UP}.")],
        "complete",
        f"{UP}.weight is not stored",
    ),
    "a norm": (
        "llama-ct", lambda t: t.pop(f"{LAYER}.input_layernorm.weight"), "complete", "input_layernorm.weight is not",
    ),
    "the last norm": ("llama-ct", lambda t: t.pop("model.norm.weight"), "complete", "model.norm.weight is not stored"),
    "every norm of a kind": (
        "llama-ct",
        lambda t: [t.pop(name) for name in list(t) if name.endswith("input_layernorm.weight")],
        "complete",
        "input_layernorm.weight is not stored",
    ),
    "a bias": ("qwen2-a16-ct", lambda t: t.pop(f"{LAYER}.self_attn.q_proj.bias"), "complete", "q_proj.bias is not"),
    "a head": ("untied-a16-ct", lambda t: t.pop("lm_head.weight"), "architecture", "no head is stored"),
    "the input scale of a head": (
        "llama-head-mo", lambda t: t.pop("lm_head.input_scale"), "matrices", "lm_head lacks input_scale",
    ),
    "a quantized head": (
        "llama-head-ct",
        lambda t: [t.pop(name) for name in list(t) if name.startswith("lm_head.")],
        "architecture",
        "no head is stored",
    ),
    "a layer": (
        "llama-ct",
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{LAYER}.")],
        "architecture",
        "layer 1 is not stored",
    ),
}  # fmt: skip


def no_server(folder: Path) -> str:
    """A command that would leave a mark if it were run as a server."""
    script = folder / "vllm"
    script.write_text(f"#!/bin/sh\necho started >> {folder}/started\nexit 1\n")
    script.chmod(0o755)
    return str(script)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, arguments), "--json", "--device", "cpu"])
    assert isinstance(stop.value.code, int)
    return stop.value.code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["serve", "numerics"])
@pytest.mark.parametrize("lacking", LACKING)
def test_a_checkpoint_that_lacks_something_fails_with_its_document_and_starts_nothing(
    lacking: str, stage: str, copy: Callable[[str], Copy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, edit, check, words = LACKING[lacking]
    made = copy(name)
    with edit_tensors(made.folder) as tensors:
        edit(tensors)
    against = ["--against", str(made.source)] if stage == "numerics" else ["--vllm", no_server(tmp_path)]
    few = ["--samples", "1", "--sequence-length", "16"]
    code, document = run(capsys, made.folder, "--stage", stage, *against, *few, "--report", tmp_path / "proof")
    failed = {one["name"]: one["faults"] for one in document["checks"] if not one["passed"]}
    assert code == 1
    assert any(words in fault for fault in failed[check])
    assert {one["stage"] for one in document["checks"]} == {"structure", stage}
    assert document[stage] is None
    assert not (tmp_path / "started").exists()
    assert json.loads((tmp_path / "proof" / "report.json").read_text())["passed"] is False


@pytest.mark.parametrize("name", GOOD)
def test_a_good_checkpoint_is_complete(name: str, good: Callable[[str], Path]) -> None:
    finding = check_complete(open_subject(good(name)))
    assert finding.faults == []
    assert not finding.looked_at.startswith("0 ")


def test_a_model_that_nobody_knows_is_not_held_against_its_class(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    with edit_json(made.folder / "config.json") as config:
        config["architectures"] = ["UnheardOfForCausalLM"]
    with edit_tensors(made.folder) as tensors:
        del tensors["model.norm.weight"]
    assert check_complete(open_subject(made.folder)).faults == []


def test_what_is_stored_under_another_name_is_not_missed(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-ct")
    with edit_tensors(made.folder) as tensors:
        for name in [name for name in tensors if name.endswith("input_layernorm.weight")]:
            tensors[name.replace("input_layernorm", "ln_1")] = tensors.pop(name)
    assert check_complete(open_subject(made.folder)).faults == []
