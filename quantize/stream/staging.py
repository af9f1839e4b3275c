"""Pieces of tensors on their way between host memory that programs read and write, and the device.

On a GPU, each thread has two pinned buffers and a stream of its own: one buffer is filled while the other is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checkpoint.source import tensor_bytes

PIECE_BYTES = 16 << 20


class Staging:
    """The way of one thread's pieces to a device, or from it. On the CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = _Pinned(device) if device.type == "cuda" else None

    @contextmanager
    def writing(self, target: Tensor) -> Iterator[memoryview]:
        """The memory for the bytes of a piece, which are on the device after the block and `finish`.

        Args:
            target: uint8 [at most PIECE_BYTES], on the device.
        """
        if self._pinned is None:
            yield tensor_bytes(target)
            return
        piece = self._pinned.next_free()[: len(target)]
        yield tensor_bytes(piece)
        self._pinned.copy(target, piece)

    def reading(self, tensor: Tensor) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces. Each is valid until the next is requested, while the one after it is on its
        way.

        Args:
            tensor: uint8 [bytes], on the device or the host.
        """
        pieces = tensor.split(PIECE_BYTES)
        if self._pinned is None or not tensor.is_cuda:
            yield from map(tensor_bytes, pieces)
            return
        coming = self._pinned.bring(pieces[0]) if pieces else None
        for at in range(len(pieces)):
            assert coming is not None
            host = coming
            self._pinned.finish()
            if at + 1 < len(pieces):
                coming = self._pinned.bring(pieces[at + 1])
            yield tensor_bytes(host)

    def finish(self) -> None:
        """Wait for all copies."""
        if self._pinned is not None:
            self._pinned.finish()


class _Pinned:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in self._buffers]
        self._turn = 0

    def next_free(self) -> Tensor:
        """The buffer whose last copy began earlier, once that copy has ended."""
        self._turn = 1 - self._turn
        self._events[self._turn].synchronize()
        return self._buffers[self._turn]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begin a copy to or from the buffer of this turn."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._events[self._turn].record()

    def bring(self, piece: Tensor) -> Tensor:
        """Begin to copy a piece to the host. Returns its memory there, which `finish` makes valid."""
        host = self.next_free()[: len(piece)]
        self.copy(host, piece)
        return host

    def finish(self) -> None:
        self._stream.synchronize()


class StagingByThread:
    """A `Staging` for each thread that calls."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._local = device, threading.local()

    def __call__(self) -> Staging:
        """The calling thread's."""
        if not hasattr(self._local, "staging"):
            self._local.staging = Staging(self._device)
        staging: Staging = self._local.staging
        return staging
