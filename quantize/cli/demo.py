"""`nvquant demo`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import CheckFailed
from ..quoting import argument, shell
from .options import debug_option, format_option, json_option, recipe_option
from .output import clear_live_line, emit_json, gigabytes, print_table, say, stage_reporter, tell
from .progress import progress_display

NAMES = {
    "floor": "the same, every result rounded to BF16",
    "w4a4": "W4A4 (Blackwell)",
    "weight_only": "weight-only (Hopper, Ada, Ampere)",
}


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("nvquant-demo"),
    show_default=True,
    help="Write source and output to this folder.",
)
@recipe_option
@format_option
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Measure the numbers on this many held-out sequences.",
    show_default="12",
)
@json_option
@debug_option
def command(output: Path, recipe_name: str, format_name: str, samples: int | None, as_json: bool) -> None:
    """Run plan, convert and verify on a real model (SmolLM2-135M-Instruct, from a package).

    The demo needs no account and no GPU. It takes a few minutes on two cores.
    """
    from ..demo.run import HELD_OUT_SAMPLES, DemoResult, Display, run_demo

    def line(text: str) -> None:
        clear_live_line()
        say(text)

    display = Display(line, progress_display, stage_reporter())
    result: DemoResult = run_demo(output, recipe_name, format_name, display, samples or HELD_OUT_SAMPLES)
    if as_json:
        emit_json(result.as_json())
    else:
        _print_report(result)
    if not result.verified.passed:
        raise CheckFailed("the converted checkpoint did not pass verification. The report names the failed checks.")


def _print_report(result: object) -> None:
    from ..demo.run import MODEL, PROMPT, DemoResult

    assert isinstance(result, DemoResult)
    checks = result.verified.checks
    failed = [check.name for check in checks if not check.passed]
    verdict = f"passed all {len(checks)} checks"
    if failed:
        verdict = f"FAILED {len(failed)} of {len(checks)} checks ({', '.join(failed)})"
    tell(f"\n{MODEL}, {result.plan['recipe']} in the {result.plan['format']} layout: {verdict}.\n")
    rows = [
        [part["name"], part["scheme"], str(part["tensors"]), gigabytes(part["bytes_in"]), gigabytes(part["bytes_out"])]
        for part in result.plan["groups"]
    ]
    print_table(["part", "scheme", "tensors", "before", "after"], rows)
    converted = result.converted
    tell(
        f"\nConverted in {converted.seconds:.0f} s, peak {gigabytes(converted.peak_host_bytes)} of memory. "
        f"{converted.quantized} matrices, {gigabytes(converted.tensor_bytes)}: {converted.output}"
    )
    tell("")
    numbers = result.verified.numerics
    if numbers is not None:
        _print_numbers(numbers)
    tell(f"\nThe model continues {PROMPT!r} with {result.answer!r}. Report: {result.report}")
    tell(f"{result.seconds:.0f} s in total. Next: {shell(['vllm', 'serve', argument(converted.output)])}")


def _print_numbers(numbers: Mapping[str, Any]) -> None:
    rows = [["BF16 source", f"{numbers['perplexity_source']:.2f}", "0", "100 %"]]
    for name, one in numbers["arithmetics"].items():
        agreement = f"{one['top1']['agreement']:.1%}"
        noise = one["kl"]["rounding_noise"]
        kl = f"{one['kl']['mean']:.4f}" + ("" if noise is None else f" ± {noise:.3f}")
        rows.append([NAMES[name], f"{one['perplexity']:.2f}", kl, agreement])
    title = f"{numbers['text']['scored']:,} held-out tokens"
    print_table([title, "perplexity", "KL to BF16", "top-1 agreement"], rows)
