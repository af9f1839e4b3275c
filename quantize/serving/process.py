"""A server as a tree of processes: started apart from nvquant, and ended completely."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint.places import new_file, write_whole
from ..errors import InputError
from ..quoting import HIDDEN, secrets_among, without_secrets
from . import guard
from .guard import GRACE_SECONDS, descendants

FIRST_SIGNAL = 128  # and above it exit codes of processes that a signal ended, as shells give them


class ServerProcess:
    """A command that runs until `end`, with all that it starts. Its output goes to a file.

    Attributes:
        log: the file.
    Args:
        command: the program by path or name, and its arguments.
        environment: the complete one. The process inherits nothing else.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._secrets = secrets_among(command)
        with new_file(log) as output:
            self._process = subprocess.Popen(
                # -I: nothing of the caller's Python settings; -S: no site packages, which take a second to find.
                [sys.executable, "-I", "-S", guard.__file__, *command],
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """The command's exit code, 128 and more for a signal. None while it runs."""
        return self._process.poll()

    @property
    def signal_name(self) -> str | None:
        """The signal that ended the command, as `SIGKILL`."""
        code = self.exit_code
        if code is None or code <= FIRST_SIGNAL:
            return None
        with contextlib.suppress(ValueError):
            return signal.Signals(code - FIRST_SIGNAL).name
        return None

    def read_log(self) -> str:
        """The log so far, without the keys and passwords of its command."""
        text = self.log.read_text(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return without_secrets(text)

    def pids(self) -> list[int]:
        """The command's process and all below it."""
        return descendants(self._process.pid)

    def memory_bytes(self) -> int:
        """Resident memory of all processes, with shared memory counted once, or 0 where it is unknown."""
        return sum(_proportional_bytes(pid) for pid in self.pids())

    def end(self) -> None:
        """End all processes, in order if they do so in ten seconds, and wait until none is left."""
        left = self.pids()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS + 10)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as impatience:
            # Whoever presses Ctrl-C once more does not want to wait, but must not leave a server behind either.
            for pid in {*left, *self.pids(), self._process.pid}:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()
            if isinstance(impatience, KeyboardInterrupt):
                raise
        finally:
            self._clean_log()

    def _clean_log(self) -> None:
        """A log lies beside a report, and goes where that goes."""
        with contextlib.suppress(OSError, InputError):
            cleaned = self.read_log()
            if cleaned != self.log.read_text(errors="replace"):
                write_whole(self.log, cleaned.encode(errors="replace"))


def _proportional_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
