"""`nvquant convert` under launchers: one voice, one document, the bytes of one process, and an end for all."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.conversions import TinyModels, contents, random_samples, write_ids
from support.launching import DEADLINE_SECONDS, StartedRanks, clean_environment, free_port
from support.tiny_models import tiny_llama

RUN = ("--device", "cpu", "--quantizer", "rtn", "--sequence-length", "200")
MODULE = (sys.executable, "-m", "nvquant")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of so many layers, beside the ids of so many sequences, that a run takes seconds."""
    folder = tmp_path_factory.mktemp("deep")
    write_ids(folder / "ids.jsonl", random_samples([200] * 24))
    return tiny_llama(folder / "source", num_layers=16, shards=2)


def convert(source: Path, ids: Path, samples: int) -> list[str]:
    return [
        "convert", str(source), "-o", "out", "--calibration", str(ids), "--samples", str(samples), *RUN, "--json",
    ]  # fmt: skip


def alone(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [*MODULE, *command],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=DEADLINE_SECONDS,
        env=clean_environment() | {"OMP_NUM_THREADS": "1"},
    )


def test_accelerate_launch_gives_one_document_and_the_bytes_of_one_process(
    tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    assert accelerate is not None
    # `--cpu` starts one process, however many are asked for; with `--multi_gpu` their device is left to the command.
    launcher = [
        accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", str(free_port()), "-m", "nvquant",
    ]  # fmt: skip
    command = convert(tiny("gemma4"), ids, 6)
    launched = subprocess.run(
        [*launcher, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=DEADLINE_SECONDS,
        env=clean_environment() | {"OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["output"] == "out"
    assert launched.stderr.count("nvquant 0") == launched.stderr.count("6 samples, 144 tokens") == 1
    assert ", cpu, 2 ranks" in launched.stderr
    assert "layer=6/6 phase=done" in launched.stderr
    one = alone(command, tmp_path / "alone")
    assert one.returncode == 0, one.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")


@pytest.mark.thorough
def test_only_the_first_rank_speaks(tiny: TinyModels, ids: Path, tmp_path: Path) -> None:
    ended = StartedRanks(3, [*MODULE, *convert(tiny("llama"), ids, 6)], tmp_path).wait()
    assert [rank.code for rank in ended] == [0, 0, 0], ended
    assert json.loads(ended[0].stdout)["quantized"] == 9
    assert [rank.stdout for rank in ended[1:]] == ["", ""]
    assert "Warning" not in ended[0].stderr
    assert [rank.stderr for rank in ended[1:]] == ["", ""]


# The real command; what it registers to do at exit is done before this, and is heard of last.
LAST_THREADS = """
import atexit, pathlib, sys
atexit.register(lambda: print("threads", len(list(pathlib.Path("/proc/self/task").iterdir())), file=sys.stderr))
from nvquant.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_of_the_connections_is_left_when_the_interpreter_ends(
    tiny: TinyModels, ids: Path, tmp_path: Path
) -> None:
    """One that wants to run then aborts the process, after a run that went well."""
    ended = StartedRanks(2, [sys.executable, "-c", LAST_THREADS, *convert(tiny("gemma4"), ids, 6)], tmp_path).wait()
    assert [rank.code for rank in ended] == [0, 0], ended
    assert [rank.stderr.splitlines()[-1] for rank in ended] == ["threads 1", "threads 1"]


def wait_for_layer(folder: Path, started: StartedRanks) -> None:
    """Wait until a layer is whole, in a run that still goes on."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not list(folder.glob("out.partial/nvquant_run/model-00001-*.json")):
        assert all(process.poll() is None for process in started.processes), started.wait()
        assert time.monotonic() < deadline, started.wait()
        time.sleep(0.005)


def test_a_rank_killed_in_the_middle_ends_the_run_and_one_process_finishes_it(deep: Path, tmp_path: Path) -> None:
    command = convert(deep, deep.with_name("ids.jsonl"), 24)
    started = StartedRanks(2, [*MODULE, *command], tmp_path)
    wait_for_layer(tmp_path, started)
    started.processes[1].send_signal(signal.SIGKILL)
    first, second = started.wait()
    assert second.code == -signal.SIGKILL
    assert first.code == 3, first.stderr
    assert json.loads(first.stdout)["error"]["exit_code"] == 3
    assert "Traceback" not in first.stderr
    (error,) = [line for line in first.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: one of the 2 ranks ended (rank 0 lost its connection)")
    assert "of 16 layers are complete and kept" in error
    assert not (tmp_path / "out").exists()
    resumed = alone(command, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert 1 <= json.loads(resumed.stdout)["layers_resumed"] < 16
    whole = alone(command, tmp_path / "whole")
    assert json.loads(whole.stdout)["layers_resumed"] == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_an_interrupt_of_one_rank_ends_all_and_says_how_to_go_on(deep: Path, tmp_path: Path) -> None:
    command = convert(deep, deep.with_name("ids.jsonl"), 24)
    started = StartedRanks(2, [*MODULE, *command], tmp_path)
    wait_for_layer(tmp_path, started)
    started.processes[1].send_signal(signal.SIGINT)
    ended = started.wait()
    assert [rank.code for rank in ended] == [130, 130], ended
    for rank in ended:
        assert rank.stderr.count("Stopped after layer ") == rank.stderr.count("Error: ") == 1
        assert "To resume, run the same command again." in rank.stderr
        assert "Traceback" not in rank.stderr
    assert json.loads(ended[0].stdout)["error"]["exit_code"] == 130 and ended[1].stdout == ""
    assert (tmp_path / "out.partial").is_dir()


def test_ranks_that_do_not_find_each_other_say_so(tiny: TinyModels, ids: Path, tmp_path: Path) -> None:
    environment = clean_environment() | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ended = subprocess.run(
        [*MODULE, *convert(tiny("llama"), ids, 6)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=DEADLINE_SECONDS,
        env=environment | {"MASTER_PORT": "99999"},
    )
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("Error: the ranks cannot connect (port must have value")
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
