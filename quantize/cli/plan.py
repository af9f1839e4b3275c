"""`nvquant plan`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from ..api.inputs import as_quantizer, named, open_source
from ..calibrate.tokenizer_files import missing_packages
from ..checkpoint.source import Checkpoint
from ..errors import InputError, NvquantError
from ..format.layouts import LAYOUTS
from ..plan.calibration import CalibrationSize, calibration_size
from ..plan.conversion import Conversion, forecast_conversion
from ..plan.conversion import as_json as time_document
from ..plan.forecast import Memory, census, fits, forecast_memory, serving_bytes
from ..plan.forecast import as_json as plan_document
from ..plan.fp8_attention import fp8_attention
from ..plan.head_cost import head_cost
from ..plan.machines import Disk
from ..plan.plan import Plan, compute_plan
from ..plan.serving import Serving
from ..plan.serving import as_json as serving_document
from ..recipe.kept import kept_words
from ..recipe.load import load_recipe, shipped_recipes
from ..recipe.roles import describe
from ..weights.decoding import form_notes
from .machine_options import machine_options, print_conversion, read_machine
from .options import (
    calibration_options,
    debug_option,
    format_option,
    output_option,
    quantizer_option,
    recipe_option,
    revision_option,
)
from .output import Output, gigabytes
from .plan_serving import compare_recipes, print_serving, read_load, serving_options

EXAMPLES = """
\b
Examples:
  nvquant plan google/gemma-4-31b --recipe nvfp4
  nvquant plan google/gemma-4-31b --context 65536 --users 8 --kv-cache fp8
  nvquant plan ./gemma-4-31b --recipe nvfp4 --json
  nvquant plan ./gemma-4-31b --on H200 --disk 1.7GB/s --price 3.50
  nvquant plan google/gemma-4-31b --on "RTX 4090" --network 400MB/s --low-disk
"""


@click.command("plan", epilog=EXAMPLES)
@click.argument("model")
@recipe_option
@format_option
@quantizer_option
@serving_options
@calibration_options
@click.option("--gpu/--no-gpu", default=True, help="Forecast the conversion's memory with or without a GPU.")
@machine_options
@revision_option
@output_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    recipe_name: str,
    format_name: str,
    quantizer: str | None,
    context: int | None,
    users: int | None,
    kv_cache: str | None,
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

    This command reads headers and config, and no weights. With --context, it also compares all recipes for serving.
    """
    load = read_load(context, users, kv_cache)
    recipe = load_recipe(recipe_name)
    source, name = open_source(model, revision, say=out.say)
    machine = read_machine(on, disk, network, low_disk, price, from_hub=source.hub is not None)
    serving = None if load is None else compare_recipes(source, name, format_name, load, recipe)
    is_needed = machine is not None or ctx.get_parameter_source("recipe_name") is not ParameterSource.DEFAULT
    if serving is not None and not is_needed and serving.refuses(recipe.name):
        _only_serving(serving, source, name, out)
        return
    plan = compute_plan(source, recipe, LAYOUTS[format_name], name, as_quantizer(quantizer, recipe))
    from ..convert.checks import check_conversion

    unclaimed = check_conversion(plan)
    if source.hub is not None:
        out.say(named(plan))
    size = calibration_size(plan, samples, sequence_length)
    sizes = (size.samples, size.sequence_length, batch_size)
    if machine is not None and machine.gpu is not None and not gpu:
        raise InputError(f"--no-gpu and --on {on} contradict each other", where="--no-gpu", hint="Drop one of them")
    memory = forecast_memory(plan, *sizes, gpu=gpu if machine is None else machine.gpu is not None)
    conversion = None if machine is None else forecast_conversion(plan, machine, *sizes, usd_per_hour=price)
    out.report(
        lambda: {**_document(plan, size, memory, conversion, serving), "unclaimed": unclaimed},
        lambda: _print(plan, size, memory, conversion, serving, price, out, unclaimed),
    )


def _only_serving(serving: Serving, source: Checkpoint, name: str, out: Output) -> None:
    """Print the comparison of recipes for a model that the default recipe does not fit."""
    commit = None if source.hub is None else source.hub.commit

    def words() -> None:
        out.tell(name)
        print_serving(serving, out)

    out.report(lambda: {"model": name, "commit": commit, "serving": serving_document(serving)}, words)


def _document(
    plan: Plan, size: CalibrationSize, memory: Memory, conversion: Conversion | None, serving: Serving | None
) -> dict[str, Any]:
    document = plan_document(plan, memory)
    document["calibration"] = asdict(size) if plan.needs_calibration else None
    cost = head_cost(plan)
    document["head"] = None if cost is None else asdict(cost)
    attention = fp8_attention(plan)
    document["fp8_attention"] = None if attention is None else asdict(attention)
    document["time"] = None if conversion is None else time_document(conversion)
    document["missing_packages"] = list(_missing_packages(plan))
    if serving is not None:
        document["serving"] = serving_document(serving)
    return document


