"""Hold `verify --stage numerics` against a second implementation, on the same tokens of a real model.

usage: python benchmarks/judged.py FOLDER [--samples 12] [--sequence-length 512] [--recipe nvfp4-full] [--json FILE]

FOLDER gets SmolLM2-135M and its conversion, where they are not there. The judge (`tests/support/emulation.py`) shares
no code with nvquant: it reads the files with safetensors, loads the model with transformers, and computes in float32,
the whole model at once. Both get the token ids of the shipped held-out text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.emulation import load_emulation

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
    ours, tokens = measured(source, checkpoint, options)
    theirs = judged(source, checkpoint, tokens)
    report = {
        "benchmark": "judged",
        "machine": common.machine(),
        "versions": common.versions(),
        "work": {
            "description": f"KL of SmolLM2-135M, {options.recipe}, {options.samples} sequences: two implementations",
            "tokens": sum(map(len, tokens)),
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
        code = (
            "import sys; from pathlib import Path; from nvquant.demo.smollm2 import build_smollm2; "
            "build_smollm2(Path(sys.argv[1])); print('{}')"
        )
        common.run_child([sys.executable, "-c", code, source], label="model")
    if not checkpoint.exists():
        command = [sys.executable, "-m", "nvquant", "convert", source, "--recipe", recipe, "--quantizer", "rtn"]
        command += ["--samples", 16, "--sequence-length", 512, "-o", checkpoint, "--json"]
        common.run_child(command, label="conversion")


def measured(source: Path, checkpoint: Path, options: argparse.Namespace) -> tuple[Figures, list[list[int]]]:
    """What the stage says of each arithmetic, and the ids that it was measured on."""
    from nvquant.verify.numerics.text import load_text
    from nvquant.verify.subject import open_subject

    command = [sys.executable, "-m", "nvquant", "verify", checkpoint, "--against", source, "--stage", "structure"]
    command += ["--stage", "numerics", "--samples", options.samples, "--sequence-length", options.sequence_length]
    document = common.run_child([*command, "--device", "cpu", "--json"], label="verify")
    found = {
        name: {"kl": one["kl"]["mean"], "top1": one["top1"]["agreement"], "nll": one["nll"]}
        for name, one in document["numerics"]["arithmetics"].items()
        if name != "floor"
    }
    subject = open_subject(checkpoint)
    text = load_text(None, checkpoint, subject.config, options.samples, options.sequence_length)
    return found, [sample.tolist() for sample in text.samples]


@torch.no_grad()
def judged(source: Path, checkpoint: Path, tokens: list[list[int]]) -> Figures:
    """What the judge says, mean over all positions but the last of each sequence."""
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    served = load_emulation(checkpoint)
    w4a4 = _compare(original, served, tokens)
    for module in served.modules():
        module._forward_pre_hooks.clear()  # the rounding of inputs
    return {"w4a4": w4a4, "weight_only": _compare(original, served, tokens)}


def _compare(original: PreTrainedModel, served: PreTrainedModel, tokens: list[list[int]]) -> dict[str, float]:
    sums = torch.zeros(len(COLUMNS), dtype=torch.float64)
    count = 0
    for ids in tokens:
        row = torch.tensor(ids)
        right, got = (
            model(input_ids=row[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            for model in (original, served)
        )
        sums[0] += (right.exp() * (right - got)).sum()
        sums[1] += (right.argmax(-1) == got.argmax(-1)).sum()
        sums[2] -= got.gather(1, row[1:, None]).sum()
        count += len(ids) - 1
    return dict(zip(COLUMNS, (sums / count).tolist(), strict=True))


if __name__ == "__main__":
    main()
