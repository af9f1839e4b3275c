"""Addresses in the log of huggingface_hub: those of the stores behind the Hub are signed, so that anybody who knows one
can read the file."""

from __future__ import annotations

import logging
import re

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")


def without_signatures(text: str) -> str:
    """A text with its addresses cut at their question mark."""
    return _QUERY.sub(r"\1?…", text)


def hide_signatures() -> None:
    """Cut the addresses in huggingface_hub's own messages at the question mark, wherever the messages go."""
    from huggingface_hub.utils import logging as _  # noqa: F401  makes the handlers

    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(known, _WithoutQueries) for known in handler.filters):
            handler.addFilter(_WithoutQueries())


class _WithoutQueries(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_signatures(record.getMessage()), ()
        return True
