"""Addresses in what huggingface_hub logs: those of the stores behind the Hub are signed, and whoever reads one may read
the file."""

from __future__ import annotations

import logging
import re

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")


def without_signatures(text: str) -> str:
    """A text whose addresses end at their question mark."""
    return _QUERY.sub(r"\1?…", text)


def hide_signatures() -> None:
    """Let huggingface_hub's own messages, wherever they go, name addresses without what follows the question mark."""
    from huggingface_hub.utils import logging as _  # noqa: F401  makes the handlers

    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(known, _WithoutQueries) for known in handler.filters):
            handler.addFilter(_WithoutQueries())


class _WithoutQueries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_signatures(record.getMessage()), ()
        return True
