"""Decoder layers on their way from the shards to the device, ahead of the walk.

Two buffers on the device, each the size of the largest layer, are filled in turn: while one layer is computed, the next
is read. On a GPU the bytes pass through a few small pinned buffers of the host, so host memory never contains a
complete layer. Several tensors are read in parallel, and each is hashed on the way.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.source import MOST_READERS, Checkpoint, torch_dtype
from ..errors import InputError
from .memory import telling_of_full_gpu
from .staging import PIECE_BYTES, StagingByThread
from .trace import Trace

SLOTS = 2
ALIGNMENT = (
    512  # of tensors in a buffer; a product's bits may depend on it on some processors, so it is always the same
)

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class LoadedLayer:
    """A layer on the device.

    Attributes:
        tensors: by their names in the checkpoint, in their stored dtype. They are valid until `release` is called.
        sha256: of the layer's source bytes (`layer_digest`), or None if it was not requested.
        release: returns the buffer. Call it once, from the thread whose stream used the tensors.
    """

    layer: int
    tensors: dict[str, Tensor]
    sha256: str | None
    release: Callable[[], None]


def layer_digest(digests: dict[str, str]) -> str:
    """sha256 of a layer's source: of the lines `NAME SHA256` for every tensor, in the order of the names."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


class TensorReader:
    """Reads tensors into their places on the device, several at once, and hashes each on the way.

    Attributes:
        bytes_read: so far.
    """

    def __init__(self, source: Checkpoint, device: torch.device) -> None:
        self._source, self._staging = source, StagingByThread(device)
        self._pool = ThreadPoolExecutor(min(MOST_READERS, os.cpu_count() or 1), "read")
        self._lock, self._is_given_up = threading.Lock(), threading.Event()
        self.bytes_read = 0

    def read_all(self, places: Mapping[str, Tensor], is_hashed: bool) -> dict[str, str]:
        """Read tensors, the largest first.

        Args:
            places: uint8 [bytes of the tensor] on the device, by name.
        Returns:
            the sha256 of each tensor's bytes by name, or empty texts.
        Raises:
            InputError: a shard vanished, changed or cannot be read.
        """
        by_size = sorted(places, key=lambda name: -len(places[name]))
        reads = {name: self._pool.submit(self._read, name, places[name], is_hashed) for name in by_size}
        return {name: read.result() for name, read in reads.items()}

    def give_up(self) -> None:
        """End the reads that are under way."""
        self._is_given_up.set()

    def close(self) -> None:
        """Wait for the end of the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, name: str, place: Tensor, is_hashed: bool) -> str:
        digest, staging = hashlib.sha256(), self._staging()
        try:
            for at in range(0, len(place), PIECE_BYTES):
                if self._is_given_up.is_set():
                    raise InputError("the run has ended.")
                target = place[at : at + PIECE_BYTES]
                with staging.writing(target) as piece:
                    self._source.read_into(name, piece, at)
                    if is_hashed:
                        digest.update(piece)
                with self._lock:
                    self.bytes_read += len(target)
        finally:
            staging.finish()
        return digest.hexdigest() if is_hashed else ""


class LayerReader:
    """Reads layers in the given order, one ahead of the one in use.

    Args:
        names: of each layer's tensors in the checkpoint.
        layers: numbers of the layers to read, in the order of the walk.
        is_hashed: whether to hash a layer's source bytes.
        while_waiting: called now and then during the wait for a layer, which may take hours over a network.
    """

    def __init__(
        self,
        source: Checkpoint,
        names: Mapping[int, Sequence[str]],
        layers: Sequence[int],
        device: torch.device,
        is_hashed: Callable[[int], bool],
        trace: Trace,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._while_waiting = while_waiting
        self._source, self._names, self._layers, self._is_hashed = source, names, list(layers), is_hashed
        self._device, self._trace = device, trace
        self._ready: queue.Queue[LoadedLayer | BaseException] = queue.Queue()
        self._free: queue.Queue[_Slot | None] = queue.Queue()
        self._idle = threading.Event()
        self._tensors = TensorReader(source, device)
        self._has_left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def __enter__(self) -> LayerReader:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._has_left.set()
        self._tensors.give_up()
        self._free.put(None)
        self._thread.join()
        self._tensors.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._tensors.bytes_read

    def __iter__(self) -> Iterator[LoadedLayer]:
        """The layers, in order.

        Raises:
            InputError: a shard vanished, changed or cannot be read.
        """
        for _ in self._layers:
            with self._trace.span("wait for read"):
                got = self._next()
            if isinstance(got, BaseException):
                raise got
            yield got

    def _next(self) -> LoadedLayer | BaseException:
        while True:
            try:
                return self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                self._while_waiting()

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until no layer is being read, at most so many seconds. It gives the walk's own reading priority."""
        self._idle.wait(seconds)

    def _run(self) -> None:
        try:
            with self._trace.span("make buffers"), telling_of_full_gpu("two decoder layers"):
                size = max((_layout(self._source, self._names[layer])[1] for layer in self._layers), default=0)
                for _ in range(min(SLOTS, len(self._layers))):
                    self._free.put(_Slot(torch.empty(size, dtype=torch.uint8, device=self._device)))
            for layer in self._layers:
                self._idle.set()
                slot = self._free.get()
                if slot is None or self._has_left.is_set():
                    return
                self._idle.clear()
                slot.wait()
                self._ready.put(self._read(layer, slot))
        except BaseException as error:
            self._ready.put(error)
        finally:
            self._idle.set()

    def _read(self, layer: int, slot: _Slot) -> LoadedLayer:
        names = self._names[layer]
        begins, _ = _layout(self._source, names)
        infos = {name: self._source.info(name) for name in names}
        places = {name: slot.buffer[begins[name] : begins[name] + infos[name].nbytes] for name in names}
        is_hashed = self._is_hashed(layer)
        with self._trace.span("read", f"layer {layer}"):
            digests = self._tensors.read_all(places, is_hashed)
        tensors = {
            name: place.view(torch_dtype(infos[name].dtype)).view(infos[name].shape) for name, place in places.items()
        }
        digest = layer_digest(digests) if is_hashed else None
        return LoadedLayer(layer, tensors, digest, lambda: self._give_back(slot))

    def _give_back(self, slot: _Slot) -> None:
        slot.used()
        self._free.put(slot)


class _Slot:
    """A buffer on the device, uint8 [bytes of the largest layer]."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self._event: Any = None

    def used(self) -> None:
        """Mark the work of the calling thread's stream so far as the last use of the buffer's content."""
        if self.buffer.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Wait for the end of that work."""
        if self._event is not None:
            self._event.synchronize()


def _layout(source: Checkpoint, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """Where each tensor begins in a buffer, and the bytes of all."""
    places, position = {}, 0
    for name in names:
        places[name] = position
        position += -(-source.info(name).nbytes // ALIGNMENT) * ALIGNMENT
    return places, position
