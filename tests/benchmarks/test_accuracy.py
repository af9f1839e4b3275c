"""The accuracy benchmark: its judge, the statistics of its tables, and the chain with real tools on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_llama

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Any:
    """The programs of the benchmarks import each other as neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def step(name: str, source: Path, work: Path, *options: object) -> str:
    command = [sys.executable, BENCHMARKS / "accuracy.py", name, source, work, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def run_of(kl: list[float], kinds: list[str]) -> dict[str, Any]:
    same = {"kind": kinds, "tokens": [63] * len(kl), "top1": [0.5] * len(kl)}
    return {"sequences": {**same, "kl": kl, "nll": [2.0] * len(kl), "nll_source": [1.9] * len(kl)}}


def test_a_standard_error_counts_the_spread_within_kinds_alone() -> None:
    from accuracy_table import stratified

    mean, error = stratified([1.0, 3.0, 101.0, 103.0], ["a", "a", "b", "b"])
    # Each kind: s^2 = 2, so the variance of its mean is 1, and that of the mean of two kinds (1 + 1) / 4.
    assert mean == 52.0
    assert error == pytest.approx(0.5**0.5)


def test_a_difference_is_taken_sequence_by_sequence_over_the_seeds_that_both_have() -> None:
    from accuracy_table import paired

    kinds = ["a", "a", "a"]
    base = {"seeds": {"0": run_of([1.0, 5.0, 9.0], kinds), "1": run_of([3.0, 7.0, 11.0], kinds)}}
    mine = {"seeds": {"0": run_of([1.1, 5.1, 9.1], kinds)}}
    difference, error = paired(mine, base)
    assert difference == pytest.approx(0.1)
    assert error == pytest.approx(0.0, abs=1e-12)


def test_the_judge_scores_equal_and_different_distributions() -> None:
    import torch
    from judge import scored

    class Answers(torch.nn.Module):
        device = "cpu"

        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.row = torch.tensor(logits)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Output", (), {"logits": self.row.expand(*input_ids.shape, 2)})

    row = {"kind": "code", "input_ids": [0, 1, 0]}
    fair, unfair = Answers([0.0, 0.0]), Answers([0.0, 1.0986122886681098])  # 1/2, 1/2 and 1/4, 3/4
    same, other = (scored(fair, one, [row])[0] for one in (fair, unfair))
    assert same == {"kind": "code", "tokens": 2, "kl": 0, "top1": 1, "nll": 0.693147, "nll_source": 0.693147}
    assert other["kl"] == pytest.approx(0.143841, abs=1e-6)  # ln(4 / 3) / 2
    assert other["nll"] == pytest.approx((1.386294 + 0.287682) / 2, abs=1e-6)
    assert other["top1"] == 0


def test_the_judge_counts_matrices_bits_and_unequal_scales() -> None:
    import torch
    from judge import census

    layer, stored = "model.layers.0.self_attn", {"model.embed_tokens.weight": torch.ones(4, 64, dtype=torch.bfloat16)}
    for name, scale in (("q_proj", 2.0), ("k_proj", 2.0), ("v_proj", 4.0)):
        stored |= {
            f"{layer}.{name}.weight_packed": torch.zeros(32, 32, dtype=torch.uint8),
            f"{layer}.{name}.weight_scale": torch.ones(32, 4).to(torch.float8_e4m3fn),
            f"{layer}.{name}.weight_global_scale": torch.tensor([scale]),
        }
    stored[f"{layer}.q_proj.input_global_scale"] = torch.ones(1)
    stored[f"{layer}.o_proj.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)
    found = census(stored)
    packed, scales = 3 * (1024 + 128 + 4) + 4, 4 * 2048
    assert found["matrices"] == 4 and found["rounded"] == 1 and found["unequal"] == 1
    assert found["bits"] == round(8 * (packed + 4096) / scales, 4)


def test_inputs_with_a_pre_quant_scale_are_multiplied_before_they_are_rounded() -> None:
    import torch
    from support.emulation import decode_tensors, quantize_dequantize

    stored = {
        "a.weight": torch.zeros(2, 8, dtype=torch.uint8),
        "a.weight_scale": torch.ones(2, 1).to(torch.float8_e4m3fn),
        "a.weight_scale_2": torch.tensor(0.5),
        "a.input_scale": torch.tensor(0.01),
        "a.pre_quant_scale": torch.linspace(0.5, 2.0, 16),
    }
    state, rounds = decode_tensors(stored)
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = quantize_dequantize(inputs * stored["a.pre_quant_scale"], 1 / stored["a.input_scale"])
    assert set(state) == {"a.weight"}
    assert torch.equal(rounds["a"](inputs), expected)
    assert not torch.equal(rounds["a"](inputs), quantize_dequantize(inputs, 1 / stored["a.input_scale"]))


@pytest.mark.slow
def test_nvquant_and_a_peer_go_through_all_steps(tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    import torch
    from accuracy_table import section
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from support.emulation import decode_tensors, read_tensors

    source, work = tiny_llama(tmp_path / "source", num_layers=2), tmp_path / "work"
    sizes = ("--samples", 6, "--sequence-length", 32, "--judge-samples", 2, "--seeds", 0)
    methods = ("--methods", "nvquant-gptq,llmcompressor-smoothquant-gptq", "--device", "cpu", "--seeds", 0)
    assert "judged: 384 tokens of 6 kinds" in step("ids", source, work, *sizes)
    step("run", source, work, *methods)
    assert "... " not in step("run", source, work, *methods)  # all of it is done
    peer = work / "checkpoints" / "llmcompressor-smoothquant-gptq-0"
    stored = read_tensors(peer)
    decoded, _ = decode_tensors(stored)
    name = "model.layers.1.mlp.down_proj"
    of_layer = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
    theirs = NVFP4PackedCompressor.decompress(of_layer, preset_name_to_scheme("NVFP4", ["Linear"]))["weight"]
    torch.testing.assert_close(theirs.float(), decoded[f"{name}.weight"], rtol=2**-8, atol=0)  # theirs is BF16
    step("judge", source, work, "--device", "cpu", "--batch", 2, "--discard")
    assert not list((work / "checkpoints").iterdir())
    step("collect", source, work, "--name", "Tiny", "--json", tmp_path, "--seeds", 0)
    report = json.loads((tmp_path / "accuracy-tiny.json").read_text())
    assert set(report["methods"]) == {"nvquant-gptq", "llmcompressor-smoothquant-gptq"}
    for method in report["methods"].values():
        run = method["seeds"]["0"]
        assert run["matrices"] == run["rounded"] == 14 and run["unequal"] == 0
        assert len(run["sequences"]["kl"]) == 12 and 0 < min(run["sequences"]["kl"]) < max(run["sequences"]["kl"]) < 0.1
    assert "| **nvquant gptq with folds** | " in "\n".join(section(report))


def test_a_failed_method_is_noted_and_tried_again(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    source, work = tiny_llama(tmp_path / "source", num_layers=2), tmp_path / "work"
    (work / "ids").mkdir(parents=True)
    save_file({"input_ids": torch.full((2, 8), 7)}, work / "ids" / "calibration-0.safetensors")
    wrong = ("--more", "lost=--recipe no-such-recipe", "--methods", "nvquant-lost", "--seeds", 0, "--device", "cpu")
    assert "no-such-recipe" in step("run", source, work, *wrong)
    noted = json.loads((work / "runs" / "nvquant-lost-0.json").read_text())
    assert noted["failed"].startswith("exit code 2") and noted["label"] == "nvquant lost"
    assert "... nvquant-lost, seed 0" in step("run", source, work, *wrong)
