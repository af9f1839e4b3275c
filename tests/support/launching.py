"""Several processes on one conversion: ranks that a fork of one warm process starts, and any command as ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from support.commands import Ended

DEADLINE_SECONDS = 120.0
FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankEnded:
    """How one rank ended.

    Attributes:
        code: its exit code; negative for a signal.
        told: what it had to say: `error`, or `finished` and `resumed`.
    """

    code: int
    told: Mapping[str, Any]

    @property
    def error(self) -> str:
        """The sentence it ended with."""
        return str(self.told["error"])


class WarmRanks:
    """Starts ranks as forks of a process that has imported everything: real processes, without seconds of imports.

    A job is what `support.rank_process` reads; used as a context.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._jobs = folder, 0
        environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        self._log = (folder / "warm.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.rank_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> WarmRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    def __call__(self, size: int, **job: Any) -> list[RankEnded]:
        """Run a job on so many ranks, of which none may still run at the deadline; how each ended, in order."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._jobs += 1
        folder = self._folder / f"job-{self._jobs}"
        folder.mkdir()
        task = {"size": size, "port": free_port(), "folder": str(folder), "deadline": DEADLINE_SECONDS, "job": job}
        self._process.stdin.write(json.dumps(task, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "warm.log").read_text()
        codes = json.loads(answer)
        told = [self._told(folder / f"rank-{rank}.json") for rank in range(size)]
        stuck = [rank for rank, code in enumerate(codes) if code is None]
        assert not stuck, f"ranks {stuck} still ran after {DEADLINE_SECONDS} s: {told}"
        return [RankEnded(code, said) for code, said in zip(codes, told, strict=True)]

    @staticmethod
    def _told(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text()) if path.exists() else {}


class StartedRanks:
    """A command started as every one of so many ranks, by the variables that launchers set."""

    def __init__(self, size: int, command: Sequence[object], folder: Path) -> None:
        self._folder = folder
        port = str(free_port())
        self.processes = []
        for rank in range(size):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment = clean_environment() | {name: str(value) for name, value in variables.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
                words = [str(word) for word in command]
                self.processes.append(subprocess.Popen(words, stdout=out, stderr=err, env=environment, cwd=folder))

    def wait(self) -> list[Ended]:
        """How each ended; none may still run at the deadline."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        try:
            for process in self.processes:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
        return [self._ended(rank, process.returncode) for rank, process in enumerate(self.processes)]

    def _ended(self, rank: int, code: int) -> Ended:
        return Ended(code, (self._folder / f"{rank}.out").read_text(), (self._folder / f"{rank}.err").read_text())


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher sets."""
    return {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES}


def free_port() -> int:
    """A port on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
