"""Shards on their way from the device to the disk, behind the walk.

The tensors of a shard stay on the device until another thread has copied them out in small pieces, hashed and written
the pieces, made the file durable and recorded it in the journal. Host memory never contains a complete shard. Two
shards may be on their way, and a third one waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import Checkpoint
from ..checkpoint.writer import TensorEntry, write_shard
from ..plan.plan import Plan, PlannedShard
from .staging import StagingByThread
from .trace import Trace

MOST_ON_THEIR_WAY = 2
YIELD_SECONDS = 0.05  # how long a copied piece lets the walk's reading go first


class ShardWriter:
    """Writes the shards of decoder layers.

    Args:
        folder: in which the shards grow.
    """

    def __init__(self, folder: Path, device: torch.device, trace: Trace) -> None:
        self._folder, self._device, self._trace = folder, device, trace
        self._pool = ThreadPoolExecutor(MOST_ON_THEIR_WAY, "write")
        self._room = threading.Semaphore(MOST_ON_THEIR_WAY)
        self._writes: list[Future[None]] = []
        self._lock = threading.Lock()
        self._staging = StagingByThread(device)
        self.bytes_written = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()

    def submit(
        self, shard: PlannedShard, made: Mapping[str, Tensor], kept: Mapping[str, Tensor], done: Callable[[str], None]
    ) -> None:
        """Write a shard in another thread. Wait while two shards are being written.

        Args:
            made: tensors that belong to the shard alone, by output name, on the device or the host.
            kept: tensors that later work of this thread's stream will overwrite, so they are copied first.
            done: called in the writing thread with the shard's sha256 when it is durable under its name.
        Raises:
            InputError: an earlier shard could not be written.
        """
        self.check()
        with self._trace.span("wait for write"):
            self._room.acquire()
        try:
            self.check()
            # Made plain by this thread's stream, for which the event stands; the writing thread has streams of its own.
            tensors = {name: tensor.contiguous() for name, tensor in made.items()}
            tensors |= {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}
            event = None
            if self._device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
        except BaseException:
            self._room.release()
            raise
        self._writes.append(self._pool.submit(self._write, shard, tensors, event, done))

    def check(self) -> None:
        """Raise the error of a write that has ended."""
        for write in [write for write in self._writes if write.done()]:
            self._writes.remove(write)
            write.result()

    def finish(self) -> None:
        """Wait for all writes.

        Raises:
            InputError: one of them failed.
        """
        for write in self._writes:
            write.result()
        self._writes.clear()

    def _write(self, shard: PlannedShard, tensors: dict[str, Tensor], event: Any, done: Callable[[str], None]) -> None:
        def contents(entry: TensorEntry) -> Iterator[memoryview]:
            tensor = tensors.pop(entry.name).detach()
            yield from self._staging().reading(tensor.reshape(-1).view(torch.uint8))

        try:
            with self._trace.span("write", shard.file):
                if event is not None:
                    event.synchronize()
                done(write_shard(self._folder / shard.file, shard.entries, contents))
            with self._lock:
                self.bytes_written += shard.tensor_bytes
        finally:
            tensors.clear()
            self._room.release()


def copy_shard(
    source: Checkpoint, plan: Plan, folder: Path, shard: PlannedShard, yield_to: Callable[[float], None]
) -> str:
    """Copy the tensors of a shard without quantized tensors, byte for byte, and return its sha256.

    Args:
        yield_to: called after each piece with a number of seconds, for which more urgent reading has priority.
    Raises:
        InputError: a source shard vanished, changed or cannot be read. The disk is full or not writable.
    """

    def contents(entry: TensorEntry) -> Iterator[memoryview]:
        for piece in source.pieces(plan.origins[entry.name].source):
            yield piece
            yield_to(YIELD_SECONDS)

    return write_shard(folder / shard.file, shard.entries, contents)
