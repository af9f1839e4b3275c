"""The options of a conversion, and its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..stream.trace import Trace
from .progress import Progress, ProgressSink
from .ranks import Ranks
from .stop import StopRequest


def _tell_nobody(_progress: Progress) -> None:
    pass


@dataclass(frozen=True)
class ConvertOptions:
    """The options of a conversion.

    Attributes:
        device: `cpu` or `cuda` (with an index if there are several).
        memory_budget_bytes: limit of the run's memory, on the GPU and on the host each, or None for the free memory.
        restart: begin anew, and replace an unfinished run or an output. Otherwise an unfinished run is resumed.
        progress: called with the progress of the run, by any of its threads.
        stop: checked between batches for a request to end the run.
        ranks: the processes that share the run.
        trace: measures the time of its phases.
        fold: whether to make exact folds before quantizing. Requires calibration.
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
    fold: bool = False


@dataclass(frozen=True)
class ConvertResult:
    """The result of a conversion, and the document of `convert --json`.

    Attributes:
        seconds: from the first read to the last byte. The earlier import of libraries counts in `phases` alone.
        phases: seconds by phase, all threads together (docs/profiling.md).
        layers_resumed: decoder layers that an earlier run had finished.
        was_finished: whether an equal run had already written the complete output.
        error_feedback: None for a quantizer without. Else the numbers of fused groups (`groups`), of those that needed
            more damping than the quantizer's own (`more_damping`), of those with blocks whose updated weights outgrew
            the largest block scale (`outgrown`), and of these blocks (`outgrown_blocks`).
        casts: None where no matrix keeps the codes of a quantized source. Else the numbers of such matrices, of their
            blocks of 16 values, of blocks with the same values under another scale (`shifted`), and of blocks that
            were requantized because the span of their exponents is too wide (`rounded`).
        distillation: the document of `distill --json`. None where none was requested.
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
    error_feedback: dict[str, int] | None = None
    phases: dict[str, float] = field(default_factory=dict)
    casts: dict[str, int] | None = None
    distillation: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The document of `convert --json`."""
        return asdict(self)
