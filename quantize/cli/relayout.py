"""`nvquant relayout`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..api import relayout
from ..format.layouts import FORMAT_NAMES
from ..quoting import argument, shell
from .options import debug_option, output_option
from .output import Output, gigabytes

if TYPE_CHECKING:
    from ..convert.relayout import RelayoutResult

EXAMPLES = """
\b
Examples:
  nvquant relayout ./gemma-4-31b-nvfp4 --format modelopt -o ./gemma-4-31b-nvfp4-modelopt
  nvquant relayout ./from-modelopt --format compressed-tensors -o ./for-vllm
"""


@click.command("relayout", epilog=EXAMPLES)
@click.argument("checkpoint")
@click.option("--format", "format_name", type=click.Choice(FORMAT_NAMES), required=True, help="Write this layout.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Write the output to this folder.")
@output_option
@debug_option
def command(checkpoint: str, format_name: str, output: Path, out: Output) -> None:
    """Rewrite the NVFP4 checkpoint CHECKPOINT, from nvquant or another tool, in the other layout.

    Nothing is quantized again. Codes and block scales keep their bytes.
    """
    result = relayout(checkpoint, format_name, output)
    if result.unequal_groups:
        out.say(
            f"{result.unequal_groups} fused groups do not share their global scales. vLLM uses the largest stored "
            f"value of each group, so their weights are wrong, and differ between the layouts."
        )
    out.report(result.as_json, lambda: _print(result, out))


def _print(result: RelayoutResult, out: Output) -> None:
    how = "computed from the recorded amaxes" if result.scalars == "exact" else "inverted, exact to one ulp"
    out.result(
        f"{result.output}: {result.tensors} tensors, {gigabytes(result.tensor_bytes)}, {result.quantized} matrices in "
        f"the {result.format} layout in {result.seconds:.1f} s, global scales {how}."
    )
    out.say(f"Next: {shell(['nvquant', 'verify', argument(result.output)])}")
