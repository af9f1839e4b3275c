"""Errors that a user can act on. Each carries the exit code of the command that it ends.

A message is one sentence (two at most) that names the file, tensor or option and the way out. Without `--debug`,
nothing else is printed.
"""

from __future__ import annotations

from .quoting import message


class NvquantError(Exception):
    """Base of all errors whose message is meant for the user.

    As text it is one line without control characters, secrets and commands to a reader of logs, whatever it names.
    """

    exit_code = 1

    def __str__(self) -> str:
        return message(super().__str__())


class CheckFailed(NvquantError):
    """A check failed."""

    exit_code = 1


class InputError(NvquantError):
    """The input or the request is wrong, and nothing was written."""

    exit_code = 2


class EnvironmentLack(NvquantError):
    """The environment lacks something: a package, a version, a device."""

    exit_code = 3


class ShapeError(InputError):
    """A matrix whose number of columns does not divide into blocks of 16."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(
            f"{name} has shape {list(shape)}, whose last axis is not a multiple of 16: remove it from the "
            f"recipe's quantize list."
        )
        self.name, self.shape = name, shape


class NonFiniteError(InputError):
    """A NaN or an infinity in a weight, with its first position."""

    def __init__(self, name: str, row: int, column: int) -> None:
        super().__init__(
            f"{name} holds a NaN or an infinity at row {row}, column {column}: the source model is damaged, "
            f"download it again."
        )
        self.name, self.row, self.column = name, row, column
