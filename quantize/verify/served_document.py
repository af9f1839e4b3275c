"""The part `serve` of a report's document (docs/serving.md, "Document")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..serving.log import LogFacts
from ..serving.server import Server
from .served_answers import Answers
from .served_arithmetic import ServedArithmetic


def serve_document(
    server: Server | None,
    url: str | None,
    facts: LogFacts,
    arithmetic: ServedArithmetic,
    forecast_bytes: int | None,
    answers: Answers | None,
    logprobs: Mapping[str, Any] | None,
    hints: Sequence[str],
) -> dict[str, Any]:
    """The results as JSON values.

    Args:
        server: None before it has started.
        url: of a server that was running already.
        forecast_bytes: of the weights in the server's memory.
        logprobs: the comparison of likelihoods, where there was one.
        hints: may contain a hint twice.
    """
    found = (logprobs or {}).get("arithmetic")
    kernel = None
    if facts.kernels or arithmetic.reported or found:
        kernel = {
            "class": ", ".join(kernel.name for kernel in facts.kernels) or None,
            "arithmetic": arithmetic.reported or found,
            "words": arithmetic.words(found),
        }
    return {
        "server": {
            "vllm": facts.version,
            "command": server.command if server else "",
            "url": url,
            "ready_seconds": round(server.ready_seconds, 1) if server and server.process else None,
        },
        "kernel": kernel,
        "attention": facts.attention,
        "memory": {
            "reported_bytes": facts.weights_bytes,
            "forecast_bytes": forecast_bytes,
            "kv_tokens": facts.kv_tokens,
            "kv_bytes": facts.kv_bytes,
            "max_model_len": facts.max_model_len,
        },
        "answers": answers.document if answers else [],
        "logprobs": logprobs,
        "decode_tokens_per_second": answers.tokens_per_second if answers else None,
        "hints": list(dict.fromkeys(hints)),
    }
