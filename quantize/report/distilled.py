"""A distillation in one line, for reports, cards and commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..quoting import one_line
from .words import number


def distillation_words(record: object) -> str | None:
    """The held-out KL divergence before and after a distillation, or why it was not kept. None without a record.

    Args:
        record: `DistillationRecord` as JSON, or anything else.
    """
    if not isinstance(record, Mapping):
        return None
    tokens = f"{number(record.get('tokens'))} tokens"
    if record.get("is_kept") is not True:
        return f"{tokens}, not kept: {one_line(record.get('reason'))}"
    kinds = record.get("heldout")
    named = kinds.items() if isinstance(kinds, Mapping) else ()
    by_kind = ", ".join(f"{one_line(kind)} {_change(one)}" for kind, one in named)
    return f"{tokens}, held-out KL {_change(record.get('total'))} nats{f' ({by_kind})' if by_kind else ''}"


def _change(one: Any) -> str:
    before, after = ((one.get(key) if isinstance(one, Mapping) else None) for key in ("before", "after"))
    return f"{number(before)} to {number(after)}"
