"""Annotations that a CI system shows beside a run: the command writes them into a file, and no program parses a log."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..errors import NvquantError
from ..quoting import message, workflow_command

VARIABLE = "NVQUANT_ANNOTATIONS"
TITLE = "nvquant verify"


class AnnotatedCommand(click.Command):
    """A command that writes its errors, also those of its options, to the file that $NVQUANT_ANNOTATIONS names."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """See click."""
        try:
            return super().make_context(*args, **options)
        except click.ClickException as error:
            _refused(error.format_message())
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """See click."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            _refused(error.format_message())
            raise
        except NvquantError as error:
            _refused(str(error))
            raise


def write_annotations(commands: Iterable[str]) -> bool:
    """Append workflow commands to the file that $NVQUANT_ANNOTATIONS names. Return False if it names none.

    The file is for GitHub's runner alone. The action prints it after all other output.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return False
    with Path(name).open("a", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{command}\n" for command in commands)
    return True


def _refused(text: str) -> None:
    write_annotations([workflow_command("error", {"title": TITLE}, message(text))])
