"""`vllm bench serve` as load generator, of the same vLLM that serves.

Source of the flags and of the result's keys: vLLM 0.24.0 and 0.32.0, benchmarks/serve.py, seen in real runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EnvironmentLack, InputError
from ..serving.command import COMMAND_MODULE, SERVER_MODULE, VllmCommand
from .load import RANDOM, Load, LoadFailed, Measured, call, last_words

RESULT, SAID = "vllm-bench.json", "vllm-bench.log"
# The command line of the CPU wheel looks for a distribution named vllm, which that wheel is not, and dies; the module
# behind `vllm bench serve` is the same.
DRIVER = """\
import argparse
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""


@dataclass(frozen=True)
class VllmBench:
    """`vllm bench serve`.

    Attributes:
        words: program and arguments, up to where its flags begin.
        version: of that vLLM, where it is known.
    """

    words: tuple[str, ...]
    version: str | None = None

    @property
    def name(self) -> str:
        """With its version, where that is known."""
        return "vllm bench serve" + (f" {self.version}" if self.version else "")

    def run(self, load: Load, folder: Path) -> Measured:
        """See `LoadGenerator.run`."""
        result, said = folder / RESULT, folder / SAID
        result.unlink(missing_ok=True)
        code = call([*self.words, *flags(load, folder)], {"VLLM_NO_USAGE_STATS": "1"}, said)
        if code != 0 or not result.is_file():
            _explain_lack(self.words, said)
            raise LoadFailed(f"vllm bench serve ended with exit code {code}: {last_words(said)}")
        return parse_result(json.loads(result.read_text()), load)


def bench_command(vllm: VllmCommand) -> VllmBench:
    """`vllm bench serve` of the vLLM that `vllm` starts.

    Raises:
        InputError: the call cannot be derived from its command line.
    """
    words = vllm.words
    if SERVER_MODULE in words:
        at = words.index(SERVER_MODULE)
        return VllmBench((*words[: at - 1], "-c", DRIVER), vllm.version)
    if words[-1] == "serve":
        return VllmBench((*words[:-1], "bench", "serve"), vllm.version)
    if words[-1] == COMMAND_MODULE:
        return VllmBench((*words, "bench", "serve"), vllm.version)
    raise InputError(
        "nvquant cannot derive the call of `vllm bench serve` from it",
        where=f"--vllm {' '.join(words)}",
        hint="Give a command that ends in `serve`, or use --load-generator guidellm",
    )


def flags(load: Load, folder: Path) -> list[str]:
    """The arguments of a load."""
    # Servers other than vLLM answer /tokenize in another form, which the generator does not understand; beside /v1
    # they have none, and it goes on without.
    base, endpoint = (load.url, "/v1/completions") if load.is_vllm else (f"{load.url}/v1", "/completions")
    return [
        *("--backend=vllm", f"--base-url={base}", f"--endpoint={endpoint}", "--model", load.model),
        *("--tokenizer", str(load.tokenizer), f"--dataset-name={load.dataset}"),
        *([f"--dataset-path={load.dataset_path}"] if load.dataset_path else []),
        *([f"--random-input-len={load.context}"] if load.dataset == RANDOM else []),
        f"--{'random-' if load.dataset == RANDOM else ''}output-len={load.output_tokens}",
        *(f"--num-prompts={load.requests}", f"--max-concurrency={load.users}", f"--seed={load.seed}"),
        *("--ignore-eos", "--temperature=0", "--disable-tqdm", "--ready-check-timeout-sec=0"),
        *("--percentile-metrics=ttft,tpot,itl", "--metric-percentiles=50,99"),
        *("--save-result", "--save-detailed", f"--result-dir={folder}", f"--result-filename={RESULT}"),
    ]


def parse_result(result: Mapping[str, Any], load: Load) -> Measured:
    """The figures of a result file.

    Raises:
        LoadFailed: a request failed, or the file lacks a figure.
    """
    try:
        completed, failed = int(result["completed"]), int(result.get("failed", 0))
        if failed or completed < load.requests:
            raise LoadFailed(_failures(load, completed, result.get("errors")))
        measured = Measured(
            completed,
            float(result["duration"]),
            int(result["total_input_tokens"]),
            int(result["total_output_tokens"]),
            float(result["p50_ttft_ms"]),
            float(result["p99_ttft_ms"]),
            float(result["mean_tpot_ms"]),
            float(result["p50_itl_ms"]),
            float(result["p99_itl_ms"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LoadFailed(f"vllm bench serve wrote a result in an unknown form ({error!r}).") from error
    if not math.isfinite(measured.seconds) or measured.seconds <= 0:
        raise LoadFailed(f"vllm bench serve reported {measured.seconds} seconds, which is impossible.")
    return measured


def _failures(load: Load, completed: int, errors: Any) -> str:
    words = f"{load.requests - completed} of {load.requests} requests failed"
    said = [str(error).strip() for error in errors if error] if isinstance(errors, Sequence) else []
    return f"{words}: {said[0].splitlines()[-1][:300]}" if said else f"{words}."


def _explain_lack(words: Sequence[str], said: Path) -> None:
    text = last_words(said)
    if "No module named" not in text and "ImportError" not in text:
        return
    python = words[0] if "-c" in words or "-m" in words else "the Python of that vLLM"
    raise EnvironmentLack(
        f"vllm bench serve lacks a package ({text})", hint=f"install it with `{python} -m pip install 'vllm[bench]'`"
    )