def _print(
    plan: Plan,
    size: CalibrationSize,
    memory: Memory,
    conversion: Conversion | None,
    serving: Serving | None,
    price: float | None,
    out: Output,
    unclaimed: Sequence[str],
) -> None:
    out.tell(f"{plan.model}, recipe {plan.recipe.name}, {plan.layout.name} layout\n")
    rows = [[g.name, g.scheme, str(g.tensors), gigabytes(g.bytes_in), gigabytes(g.bytes_out)] for g in census(plan)]
    source_bytes = sum(g.bytes_in for g in census(plan))
    rows.append(["total", "", str(plan.tensors), gigabytes(source_bytes), gigabytes(plan.tensor_bytes)])
    out.table(["part", "scheme", "tensors", "before", "after"], rows)
    for note in form_notes(plan.source):
        out.tell(f"\n{note}")
    if plan.casts:
        forms = " and ".join(sorted(set(plan.casts.values())))
        out.tell(f"{len(plan.casts):,} of the quantized matrices keep their {forms} codes.")
    out.tell(
        f"\n{len(plan.matrices)} matrices quantized, {plan.tensor_bytes:,} bytes of tensors in "
        f"{len(plan.shards)} files."
    )
    _say_unquantized(plan, unclaimed, out)
    for cost in (head_cost(plan), fp8_attention(plan)):
        if cost is not None:
            out.tell(cost.words)
    if plan.needs_calibration:
        out.tell(f"Calibration takes {size.words}.")
    if conversion is None:
        out.tell(
            f"Conversion needs up to {gigabytes(memory.host_bytes)} of host memory and "
            f"{gigabytes(memory.gpu_bytes)} of GPU memory."
        )
    if serving is None:
        _say_fits(plan, out)
    elif conversion is None:
        print_serving(serving, out)
    else:
        print_serving(serving, out, () if conversion.machine.gpu is None else (conversion.machine.gpu,))
    if conversion is not None:
        print_conversion(conversion, plan.quantizer, price, out)
    packages = _missing_packages(plan)
    if packages:
        out.tell(f"Calibration on text requires {' and '.join(packages)}: run `pip install {' '.join(packages)}`.")


def _say_unquantized(plan: Plan, unclaimed: Sequence[str], out: Output) -> None:
    """Print which matrices of the decoder stay as they are, and which tensors the model does not read."""
    kept = kept_words(plan.kept_shares)
    if kept is not None:
        out.tell(kept)
    if unclaimed:
        kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in unclaimed))
        number = "1 tensor" if len(unclaimed) == 1 else f"{len(unclaimed)} tensors"
        out.tell(f"Copied byte for byte, because the model does not read them: {number}, {describe(kinds)}.")


def _missing_packages(plan: Plan) -> tuple[str, ...]:
    """Packages that this model's tokenizer requires for the recipe's calibration on text, and that are missing."""
    found = missing_packages(plan.source.folder) if plan.needs_calibration else None
    return found[1] if found else ()


def _say_fits(plan: Plan, out: Output) -> None:
    fitting = [fit.gpu for fit in fits(plan) if fit.fits]
    needed = gigabytes(serving_bytes(plan))
    out.tell(
        f"Serving 8192 tokens of context needs {needed}: fits {', '.join(fitting) or 'none of the GPUs known here'}."
    )
    for name in shipped_recipes():
        smaller = _smaller_plan(plan, name)
        more = [] if smaller is None else [fit.gpu for fit in fits(smaller) if fit.fits and fit.gpu not in fitting]
        if smaller is not None and more:
            out.tell(f"With recipe {name} ({gigabytes(smaller.tensor_bytes)}) it fits {', '.join(more)} too.")


def _smaller_plan(plan: Plan, name: str) -> Plan | None:
    """The plan of another recipe that quantizes inputs too and has fewer bytes, or None."""
    from ..convert.config import check_patterns

    recipe = load_recipe(name).model_copy(update={"experts": plan.recipe.experts})
    if name == plan.recipe.name:
        return None
    try:
        other = compute_plan(plan.source, recipe, plan.layout, plan.model)
        check_patterns(other)
    except NvquantError:  # a model that this recipe does not fit
        return None
    is_alike = other.has_calibrated_scales == plan.has_calibrated_scales
    return other if is_alike and other.tensor_bytes < plan.tensor_bytes else None
