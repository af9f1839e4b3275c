"""`nvquant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import EnvironmentLack
from ..plan.plan import Plan
from .options import (
    calibration_options,
    debug_option,
    format_option,
    json_option,
    make_plan,
    parse_bytes,
    recipe_option,
)
from .output import emit_json, gigabytes, progress_reporter, say

EXAMPLES = """
\b
Examples:
  nvquant convert ./gemma-4-31b --recipe nvfp4
  nvquant convert ./gemma-4-31b --recipe nvfp4-full --format modelopt -o out --samples 256
  nvquant convert ./model --recipe nvfp4-a16 --device cpu
  nvquant convert ./model --recipe my.yaml --calibration prompts.jsonl
"""


@click.command("convert", epilog=EXAMPLES)
@click.argument("model")
@recipe_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Output folder; MODEL-RECIPE in the current folder by default.",
)
@format_option
@click.option("--quantizer", help="Override the recipe's quantizer: mse or rtn.")
@click.option(
    "--calibration",
    help="A shipped set, a Hub data set, a .txt/.jsonl/.parquet/.csv file, or token ids; the recipe's by default.",
)
@calibration_options
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of calibration samples.")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--memory-budget", callback=parse_bytes, help="GPU memory that the run may use, as 8GB.")
@click.option(
    "--engine",
    type=click.Choice(["nvquant", "llmcompressor"]),
    default="nvquant",
    show_default=True,
    help="llmcompressor: a second opinion.",
)
@json_option
@debug_option
def command(
    model: str,
    recipe_name: str,
    output: Path | None,
    format_name: str,
    quantizer: str | None,
    calibration: str | None,
    samples: int | None,
    sequence_length: int | None,
    batch_size: int,
    seed: int,
    device: str,
    memory_budget: int | None,
    engine: str,
    as_json: bool,
) -> None:
    """Convert MODEL, layer by layer. The output folder appears only when it is whole and exactly as planned."""
    plan, recipe = make_plan(model, recipe_name, format_name)
    from ..convert.output import check_output
    from ..quantizers import get_quantizer

    chosen = get_quantizer(quantizer or recipe.quantizer).name
    target = output or Path(f"{plan.source.folder.resolve().name}-{recipe.name}")
    check_output(target, plan.file_bytes, plan.source.folder)
    device = _resolve_device(device)
    say(
        f"nvquant {__version__}: {plan.model} -> {target}, recipe {recipe.name}, {chosen}, {plan.layout.name}, {device}"
    )
    loaded = None
    if recipe.needs_calibration:
        from ..calibrate.samples import load_calibration

        loaded = load_calibration(
            calibration or recipe.calibration.set,
            model_folder=plan.source.folder,
            config=plan.source.config,
            samples=samples or recipe.calibration.samples,
            sequence_length=sequence_length or recipe.calibration.sequence_length,
            seed=seed,
        )
        say(f"calibration {loaded.name}: {len(loaded.samples)} samples, {loaded.tokens:,} tokens, {loaded.framing}")
    from ..convert.pipeline import ConvertOptions

    options = ConvertOptions(target, chosen, device, batch_size, memory_budget, progress_reporter())
    if engine == "llmcompressor":
        from ..convert.second_opinion import convert_with_llmcompressor as run
    else:
        from ..convert.pipeline import convert as run
    result = run(plan, options, loaded).as_json()
    _report(plan, result, as_json)


def _resolve_device(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLack(
            f"--device cuda: torch {torch.__version__} sees no CUDA device: use --device cpu, or install a CUDA "
            f"build of torch."
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _report(plan: Plan, result: dict[str, Any], as_json: bool) -> None:
    if result["marlin_flushed_blocks"]:
        from ..format.marlin import RULE_READ_FROM

        say(
            f"{result['marlin_flushed_blocks']:,} blocks would be served as zeros by Marlin on GPUs without FP4 "
            f"units (rule of {RULE_READ_FROM})."
        )
    if as_json:
        emit_json(result)
        return
    click.echo(
        f"{result['output']}: {result['tensors']} tensors, {gigabytes(result['tensor_bytes'])}, "
        f"{result['quantized']} matrices quantized in "
        f"{result['seconds']:.1f} s; peak {gigabytes(result['peak_host_bytes'])} host, "
        f"{gigabytes(result['peak_gpu_bytes'])} GPU."
    )
    say(f"Next: nvquant verify {result['output']} --against {plan.model}")
