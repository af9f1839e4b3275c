"""Hold `verify --stage numerics` against a second implementation, on the same tokens of a real model.

usage: python benchmarks/judged.py FOLDER [--samples 12] [--sequence-length 512] [--recipe nvfp4-full] [--json FILE]

FOLDER gets SmolLM2-135M and its conversion, where they are not there. The judge (`tests/support/emulation.py`) shares
no code with nvquant: it reads the files with safetensors, loads the model with transformers, and computes in float32,
the whole model at once. Both get the token ids of the shipped held-out text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import common
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from nvquant.demo.smollm2 import build_smollm2
from support.emulation import load_emulation, read_tensors
from verify.numerics.measuring import Samples, held_out, measured, original, whole_models

Figures = dict[str, dict[str, float]]
COLUMNS = ("kl", "top1", "nll")


def main() -> None:
    """Measure by both, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--recipe", default="nvfp4-full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a folder gets BENCHMARK-MACHINE.json")
    options = parser.parse_args()
    source = options.folder / "smollm2"
    checkpoint = options.folder / f"smollm2-{options.recipe}"
    prepare(source, checkpoint, options.recipe)
    samples = held_out(source, options.samples, options.sequence_length)
    ours = stage_says(source, checkpoint, samples)
    theirs = judge_says(source, checkpoint, samples, list(ours))
    report = {
        "benchmark": "judged",
        "machine": common.machine(),
        "versions": common.versions(),
        "work": {
            "description": f"KL of SmolLM2-135M, {options.recipe}, {options.samples} sequences: two implementations",
            "tokens": sum(map(len, samples)),
        },
        "runs": {"nvquant": ours, "judge": theirs},
    }
    print(f"{'':<12}" + "".join(f"{column:>30}" for column in COLUMNS))
    for name, judge in theirs.items():
        said = (f"{ours[name][column]:.4f} judge {judge[column]:.4f}" for column in COLUMNS)
        print(f"{name:<12}" + "".join(f"{words:>30}" for words in said))
    common.write_report(report, options.json)


def prepare(source: Path, checkpoint: Path, recipe: str) -> None:
    """The model and its conversion, where they are not there."""
    source.parent.mkdir(parents=True, exist_ok=True)
    if not (source / "config.json").exists():
        build_smollm2(source)
    if not checkpoint.exists():
        command = [sys.executable, "-m", "nvquant", "convert", source, "--recipe", recipe, "--quantizer", "rtn"]
        command += ["--samples", 16, "--sequence-length", 512, "-o", checkpoint, "--json"]
        common.run_child(command, label="conversion")


def stage_says(source: Path, checkpoint: Path, samples: Samples) -> Figures:
    """The stage's figures for each arithmetic."""
    arithmetics = measured(checkpoint, source, samples).document["arithmetics"]
    return {
        name: {"kl": one["kl"]["mean"], "top1": one["top1"]["agreement"], "nll": one["nll"]}
        for name, one in arithmetics.items()
        if name != "floor"
    }


def judge_says(source: Path, checkpoint: Path, samples: Samples, arithmetics: Sequence[str]) -> Figures:
    """The same from the whole models.

    Args:
        arithmetics: those of the checkpoint, the one that rounds most inputs first.
    """
    model, emulation = original(source), load_emulation(checkpoint)
    in_fp8 = {name for name, tensor in read_tensors(checkpoint).items() if tensor.dtype == torch.float8_e4m3fn}
    found: Figures = {}
    for name, fewer in zip(arithmetics, [*arithmetics[1:], None], strict=True):
        kl, nll, top1 = whole_models(model, emulation, samples)
        found[name] = {"kl": kl, "top1": top1, "nll": nll}
        for module_name, module in emulation.named_modules():
            if fewer != "w8a8" or f"{module_name}.weight" not in in_fp8:
                module._forward_pre_hooks.clear()  # the rounding of inputs
    return found


if __name__ == "__main__":
    main()
