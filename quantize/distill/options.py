"""The options of a distillation, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..convert.stop import StopRequest
from ..errors import InputError
from ..stream.distillation import DistillationRecord

BATCH_SEQUENCES = 8
SEQUENCE_LENGTH = 512
HELDOUT_SAMPLES = 36  # six of each kind
DEFAULT_SET = "offline"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class DistillOptions:
    """The options of a distillation.

    Attributes:
        output: the folder of the new checkpoint.
        tokens: of the training, at most.
        text: the training text, as for `--calibration`.
        heldout: the text that the gate measures, likewise. None for the shipped held-out text.
        device: torch's name.
        memory_budget_bytes: None for the free memory of the device.
        seed: of the order of the training text. The default is not that of a conversion's calibration.
        restart: begin anew instead of resuming an unfinished run.
        is_in_place: whether the output replaces the checkpoint itself.
        scale_rate, norm_rate: the first learning rates of θ and r.
        in_float32: compute in float32 on a GPU too.
        snapshot_steps: steps between two snapshots.
        stop: checked between steps for a request to end the run.
        progress: called with (done, total, phase).
    """

    output: Path
    tokens: int
    text: str = DEFAULT_SET
    heldout: str | None = None
    heldout_samples: int = HELDOUT_SAMPLES
    sequence_length: int = SEQUENCE_LENGTH
    seed: int = 1
    device: str = "cpu"
    memory_budget_bytes: int | None = None
    restart: bool = False
    is_in_place: bool = False
    scale_rate: float = 0.002
    norm_rate: float = 0.001
    in_float32: bool = False
    snapshot_steps: int = 10
    stop: StopRequest = field(default_factory=StopRequest)
    progress: Progress = lambda done, total, phase: None

    def __post_init__(self) -> None:
        """Refuse too few tokens.

        Raises:
            InputError: fewer than one sequence.
        """
        if self.tokens < self.sequence_length:
            raise InputError(
                f"{self.tokens:,} tokens of distillation are fewer than one sequence of {self.sequence_length}",
                hint="give 409600 tokens for 100 steps",
            )

    @property
    def samples(self) -> int:
        """The number of training sequences."""
        return self.tokens // self.sequence_length

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation. The trained numbers are float32."""
        return torch.float32 if self.device == "cpu" or self.in_float32 else torch.bfloat16

    @property
    def steps(self) -> int:
        """The number of steps."""
        return -(-self.samples // BATCH_SEQUENCES)


@dataclass(frozen=True)
class DistillResult:
    """The result of a distillation, and the document of `distill --json`.

    Attributes:
        record: as the manifest has it.
        was_finished: whether an equal run had already written the output.
    """

    output: str
    record: DistillationRecord
    seconds: float
    peak_host_bytes: int
    peak_gpu_bytes: int
    was_finished: bool = False

    def as_json(self) -> dict[str, Any]:
        """The document of `distill --json`."""
        return {
            "output": self.output,
            **self.record.as_json(),
            "seconds": self.seconds,
            "peak_host_bytes": self.peak_host_bytes,
            "peak_gpu_bytes": self.peak_gpu_bytes,
            "was_finished": self.was_finished,
        }
