"""A document's parts in the order of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..quoting import argument, one_line, shell
from ..verify.numerics.document import MeasuredText, Numerics, numerics_of
from .distilled import distillation_words
from .document import at, stages_run
from .kinds import kind_warnings, kinds_table
from .measured import (
    accuracy_notes,
    accuracy_table,
    accuracy_tiles,
    inputs_of,
    layers_of,
    matrices_of,
    size_tile,
    sizes_of,
)
from .parts import Page
from .served import served_of, served_tiles
from .speed import machine_facts, speed_notes, speed_tables
from .verdict import check_lines, verdict_of
from .words import ABSENT, is_finite

LIMITS = {"max_kl": "--max-kl", "min_top1": "--min-top1"}


def page_of(whole: Mapping[str, Any]) -> Page:
    """Everything that a page shows, out of the document."""
    checkpoint, numerics, serve = whole["checkpoint"], numerics_of(whole["numerics"]), whole["serve"]
    name = one_line(checkpoint.get("name") or "checkpoint")
    return Page(
        title=name,
        subtitle=_subtitle(checkpoint),
        verdict=verdict_of(whole),
        tiles=tuple([*accuracy_tiles(numerics), *size_tile(checkpoint), *served_tiles(serve)]),
        accuracy=accuracy_table(numerics),
        accuracy_notes=accuracy_notes(numerics),
        kinds=kinds_table(numerics),
        kind_warnings=kind_warnings(numerics),
        layers=layers_of(numerics),
        sizes=sizes_of(checkpoint),
        served=served_of(serve),
        speed=speed_tables(whole.get("bench")),
        speed_notes=speed_notes(whole.get("bench")),
        checks=check_lines(whole["checks"]),
        matrices=tuple(table for table in (matrices_of(numerics), inputs_of(numerics)) if table),
        command=_command(whole, numerics),
        reproduce=_known(_reproduce(whole, numerics)),
        machine=_known(_machine(whole, numerics)),
    )


def _subtitle(checkpoint: Mapping[str, Any]) -> str:
    parts = [
        f"{one_line(checkpoint['layout'])} layout" if checkpoint.get("layout") else "",
        f"recipe {one_line(checkpoint['recipe'])}" if checkpoint.get("recipe") else "",
        f"quantizer {one_line(checkpoint['quantizer'])}" if checkpoint.get("quantizer") else "",
        f"made by {one_line(checkpoint['made_by'])}" if checkpoint.get("made_by") else "",
        f"from {one_line(checkpoint['source'])}" if checkpoint.get("source") else "",
    ]
    return " · ".join(part for part in parts if part)


def _command(whole: Mapping[str, Any], numerics: Numerics | None) -> str:
    """The command that makes this report, as far as the document contains it."""
    name = str(whole["checkpoint"].get("name") or "CHECKPOINT")
    words = ["nvquant", "verify", argument(name)]
    source = whole["checkpoint"].get("source") or (numerics and numerics.source)
    if source:
        words += ["--against", argument(source)]
    for stage in stages_run(whole):
        words += ["--stage", stage]
    for key, option in LIMITS.items():
        limit = getattr(numerics and numerics.thresholds, key, None)
        if is_finite(limit):
            words += [option, f"{limit:g}"]
    return shell(words)


def _reproduce(whole: Mapping[str, Any], numerics: Numerics | None) -> list[tuple[str, Any]]:
    limits = None if numerics is None else numerics.thresholds
    text = MeasuredText() if numerics is None or numerics.text is None else numerics.text
    words = {"max_kl": "mean KL at most", "min_top1": "top-1 agreement at least", "max_delta_nll": "ΔNLL at most"}
    stated = [f"{word} {_limit(getattr(limits, key))}" for key, word in words.items() if limits is not None]
    return [
        ("Distilled", distillation_words(at(whole, "checkpoint", "distillation"))),
        ("nvquant", __version__),
        ("vLLM", at(whole, "serve", "server", "vllm")),
        ("Server's command", at(whole, "serve", "server", "command")),
        ("Limits", ", ".join(stated)),
        ("Text", text.name),
        ("Text's sha256", text.sha256),
    ]


def _limit(value: Any) -> str:
    return f"{value:g}" if is_finite(value) else "(no limit)"


def _machine(whole: Mapping[str, Any], numerics: Numerics | None) -> list[tuple[str, Any]]:
    device, dtype = (None, None) if numerics is None else (numerics.device, numerics.dtype)
    return [
        ("Numbers measured on", f"{device}, {dtype}" if device and dtype else device),
        ("Served by", at(whole, "serve", "kernel", "class")),
        *machine_facts(whole.get("bench")),
    ]


def _known(facts: list[tuple[str, Any]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, one_line(value)) for name, value in facts if value and value != ABSENT)
