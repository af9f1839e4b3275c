"""Keeps a server's processes together, and ends them all when nvquant ends, in whichever way.

This is a program of its own, run with nothing but the standard library: `python guard.py COMMAND...`. Its standard
input is a pipe whose other end nvquant holds. When that end closes, because nvquant closed it or was killed, the guard
ends the command and everything that the command started, and exits with the command's status.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path

GRACE_SECONDS = 10.0
ORPHAN_SECONDS = 3.0
POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents first. Empty where the system has no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # a process that ended meanwhile
            # The second field, a program's name in brackets, may hold anything.
            parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the rest still works
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class _Reaper:
    """Collects ended children, the command among them. Orphans of the command become children of the guard."""

    def __init__(self, command: int) -> None:
        self._command = command
        self.status: int | None = None

    def collect(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._command:
                self.status = os.waitstatus_to_exitcode(status)


def _start(command: list[str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should the guard itself be killed
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _end_all(reaper: _Reaper, command: int) -> None:
    """Send the command a signal to end, then the processes that it left behind, and kill those that do not end.

    The command ends its own children, because it may need them for an orderly end.
    """
    _send([command], signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    orphans_asked = False
    while left := descendants(os.getpid()):
        if time.monotonic() > deadline:
            _send(left, signal.SIGKILL)
        elif reaper.status is not None and not orphans_asked:
            _send(left, signal.SIGTERM)
            orphans_asked, deadline = True, min(deadline, time.monotonic() + ORPHAN_SECONDS)
        time.sleep(POLL_SECONDS / 4)
        reaper.collect()


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def main(command: list[str]) -> int:
    """Run the command until it or nvquant ends. Returns its exit status, negative for a signal."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    asked_to_end: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda heard, _: asked_to_end.append(heard))
    pid = _start(command)
    reaper = _Reaper(pid)
    while reaper.status is None and not asked_to_end:
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if readable and not os.read(0, 1):
            break
        reaper.collect()
    _end_all(reaper, pid)
    return reaper.status if reaper.status is not None else -signal.SIGKILL


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code >= 0 else 128 - code)
