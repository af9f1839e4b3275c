"""A distillation from plain values, for `nvquant.distill` and the commands `distill` and `convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import EnvironmentLack, InputError
from ..plan.plan import Plan
from .inputs import AnyPath, find_remote, open_model, resolve_device

if TYPE_CHECKING:
    from ..convert.stop import StopRequest
    from ..distill.options import DistillResult, Progress

DEFAULT_TOKENS = 409_600


@dataclass(frozen=True)
class DistillRequest:
    """A request to distill a checkpoint, in plain values.

    Attributes:
        checkpoint: a folder, or a checkpoint on the Hub.
        against: the source of the checkpoint, a folder or a model on the Hub.
        output: the folder to write.
        tokens: of the training.
        calibration: the training text, as for a conversion. None for the shipped set.
        text: the text that decides whether the training is kept. None for the shipped held-out text.
        memory_budget: bytes, on the device. None for the free memory.
        restart: begin anew instead of resuming an unfinished run.
    """

    checkpoint: AnyPath
    against: AnyPath
    output: AnyPath
    tokens: int = DEFAULT_TOKENS
    calibration: AnyPath | None = None
    text: AnyPath | None = None
    device: str = "auto"
    memory_budget: int | None = None
    restart: bool = False


def run_distillation(request: DistillRequest, stop: StopRequest, progress: Progress) -> DistillResult:
    """Distill a checkpoint.

    Args:
        stop: checked between steps for a request to end the run.
        progress: called with (done, total, phase).
    Raises:
        InputError: see `open_model` and `distill.run.distill`. The output is the checkpoint itself.
        EnvironmentLack: no such device, or too little memory.
    """
    from ..distill.options import DEFAULT_SET, DistillOptions
    from ..distill.run import distill
    from ..verify.remote import fetch_checkpoint

    remote = find_remote(str(request.checkpoint))
    folder = Path(request.checkpoint) if remote is None else fetch_checkpoint(remote, progress)
    output = Path(request.output)
    options = DistillOptions(
        output,
        request.tokens,
        text=str(request.calibration or DEFAULT_SET),
        heldout=None if request.text is None else str(request.text),
        device=resolve_device(request.device),
        memory_budget_bytes=request.memory_budget,
        restart=request.restart,
        stop=stop,
        progress=progress,
    )
    return distill(folder, open_model(str(request.against)), options)


def distill_converted(
    plan: Plan, target: Path, request: DistillRequest, stop: StopRequest, progress: Progress
) -> DistillResult:
    """Distill the output of a conversion in its place. An equal call resumes an unfinished distillation.

    Raises:
        InputError, EnvironmentLack: see `run_distillation`. The output of the conversion stays.
    """
    from ..distill.options import DistillOptions
    from ..distill.run import distill

    options = DistillOptions(
        target,
        request.tokens,
        device=resolve_device(request.device),
        memory_budget_bytes=request.memory_budget,
        restart=request.restart,
        is_in_place=True,
        stop=stop,
        progress=progress,
    )
    try:
        return distill(target, plan.source, options)
    except (InputError, EnvironmentLack) as error:
        error.add(f"{target} contains the complete checkpoint without distillation.")
        raise


def check_distillation(plan: Plan, tokens: int, device: str, memory_budget: int | None) -> None:
    """Refuse a distillation after a conversion that is impossible, before the conversion.

    Raises:
        InputError: too few tokens.
        EnvironmentLack: too little memory.
    """
    from ..distill.memory import check_memory
    from ..distill.options import DistillOptions

    options = DistillOptions(Path(), tokens, device=device, memory_budget_bytes=memory_budget)
    sizes = {name: (one.rows, one.cols, one.scheme.has_block_scales) for name, one in plan.matrices.items()}
    check_memory(sizes, plan.source, options, options.dtype)


def refuse_distilled(output: Path) -> None:
    """Refuse the finished output of a conversion with distillation, where none is requested.

    Raises:
        InputError: the output is distilled.
    """
    from ..stream.manifest import Manifest, read_manifest

    manifest = read_manifest(output)
    if isinstance(manifest, Manifest) and manifest.distillation is not None and manifest.distillation.is_kept:
        raise InputError(
            f"-o {output} contains the finished checkpoint of a run with --distill",
            where="-o",
            hint="repeat the option, choose another folder, or replace it with --restart",
        )
