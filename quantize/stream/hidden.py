"""Storage of the hidden states of all calibration batches between two layers: on the device, in host memory, on disk.

Each batch gets one place when it is recorded: the device while the budget lasts, then host memory (page-locked for a
GPU), then a file. Hidden states from host memory or disk are copied to the device ahead of need, while the batch before
is computed, and copied back after it.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import tensor_bytes
from ..errors import InputError


@dataclass(frozen=True)
class HiddenBudget:
    """The bytes of hidden states that each kind of memory may hold.

    Attributes:
        device_bytes: on the device.
        host_bytes: in host memory (for a CPU, which has no other memory, both count as one).
        folder: the folder of a file for the rest, which is removed at the end.
    """

    device_bytes: int
    host_bytes: int
    folder: Path


class HiddenStates:
    """The hidden states of all batches, each [sequences, tokens, hidden size].

    Attributes:
        device: the device that computes them.

    Call `append` in the order of the batches, then for every layer `fetch` and `store` in that order.
    """

    def __init__(self, device: torch.device, budget: HiddenBudget) -> None:
        self.device, self._budget = device, budget
        self._shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._places: list[_OnDevice | _InHostMemory | _OnDisk] = []
        self._file: _File | None = None
        self._device_left = budget.device_bytes + (budget.host_bytes if device.type == "cpu" else 0)
        self._host_left = 0 if device.type == "cpu" else budget.host_bytes
        self._coming: dict[int, _Coming] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._places)

    def append(self, hidden: Tensor) -> None:
        """Add the next batch, from any device, with a copy only where it moves.

        Raises:
            InputError: it has to wait on disk, and the disk is full or cannot be written to.
        """
        size = hidden.nbytes
        self._shapes.append((tuple(hidden.shape), hidden.dtype))
        if size <= self._device_left:
            self._device_left -= size
            self._places.append(_OnDevice(hidden.to(self.device)))
        elif size <= self._host_left:
            self._host_left -= size
            self._places.append(_InHostMemory(hidden))
        else:
            self._file = self._file or _File(self._budget.folder)
            self._places.append(_OnDisk(self._file, hidden))

    def reserve(self, size: int) -> None:
        """Let the GPU's allocator take so many bytes at once, within the budget. A hundred separate allocations, one a
        batch, cost half a second."""
        if self.device.type == "cuda":
            with suppress(torch.OutOfMemoryError):
                torch.empty(min(size, self._device_left), dtype=torch.uint8, device=self.device)

    def fetch(self, at: int) -> Tensor:
        """A batch's hidden state on the device, while the next one is on its way."""
        coming = self._coming.pop(at, None) or self._bring(at)
        if at + 1 < len(self._places) and at + 1 not in self._coming:
            self._coming[at + 1] = self._bring(at + 1)
        tensor = coming.hidden.result() if isinstance(coming.hidden, Future) else coming.hidden
        if coming.event is not None:  # not the whole stream, which brings the next batch meanwhile
            torch.cuda.current_stream(self.device).wait_event(coming.event)
            tensor.record_stream(torch.cuda.current_stream(self.device))
        return tensor

    def store(self, at: int, hidden: Tensor) -> None:
        """Replace a batch's hidden state by the one that a layer returned.

        Raises:
            InputError: its shape or dtype changed, or it waits on disk and an earlier write failed.
        """
        if (tuple(hidden.shape), hidden.dtype) != self._shapes[at]:
            shape, dtype = self._shapes[at]
            raise InputError(
                f"a decoder layer turns a hidden state of {list(shape)} in {dtype} into {list(hidden.shape)} in "
                f"{hidden.dtype}, which the layer-by-layer walk does not support",
                hint="use a weight-only recipe",
            )
        place = self._places[at]
        self._coming.pop(at, None)  # what it was before
        if self._stream is not None and not isinstance(place, _OnDevice):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                place.put(hidden)
            hidden.record_stream(self._stream)
        else:
            place.put(hidden)

    def spill(self) -> bool:
        """Move the hidden states on a GPU to host memory, or to disk once the budget is used up, after the GPU ran out
        of memory. Return False where none were on the GPU."""
        is_gpu = self.device.type == "cuda"
        moved = [at for at, place in enumerate(self._places) if is_gpu and isinstance(place, _OnDevice)]
        self._coming.clear()
        for at in moved:
            hidden = self._places[at].bring(self.device)
            assert isinstance(hidden, Tensor)
            if hidden.nbytes <= self._host_left:
                self._host_left -= hidden.nbytes
                self._places[at] = _InHostMemory(hidden)
            else:
                self._file = self._file or _File(self._budget.folder)
                self._places[at] = _OnDisk(self._file, hidden)
        self._device_left = 0
        return bool(moved)

    @property
    def left(self) -> HiddenBudget:
        """The part of the budget that no hidden state uses."""
        return HiddenBudget(self._device_left, self._host_left, self._budget.folder)

    def shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each batch's hidden state."""
        return list(self._shapes)

    def sizes(self) -> list[int]:
        """Bytes of each batch's hidden state."""
        return [math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes]

    def on_host(self) -> Iterator[Tensor]:
        """Every batch's hidden state in host memory, one after the other, for a snapshot."""
        for at in range(len(self._places)):
            yield self.fetch(at).cpu()
        self._coming.clear()

    def close(self) -> None:
        """Drop everything, the file too."""
        self._coming.clear()
        self._places.clear()
        if self._file is not None:
            self._file.close()

    def _bring(self, at: int) -> _Coming:
        place = self._places[at]
        if self._stream is None or isinstance(place, _OnDevice):
            return _Coming(place.bring(self.device), None)
        with torch.cuda.stream(self._stream):
            return _Coming(place.bring(self.device), self._stream.record_event())


