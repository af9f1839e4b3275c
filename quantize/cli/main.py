"""`nvquant`: the group of commands. Imports nothing heavy; a command's module is imported when the command runs."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from typing import Any

import click

from .. import __version__
from ..checkpoint.hub.quiet import without_signatures
from ..errors import NvquantError

COMMANDS = {
    "plan": "Sizes, memory and GPUs that fit, before any work.",
    "convert": "Turn a BF16 checkpoint into an NVFP4 checkpoint.",
    "verify": "Prove a checkpoint: structure, bytes, scales.",
    "bench": "Serving speed: decode, prefill, users, contexts.",
    "doctor": "What this machine can do, and what it lacks.",
    "push": "Publish a proved checkpoint with its card on the Hub.",
    "relayout": "Rewrite an NVFP4 checkpoint in the other layout.",
    "recipes": "List the recipes, or show one.",
    "demo": "The whole chain on an embedded real model.",
}
INTERRUPTED = 130


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"nvquant.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="nvquant")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Turn a BF16 Hugging Face model into an NVFP4 checkpoint that vLLM serves, and prove it.

    \b
    Exit codes: 0 done and everything held; 1 a check failed; 2 the input or the request is wrong;
    3 the environment lacks something.
    """
    ctx.obj = {"debug": debug}


def _without_secrets(text: str) -> str:
    """A traceback without what opens something: the signatures of addresses, tokens of the Hub."""
    return re.sub(r"\bhf_\w{6,}", "hf_…", without_signatures(text))


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code; a user's error is one sentence on stderr."""
    debug = "--debug" in (sys.argv[1:] if args is None else args)
    try:
        result: Any = cli.main(args=args, prog_name="nvquant", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except NvquantError as error:
        if debug:
            click.echo(_without_secrets(traceback.format_exc()), err=True, nl=False)
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(INTERRUPTED)
