"""`nvquant plan`."""

from __future__ import annotations

from typing import Any

import click

from ..api.inputs import checked_plan, named
from ..calibrate.tokenizer_files import missing_packages
from ..errors import InputError, NvquantError
from ..plan.conversion import Conversion, forecast_conversion
from ..plan.conversion import as_json as time_document
from ..plan.forecast import Memory, census, fits, forecast_memory, serving_bytes
from ..plan.forecast import as_json as plan_document
from ..plan.machines import Disk
from ..plan.plan import Plan
from ..recipe.load import load_recipe
from .machine_options import machine_options, print_conversion, read_machine
from .options import (
    calibration_options,
    debug_option,
    format_option,
    output_option,
    recipe_option,
    revision_option,
)
from .output import Output, gigabytes

EXAMPLES = """
\b
Examples:
  nvquant plan google/gemma-4-31b --recipe nvfp4
  nvquant plan ./gemma-4-31b --recipe nvfp4 --json
  nvquant plan ./gemma-4-31b --on H200 --disk 1.7GB/s --price 3.50
  nvquant plan google/gemma-4-31b --on "RTX 4090" --network 400MB/s --low-disk
"""


@click.command("plan", epilog=EXAMPLES)
@click.argument("model")
@recipe_option
@format_option
@calibration_options
@click.option("--gpu/--no-gpu", default=True, help="Forecast the conversion's memory with or without a GPU.")
@machine_options
@revision_option
@output_option
@debug_option
def command(
    model: str,
    recipe_name: str,
    format_name: str,
    samples: int | None,
    sequence_length: int | None,
    batch_size: int,
    gpu: bool,
    on: str | None,
    disk: Disk | None,
    network: float | None,
    low_disk: bool,
    price: float | None,
    revision: str | None,
    out: Output,
) -> None:
    """Forecast exactly the files of converting MODEL, and the needs of the conversion and of its result.

    This command reads headers and config, and no weights.
    """
    plan = checked_plan(model, recipe_name, format_name, revision, say=out.say)
    if plan.source.hub is not None:
        out.say(named(plan))
    calibration = plan.recipe.calibration
    sizes = (samples or calibration.samples, sequence_length or calibration.sequence_length, batch_size)
    machine = read_machine(on, disk, network, low_disk, price, from_hub=plan.source.hub is not None)
    if machine is not None and machine.gpu is not None and not gpu:
        raise InputError(f"--no-gpu and --on {on} contradict each other. Drop one of them.")
    memory = forecast_memory(plan, *sizes, gpu=gpu if machine is None else machine.gpu is not None)
    conversion = None if machine is None else forecast_conversion(plan, machine, *sizes, usd_per_hour=price)

    def document() -> dict[str, Any]:
        time = None if conversion is None else time_document(conversion)
        return {**plan_document(plan, memory), "time": time, "missing_packages": list(_missing_packages(plan))}

    out.report(document, lambda: _print(plan, memory, conversion, price, out))


def _print(plan: Plan, memory: Memory, conversion: Conversion | None, price: float | None, out: Output) -> None:
    out.tell(f"{plan.model}, recipe {plan.recipe.name}, {plan.layout.name} layout\n")
    rows = [[g.name, g.scheme, str(g.tensors), gigabytes(g.bytes_in), gigabytes(g.bytes_out)] for g in census(plan)]
    source_bytes = sum(g.bytes_in for g in census(plan))
    rows.append(["total", "", str(plan.tensors), gigabytes(source_bytes), gigabytes(plan.tensor_bytes)])
    out.table(["part", "scheme", "tensors", "before", "after"], rows)
    out.tell(
        f"\n{len(plan.matrices)} matrices quantized, {plan.tensor_bytes:,} bytes of tensors in "
        f"{len(plan.shards)} files."
    )
    if conversion is None:
        out.tell(
            f"Conversion needs up to {gigabytes(memory.host_bytes)} of host memory and "
            f"{gigabytes(memory.gpu_bytes)} of GPU memory."
        )
    _say_fits(plan, out)
    if conversion is not None:
        print_conversion(conversion, plan.recipe.quantizer, price, out)
    packages = _missing_packages(plan)
    if packages:
        out.tell(f"Calibration on text requires {' and '.join(packages)}: run `pip install {' '.join(packages)}`.")


def _missing_packages(plan: Plan) -> tuple[str, ...]:
    """Packages that this model's tokenizer requires for the recipe's calibration on text, and that are missing."""
    found = missing_packages(plan.source.folder) if plan.recipe.needs_calibration else None
    return found[1] if found else ()


def _say_fits(plan: Plan, out: Output) -> None:
    fitting = [fit.gpu for fit in fits(plan) if fit.fits]
    needed = gigabytes(serving_bytes(plan))
    out.tell(
        f"Serving 8192 tokens of context needs {needed}: fits {', '.join(fitting) or 'none of the GPUs known here'}."
    )
    if plan.recipe.name == "nvfp4-full":
        return
    from ..convert.config import check_patterns
    from ..plan.plan import compute_plan

    recipe = load_recipe("nvfp4-full").model_copy(update={"experts": plan.recipe.experts})
    try:
        full = compute_plan(plan.source, recipe, plan.layout, plan.model)
        check_patterns(full)
    except NvquantError:  # only a hint: this recipe does not fit the model
        return
    more = [fit.gpu for fit in fits(full) if fit.fits and fit.gpu not in fitting]
    if more:
        out.tell(f"With recipe nvfp4-full ({gigabytes(full.tensor_bytes)}) it fits {', '.join(more)} too.")