@dataclass(frozen=True)
class _Coming:
    """A hidden state on its way to the device, there when the event has happened (None: already there)."""

    hidden: Tensor | Future[Tensor]
    event: torch.cuda.Event | None


class _OnDevice:
    """Contiguous, as from the other places: strides may change the order in which a kernel adds."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden.contiguous()

    def bring(self, device: torch.device) -> Tensor:
        return self._hidden

    def put(self, hidden: Tensor) -> None:
        if self._hidden.is_cuda:  # in place: a new block would lie anywhere, and cut free memory into pieces
            self._hidden.copy_(hidden)
        else:
            self._hidden = hidden.contiguous()


class _InHostMemory:
    """Page-locked memory. Copies run in the calling stream's order."""

    def __init__(self, hidden: Tensor) -> None:
        self._memory = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        self._memory.copy_(hidden)

    def bring(self, device: torch.device) -> Tensor:
        return self._memory.to(device, non_blocking=True)

    def put(self, hidden: Tensor) -> None:
        self._memory.copy_(hidden, non_blocking=True)


class _OnDisk:
    """A range of the file. One thread reads and writes, in the order of the calls."""

    def __init__(self, file: _File, hidden: Tensor) -> None:
        self._file, self._shape, self._dtype = file, hidden.shape, hidden.dtype
        self._begin = file.reserve(hidden.nbytes)
        self.put(hidden)

    def bring(self, device: torch.device) -> Tensor | Future[Tensor]:
        return self._file.thread.submit(self._read, device)

    def _read(self, device: torch.device) -> Tensor:
        hidden = torch.empty(self._shape, dtype=self._dtype, pin_memory=device.type == "cuda")
        self._file.read(tensor_bytes(hidden), self._begin)
        return hidden.to(device)

    def put(self, hidden: Tensor) -> None:
        # To host memory at once, in the calling stream's order: what lies on the device is overwritten soon.
        self._file.write_later(hidden.cpu(), self._begin)


class _File:
    """A file without a name, which disappears however the run ends."""

    MOST_WAITING = 4

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file: Any = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        self._end = 0
        self._writes: list[Future[None]] = []
        self._error: InputError | None = None
        self.thread = ThreadPoolExecutor(1, "hidden")

    def reserve(self, size: int) -> int:
        begin, self._end = self._end, self._end + size
        return begin

    def write_later(self, tensor: Tensor, begin: int) -> None:
        while len(self._writes) >= self.MOST_WAITING:
            self._writes.pop(0).result()
        self._writes.append(self.thread.submit(self._write, tensor, begin))

    def _write(self, tensor: Tensor, begin: int) -> None:
        piece = tensor_bytes(tensor)
        try:
            while len(piece):
                done = os.pwrite(self._file.fileno(), piece, begin)
                piece, begin = piece[done:], begin + done
        except OSError as error:
            self._error = self._failed(error)
            raise self._error from error

    def read(self, buffer: memoryview, begin: int) -> None:
        if self._error is not None:  # what is read was to be written before, in this same thread
            raise self._error
        try:
            while len(buffer):
                got = os.preadv(self._file.fileno(), [buffer], begin)
                if not got:
                    raise OSError(errno.EIO, "the file ended early")
                buffer, begin = buffer[got:], begin + got
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)
        self._file.close()

    def _failed(self, error: OSError) -> InputError:
        return InputError(
            f"hidden states cannot be stored in {self._folder} ({error.strerror})",
            hint="free space, use fewer --samples, or give a larger --memory-budget",
        )
