"""The part of `nvquant plan` about serving: its options, and the table of all recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..checkpoint.source import Checkpoint
from ..errors import InputError
from ..format.layouts import LAYOUTS
from ..plan.forecast import SERVING_OVERHEAD_BYTES, VLLM_SHARE
from ..plan.gpus import GPUS, short_name
from ..plan.serving import KV_CACHES, Load, OnGpu, Refused, Row, Serving, forecast_serving
from ..recipe.load import load_recipe, shipped_recipes
from ..recipe.schema import Recipe
from .output import Output, gigabytes

F = TypeVar("F", bound=Callable[..., Any])
# One GPU for each usual size of memory. The others are in the JSON document.
COLUMNS = ("RTX 5060 Ti 16 GB", "RTX 4090", "RTX 5090", "L40S", "RTX PRO 6000", "H200")


def serving_options(function: F) -> F:
    """`--context`, `--users`, `--kv-cache`."""
    for option in (
        click.option(
            "--kv-cache",
            type=click.Choice(list(KV_CACHES)),
            help="Store the keys and values of this context in this dtype.",
            show_default="bf16",
        ),
        click.option(
            "--users",
            type=click.IntRange(min=1),
            help="Serve this many users at the same time, each with this context.",
            show_default="1",
        ),
        click.option(
            "--context",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="Compare all recipes for serving this context: the memory, and the most tokens a second on GPUs that "
            "fit.",
        ),
    ):
        function = option(function)
    return function


def read_load(context: int | None, users: int | None, kv_cache: str | None) -> Load | None:
    """The load that the options describe, or None without --context.

    Raises:
        InputError: an option has no effect without --context.
    """
    if context is not None:
        return Load(context, users or 1, kv_cache or "bf16")
    for option, value in (("--users", users), ("--kv-cache", kv_cache)):
        if value is not None:
            raise InputError(
                f"{option} affects only the comparison of recipes for a context", hint="Give the context with --context"
            )
    return None


def compare_recipes(source: Checkpoint, model: str, format_name: str, load: Load, own: Recipe) -> Serving:
    """The forecast for the source, every shipped recipe, and the requested one if it is the user's own file.

    Raises:
        InputError: see `forecast_serving`.
    """
    from ..convert.config import check_patterns

    recipes = [load_recipe(name) for name in shipped_recipes()]
    if own not in recipes:
        recipes.append(own)
    return forecast_serving(source, recipes, LAYOUTS[format_name], model, load, check_patterns)


def print_serving(serving: Serving, out: Output, gpus: tuple[str, ...] = COLUMNS) -> None:
    """The table on stdout, with a column for each of these GPUs, and notes below it."""
    load = serving.load
    rows = [row for row in serving.rows if isinstance(row, Row)]
    refused = [row for row in serving.rows if isinstance(row, Refused)]
    cells = {gpu: [_cell(on, load) for row in rows for on in row.gpus if on.gpu == gpu] for gpu in gpus}
    users = "1 user" if load.users == 1 else f"{load.users} users, each"
    out.tell(f"\nServing {users} with {load.context:,} tokens of context and a KV cache in {load.kv_cache.upper()}:\n")
    table = [
        [row.name, gigabytes(row.weight_bytes), gigabytes(row.kv_bytes), gigabytes(row.total_bytes)]
        + [cells[gpu][at] for gpu in gpus]
        for at, row in enumerate(rows)
    ]
    heads = [f"{short_name(gpu)}\n{GPUS[gpu].size_gb} GB" for gpu in gpus]
    width = max(len(text) for text in ("recipe", *(row.name for row in rows), *(row.recipe for row in refused)))
    out.table([f"{'recipe':<{width}}", "weights", "KV cache", "total", *heads], table)
    for row in refused:
        out.tell(f"{row.recipe:<{width}}  {row.reason}")
    out.tell()
    has_stars = any(cell.startswith("*") for gpu in gpus for cell in cells[gpu])
    for note in _notes(serving, bool(gpus), has_stars):
        out.tell(note)


def _cell(on: OnGpu, load: Load) -> str:
    """The ceiling for one user and for all together, a dash if the row does not fit, a star if vLLM's default share of
    the memory does not suffice."""
    if on.tokens_per_second is None or on.tokens_per_second_alone is None:
        return "-"
    star = "" if on.fits_by_default else "*"
    alone = f"{on.tokens_per_second_alone:,.0f}"
    return star + (alone if load.users == 1 else f"{alone} / {on.tokens_per_second:,.0f}")


def _notes(serving: Serving, has_gpus: bool, has_stars: bool) -> list[str]:
    load, notes = serving.load, []
    if has_gpus:
        of = "" if load.users == 1 else f", for one user alone / for all {load.users} together"
        notes.append(f"A column gives the most tokens a second that the GPU's memory bandwidth allows{of}.")
        notes.append("A dash marks a row that does not fit.")
    if has_stars:
        notes.append(
            f"A star marks a row that fits only if --gpu-memory-utilization is above vLLM's default of {VLLM_SHARE}."
        )
    overhead = f"Total adds {gigabytes(SERVING_OVERHEAD_BYTES)} for all else."
    if serving.tower_bytes:
        notes.append(
            f"Weights include vision and audio ({gigabytes(serving.tower_bytes)}), which vLLM does not load with "
            f"--language-model-only. {overhead}"
        )
    else:
        notes.append(overhead)
    return notes
