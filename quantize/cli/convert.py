"""`nvquant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..api.conversion import ENGINES, Conversion, ConvertRequest
from ..api.publication import check_push, push_converted
from ..api.sweeping import within_budget
from ..quoting import argument, shell
from .options import (
    calibration_options,
    debug_option,
    device_option,
    fold_option,
    format_option,
    memory_budget_option,
    output_options,
    parse_bytes,
    quantizer_option,
    recipe_option,
    resume_option,
    revision_option,
)
from .output import Output, gigabytes
from .publishing import report_push

if TYPE_CHECKING:
    from ..convert.options import ConvertResult

EXAMPLES = """
\b
Examples:
  nvquant convert google/gemma-4-31b --recipe nvfp4
  nvquant convert google/gemma-4-31b --recipe nvfp4 --low-disk
  nvquant convert google/gemma-4-31b --recipe nvfp4 --push-to me/gemma-4-31b-NVFP4
  nvquant convert ./gemma-4-31b --recipe nvfp4
  nvquant convert ./gemma-4-31b --recipe nvfp4-full --format modelopt -o out --samples 256
  nvquant convert ./model --recipe nvfp4-a16 --device cpu
  nvquant convert ./model --recipe my.yaml --calibration prompts.jsonl
  nvquant convert ./model --recipe nvfp4-full --target-bits 5.5
"""


@click.command("convert", epilog=EXAMPLES)
@click.argument("model")
@recipe_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the output to this folder.",
    show_default="MODEL-RECIPE in the current folder",
)
@format_option
@quantizer_option
@fold_option
@click.option(
    "--target-bits",
    type=float,
    metavar="BITS",
    help="Give groups more bits by `nvquant sweep`, within this mean number of stored bits a weight.",
)
@click.option(
    "--target-size",
    callback=parse_bytes,
    metavar="SIZE",
    help="Give groups more bits by `nvquant sweep`, within this size of the checkpoint, such as 24GB.",
)
@click.option(
    "--max-kl",
    type=float,
    metavar="NATS",
    help="Give as few groups more bits by `nvquant sweep` as a forecast of this mean KL divergence needs.",
)
@click.option(
    "--calibration",
    help="Calibrate with a shipped set, a Hub data set, a .txt/.jsonl/.parquet/.csv file, or token ids.",
    show_default="the recipe's set",
)
@click.option(
    "--calibration-fallback",
    metavar="SET",
    help="Calibrate with this set if the Hub data set is not available. Without this option, that is an error.",
)
@calibration_options
@click.option("--seed", type=int, default=0, show_default=True, help="Choose calibration samples with this seed.")
@device_option
@memory_budget_option("on the GPU and on the host each, such as 8GB")
@resume_option("an unfinished run of this output")
@click.option(
    "--profile",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write a phase table and a trace for Perfetto to this folder.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="nvquant",
    show_default=True,
    help="Convert with this engine. Use llmcompressor for a second opinion.",
)
@revision_option
@click.option(
    "--low-disk",
    is_flag=True,
    help="Fetch the weights of a MODEL on the Hub by ranges as the walk needs them, and keep none on the disk.",
)
@click.option(
    "--distill",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help=(
        "Then train block scales and norms on this many tokens of the shipped set, like `nvquant distill`. Good values "
        "begin at 409600."
    ),
)
@click.option(
    "--push-to",
    metavar="REPO",
    help="Verify the checkpoint and publish it as org/name, like `nvquant push`. New repositories are private.",
)
@output_options
@debug_option
def command(
    model: str,
    recipe_name: str,
    format_name: str,
    resume: bool,
    profile: Path | None,
    push_to: str | None,
    out: Output,
    **values: Any,
) -> None:
    """Convert MODEL, a folder or a model on the Hub, layer by layer.

    The output folder appears only when it is complete and exactly as planned. To resume an unfinished run, run the same
    command again.
    """
    if push_to is not None:
        check_push(push_to)
    request = ConvertRequest(model, recipe_name, format=format_name, profile=profile, restart=not resume, **values)
    request = within_budget(request, out.stages(), out.say)
    conversion = Conversion(request, out.say)
    from ..convert.stop import StopRequest

    with StopRequest() as stop:
        stop.is_quiet = out.is_quiet
        result = conversion.run(stop, out.conversion, out.stages())
    if conversion.is_first:
        _finish(conversion, result, push_to, profile, out)


def _finish(
    conversion: Conversion, result: ConvertResult, push_to: str | None, profile: Path | None, out: Output
) -> None:
    """Report the result, and publish it if --push-to is given."""
    _say(result, profile, out)
    out.result(
        f"{result.output}: {result.tensors} tensors, {gigabytes(result.tensor_bytes)}, "
        f"{result.quantized} matrices quantized in {result.seconds:.1f} s, "
        f"peak {gigabytes(result.peak_host_bytes)} host, {gigabytes(result.peak_gpu_bytes)} GPU."
    )
    if push_to is None:
        words = ["nvquant", "verify", argument(result.output), "--against", argument(conversion.plan.model)]
        out.say(f"Next: {shell(words)}")
        out.report(result.as_json, lambda: None)
    else:
        pushed = push_converted(conversion.target, conversion.plan.source, push_to, out.stages(), out.say)
        out.report(lambda: {**result.as_json(), "push": pushed.as_json()}, lambda: report_push(pushed, out))


def _say(result: ConvertResult, profile: Path | None, out: Output) -> None:
    if profile is not None:
        out.say(f"Profile: {profile / 'phases.txt'}, and {profile / 'trace.json'} for ui.perfetto.dev")
    if result.distillation is not None:
        from ..report.distilled import distillation_words

        out.say(f"Distilled with {distillation_words(result.distillation)}.")
    if result.was_finished:
        out.say("An equal run has already written this output. To rebuild it, use --restart.")
    casts = result.casts
    if casts is not None:
        out.say(
            f"{casts['matrices']:,} matrices keep the codes of the source. {casts['rounded']:,} of their "
            f"{casts['blocks']:,} blocks were requantized, because the span of their exponents is too wide."
            if casts["rounded"]
            else f"{casts['matrices']:,} matrices keep the codes of the source, and no value of them changed."
        )
    feedback = result.error_feedback
    if feedback is not None and (feedback["more_damping"] or feedback["outgrown"]):
        out.say(
            f"Of {feedback['groups']:,} fused groups, {feedback['more_damping']:,} needed more damping, and in "
            f"{feedback['outgrown']:,} of them {feedback['outgrown_blocks']:,} blocks outgrew the largest block scale."
        )
    if result.marlin_flushed_blocks:
        from ..format.marlin import RULE_READ_FROM

        out.say(
            f"{result.marlin_flushed_blocks:,} blocks become zeros in Marlin on GPUs without FP4 units (rule of "
            f"{RULE_READ_FROM})."
        )
