"""`nvquant demo`."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import CheckFailed
from .options import debug_option, format_option, json_option, recipe_option
from .output import emit_json, gigabytes, print_table, say


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("nvquant-demo"),
    show_default=True,
    help="Folder for source and output.",
)
@recipe_option
@format_option
@json_option
@debug_option
def command(output: Path, recipe_name: str, format_name: str, as_json: bool) -> None:
    """Take a real model (SmolLM2-135M-Instruct, from a package) through plan, convert and verify, and compare it with
    its source.

    Needs no account and no GPU; a few minutes on two cores.
    """
    from ..demo.run import DemoResult, run_demo

    result: DemoResult = run_demo(output, recipe_name, format_name, say)
    if as_json:
        emit_json(result.as_json())
    else:
        _print_report(result)
    if not result.verified.passed:
        raise CheckFailed("the converted checkpoint did not pass verification; the report names the check.")


def _print_report(result: object) -> None:
    from ..demo.run import MODEL, PROMPT, DemoResult

    assert isinstance(result, DemoResult)
    click.echo(f"\n{MODEL}: {result.plan['recipe']} in the {result.plan['format']} layout\n")
    rows = [
        [part["name"], part["scheme"], str(part["tensors"]), gigabytes(part["bytes_in"]), gigabytes(part["bytes_out"])]
        for part in result.plan["groups"]
    ]
    print_table(["part", "scheme", "tensors", "before", "after"], rows)
    converted, compared = result.converted, result.compared
    click.echo(
        f"\nConverted in {converted.seconds:.0f} s, peak {gigabytes(converted.peak_host_bytes)} of memory; "
        f"{converted.quantized} matrices, {gigabytes(converted.tensor_bytes)}: {converted.output}"
    )
    passed = sum(check.passed for check in result.verified.checks)
    click.echo(f"Verified: {passed} of {len(result.verified.checks)} checks passed.\n")
    print_table(
        [f"{compared.tokens:,} held-out tokens", "perplexity", "KL to BF16"],
        [
            ["BF16 source", f"{compared.perplexity_source:.2f}", "0"],
            ["as W4A16 (weights only)", f"{compared.perplexity_weight_only:.2f}", f"{compared.kl_weight_only:.3f}"],
            ["as served", f"{compared.perplexity:.2f}", f"{compared.kl:.3f}"],
        ],
    )
    click.echo(f"\nSame next token as the source: {compared.top1:.1%}. {PROMPT!r} goes on with {result.answer!r}.")
    click.echo(f"{result.seconds:.0f} s in all. Next: vllm serve {converted.output}")
