"""The benchmark's figures as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..quoting import one_line
from .document import at, numeric, rows
from .parts import Column, Table
from .words import fixed, is_finite, number, percent, size

POINTS: Mapping[str, str] = {
    "name": "model",
    "kv_cache": "KV cache",
    "context": "context",
    "users": "users",
    "decode_tokens_per_second": "decode, tok/s",
    "ceiling_tokens_per_second": "ceiling, tok/s",
    "share_of_ceiling": "of ceiling",
    "prefill_tokens_per_second": "prefill, tok/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "itl_p50_ms": "inter-token p50, ms",
    "itl_p99_ms": "inter-token p99, ms",
}
SERVERS: Mapping[str, str] = {
    "name": "model",
    "kv_cache": "KV cache",
    "scheme": "weights",
    "vllm": "vLLM",
    "kernel": "kernel",
    "checkpoint_bytes": "on disk",
    "weights_bytes": "in memory",
    "gpu_memory_bytes": "GPU memory in use",
    "process_memory_bytes": "RAM in use",
    "kv_cache_tokens": "KV-cache tokens",
}
WORDS = frozenset({"name", "kv_cache", "scheme", "vllm", "kernel"})


def speed_tables(bench: Any) -> tuple[Table, ...]:
    """The benchmark's points and its servers. Empty without a benchmark."""
    found = (
        _table("Speed of serving, one row a point", POINTS, rows(at(bench, "points"))),
        _table("Servers", SERVERS, rows(at(bench, "servers"))),
    )
    return tuple(table for table in found if table is not None)


def speed_notes(bench: Any) -> tuple[str, ...]:
    """Notes beside the figures: failed points, the points' own notes, the meaning of a ceiling."""
    notes = ["The benchmark was interrupted. The table lists the points measured before that."]
    notes = notes if at(bench, "complete") is False else []
    for point in rows(at(bench, "points")):
        for name, key in (("failed", "failed"), ("note", "note")):
            if point.get(key):
                where = f"{point.get('name', 'a point')}, context {number(point.get('context'))}"
                notes.append(one_line(f"{where}, {number(point.get('users'))} users: {name}: {point[key]}"))
    if any(is_finite(numeric(point.get("ceiling_tokens_per_second"))) for point in rows(at(bench, "points"))):
        notes.append("Ceiling: the GPU's memory bandwidth over the bytes that one decoded token reads.")
    return tuple(notes)


def machine_facts(bench: Any) -> list[tuple[str, Any]]:
    """The benchmark's machine."""
    machine = at(bench, "machine")
    gpus = [
        f"{one_line(gpu.get('name'))} ({size(numeric(gpu.get('memory_bytes')))})" for gpu in rows(at(machine, "gpus"))
    ]
    bandwidth = numeric(at(machine, "bandwidth_bytes_per_second"))
    cores = at(machine, "cores")
    return [
        ("GPUs", ", ".join(gpus)),
        ("Driver", at(machine, "driver")),
        ("Memory bandwidth", f"{bandwidth / 1e12:.2f} TB/s" if is_finite(bandwidth) else None),
        ("NVFP4 on it", at(machine, "fp4")),
        ("CPU", f"{at(machine, 'cpu')}, {cores} cores" if cores else at(machine, "cpu")),
        ("Load generator", at(bench, "settings", "load_generator")),
    ]


def _table(caption: str, titles: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> Table | None:
    keys = [key for key in titles if any(line.get(key) is not None for line in lines)]
    if not keys:
        return None
    columns = tuple(Column(titles[key], "text" if key in WORDS else "number") for key in keys)
    return Table(caption, columns, tuple(tuple(_cell(key, numeric(line.get(key))) for key in keys) for line in lines))


def _cell(key: str, value: Any) -> str:
    if key in WORDS:
        return one_line(value)
    if key == "share_of_ceiling":
        return percent(value, 0)
    if key.endswith("_bytes"):
        return size(value)
    return fixed(value, 0) if is_finite(value) and abs(value) >= 1000 else number(value)
