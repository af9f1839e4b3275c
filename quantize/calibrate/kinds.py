"""Samples of several kinds of text in shares: each sample is of one kind, and each kind has its share of the tokens."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from ..errors import InputError
from .rows import read_rows
from .text import Columns, Document, document_of

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable
    from pathlib import Path

logger = logging.getLogger("nvquant.calibrate.kinds")

KIND_COLUMN = "kind"


class KindStreams:
    """One stream of documents as a stream for each kind. Documents of other kinds wait in memory for their turn.

    Args:
        documents: of any kinds. Those of kinds that are not listed are skipped.
        kinds: the listed ones.
        title: of the text, for errors.
    """

    def __init__(self, documents: Iterator[Document], kinds: Mapping[str, float], title: str) -> None:
        self._documents, self._title = documents, title
        self._waiting: dict[str, deque[Document]] = {kind: deque() for kind in kinds}
        self._seen: set[str] = set()

    def of(self, kind: str) -> Iterator[Document]:
        """Documents of one kind, in the order of the whole stream.

        Raises:
            InputError: the whole stream contains none.
        """
        waiting = self._waiting[kind]
        while True:
            while not waiting:
                document = next(self._documents, None)
                if document is None:
                    self._require(kind)
                    return
                self._seen.add(document.kind)
                if document.kind in self._waiting:
                    self._waiting[document.kind].append(document)
            yield waiting.popleft()

    def _require(self, kind: str) -> None:
        if kind not in self._seen:
            raise InputError(
                f"{self._title} has no text of the kind {kind} (it has {', '.join(sorted(self._seen)) or 'none'})",
                where="kinds",
                hint="list kinds that it has",
            )


def draw_by_kind(
    streams: Mapping[str, Iterator[list[int]]], weights: Mapping[str, float]
) -> Iterator[tuple[str, list[int]]]:
    """Samples of all streams with their kinds, in equal numbers of tokens for equal weights.

    The next sample is always of the kind with the fewest tokens for its weight so far, the first listed one where
    several have equally few. When one kind is exhausted, the others continue. The first samples do not depend on the
    number of samples that the caller takes.
    """
    order = list(streams)
    spent = [(0.0, at) for at in range(len(order))]
    while spent:
        used, at = heappop(spent)
        kind = order[at]
        ids = next(streams[kind], None)
        if ids is None:
            logger.warning("All text of the kind %s is used: the other kinds continue", kind)
            continue
        yield kind, ids
        heappush(spent, (used + len(ids) / weights[kind], at))


def kinds_in(source: Path | Traversable) -> tuple[str, ...]:
    """The kinds of the documents in a table file, sorted. None where its first row has no column `kind`.

    Raises:
        InputError: see `read_rows` and `document_of`.
    """
    found: set[str] = set()
    for number, row in read_rows(source, None):
        if number == 1 and KIND_COLUMN not in row:
            return ()
        document = document_of(row, Columns(kind=KIND_COLUMN), f"{source.name}, row {number}")
        if document is not None:
            found.add(document.kind)
    return tuple(sorted(found))
