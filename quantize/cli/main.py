"""`nvquant`: the group of commands. It imports nothing heavy, and a command's module only when the command runs."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from .. import __version__
from ..errors import EnvironmentLack, InputError, NvquantError
from ..quoting import json_text, lines
from ..quoting import message as quoted_message
from .output import send_warnings_to_stderr

COMMANDS = {
    "plan": "Forecast sizes, memory and the GPUs that fit, before any work.",
    "sweep": "Measure what each layer loses, and make recipes for a budget.",
    "convert": "Turn a BF16 checkpoint into an NVFP4 checkpoint.",
    "distill": "Train the scales and norms of a checkpoint to its source's predictions.",
    "verify": "Prove a checkpoint: its files, its numbers, a served answer.",
    "bench": "Measure serving speed for users and contexts.",
    "doctor": "Report the abilities of this machine and what it lacks.",
    "push": "Publish a verified checkpoint with its card on the Hub.",
    "relayout": "Rewrite an NVFP4 checkpoint in the other layout.",
    "recipes": "List the recipes, or show one.",
    "demo": "Run the complete chain on a small real model.",
}
WRONG, LACKING, INTERRUPTED = 2, 3, 130
MOST_MESSAGE = 1200  # characters


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
    Exit codes:
      0  success
      1  a check failed
      2  the input or the request is wrong
      3  the environment lacks something
    """
    ctx.obj = {"debug": debug}
    send_warnings_to_stderr()


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code. Every error is one sentence on stderr."""
    _open_missing_streams()
    given = sys.argv[1:] if args is None else args
    code = _run(given, "--debug" in given, "--json" in given)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            code = _lost_stream(error)
    sys.exit(code)


def _run(args: list[str], debug: bool, as_json: bool) -> int:
    """Run a command, print its error if one ends it, and return the exit code."""
    try:
        return _invoke(args)
    except NvquantError as error:
        return _tell(error, debug, as_json)
    except click.ClickException as error:
        refusal = NvquantError(" ".join(error.format_message().split()))
        return _tell(refusal, False, as_json, error.exit_code, words=partial(_show, error))
    except (click.Abort, KeyboardInterrupt):
        stopped = NvquantError("Stopped.")
        return _tell(stopped, False, as_json, INTERRUPTED, words=lambda: click.echo("Stopped.", err=True))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except OSError as error:
        if error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            return _lost_stream(error)
        return _tell(_unexpected(error), debug, as_json, LACKING if _is_lack(error) else WRONG)
    except MemoryError:
        lack = EnvironmentLack("This machine ran out of memory", hint="free some, or use a larger machine")
        return _tell(lack, debug, as_json)
    except Exception as error:
        return _tell(_unexpected(error), debug, as_json)


def _invoke(args: list[str]) -> int:
    """Run a command. As click's own `main`, but that takes any broken pipe for that of the results, and ends in 1."""
    if "_NVQUANT_COMPLETE" in os.environ:  # a shell requests completions
        cli.main(args=args, prog_name="nvquant")
    try:
        with cli.make_context("nvquant", list(args)) as context:
            result: Any = cli.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    return result if isinstance(result, int) else 0


def _show(error: click.ClickException) -> None:
    """click's own words for a wrong command line, which repeat its arguments."""
    text = io.StringIO()
    error.show(file=text)
    click.echo(lines(text.getvalue()), err=True, nl=False)


def _tell(
    error: NvquantError,
    debug: bool,
    as_json: bool,
    code: int | None = None,
    words: Callable[[], None] | None = None,
) -> int:
    """Print the sentence of an error on stderr, after the traceback with --debug, and return the exit code.

    With --json, its fields are the one document on stdout. Of several ranks, the first prints it.

    Args:
        code: None for the error's own.
        words: prints the error instead of "Error: " and the sentence.
    """
    code = error.exit_code if code is None else code
    try:
        if debug:
            click.echo(lines(traceback.format_exc()), err=True, nl=False)
        if words is None:
            click.echo(f"Error: {_shortened(str(error))}", err=True)
        else:
            words()
        if as_json and os.environ.get("RANK", "0") == "0":
            click.echo(json_text({"error": {**error.as_json(), "exit_code": code}}))
    except (OSError, ValueError) as lost:
        _lost_stream(lost)
    return code


def _shortened(message: str) -> str:
    """A message without its middle if it is too long to read. Its end, the way out, stays."""
    end = MOST_MESSAGE // 3
    return message if len(message) <= MOST_MESSAGE else f"{message[: MOST_MESSAGE - end]} … {message[-end:]}"


def _unexpected(error: Exception) -> NvquantError:
    """The error for an error that no code expects: its place, its class and its text."""
    if isinstance(error, OSError) and error.strerror:
        files = [repr(str(name)) for name in (error.filename, error.filename2) if name is not None]
        where = " and ".join(files) or None
        hint = "Correct this and run the command again (--debug prints the traceback)"
        return InputError(error.strerror, where=where, hint=hint)
    last = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {last[0].filename.rpartition('/')[2]}:{last[0].lineno}" if last else ""
    words = quoted_message(" ".join(str(error)[:1000].split()))[:200]
    return InputError(
        f"An unexpected error occurred ({type(error).__name__}{where}{words and ': '}{words})",
        hint="check the input files, and report the output of the command with --debug",
    )


def _is_lack(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def _open_missing_streams() -> None:
    """Open /dev/null for each standard stream that the caller closed, or the next file would take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            setattr(sys, name, open(number, mode, closefd=False))


def _lost_stream(error: Exception) -> int:
    """The code for a reader that went away or for results that found no room. Only the second prints a sentence, if
    stderr is still open. Nothing more is written to a stream that fails."""
    if not isinstance(error, BrokenPipeError):
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the stream is closed"
        with contextlib.suppress(OSError, ValueError):
            os.write(
                2, f"Error: The results cannot be written ({reason}): write them to a place with free space.\n".encode()
            )
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nothing, stream.fileno())  # what is still in the buffer goes there when Python ends
                stream.flush()
    os.close(nothing)
    return LACKING
