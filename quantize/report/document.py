"""The document that every form of a report is written from: `Report.as_json()` and the benchmark, fit to publish."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ..quoting import without_secrets
from ..verify.report import Report, plain_json

STAGES = ("structure", "numerics", "serve")
_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"]+/)+([^\s/'\"]+)/?")


def document(report: Report, bench: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The report and the benchmark as plain JSON values, fit to publish."""
    return publishable(plain_json({**report.as_json(), "bench": bench}))


def publishable(whole: dict[str, Any]) -> dict[str, Any]:
    """The document with every server's command without the folders of its paths and without its host, so that the same
    checkpoint gives the same document on every machine and no user's name is published. Changes it in place."""
    for server in [at(whole, "serve", "server"), *rows(at(whole, "bench", "servers"))]:
        if isinstance(server, dict):
            server.update({key: _portable(key, server[key]) for key in ("command", "url") if key in server})
    whole.update({key: _without_secrets(value) for key, value in whole.items()})
    return whole


def _without_secrets(value: Any) -> Any:
    """Every string of a document without tokens, passwords and signed addresses, whoever wrote it there."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {without_secrets(key): _without_secrets(item) for key, item in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


def at(values: Any, *keys: str) -> Any:
    """The value under these keys, or None where one of them is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def rows(values: Any) -> list[Mapping[str, Any]]:
    """A list's mappings. Empty where there is no list."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    return [value for value in values if isinstance(value, Mapping)] if is_list else []


def numeric(value: Any) -> Any:
    """A number of the document, its strings for what JSON cannot hold taken back."""
    return (
        {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value) if isinstance(value, str) else value
    )


def stages_run(whole: Mapping[str, Any]) -> list[str]:
    """The stages that did anything, in their order, those of other names last."""
    names = {check["stage"] for check in whole["checks"]} | {name for name in STAGES if whole.get(name)}
    return [*(name for name in STAGES if name in names), *sorted(names - set(STAGES))]


def _portable(key: str, value: Any) -> Any:
    if key == "url":
        return None if value is None else "a server that was already running"
    if not isinstance(value, str):
        return value
    # The port is another one at every start, and part of a name that the server is asked for.
    for port in re.findall(r"--port[ =](\d+)", value):
        value = re.sub(rf"\b{port}\b", "…", value)
    value = re.sub(r"(--host|--uds)([ =])\S+", r"\1\2…", value)
    return _PATH.sub(lambda match: PurePosixPath(match[0]).name, value)
