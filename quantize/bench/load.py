"""The loads and the figures of a load generator, the same for every generator."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..checkpoint.places import new_file
from ..errors import CheckFailed
from ..serving.environment import server_environment

RANDOM = "random"
MOST_SECONDS = 4 * 3600.0


class LoadFailed(CheckFailed):
    """A load without figures, or with figures of only some of its requests. The message gives the reason."""


@dataclass(frozen=True)
class Load:
    """Requests to a server by a number of users, each of whom waits for the answer before the next request.

    Attributes:
        url: of the server, without a path.
        model: its name there.
        tokenizer: folder whose tokenizer counts the prompts' tokens.
        context: tokens of a prompt. None for a data set's own prompts.
        output_tokens: tokens of an answer. An earlier end is ignored.
        seed: of the prompts. Another seed gives others, which no cache of the server knows.
        dataset, dataset_path: the generator's names.
        is_vllm: whether the server is a vLLM, or only has OpenAI's interface.
    """

    url: str
    model: str
    tokenizer: Path
    context: int | None
    output_tokens: int
    users: int
    requests: int
    seed: int
    dataset: str = RANDOM
    dataset_path: str | None = None
    is_vllm: bool = True

    def changed(self, **values: Any) -> Load:
        """The same with other values."""
        return replace(self, **values)


@dataclass(frozen=True)
class Measured:
    """Figures of a load with an answer to every request. Times are in milliseconds.

    Attributes:
        seconds: from the first request to the last answer.
        tpot_mean_ms: a token's time in an answer, without the first, averaged over answers.
        itl_p50_ms, itl_p99_ms: from one token to the next, over all tokens.
    """

    requests: int
    seconds: float
    input_tokens: int
    output_tokens: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_mean_ms: float
    itl_p50_ms: float
    itl_p99_ms: float

    @property
    def input_tokens_per_second(self) -> float:
        """Of all users together."""
        return self.input_tokens / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        """Of all users together, the time of the prompts included."""
        return self.output_tokens / self.seconds


class LoadGenerator(Protocol):
    """A program that sends requests and takes the time."""

    @property
    def name(self) -> str:
        """For the report, as `vllm bench serve`."""

    def run(self, load: Load, folder: Path) -> Measured:
        """Send the load. Returns its figures.

        Args:
            folder: for the program's own result and its output.
        Raises:
            LoadFailed: not every request was answered.
            EnvironmentLack: the program lacks something.
        """


def call(command: Sequence[str], settings: Mapping[str, str], said: Path) -> int:
    """Run a generator, with its output in the file `said`. Returns its exit code.

    Raises:
        LoadFailed: it does not start, or does not end within four hours.
    """
    # A generator computes almost nothing; with a thread for each core it would take them from a server on a CPU.
    environment = server_environment(
        {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}, command[0]
    )
    with new_file(said) as output:
        try:
            process = subprocess.Popen(
                list(command), env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise LoadFailed(f"{command[0]} does not start ({os.strerror(error.errno or 0)}).") from error
        try:
            return process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise LoadFailed(f"{command[0]} did not end within {MOST_SECONDS / 3600:.0f} hours.") from error
        finally:  # an interruption, too
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def last_words(said: Path) -> str:
    """The last line of a program's output that is an error, or its last line."""
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith(("error:", "Error:"))]
    return (errors or lines or ["no output"])[-1][:300]
