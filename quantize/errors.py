"""Errors that a user can act on. Each carries the exit code of the command that it ends.

A message is one sentence (two at most) that names the file, tensor or option and the way out. Without `--debug`,
nothing else is printed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .quoting import message


def phrase(what: str, where: str | None = None, hint: str | None = None) -> str:
    """The sentence of an error: `where: what: hint.`

    Args:
        where: left out where `what` begins with it.
        hint: a second sentence if it begins with a capital, or if `what` ends with a full stop.
    """
    text = f"{where}: {what}" if where and not what.startswith(where) else what
    if not hint:
        return text
    join = " " if text.endswith(".") else ". " if hint[0].isupper() else ": "
    return f"{text}{join}{hint}."


class NvquantError(Exception):
    """Base of all errors whose message is meant for the user.

    As text it is one line without control characters, secrets and commands to a reader of logs, whatever it names.

    Attributes:
        what: the problem, with the exact names and values.
        where: the file, tensor or option. None where `what` alone names it.
        hint: the way out, without its full stop. None where there is none, or where `what` contains it.
    """

    exit_code = 1

    def __init__(self, what: str = "", *, where: object = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.hint = what, hint
        self.where = None if where is None else str(where)
        self._more: list[str] = []

    def __str__(self) -> str:
        return message(" ".join([phrase(self.what, self.where, self.hint), *self._more]))

    def add(self, sentence: str) -> None:
        """Append a sentence to the text."""
        self._more.append(sentence)

    def rename(self, old: str, new: str) -> None:
        """Replace a word in all fields, such as the option of another command."""
        self.what = self.what.replace(old, new)
        self.where = self.where and self.where.replace(old, new)
        self.hint = self.hint and self.hint.replace(old, new)

    def as_json(self) -> dict[str, Any]:
        """The fields, and the exit code of the command."""
        hint = " ".join([f"{self.hint}." if self.hint and self._more else self.hint or "", *self._more]).strip()
        return {
            "what": message(self.what),
            "where": None if self.where is None else message(self.where),
            "hint": message(hint) if hint else None,
            "exit_code": self.exit_code,
        }


class CheckFailed(NvquantError):
    """A check failed."""

    exit_code = 1


class InputError(NvquantError):
    """The input or the request is wrong, and nothing was written."""

    exit_code = 2


class EnvironmentLack(NvquantError):
    """The environment lacks something: a package, a version, a device."""

    exit_code = 3


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """The error for a name that is none of the choices.

    Args:
        kind: such as `layout`.
        choices: two or more.
    """
    *others, last = choices
    return InputError(f"{kind} '{name}' does not exist", hint=f"choose {', '.join(others)} or {last}")


class ShapeError(InputError):
    """A matrix whose number of columns does not divide into blocks of 16."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(
            f"{name} has shape {list(shape)}, whose last axis is not a multiple of 16",
            where=name,
            hint="remove it from the recipe's quantize list",
        )
        self.name, self.shape = name, shape


class NonFiniteError(InputError):
    """A NaN or an infinity in a weight, with its first position."""

    def __init__(self, name: str, row: int, column: int) -> None:
        super().__init__(
            f"{name} holds a NaN or an infinity at row {row}, column {column}",
            where=name,
            hint="the source model is damaged, download it again",
        )
        self.name, self.row, self.column = name, row, column
