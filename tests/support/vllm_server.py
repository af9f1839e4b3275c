"""Start a real vLLM server on a checkpoint, ask it, and make sure that nothing of it survives."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PYTHON_VARIABLE = "NVQUANT_TEST_VLLM"
MODEL_NAME = "served"

# One computing thread: with as many as there are cores, vLLM's worker and its own server starve each other.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # vLLM compiles the function that ranks prompt logprobs at the first request, for three seconds.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The worker lives in the engine's process: one import of vLLM less, a third of the start-up time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
# Names that would lead the server to this test run's packages, or away from the plugin.
FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS", "VLLM_PLUGINS", "VLLM_DISABLED_KERNELS")

ARGUMENTS = ("--enforce-eager", "--max-model-len=512")
# Without it vLLM serves a checkpoint that lacks a tensor, from uninitialised memory.
CHECK_LOADED = '--model-loader-extra-config={"enable_weights_track": true}'


class ServerDied(AssertionError):
    """The server ended before it was ready; the message is the root cause from its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers; lives as long as the `serve` block around it."""

    url: str
    log: Path

    @property
    def kernel(self) -> str:
        """Name of the class that multiplies NVFP4 weights, as the server logged it."""
        found = re.search(r"Using (\w+) for NVFP4 GEMM", self.log.read_text())
        assert found, f"{self.log} names no NVFP4 kernel"
        return found[1]

    def complete(self, prompt: str | Sequence[int], max_tokens: int) -> str:
        """Greedy continuation of a text or of token ids."""
        return self._ask(prompt, max_tokens=max_tokens)["text"]

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Natural-log likelihood of each id but the first, given all ids before it."""
        answers = self._ask(ids, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
        return [answer[str(token)]["logprob"] for answer, token in zip(answers[1:], ids[1:], strict=True)]

    def _ask(self, prompt: str | Sequence[int], **options: Any) -> dict[str, Any]:
        body = {"model": MODEL_NAME, "prompt": prompt, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]


def vllm_python() -> Path:
    """Python of the vLLM environment; skips the calling test when there is none.

    Raises AssertionError when the variable is set but names no file: that is a mistake, not an absence.
    """
    if given := os.environ.get(PYTHON_VARIABLE):
        assert Path(given).is_file(), f"{PYTHON_VARIABLE}={given} is not a Python interpreter"
        return Path(given)
    default = REPOSITORY / ".venv-vllm" / "bin" / "python"
    if not default.is_file():
        pytest.skip(
            f"no vLLM environment: set {PYTHON_VARIABLE} to its python, or install one in .venv-vllm "
            "(integrations/vllm_cpu/README.md has the lines)"
        )
    return default


@contextmanager
def serve(checkpoint: Path, log: Path, *, check_loaded: bool = True, ready_seconds: float = 240) -> Iterator[Server]:
    """Serve a checkpoint folder on a free port of this machine; the server's output goes to `log`.

    With `check_loaded` vLLM refuses a checkpoint that leaves one of its parameters without a value.
    Raises ServerDied with the root cause when it ends early, TimeoutError when it is not ready in time.
    """
    port = _free_port()
    # `python -m` and not `vllm serve`: that script of the CPU wheel looks for a distribution named vllm and dies.
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server"]
    command += [f"--model={checkpoint}", f"--served-model-name={MODEL_NAME}", "--host=127.0.0.1", f"--port={port}"]
    command += [*ARGUMENTS, *([CHECK_LOADED] if check_loaded else [])]
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN_VARIABLES} | ENVIRONMENT
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_ready(process, server, ready_seconds)
        yield server
    finally:
        _end_group(process)


def root_cause(log: str) -> str:
    """Return the line of a failed start's log that says why: the last error of the process that loads the model.

    The server itself ends with "Engine core initialization failed", which is never the cause.
    """
    error = re.compile(r"^\((?:Worker|EngineCore)[^)]*\).*?\b(\w+(?:Error|Exception): .*)$", re.MULTILINE)
    lines = error.findall(log) or re.findall(r"^.*\w+(?:Error|Exception): .*$", log, re.MULTILINE)
    return lines[-1] if lines else log[-2000:]


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not _is_healthy(server.url):
        if process.poll() is not None:
            raise ServerDied(f"{root_cause(server.log.read_text())}\nfull log: {server.log}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer from vLLM after {seconds} seconds, see {server.log}")
        time.sleep(0.2)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, wait until its group has removed its shared memory, and kill whatever is left of it."""
    process.terminate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _is_alive(process):
        time.sleep(0.1)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Say whether any process of the group runs; the group's number is that of its first process."""
    process.poll()  # a zombie would count as a member
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
