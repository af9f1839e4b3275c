"""`nvquant recipes`."""

from __future__ import annotations

from importlib import resources

import click

from ..recipe.load import load_recipe, shipped_recipes
from .options import debug_option
from .output import Output


@click.group("recipes", invoke_without_command=True)
@debug_option
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the recipes that ship with nvquant, or show one as the start of your own."""
    out = Output()
    if ctx.invoked_subcommand is None:
        for name in shipped_recipes():
            out.tell(f"{name:<12} {load_recipe(name).description}")


@command.command("show")
@click.argument("name")
@debug_option
def show(name: str) -> None:
    """Print the recipe NAME. If NAME is a file of your own, check it first."""
    load_recipe(name)
    if name in shipped_recipes():
        text = resources.files("nvquant.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        Output().tell(text.removesuffix("\n"))
    else:
        with click.open_file(name, encoding="utf-8") as file:
            Output().tell(file.read().removesuffix("\n"))
