"""`nvquant distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..api.distillation import DEFAULT_TOKENS, DistillRequest, run_distillation
from ..quoting import argument, shell
from .options import debug_option, device_option, memory_budget_option, output_options, resume_option
from .output import Output, gigabytes

if TYPE_CHECKING:
    from ..distill.options import DistillResult

EXAMPLES = """
\b
Examples:
  nvquant distill ./gemma-4-31b-nvfp4 --against google/gemma-4-31b -o ./distilled
  nvquant distill ./out --against ./model -o ./distilled --tokens 819200
  nvquant distill ./out --against ./model -o ./distilled --text mine.jsonl
"""


@click.command("distill", epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--against", metavar="MODEL", required=True, help="Train to this source of CHECKPOINT.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Write the output to this folder.")
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="Train on this many tokens, 4096 in a step.",
)
@click.option(
    "--calibration",
    help="Train on a shipped set, a Hub data set, a .txt/.jsonl/.parquet/.csv file, or token ids.",
    show_default="the shipped set",
)
@click.option(
    "--text",
    metavar="FILE",
    help="Decide on this text whether the training is kept.",
    show_default="the shipped held-out text",
)
@device_option
@memory_budget_option("of the device, such as 80GB")
@resume_option("an unfinished run of this output")
@output_options
@debug_option
def command(checkpoint: str, against: str, resume: bool, out: Output, **values: Any) -> None:
    """Train the block scales and norms of the NVFP4 checkpoint CHECKPOINT to the predictions of its source.

    Codes, global scales and all other tensors stay. The training is kept only if the KL divergence on held-out text
    falls and no kind of text loses. Otherwise the output equals CHECKPOINT. To resume an unfinished run, run the same
    command again.
    """
    from ..convert.stop import StopRequest

    request = DistillRequest(checkpoint, against, restart=not resume, **values)
    with StopRequest() as stop:
        stop.is_quiet = out.is_quiet
        result = run_distillation(request, stop, out.stages())
    out.clear_live_line()
    out.report(result.as_json, lambda: _print(result, against, out))


def _print(result: DistillResult, against: str, out: Output) -> None:
    from ..report.distilled import distillation_words

    if result.was_finished:
        out.say("An equal run has already written this output. To rebuild it, use --restart.")
    out.result(f"{result.output}: {distillation_words(result.record.as_json())}.")
    peaks = f"peak {gigabytes(result.peak_host_bytes)} host, {gigabytes(result.peak_gpu_bytes)} GPU"
    out.say(f"{result.seconds:.1f} s, {peaks}.")
    out.say(f"Next: {shell(['nvquant', 'verify', argument(result.output), '--against', argument(against)])}")
