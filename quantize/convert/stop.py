"""Ending a run on request: the layer at hand is dropped, everything written stays, and the next run continues."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from ..errors import NvquantError

HEARD = b"Stopping; layers that are whole are kept. Ctrl-C once more ends the run at once.\n"
STOPPED = 128  # and above it the exit codes of runs that a signal ended


class Stopped(NvquantError):
    """The run was asked to end; the exit code is that of the signal, as shells give it."""

    def __init__(self, number: int, layers_done: int, layers: int) -> None:
        super().__init__("")
        self.exit_code = STOPPED + number
        self.count(layers_done, layers)

    def count(self, layers_done: int, layers: int) -> None:
        """Say how many layers are whole; those on their way to the disk become so while the run ends."""
        self.args = (f"Stopped after layer {layers_done} of {layers}; run the same command again to continue.",)


class StopRequest:
    """Whether the run shall end. As a context it listens to SIGINT and SIGTERM: the first one ends the run in order,
    a second SIGINT at once.

    Attributes:
        number: of the signal that was heard.
        is_quiet: whether nobody is told on stderr that it was heard.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_quiet = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _listen(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is None and not self.is_quiet:
            with contextlib.suppress(OSError):  # past Python's buffers, which the signal may have interrupted
                os.write(2, HEARD)
        self.number = number
