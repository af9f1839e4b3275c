"""How to run a conversion, and what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .progress import Progress, ProgressSink
from .ranks import Ranks
from .stop import StopRequest
from .trace import Trace


def _tell_nobody(_progress: Progress) -> None:
    pass


@dataclass(frozen=True)
class ConvertOptions:
    """How to run a conversion.

    Attributes:
        device: `cpu` or `cuda` (with an index if there are several).
        memory_budget_bytes: how much memory the run may use, on the GPU and on the host each; None for what is free.
        restart: begin anew, whatever is there; else a run that ended early is continued.
        progress: told how far the run is, by any of its threads.
        stop: asked between batches whether the run shall end.
        ranks: the processes that share the run.
        trace: where its time goes.
    """

    output: Path
    quantizer: str
    device: str = "cpu"
    batch_size: int = 1
    memory_budget_bytes: int | None = None
    restart: bool = False
    progress: ProgressSink = _tell_nobody
    stop: StopRequest = field(default_factory=StopRequest)
    ranks: Ranks = field(default_factory=Ranks)
    trace: Trace = field(default_factory=Trace)


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did; the document of `convert --json`.

    Attributes:
        seconds: from the first read to the last byte; the import of libraries before stands under `phases`.
        phases: seconds by phase, all threads together (docs/profiling.md).
        layers_resumed: decoder layers that an earlier run had finished.
        was_finished: the whole output was there already, made by an equal run.
    """

    output: str
    tensors: int
    tensor_bytes: int
    quantized: int
    seconds: float
    peak_host_bytes: int
    peak_gpu_bytes: int
    calibration: dict[str, Any] | None
    marlin_flushed_blocks: int
    layers_resumed: int = 0
    was_finished: bool = False
    phases: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The document of `convert --json`."""
        return asdict(self)
