"""`nvquant demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..quoting import argument, shell
from .options import debug_option, format_option, output_options, recipe_option
from .output import Output, gigabytes

if TYPE_CHECKING:
    from ..demo.run import DemoResult
    from ..verify.numerics.document import Numerics

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
@output_options
@debug_option
def command(output: Path, recipe_name: str, format_name: str, samples: int | None, out: Output) -> int:
    """Run plan, convert and verify on a real model (SmolLM2-135M-Instruct, from a package).

    The demo needs no account and no GPU. It takes a few minutes on two cores.
    """
    from ..demo.run import HELD_OUT_SAMPLES, Display, run_demo

    def line(text: str) -> None:
        out.clear_live_line()
        out.say(text)

    display = Display(line, out.conversion, out.stages())
    result = run_demo(output, recipe_name, format_name, display, samples or HELD_OUT_SAMPLES)
    out.report(result.as_json, lambda: _print_report(result, out))
    if not result.verified.passed:
        out.fail("the converted checkpoint did not pass verification. The report names the failed checks.")
        return 1
    return 0


def _print_report(result: DemoResult, out: Output) -> None:
    from ..demo.run import MODEL, PROMPT
    from ..verify.numerics.document import numerics_of

    checks = result.verified.checks
    failed = [check.name for check in checks if not check.passed]
    verdict = f"passed all {len(checks)} checks"
    if failed:
        verdict = f"FAILED {len(failed)} of {len(checks)} checks ({', '.join(failed)})"
    out.result(f"\n{MODEL}, {result.plan['recipe']} in the {result.plan['format']} layout: {verdict}.\n")
    rows = [
        [part["name"], part["scheme"], str(part["tensors"]), gigabytes(part["bytes_in"]), gigabytes(part["bytes_out"])]
        for part in result.plan["groups"]
    ]
    out.table(["part", "scheme", "tensors", "before", "after"], rows)
    converted = result.converted
    out.tell(
        f"\nConverted in {converted.seconds:.0f} s, peak {gigabytes(converted.peak_host_bytes)} of memory. "
        f"{converted.quantized} matrices, {gigabytes(converted.tensor_bytes)}: {converted.output}"
    )
    out.tell("")
    numbers = numerics_of(result.verified.numerics)
    if numbers is not None:
        _print_numbers(numbers, out)
    out.tell(f"\nThe model continues {PROMPT!r} with {result.answer!r}. Report: {result.report}")
    out.tell(f"{result.seconds:.0f} s in total. Next: {shell(['vllm', 'serve', argument(converted.output)])}")


def _print_numbers(numbers: Numerics, out: Output) -> None:
    rows = [["BF16 source", f"{numbers.perplexity_source:.2f}", "0", "100 %"]]
    for name, one in numbers.arithmetics.items():
        noise = one.kl.rounding_noise
        kl = f"{one.kl.mean:.4f}" + ("" if noise is None else f" ± {noise:.3f}")
        rows.append([NAMES[name], f"{one.perplexity:.2f}", kl, f"{one.top1.agreement:.1%}"])
    title = f"{numbers.text.scored if numbers.text else 0:,} held-out tokens"
    out.table([title, "perplexity", "KL to BF16", "top-1 agreement"], rows)
