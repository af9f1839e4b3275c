"""Nothing of a server is left behind: not its children, not what detached itself, not even if nvquant is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.serving.process import ServerProcess

# A server of three generations; the last one detaches itself from group, session and parent, as daemons do. With
# STUBBORN set, none but the first hears SIGTERM.
TREE = """\
import os, signal, subprocess, sys, time
folder, depth = sys.argv[1], int(sys.argv[2])
with open(os.path.join(folder, f"{depth}.pid"), "w") as file:
    file.write(str(os.getpid()))
if depth < 3:
    subprocess.Popen([sys.executable, "-c", open(sys.argv[3]).read(), folder, str(depth + 1), sys.argv[3]],
                     start_new_session=depth == 2)
if depth > 1 and "STUBBORN" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if depth == 2:
    time.sleep(0.5)
    sys.exit()
time.sleep(600)
"""


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def tree(tmp_path: Path) -> tuple[list[str], Callable[[], list[int]]]:
    """The command of the three generations, and what gives their pids once all have started."""
    script = tmp_path / "tree.py"
    script.write_text(TREE)

    def pids() -> list[int]:
        files = [tmp_path / f"{depth}.pid" for depth in (1, 2, 3)]
        wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    return [sys.executable, str(script), str(tmp_path), "1", str(script)], pids


def test_end_ends_a_grandchild_that_detached_itself_and_ignores_sigterm(
    tree: tuple[list[str], Callable[[], list[int]]], tmp_path: Path
) -> None:
    command, pids = tree
    process = ServerProcess(command, {**os.environ, "STUBBORN": "1"}, tmp_path / "log")
    first, second, third = pids()
    wait_for(lambda: not is_alive(second))
    assert third in process.pids()  # though its parent is gone
    assert process.memory_bytes() > 1 << 20
    process.end()
    assert not any(map(is_alive, (first, second, third)))


def test_a_server_does_not_outlive_a_killed_nvquant(
    tree: tuple[list[str], Callable[[], list[int]]], tmp_path: Path
) -> None:
    command, pids = tree
    code = (
        "import os, sys, time; from pathlib import Path; from nvquant.serving.process import ServerProcess\n"
        "ServerProcess(sys.argv[2:], dict(os.environ), Path(sys.argv[1])); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log"), *command])
    started = pids()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait_for(lambda: not any(map(is_alive, started)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_when_nvquant_is_asked_to(
    tree: tuple[list[str], Callable[[], list[int]]], tmp_path: Path, number: signal.Signals
) -> None:
    command, pids = tree
    script = tmp_path / "vllm"
    script.write_text(f"#!/bin/sh\nexec {' '.join(command)}\n")
    script.chmod(0o755)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from nvquant.serving.server import ServeOptions, serving\n"
        "folder = Path(sys.argv[1])\n"
        "with serving(folder / 'checkpoint', ServeOptions(vllm=str(folder / 'vllm')), folder / 'proof', print): pass"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    started = pids()
    owner.send_signal(number)
    owner.wait(40)
    wait_for(lambda: not any(map(is_alive, started)))


def test_the_exit_code_and_the_signal_of_the_command_are_told(tmp_path: Path) -> None:
    ended = ServerProcess(["sh", "-c", "exit 7"], dict(os.environ), tmp_path / "log")
    wait_for(lambda: ended.exit_code is not None)
    assert (ended.exit_code, ended.signal_name) == (7, None)
    killed = ServerProcess(["sh", "-c", "kill -9 $$"], dict(os.environ), tmp_path / "log")
    wait_for(lambda: killed.exit_code is not None)
    assert killed.signal_name == "SIGKILL"
    for process in (ended, killed):
        process.end()


def test_output_goes_to_the_log_and_a_program_that_cannot_start_says_so(tmp_path: Path) -> None:
    process = ServerProcess(["/no/such/program"], dict(os.environ), tmp_path / "log")
    wait_for(lambda: process.exit_code is not None)
    process.end()
    assert (tmp_path / "log").read_text() == "/no/such/program: No such file or directory\n"
