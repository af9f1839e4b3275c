"""The results of a benchmark as JSON and Markdown, written after every point, so that an interruption loses none."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.places import write_whole
from ..errors import InputError
from ..serving.machine import BANDWIDTH_SOURCE, Gpu, fp4_path, ram_bytes

JSON_NAME, MARKDOWN_NAME = "bench.json", "bench.md"
NO_FIGURE = "-"
COLUMNS: tuple[tuple[str, str], ...] = (
    ("name", "model"),
    ("kv_cache", "KV cache"),
    ("context", "context"),
    ("users", "users"),
    ("decode_tokens_per_second", "decode tok/s"),
    ("ceiling_tokens_per_second", "ceiling tok/s"),
    ("share_of_ceiling", "of ceiling"),
    ("prefill_tokens_per_second", "prefill tok/s"),
    ("ttft_p50_ms", "TTFT p50 ms"),
    ("ttft_p99_ms", "TTFT p99 ms"),
    ("itl_p50_ms", "inter-token p50 ms"),
    ("itl_p99_ms", "inter-token p99 ms"),
)
SERVER_COLUMNS: tuple[tuple[str, str], ...] = (
    ("name", "model"),
    ("kv_cache", "KV cache"),
    ("scheme", "weights"),
    ("checkpoint_bytes", "on disk"),
    ("weights_bytes", "in memory"),
    ("read_bytes_per_token", "read a token"),
    ("gpu_memory_bytes", "GPU memory in use"),
    ("process_memory_bytes", "RAM in use"),
    ("kv_cache_tokens", "KV-cache tokens"),
    ("vllm", "vLLM"),
)
READING = (
    "Decode: users * 1000 / mean time of an output token except the first. Prefill: prompt tokens a second of all "
    "users, from requests with one output token. Ceiling: the GPU's memory bandwidth over the bytes that a decoded "
    "token reads, weights once for all users. With many users, arithmetic is the limit long before that."
)


class Results:
    """The document of a run, written to its folder whenever something is added.

    Args:
        folder: created if it does not exist.
    Raises:
        InputError: the folder already contains results, or cannot be written to.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        if (folder / JSON_NAME).exists():
            raise InputError(
                f"{folder} already contains results", where=folder, hint="name another folder with -o, or remove it"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written to ({error.strerror})", where=folder, hint="name another with -o"
            ) from error
        self._folder = folder
        self._servers: list[dict[str, Any]] = []
        self._points: list[dict[str, Any]] = []
        self.document: dict[str, Any] = {
            "nvquant": __version__,
            "complete": False,
            **head,
            "servers": self._servers,
            "points": self._points,
        }
        self._write()

    @property
    def points(self) -> Sequence[Mapping[str, Any]]:
        """The points so far."""
        return self._points

    @property
    def failed(self) -> int:
        """The number of points without figures."""
        return sum(bool(point.get("failed")) for point in self._points)

    def add_server(self, facts: Mapping[str, Any]) -> int:
        """Add a server. Returns its number for `update` and `add_point`."""
        self._servers.append(dict(facts))
        self._write()
        return len(self._servers) - 1

    def update(self, server: int, facts: Mapping[str, Any]) -> None:
        """Add facts of a server, or replace them."""
        self._servers[server].update(facts)
        self._write()

    def add_point(self, server: int, figures: Mapping[str, Any]) -> None:
        """Add a point."""
        self._points.append({"server": server, **figures})
        self._write()

    def measured_of(self, server: int) -> int:
        """The number of points of a server so far."""
        return sum(point["server"] == server for point in self._points)

    def finish(self) -> None:
        """Mark the document as complete."""
        self.document["complete"] = True
        self._write()

    def _write(self) -> None:
        _replace(self._folder / JSON_NAME, json.dumps(self.document, indent=2, ensure_ascii=False) + "\n")
        _replace(self._folder / MARKDOWN_NAME, markdown(self.document))


def head_of(
    gpus: Sequence[Gpu], bandwidth: float | None, is_given: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Machine and settings of a run."""
    machine = {
        "gpus": [
            {
                "name": gpu.name,
                "capability": ".".join(map(str, gpu.capability)) if gpu.capability else None,
                "memory_bytes": gpu.total_bytes,
            }
            for gpu in gpus
        ],
        "driver": gpus[0].driver if gpus else None,
        "fp4": fp4_path(gpus[0].capability if gpus else None),
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_source": None if bandwidth is None else "--bandwidth" if is_given else BANDWIDTH_SOURCE,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "ram_bytes": ram_bytes()[0],
    }
    return {"machine": machine, "settings": dict(settings)}


def markdown(document: Mapping[str, Any]) -> str:
    """The document for readers."""
    machine, settings = document["machine"], document["settings"]
    where = ", ".join(gpu["name"] for gpu in machine["gpus"]) or f"CPU ({machine['cpu']}, {machine['cores']} cores)"
    lines = ["# Serving speed", ""]
    if not document["complete"]:
        lines += ["The run has not ended, or was interrupted. The table lists the points measured so far.", ""]
    lines += [f"{where}. {_settings_words(settings)}.", "", *_table(COLUMNS, document["points"]), "", READING]
    notes: list[str] = []
    for name, key in (("Failed", "failed"), ("Note", "note")):
        notes += [f"- {name}: {where_of(point)}: {point[key]}" for point in document["points"] if point.get(key)]
    lines += [*([""] if notes else []), *notes, "", "## Servers", "", *_table(SERVER_COLUMNS, document["servers"]), ""]
    for server in document["servers"]:
        said = [server.get("kernel"), f"attention {server['attention']}" if server.get("attention") else None]
        said += server.get("hints") or []
        lines += [f"- {server['name']}, {server['kv_cache']} KV cache: {words}" for words in said if words]
    return "\n".join(lines).rstrip() + "\n"


def where_of(point: Mapping[str, Any]) -> str:
    """The name of a point, in words."""
    users = f"{point['users']} user{'s' if point['users'] > 1 else ''}"
    return f"{point['name']}, {point['kv_cache']} KV cache, context {_cell('context', point.get('context'))}, {users}"


def plain_table(points: Sequence[Mapping[str, Any]]) -> str:
    """The points for a terminal, with the first column to the left. Columns without any figure are skipped."""
    columns = [(key, title) for key, title in COLUMNS if any(point.get(key) is not None for point in points)]
    rows = [[title for _, title in columns], *([_cell(key, point.get(key)) for key, _ in columns] for point in points)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _settings_words(settings: Mapping[str, Any]) -> str:
    asked = f"{settings['output_tokens']} output tokens, {settings['dataset']} prompts"
    return f"{settings['load_generator']}: {asked}, a new request as soon as one is answered"


def _table(columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    used = [(key, title) for key, title in columns if any(row.get(key) is not None for row in rows)] or list(columns)
    lines = [[title for _, title in used], ["---" if at == 0 else "---:" for at in range(len(used))]]
    lines += [[_cell(key, row.get(key)).replace("|", "\\|") for key, _ in used] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return NO_FIGURE
    if key == "share_of_ceiling":
        return f"{100 * value:.0f} %"
    if key.endswith("bytes") or key == "read_bytes_per_token":
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and key != "users" else str(value)


def _replace(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8", errors="replace"))
