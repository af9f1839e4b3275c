"""The end of a run on request: the current layer is dropped, everything written stays, and the next run resumes."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from ..errors import NvquantError

HEARD = b"Stopping. Complete work is kept. Press Ctrl-C again to end the run at once.\n"
STOPPED = 128  # and above it the exit codes of runs that a signal ended


class Stopped(NvquantError):
    """A signal ended the run. The exit code is that of the signal, as shells give it."""

    def __init__(self, number: int, layers_done: int, layers: int) -> None:
        super().__init__(hint="To resume, run the same command again")
        self.exit_code = STOPPED + number
        self.count(layers_done, layers)

    def count(self, layers_done: int, layers: int) -> None:
        """Set the number of complete layers. Those on their way to the disk become complete while the run ends."""
        self.what = f"Stopped after layer {layers_done} of {layers}"


class StopRequest:
    """A request to end the run. As a context it handles SIGINT and SIGTERM: the first one ends the run in order, and a
    second SIGINT ends it at once.

    Attributes:
        number: of the signal that arrived.
        is_quiet: whether to print nothing on stderr when it arrives.
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
