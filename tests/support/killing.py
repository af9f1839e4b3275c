"""A process that is warm (everything imported, one conversion done) and forks a child for each run of `convert`, so
that hundreds of runs can be killed in a minute. `Warm` is the test's side; this file run as a module is the process.

In a child every write boundary is counted: each os.pwritev and os.fsync, and each rename, mkdir, unlink and rmdir. At
the given one the child kills itself, a write half done.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


@dataclass(frozen=True)
class Run:
    """What a child shall do.

    Attributes:
        ids: calibration; None for a recipe that needs none.
        kill_at: number of the write boundary at which it is killed, from 1; None for an undisturbed run.
        kill_after: seconds after which its parent kills it; None to leave that.
    """

    source: str
    recipe: str
    output: str
    ids: str | None = None
    quantizer: str = "rtn"
    restart: bool = False
    kill_at: int | None = None
    kill_after: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended: `killed`, or exit code and last words, its write boundaries and its seconds."""

    killed: bool
    code: int
    words: str
    boundaries: int
    seconds: float


class Warm:
    """The warm process."""

    def __enter__(self) -> Warm:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.killing"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def __call__(self, run: Run) -> Outcome:
        """Have a child do it, and wait for its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(run)) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


class _Boundaries:
    """Counts write boundaries of this process from now on, and kills it at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self._kill_at = 0, kill_at
        self._lock = threading.Lock()
        self._write, self._fsync = os.pwritev, os.fsync
        os.pwritev, os.fsync = self._counted_write, self._counted_fsync
        sys.addaudithook(lambda event, _arguments: self._passed() if event in CHANGES else None)

    def _is_last(self) -> bool:
        with self._lock:
            self.count += 1
            return self.count == self._kill_at

    def _passed(self) -> None:
        if self._is_last():
            _kill_self()

    def _counted_write(self, descriptor: int, pieces: Sequence[memoryview], begin: int, flags: int = 0) -> int:
        if self._is_last():
            self._write(descriptor, [pieces[0][: len(pieces[0]) // 2]], begin)
            _kill_self()
        return self._write(descriptor, pieces, begin, flags)

    def _counted_fsync(self, descriptor: int) -> None:
        self._passed()
        self._fsync(descriptor)


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # never returns: this thread may go on for a moment otherwise


def _convert(run: Run) -> None:
    from nvquant.convert.options import ConvertOptions
    from nvquant.convert.pipeline import convert
    from support.conversions import calibration_of, planned

    source, calibration = Path(run.source), None
    if run.ids is not None:
        calibration = calibration_of(source, Path(run.ids))
    options = ConvertOptions(Path(run.output), run.quantizer, restart=run.restart)
    convert(planned(source, run.recipe), options, calibration)


def _child(run: Run, words: int) -> None:
    """Do it, write the number of boundaries (or the error) into the pipe, end; never returns."""
    code = 0
    try:
        boundaries = _Boundaries(run.kill_at)
        _convert(run)
        os.write(words, str(boundaries.count).encode())
    except BaseException:
        os.write(words, traceback.format_exc()[-4000:].encode())
        code = 1
    os._exit(code)


def _forked(run: Run) -> Outcome:
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(run, writing)
    os.close(writing)
    if run.kill_after is not None:
        time.sleep(run.kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        words = pipe.read()
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - started
    if os.WIFSIGNALED(status):
        return Outcome(os.WTERMSIG(status) == signal.SIGKILL, -os.WTERMSIG(status), words, 0, seconds)
    code = os.WEXITSTATUS(status)
    return Outcome(False, code, words, int(words) if code == 0 else 0, seconds)


def serve() -> None:
    """Read runs from standard input, one a line, and answer each with its outcome."""
    import torch

    torch.set_num_threads(1)  # no pool of threads that a child would miss
    is_warm = set()
    for line in sys.stdin:
        run = Run(**json.loads(line))
        kind = (run.source, run.recipe)
        if kind not in is_warm:  # imports, and whatever else only the first run of a kind does
            output = f"{run.output}-warm-{random.randrange(10**9)}"
            _convert(Run(run.source, run.recipe, output, run.ids))
            shutil.rmtree(output)
            is_warm.add(kind)
        print(json.dumps(asdict(_forked(run))), flush=True)  # noqa: T201


if __name__ == "__main__":
    serve()
