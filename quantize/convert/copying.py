"""The shards around the layers, copied or, for a quantized head, made beside the walk. Its reading has priority."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from ..errors import InputError
from ..plan.plan import Plan, PlannedShard
from ..stream.reading import LayerReader
from ..stream.trace import Trace
from ..stream.writing import YIELD_SECONDS, copy_shard
from .head import HeadMaker
from .journal import Journal


class Copies:
    """Copies shards in a thread of its own, and records each in the journal. The end of the block waits for them."""

    def __init__(self, plan: Plan, journal: Journal, trace: Trace) -> None:
        self._plan, self._journal, self._trace = plan, journal, trace
        self._pool = ThreadPoolExecutor(1, "copy")
        self._copies: list[Future[None]] = []
        self._given_up = threading.Event()

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()

    def begin(self, shards: Iterable[PlannedShard], reader: LayerReader, head: HeadMaker | None) -> None:
        """Begin to copy shards, one after the other.

        Args:
            reader: has priority.
            head: makes the shard of the quantized head, which is not a copy.
        """
        self._copies += [self._pool.submit(self._copy, shard, reader, head) for shard in shards]

    def check(self) -> None:
        """Raise the error of a copy that has ended."""
        for copy in self._copies:
            if copy.done():
                copy.result()

    def wait(self, tick: Callable[[], None]) -> None:
        """Wait for all copies.

        Args:
            tick: called twice a second. It may raise to end the run.
        Raises:
            InputError: see `copy_shard`.
        """
        for copy in self._copies:
            while True:
                tick()
                try:
                    copy.result(timeout=0.5)
                    break
                except TimeoutError:
                    if copy.done():
                        raise

    def give_up(self) -> None:
        """End the copy that is under way, and begin no other: nobody waits for gigabytes of copies after an error."""
        self._given_up.set()
        for copy in self._copies:
            copy.cancel()

    def _copy(self, shard: PlannedShard, reader: LayerReader, head: HeadMaker | None) -> None:
        def let_reading_go_first(seconds: float) -> None:
            reader.wait_until_idle(seconds)
            if self._given_up.is_set():
                raise InputError("the run has ended.")

        source, partial = self._plan.source, self._journal.partial
        with self._trace.span("copy", shard.file):
            if shard.is_head and head is not None:
                digest, record = head.write(partial, lambda: let_reading_go_first(YIELD_SECONDS))
                self._journal.note(shard, digest, None, record)
                return
            digest = copy_shard(source, self._plan, partial, shard, let_reading_go_first)
            self._journal.note(shard, digest, None)
        for entry in shard.entries:
            source.content.copied(self._plan.origins[entry.name].source)
