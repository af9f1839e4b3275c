"""The progress of a conversion, as the pipeline reports it to a display."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The state of a run at one moment.

    Attributes:
        phase: name of the current work.
        layers_done: decoder layers finished, those of an earlier run included.
        layers: decoder layers in all.
        seconds: wall time of this run.
        tokens_done: tokens times layers that this run computed.
        tokens_total: tokens times layers that this run has to compute, or 0 without calibration.
        bytes_read: from the source, by this run.
        bytes_written: to the output, by this run.
        host_bytes: resident memory of the process now.
        gpu_bytes: GPU memory that its allocator has reserved now.
        layers_skipped: layers that an earlier run had finished.
        rank: this process among the ranks.
        ranks: processes that share the run.
        setup_seconds: the part of `seconds` before this run's first layer (recording, replay), which does not depend
            on the speed of the layers.
        bytes_fetched: bytes already fetched of the files that this run needs from the Hub.
        bytes_to_fetch: all bytes of these files, or 0 if there are none.
    """

    phase: str
    layers_done: int = 0
    layers: int = 0
    seconds: float = 0.0
    tokens_done: int = 0
    tokens_total: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    host_bytes: int = 0
    gpu_bytes: int = 0
    layers_skipped: int = 0
    rank: int = 0
    ranks: int = 1
    setup_seconds: float = 0.0
    bytes_fetched: int = 0
    bytes_to_fetch: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Mean speed of this run in tokens times layers a second, without its setup, or None before the first."""
        seconds = self.seconds - self.setup_seconds
        return self.tokens_done / seconds if self.tokens_done > 0 and seconds > 0 else None

    @property
    def eta_seconds(self) -> float | None:
        """Time of the remaining layers at the mean speed of this run's layers, or None before the first of them.

        It is exact at the end of a layer. The progress within a layer is unknown.
        """
        computed = self.layers_done - self.layers_skipped
        seconds = self.seconds - self.setup_seconds
        if self.layers_done >= self.layers > 0:
            return 0.0
        return seconds / computed * (self.layers - self.layers_done) if computed > 0 and seconds > 0 else None


ProgressSink = Callable[[Progress], None]
