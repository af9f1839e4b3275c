"""Options that several commands share, and functions that open the models and devices that they name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from ..checkpoint.diagnosis import adapter_beside, names_in
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..errors import EnvironmentLack, InputError
from ..format.layouts import FORMAT_NAMES, LAYOUTS
from ..plan.plan import Plan, compute_plan
from ..recipe.load import load_recipe
from ..recipe.schema import Recipe
from .output import say

if TYPE_CHECKING:
    from ..checkpoint.hub.repository import HubModel

Pin: TypeAlias = "Callable[[HubModel], HubModel]"
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


def json_option(function: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)


def debug_option(function: F) -> F:
    """`--debug`, which `main` reads, also after the name of the command."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")(function)


def device_option(function: F) -> F:
    """`--device`."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cuda", "cpu"]),
        default="auto",
        show_default=True,
        help="Compute on this device.",
    )(function)


def resolve_device(device: str) -> str:
    """The device that `--device` names, for torch. By default it is a GPU if there is one.

    Raises:
        EnvironmentLack: `cuda` is requested, and torch sees no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLack(
            f"--device cuda: torch {torch.__version__} sees no CUDA device. Use --device cpu, or install a CUDA "
            f"build of torch."
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


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


def open_model(
    model: str, revision: str | None = None, low_disk: bool = False, pin: Pin = lambda remote: remote
) -> Checkpoint:
    """The source checkpoint that MODEL names: a folder, or a model on the Hub as `org/name` or `org/name@revision`.

    Args:
        low_disk: read the weights of a model on the Hub by ranges, and keep none.
        pin: may choose another commit of a model on the Hub.
    Raises:
        InputError: neither exists, it is not a safetensors model, or an option fits only the other kind.
    """
    remote = find_remote(model, revision)
    if remote is None:
        if low_disk:
            raise InputError(f"--low-disk works only for models on the Hub, and {model} is a folder. Drop the option.")
        return open_checkpoint(Path(model))
    from ..checkpoint.hub.source import open_hub_checkpoint

    return open_hub_checkpoint(pin(remote), low_disk)


def find_remote(model: str, revision: str | None = None) -> HubModel | None:
    """The model on the Hub that a name means, or None for a folder and for a name that only a folder can have.

    Raises:
        InputError: the Hub has no such model or revision, or cannot be reached. Two revisions are given, or one of a
            folder.
    """
    from ..checkpoint.hub.errors import HubError
    from ..checkpoint.hub.repository import find_model, hub_name

    named = None if _exists(Path(model)) else hub_name(model)
    if named is None:
        if revision is not None:
            raise InputError(f"--revision {revision}: only a model on the Hub has revisions, and {model} is a folder.")
        return None
    repo, of_name = named
    if of_name is not None and revision not in (None, of_name):
        raise InputError(f"{model} names the revision {of_name}, and --revision names {revision}. Give one of them.")
    try:
        return find_model(repo, of_name or revision)
    except HubError as refusal:  # whoever meant a folder would not look for it on the Hub
        raise HubError(f"There is no folder {model} here, so nvquant looked for it on the Hub. {refusal}") from refusal


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the system, or a folder that may not be searched
        return False


def make_plan(
    model: str,
    recipe_name: str,
    format_name: str,
    revision: str | None = None,
    low_disk: bool = False,
    pin: Pin = lambda remote: remote,
) -> tuple[Plan, Recipe]:
    """Open MODEL (see `open_model`), load the recipe, compute the plan."""
    recipe = load_recipe(recipe_name)
    source, name = open_source(model, revision, low_disk, pin)
    return compute_plan(source, recipe, LAYOUTS[format_name], name), recipe


def open_source(
    model: str, revision: str | None = None, low_disk: bool = False, pin: Pin = lambda remote: remote
) -> tuple[Checkpoint, str]:
    """Open MODEL (see `open_model`), and give its name in messages."""
    source = open_model(model, revision, low_disk, pin)
    name = model.rstrip("/") if source.hub is None else source.hub.repo
    adapter = adapter_beside(names_in(source.folder) if source.hub is None else source.hub.files)
    if adapter is not None:
        say(f"{name} also contains a LoRA adapter ({adapter}), which nvquant neither merges nor converts.")
    return source, name


def named(plan: Plan) -> str:
    """The model of a plan by its name, with the commit of a model on the Hub."""
    hub = plan.source.hub
    return plan.model if hub is None else f"{hub.repo} at {hub.commit[:12]}"


def parse_bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A size such as `8GB` or `6GiB` in bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is not a size. Write it as 8GB or 6GiB.", ctx, parameter)
    return int(float(match[1]) * _UNITS[match[2] or ""])
