"""`nvquant sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..api.sweeping import SAMPLES, SEQUENCE_LENGTH, SweepRequest, run_sweep
from ..quoting import argument, shell
from .options import (
    debug_option,
    device_option,
    fold_option,
    format_option,
    memory_budget_option,
    output_options,
    parse_sizes,
    quantizer_option,
    recipe_option,
    resume_option,
    revision_option,
)
from .output import Output

if TYPE_CHECKING:
    from ..api.sweeping import SweepResult

EXAMPLES = """
\b
Examples:
  nvquant sweep ./model --recipe nvfp4-full
  nvquant sweep ./model --recipe nvfp4-full --target-bits 5 --target-bits 5.5 -o curve
  nvquant sweep google/gemma-4-31b --recipe nvfp4-full --quantizer gptq --target-size 24GB
  nvquant convert ./model --recipe curve/nvfp4-full-5.5bits.yaml
"""


@click.command("sweep", epilog=EXAMPLES)
@click.argument("model")
@recipe_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the measurements, the curve and the recipes to this folder.",
    show_default="MODEL-RECIPE.sweep in the current folder",
)
@format_option
@quantizer_option
@fold_option
@click.option(
    "--target-bits",
    type=float,
    multiple=True,
    metavar="BITS",
    help="Make a recipe with at most this mean number of stored bits a weight. You can repeat this option.",
)
@click.option(
    "--target-size",
    multiple=True,
    callback=parse_sizes,
    metavar="SIZE",
    help="Make a recipe for a checkpoint of at most this size, such as 24GB. You can repeat this option.",
)
@click.option(
    "--max-kl",
    type=float,
    multiple=True,
    metavar="NATS",
    help="Make the smallest recipe with a forecast of the mean KL divergence within this. You can repeat this option.",
)
@click.option(
    "--calibration",
    help="Measure on this set, Hub data set, .txt/.jsonl/.parquet/.csv file, or these token ids.",
    show_default="the recipe's set",
)
@click.option(
    "--calibration-fallback",
    metavar="SET",
    help="Measure on this set if the Hub data set is not available. Without this option, that is an error.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), default=SAMPLES, show_default=True, help="Measure on this many sequences."
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=2),
    default=SEQUENCE_LENGTH,
    show_default=True,
    help="Use at most this many tokens of a sequence.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Choose the sequences with this seed.")
@device_option
@memory_budget_option("on the GPU and on the host each, such as 8GB")
@resume_option("an earlier sweep in this folder")
@revision_option
@output_options
@debug_option
def command(model: str, recipe_name: str, format_name: str, resume: bool, out: Output, **values: Any) -> None:
    """Measure the loss of each fused group of MODEL in NVFP4 and in FP8, and choose by a budget.

    Each group is quantized alone, and the KL divergence of the model's predictions is measured. The groups with the
    largest gain a byte get FP8 first, and then stay in BF16. The curve shows every step with its size and a forecast
    of the KL divergence. No part of a checkpoint is written.

    An unfinished sweep resumes with the same command. With other budgets, a finished one is not measured again.
    """
    request = SweepRequest(model, recipe_name, format=format_name, restart=not resume, **values)
    result = run_sweep(request, out.stages(), out.say)
    out.clear_live_line()
    out.report(result.as_json, lambda: _print(result, model, out))


def _print(result: SweepResult, model: str, out: Output) -> None:
    from ..sweep.output import COLUMNS, curve_rows, loss_rows

    document, folder = result.document, Path(result.output)
    out.tell("The groups that lose most, each quantized alone:\n")
    out.table(["group", "scheme", "KL alone"], loss_rows(document))
    out.tell("\nThe curve:\n")
    out.table(list(COLUMNS), curve_rows(document))
    out.tell()
    for one in document.recipes:
        counts = ", ".join(f"{count} groups in {scheme}" for scheme, count in one.groups.items())
        out.result(
            f"{folder / one.file}: {one.bits:.2f} bits a weight, {one.file_bytes:,} bytes, {counts}, forecast of the "
            f"KL divergence {one.kl:.4f}."
        )
    ends = " and ".join(f"{value:.4f}" for value in dict.fromkeys(document.ends))
    out.result(
        f"{folder}: {len(document.groups)} groups measured, KL divergence {ends} with all of them in the recipe's "
        f"schemes and in FP8."
    )
    if document.recipes:
        words = ["nvquant", "convert", argument(model), "--recipe", argument(str(folder / document.recipes[0].file))]
        out.say(f"Next: {shell(words)}")
