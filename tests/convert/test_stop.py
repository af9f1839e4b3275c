"""Runs that are asked to end by a signal: in order at the first one, at once at a second SIGINT; then continued."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from nvquant.convert.journal import STATE_FOLDER
from nvquant.convert.stop import HEARD, Stopped, StopRequest
from support.conversions import contents, random_samples, write_ids
from support.tiny_models import tiny_llama

LAYERS = 24


class Command:
    """A long enough `nvquant convert` on the CPU, run as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.output = folder, folder / "out"
        self.partial, self.state = folder / "out.partial", folder / "out.partial" / STATE_FOLDER
        source = tiny_llama(folder / "source", num_layers=LAYERS, hidden_size=128, intermediate_size=512)
        ids = write_ids(folder / "ids.jsonl", random_samples((200,) * 24))
        self.arguments = [
            "convert", str(source), "--recipe", "nvfp4-full", "--device", "cpu", "--calibration", str(ids),
            "--samples", "24", "-o",
        ]  # fmt: skip

    @contextmanager
    def started(self, *program: str) -> Iterator[subprocess.Popen[str]]:
        """The running process."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *(program or ("-m", "nvquant")), *self.arguments, str(self.output)],
            env=environment, cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_for_layers(self, process: subprocess.Popen[str], layers: int) -> None:
        """Wait until so many layers are whole."""
        while len(list(self.state.glob("model-*.json"))) < layers:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)

    def whole_layers(self) -> int:
        records = [json.loads(path.read_text()) for path in self.state.glob("model-*.json")]
        return sum(record["layer"] is not None for record in records)

    def finish(self, output: Path | None = None) -> int:
        """Run to the end; the number of layers that were not made again."""
        ended = subprocess.run(
            [sys.executable, "-m", "nvquant", *self.arguments, str(output or self.output), "--json"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=self._folder, capture_output=True, text=True,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return int(json.loads(ended.stdout)["layers_resumed"])


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("stop"))


@pytest.fixture(scope="module")
def expected(command: Command) -> dict[str, str]:
    """What a run that nobody disturbs gives."""
    output = command.output.with_name("undisturbed")
    assert command.finish(output) == 0
    return contents(output)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "command" in request.fixturenames:
        command = request.getfixturevalue("command")
        for folder in (command.output, command.partial):
            subprocess.run(["rm", "-rf", folder], check=True)


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.thorough)]
)
def test_a_signal_ends_the_run_in_order_and_the_same_command_goes_on(
    command: Command, expected: dict[str, str], number: signal.Signals, code: int
) -> None:
    with command.started() as process:
        command.wait_for_layers(process, 3)
        process.send_signal(number)
        stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert stdout == ""
    assert stderr.count(HEARD.decode()) == 1
    last = stderr.splitlines()[-1]
    found = re.fullmatch(
        rf"(?:Error: )?Stopped after layer (\d+) of {LAYERS}\. To resume, run the same command again\.", last
    )
    assert found, stderr
    assert "Traceback" not in stderr
    assert not command.output.exists()
    whole = command.whole_layers()
    assert 2 <= int(found[1]) == whole < LAYERS
    assert not list(command.partial.rglob("*.tmp"))
    assert command.finish() == whole
    assert contents(command.output) == expected
    assert not command.partial.exists()


# The real command, but for its display, which is told before every batch and holds the main thread until it is
# interrupted.
WAITING = """
import contextlib, sys, threading, time
import nvquant.cli.progress, nvquant.convert.stop, nvquant.convert.watch
from nvquant.cli.main import main

requests = []

class Known(nvquant.convert.stop.StopRequest):
    def __init__(self):
        super().__init__()
        requests.append(self)

def wait(now):
    if now.layers_done >= 2 and threading.current_thread() is threading.main_thread():
        print("waiting", flush=True)
        while not requests[0].number:
            time.sleep(0.005)
        print("heard", flush=True)
        while True:
            time.sleep(0.005)

nvquant.convert.stop.StopRequest = Known
nvquant.convert.watch.TELL_SECONDS = 0
nvquant.cli.progress.progress_display = lambda: contextlib.nullcontext(wait)
main(sys.argv[1:])
"""


def read_line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def test_a_second_interrupt_ends_the_run_at_once_and_what_is_whole_stays(
    command: Command, expected: dict[str, str]
) -> None:
    with command.started("-c", WAITING) as process:
        assert read_line(process.stdout) == "waiting"
        process.send_signal(signal.SIGINT)
        assert read_line(process.stdout) == "heard"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "Stopped."
    assert not command.output.exists()
    whole = command.whole_layers()
    assert 2 <= whole < LAYERS
    assert command.finish() == whole
    assert contents(command.output) == expected


def test_a_second_interrupt_raises_and_a_second_termination_does_not() -> None:
    with StopRequest() as stop:
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_mean_what_they_meant_before_when_the_block_ends() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_exit_code_is_that_of_the_signal() -> None:
    assert Stopped(signal.SIGINT, 2, 6).exit_code == 130
    assert Stopped(signal.SIGTERM, 2, 6).exit_code == 143
