"""How far a conversion is: what the pipeline tells whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The state of a run at one moment.

    Attributes:
        phase: what is being done.
        layers_done: decoder layers finished, those of an earlier run included.
        layers: decoder layers in all.
        seconds: wall time of this run.
        tokens_done: tokens times layers that this run computed.
        tokens_total: tokens times layers that this run has to compute; 0 without calibration.
        bytes_read: from the source, by this run.
        bytes_written: to the output, by this run.
        host_bytes: resident memory of the process now.
        gpu_bytes: GPU memory that its allocator has reserved now.
        layers_skipped: layers that an earlier run had finished.
        rank: this process among the ranks.
        ranks: processes that share the run.
        setup_seconds: the part of `seconds` before this run's first layer (recording, replay): it says nothing about
            the speed of the layers.
        bytes_fetched: of the files of this run that come from the Hub, those that are there.
        bytes_to_fetch: all of them; 0 where nothing has to come.
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
        """Mean speed of this run in tokens times layers a second, its setup left out; None before the first."""
        seconds = self.seconds - self.setup_seconds
        return self.tokens_done / seconds if self.tokens_done > 0 and seconds > 0 else None

    @property
    def eta_seconds(self) -> float | None:
        """Time that the layers to come take at the mean speed of this run's layers; None before the first of them.

        True at the moment when a layer ends; while a layer is computed, its part is not known.
        """
        computed = self.layers_done - self.layers_skipped
        seconds = self.seconds - self.setup_seconds
        if self.layers_done >= self.layers > 0:
            return 0.0
        return seconds / computed * (self.layers - self.layers_done) if computed > 0 and seconds > 0 else None


ProgressSink = Callable[[Progress], None]
