"""`nvquant plan`."""

from __future__ import annotations

import click

from ..plan.forecast import as_json as plan_document
from ..plan.forecast import census, fits, forecast_memory, serving_bytes
from ..plan.plan import Plan
from ..recipe.load import load_recipe
from .options import (
    calibration_options,
    debug_option,
    format_option,
    json_option,
    make_plan,
    recipe_option,
    revision_option,
)
from .output import emit_json, gigabytes, print_table


@click.command("plan")
@click.argument("model")
@recipe_option
@format_option
@calibration_options
@click.option("--gpu/--no-gpu", default=True, help="Forecast the conversion's memory with or without a GPU.")
@revision_option
@json_option
@debug_option
def command(
    model: str,
    recipe_name: str,
    format_name: str,
    samples: int | None,
    sequence_length: int | None,
    batch_size: int,
    gpu: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Say exactly what converting MODEL would write, and what it and its result need. Reads headers and config,
    no weights."""
    plan, recipe = make_plan(model, recipe_name, format_name, revision)
    calibration = recipe.calibration
    memory = forecast_memory(
        plan, samples or calibration.samples, sequence_length or calibration.sequence_length, batch_size, gpu
    )
    if as_json:
        emit_json(plan_document(plan, memory))
        return
    click.echo(f"{plan.model}, recipe {recipe.name}, {plan.layout.name} layout\n")
    rows = [[g.name, g.scheme, str(g.tensors), gigabytes(g.bytes_in), gigabytes(g.bytes_out)] for g in census(plan)]
    source_bytes = sum(g.bytes_in for g in census(plan))
    rows.append(["total", "", str(plan.tensors), gigabytes(source_bytes), gigabytes(plan.tensor_bytes)])
    print_table(["part", "scheme", "tensors", "before", "after"], rows)
    click.echo(
        f"\n{len(plan.matrices)} matrices quantized; {plan.tensor_bytes:,} bytes of tensors in "
        f"{len(plan.shards)} files."
    )
    click.echo(
        f"Conversion needs up to {gigabytes(memory.host_bytes)} of host memory and "
        f"{gigabytes(memory.gpu_bytes)} of GPU memory."
    )
    _say_fits(plan)


def _say_fits(plan: Plan) -> None:
    fitting = [fit.gpu for fit in fits(plan) if fit.fits]
    needed = gigabytes(serving_bytes(plan))
    click.echo(
        f"Serving 8192 tokens of context needs {needed}: fits {', '.join(fitting) or 'none of the GPUs known here'}."
    )
    if plan.recipe.name == "nvfp4-full":
        return
    from ..plan.plan import compute_plan

    full = compute_plan(
        plan.source,
        load_recipe("nvfp4-full").model_copy(update={"experts": plan.recipe.experts}),
        plan.layout,
        plan.model,
    )
    more = [fit.gpu for fit in fits(full) if fit.fits and fit.gpu not in fitting]
    if more:
        click.echo(f"With recipe nvfp4-full ({gigabytes(full.tensor_bytes)}) it fits {', '.join(more)} too.")
