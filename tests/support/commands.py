"""The command line called in this process, as the console script calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from nvquant.cli.main import main


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Ended]


def run_command(capfd: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """Run a command line; everything that reaches the process's streams is seen, what libraries write too."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    stdout, stderr = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, stdout, stderr)
