"""The results of the stage `serve`: the server, the kernel in words, the answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quoting import one_line, visible
from .document import at, rows
from .measured import fixed_unit, signed, value_at
from .parts import Answer, Served, Tile
from .words import ABSENT, fixed, is_finite, number, size

ENDPOINTS = {"completions": "completion", "chat": "chat"}


def served_of(serve: Any) -> Served | None:
    """The server's facts, its answers and the hints, or None where nothing was served."""
    if not isinstance(serve, Mapping):
        return None
    hints = serve.get("hints")
    return Served(
        tuple((name, value) for name, value in _facts(serve) if value and value != ABSENT),
        tuple(_answer(answer) for answer in rows(serve.get("answers"))),
        tuple(one_line(hint) for hint in hints) if isinstance(hints, list) else (),
    )


def served_tiles(serve: Any) -> list[Tile]:
    """Decode speed for one user, with the kernel that ran."""
    speed = value_at(serve, "decode_tokens_per_second")
    if not is_finite(speed):
        return []
    version, words = at(serve, "server", "vllm"), at(serve, "kernel", "words")
    notes = [f"vLLM {one_line(version)}" if version else "", one_line(words or "").partition(":")[0]]
    return [Tile("Decode, one user", f"{number(speed)} tok/s", tuple(note for note in notes if note))]


def _facts(serve: Mapping[str, Any]) -> list[tuple[str, str]]:
    reported, forecast = value_at(serve, "memory", "reported_bytes"), value_at(serve, "memory", "forecast_bytes")
    return [
        ("Server", _server(serve)),
        ("Kernel", one_line(at(serve, "kernel", "words") or at(serve, "kernel", "class") or "")),
        ("Attention", one_line(serve.get("attention"))),
        ("Ready after", fixed_unit(value_at(serve, "server", "ready_seconds"), "s")),
        ("Weights in memory", _memory(reported, forecast)),
        ("KV cache", fixed_unit(value_at(serve, "memory", "kv_tokens"), "tokens")),
        ("Longest request", fixed_unit(value_at(serve, "memory", "max_model_len"), "tokens")),
        ("Decode, one user", fixed_unit(value_at(serve, "decode_tokens_per_second"), "tok/s")),
        ("Log-likelihood of a prompt", _logprobs(serve)),
    ]


def _server(serve: Mapping[str, Any]) -> str:
    version, url = at(serve, "server", "vllm"), at(serve, "server", "url")
    return ", ".join(part for part in (f"vLLM {one_line(version)}" if version else "", one_line(url or "")) if part)


def _memory(reported: Any, forecast: Any) -> str:
    if not is_finite(reported):
        return f"{size(forecast)} forecast, not reported" if is_finite(forecast) else ""
    return size(reported) + (f" ({size(forecast)} forecast)" if is_finite(forecast) else "")


def _logprobs(serve: Mapping[str, Any]) -> str:
    if at(serve, "logprobs") is None:
        return ""
    served, emulated = value_at(serve, "logprobs", "nll_served"), value_at(serve, "logprobs", "nll_emulated")
    return (
        f"{fixed(served, 4)} nats a token served, {fixed(emulated, 4)} emulated from the files "
        f"(mean difference {signed(value_at(serve, 'logprobs', 'mean_difference'))}, "
        f"largest {number(value_at(serve, 'logprobs', 'max_difference'))}, "
        f"over {number(value_at(serve, 'logprobs', 'tokens'))} tokens)"
    )


def _answer(answer: Mapping[str, Any]) -> Answer:
    endpoint, tokens = str(answer.get("endpoint") or "completions"), value_at(answer, "tokens")
    reason = answer.get("finish_reason")
    words = [ENDPOINTS.get(endpoint, one_line(endpoint)), "" if tokens is None else f"{number(tokens)} tokens"]
    words.append("" if reason is None else f"ended by: {one_line(reason)}")
    fault = answer.get("fault")
    text = answer.get("text")
    return Answer(
        visible(answer.get("prompt") or ""),
        visible("" if text is None else text),
        ", ".join(word for word in words if word),
        None if fault is None else one_line(fault),
    )
