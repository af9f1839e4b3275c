"""Snapshots of the hidden states, so that a resumed run does not compute the finished layers again.

A run takes at most one a minute, and spends at most a twentieth of its time on them, so a short run takes none. A
snapshot is a safetensors file in the partial folder, which is durable before its record names it. A damaged or missing
snapshot costs only time: the layers are replayed from the source.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping

import torch

from ..checkpoint.digest import file_sha256
from ..checkpoint.headers import read_header
from ..checkpoint.shard_bytes import read_range
from ..checkpoint.source import read_json, tensor_bytes, torch_dtype
from ..checkpoint.writer import TensorEntry, write_json, write_shard
from ..errors import InputError
from ..stream.hidden import HiddenStates
from ..stream.trace import Trace
from .journal import Journal

Lanes = Mapping[str, HiddenStates]
"""The hidden states of each lane, by its name."""
RECORD_NAME = "lanes.json"
LEAST_SECONDS = 60.0
SHARE_OF_TIME = 0.05
_FIRST_GUESS_BYTES_PER_SECOND = 5e8
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Snapshots:
    """Snapshots of one run.

    Attributes:
        shares_state: whether layers pass more to later layers than the hidden state. If so, no snapshot is taken.

    Args:
        is_used: False if hidden states cannot be saved completely, as with several ranks.
    """

    def __init__(self, journal: Journal, trace: Trace, is_used: bool) -> None:
        self._journal, self._trace, self._is_used = journal, trace, is_used
        self._last = time.monotonic()
        self._speed = _FIRST_GUESS_BYTES_PER_SECOND
        self._file: str | None = None
        self.shares_state = False

    def find(self, before: int) -> int | None:
        """The layer behind which a usable snapshot was taken, or None without one.

        Args:
            before: the first layer that is not done.
        """
        path = self._journal.folder / RECORD_NAME
        if not self._is_used or not path.exists():
            return None
        try:
            record = read_json(path, "")
            layer, file, sha256 = record["layer"], record["file"], record["sha256"]
            if type(layer) is not int or not 0 <= layer < before or file != _file_of(layer):
                return None
            if file_sha256(self._journal.folder / file) != sha256:
                return None
        except (InputError, OSError, KeyError, TypeError, ValueError):
            return None
        self._file = file
        return layer

    def restore(self, lanes: Lanes) -> None:
        """Put the found snapshot's states in place of the recorded ones."""
        assert self._file is not None
        header = read_header(self._journal.folder / self._file)
        for name, hidden in lanes.items():
            for at in range(len(hidden)):
                info = header.tensors[_name(name, at)]
                tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
                read_range(header.path, info.begin, tensor_bytes(tensor), header)
                hidden.store(at, tensor.to(hidden.device))

    def consider(self, layer: int, lanes: Lanes) -> None:
        """Take a snapshot behind a layer if one is due and fits on the disk."""
        cost = _size(lanes) / self._speed
        if time.monotonic() - self._last >= max(LEAST_SECONDS, cost / SHARE_OF_TIME):
            self.take(layer, lanes)

    def take(self, layer: int, lanes: Lanes) -> None:
        """Take a snapshot behind a layer now if it fits on the disk: at the end of a run that will be resumed, and
        whose layers would have to come over the network again."""
        size = _size(lanes)
        if not self._is_used or self.shares_state or shutil.disk_usage(self._journal.folder).free < 2 * size:
            return
        started = time.monotonic()
        with self._trace.span("snapshot", f"behind layer {layer}"):
            self._take(layer, lanes)
        self._last = time.monotonic()
        self._speed = size / max(1e-3, self._last - started)

    def _take(self, layer: int, lanes: Lanes) -> None:
        file, old = _file_of(layer), self._file
        states = (state for hidden in lanes.values() for state in hidden.on_host())
        entries = [
            TensorEntry(_name(name, at), _DTYPES[dtype], shape)
            for name, hidden in lanes.items()
            for at, (shape, dtype) in enumerate(hidden.shapes())
        ]

        def contents(_entry: TensorEntry) -> Iterator[memoryview]:
            yield tensor_bytes(next(states))

        digest = write_shard(self._journal.folder / file, entries, contents)
        write_json(self._journal.folder / RECORD_NAME, {"layer": layer, "file": file, "sha256": digest})
        self._file = file
        if old is not None and old != file:
            (self._journal.folder / old).unlink(missing_ok=True)


def _file_of(layer: int) -> str:
    return f"hidden-{layer:05d}.safetensors"


def _name(lane: str, at: int) -> str:
    return f"{lane}.{at:06d}"


def _size(lanes: Lanes) -> int:
    return sum(sum(hidden.sizes()) for hidden in lanes.values())
