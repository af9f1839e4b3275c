"""guidellm as load generator.

Its time between tokens is each answer's mean, so that p50 and p99 are over answers, not over tokens. It does not
request greedy decoding. Source of the flags and of the result's keys: guidellm 0.8.1, seen in real runs.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EnvironmentLack
from .load import Load, LoadFailed, Measured, call, last_words

RESULT, SAID = "guidellm.json", "guidellm.log"
INSTALL = "python -m venv guidellm && guidellm/bin/pip install guidellm"


@dataclass(frozen=True)
class GuideLlm:
    """`guidellm run`, of 0.8 or newer.

    Attributes:
        words: program and arguments, up to `run`.
    """

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """For the report."""
        return "guidellm"

    def run(self, load: Load, folder: Path) -> Measured:
        """See `LoadGenerator.run`."""
        result, said = folder / RESULT, folder / SAID
        result.unlink(missing_ok=True)
        code = call([*self.words, "run", *flags(load, result)], {}, said)
        if code != 0 or not result.is_file():
            raise LoadFailed(f"guidellm ended with exit code {code}: {last_words(said)}")
        return parse_result(json.loads(result.read_text()), load)


def find_guidellm(given: str | None) -> GuideLlm:
    """Find the guidellm of a command line, or the one on PATH.

    Raises:
        EnvironmentLack: there is none.
    """
    words = shlex.split(given or "guidellm") or ["guidellm"]
    if shutil.which(words[0]) is None:
        raise EnvironmentLack(
            f"There is no program {words[0]}",
            hint=f"install it in an environment of its own ({INSTALL}) and name it with --guidellm",
        )
    return GuideLlm(tuple(words))


def flags(load: Load, result: Path) -> list[str]:
    """The arguments of a load."""
    return [
        *("--backend", f"kind=openai_http,target={load.url},model={load.model},request_format=/v1/completions"),
        *("--profile", f"kind=concurrent,streams={load.users}"),
        *("--constraint", f"kind=max_requests,count={load.requests}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={load.context},output_tokens={load.output_tokens}"),
        *("--tokenizer", f"kind=hf_auto,model={load.tokenizer}"),
        *("--seed", f"kind=static,value={load.seed}"),
        *("--output", f"kind=json,path={result}", "--disable-console"),
    ]


def parse_result(result: Mapping[str, Any], load: Load) -> Measured:
    """The figures of a result file with one benchmark.

    Raises:
        LoadFailed: a request failed, or the file lacks a figure.
    """
    try:
        benchmark = result["benchmarks"][0]
        metrics = benchmark["metrics"]
        totals = metrics["request_totals"]
        answered, errored = int(totals["successful"]), int(totals["errored"]) + int(totals["incomplete"])
        if errored or answered < load.requests:
            words = f"{max(errored, load.requests - answered)} of {load.requests} requests failed"
            raise LoadFailed(f"{words}: {_first_error(benchmark)}")

        def of(name: str, figure: str) -> float:
            found = metrics[name]["successful"]
            return float(found["percentiles"][figure] if figure.startswith("p") else found[figure])

        ttft, latency = of("time_to_first_token_ms", "mean"), 1000 * of("request_latency", "mean")
        mean_tokens = of("output_token_count", "mean")
        return Measured(
            answered,
            float(benchmark["duration"]),
            round(of("prompt_token_count", "mean") * answered),
            round(mean_tokens * answered),
            of("time_to_first_token_ms", "p50"),
            of("time_to_first_token_ms", "p99"),
            # guidellm's own time per output token counts the first one too.
            (latency - ttft) / (mean_tokens - 1) if mean_tokens > 1 else 0.0,
            of("inter_token_latency_ms", "p50") if mean_tokens > 1 else 0.0,
            of("inter_token_latency_ms", "p99") if mean_tokens > 1 else 0.0,
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LoadFailed(f"guidellm wrote a result in an unknown form ({error!r}).") from error


def _first_error(benchmark: Mapping[str, Any]) -> str:
    errored = (benchmark.get("requests") or {}).get("errored") or [{}]
    error = str((errored[0].get("info") or {}).get("error") or "no reason given")
    return (
        error.encode().decode("unicode_escape", errors="replace").splitlines()[0].partition('("')[2][:300]
        or error[:300]
    )
