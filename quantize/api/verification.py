"""A verification from plain values, for `nvquant.verify` and the command `verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .inputs import AnyPath, find_remote, open_model, resolve_device

if TYPE_CHECKING:
    from ..serving.server import ServeOptions
    from ..verify.run import Verification
    from ..verify.threads import Progress

STAGES = ("structure", "numerics", "serve")


@dataclass(frozen=True)
class VerifyRequest:
    """A request to verify a checkpoint, in plain values.

    Attributes:
        checkpoint: a folder, or a checkpoint on the Hub.
        against: the source of the checkpoint, a folder or a model on the Hub.
        stages: of `STAGES`, in any order.
        by_ranges: whether the stage structure reads only headers and scales of a checkpoint on the Hub.
        text: a file to measure on. None for the shipped held-out text.
        server: None for the defaults.
        log_folder: for the server's log.
    """

    checkpoint: AnyPath
    against: AnyPath | None = None
    stages: Sequence[str] = ("structure",)
    by_ranges: bool = True
    text: AnyPath | None = None
    samples: int = 18
    sequence_length: int = 512
    max_kl: float | None = None
    min_top1: float | None = None
    device: str = "auto"
    server: ServeOptions | None = None
    log_folder: AnyPath | None = None


def open_verification(request: VerifyRequest, progress: Progress) -> Verification:
    """Open the checkpoint and its source for a verification, whose `run` yields the checks.

    Args:
        progress: called with (done, total, phase) by long steps.
    Raises:
        EnvironmentLack: no such device.
        InputError: see `open_model`. A stage does not exist, or needs a source that is not named.
    """
    from ..serving.server import ServeOptions
    from ..verify.numerics.stage import NumericsOptions
    from ..verify.run import STAGES as IN_ORDER
    from ..verify.run import Verification, VerifyOptions

    unknown = [stage for stage in request.stages if stage not in STAGES]
    if unknown:
        raise InputError(f"stage '{unknown[0]}' does not exist", hint=f"choose from {', '.join(STAGES)}")
    remote = find_remote(str(request.checkpoint))
    source = None if request.against is None else open_model(str(request.against))
    numerics = NumericsOptions(
        text=_path(request.text),
        samples=request.samples,
        sequence_length=request.sequence_length,
        device=resolve_device(request.device),
        max_kl=request.max_kl,
        min_top1=request.min_top1,
    )
    stages = tuple(stage for stage in IN_ORDER if stage in request.stages)
    by_ranges = remote is not None and request.by_ranges and stages == ("structure",)
    options = VerifyOptions(stages, numerics, request.server or ServeOptions(), _path(request.log_folder), by_ranges)
    return Verification(Path(request.checkpoint) if remote is None else remote, source, options, progress)


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)
