"""Options that several commands share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..api.inputs import DEVICES, FOLDS
from ..format.layouts import FORMAT_NAMES
from .output import Output

F = TypeVar("F", bound=Callable[..., Any])
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def recipe_option(function: F) -> F:
    """`--recipe`."""
    return click.option(
        "--recipe",
        "recipe_name",
        default="nvfp4",
        show_default=True,
        help="Use this shipped recipe or YAML file of your own.",
    )(function)


def format_option(function: F) -> F:
    """`--format`."""
    return click.option(
        "--format",
        "format_name",
        type=click.Choice(FORMAT_NAMES),
        default=FORMAT_NAMES[0],
        show_default=True,
        help="Write this layout.",
    )(function)


def quantizer_option(function: F) -> F:
    """`--quantizer`."""
    return click.option("--quantizer", help="Override the recipe's quantizer with mse, rtn or gptq.")(function)


def fold_option(function: F) -> F:
    """`--fold`."""
    return click.option(
        "--fold",
        type=click.Choice(FOLDS),
        help="Change the scales of channels exactly before quantizing, wherever a proof holds, or never.",
        show_default="the recipe's choice, or auto with gptq",
    )(function)


def output_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`. The command gets an `Output` as its argument `out`."""
    return _with_output(function, has_quiet=False)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--quiet`, for a command with progress. It gets an `Output` as its argument `out`."""
    return _with_output(function, has_quiet=True)


def _with_output(function: Callable[..., Any], has_quiet: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, is_quiet: bool = False, **values: Any) -> Any:
        return function(*args, out=Output(as_json, is_quiet), **values)

    if has_quiet:
        words = "Print only the result, and errors."
        click.option("-q", "--quiet", "is_quiet", is_flag=True, help=words)(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(command)


def debug_option(function: F) -> F:
    """`--debug`, which `main` reads, also after the name of the command."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(function)


def device_option(function: F) -> F:
    """`--device`."""
    return click.option(
        "--device",
        type=click.Choice(DEVICES),
        default="auto",
        show_default=True,
        help="Compute on this device.",
    )(function)


def calibration_options(function: F) -> F:
    """`--samples`, `--sequence-length`, `--batch-size`: the sizes on which memory depends."""
    for option in (
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            default=1,
            show_default=True,
            help="Compute this many sequences in one forward.",
        ),
        click.option(
            "--sequence-length",
            type=click.IntRange(min=2),
            help="Use calibration sequences of this many tokens.",
            show_default="the recipe's",
        ),
        click.option(
            "--samples",
            type=click.IntRange(min=1),
            help="Use this many calibration sequences.",
            show_default="the recipe's",
        ),
    ):
        function = option(function)
    return function


def revision_option(function: F) -> F:
    """`--revision`."""
    return click.option(
        "--revision",
        metavar="REV",
        help="Read this commit, branch or tag of a MODEL on the Hub.",
        show_default="its default branch",
    )(function)


def memory_budget_option(extent: str) -> Callable[[F], F]:
    """`--memory-budget`.

    Args:
        extent: the memory that it limits, and an example.
    """
    return click.option(
        "--memory-budget",
        callback=parse_bytes,
        help=f"Use at most this much memory {extent}.",
        show_default="the free memory",
    )


def resume_option(earlier: str) -> Callable[[F], F]:
    """`--resume/--restart`.

    Args:
        earlier: the thing to resume.
    """
    return click.option(
        "--resume/--restart",
        default=True,
        show_default=True,
        help=f"Resume {earlier}, or begin anew and replace it.",
    )


def parse_sizes(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[int]:
    """Sizes as `parse_bytes` takes them, of an option that may be repeated."""
    return [size for value in values if (size := parse_bytes(ctx, parameter, value)) is not None]


def parse_bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A size such as `8GB` or `6GiB` in bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size. Write it as 8GB or 6GiB.", ctx, parameter)
    return int(float(match[1]) * _UNITS[match[2] or ""])
