"""The likelihoods of a correct server, computed from the checkpoint's files alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...format.schemes import Arithmetic
from ..subject import Subject
from .lanes import largest_layer_bytes
from .measure import SideBySide
from .predictions import predict
from .served import ServedModel
from .tokens import RunningLogits

DECODED_PER_STORED = 4  # 16 bits for 4 and their scales
COMPUTING_BYTES = 2 << 30  # the context, libraries, hidden states of one sequence, a part of the head


def emulated_logprobs(subject: Subject, ids: Sequence[int], arithmetic: Arithmetic, device: str = "cpu") -> list[float]:
    """Compute the natural-log likelihood of each id but the first, given all before it.

    Args:
        subject: a checkpoint whose structure is sound.
        ids: two at least.
        arithmetic: of the server: with rounded inputs where the checkpoint requires it, or weight-only.
        device: the CPU replaces a GPU that a server fills which is still running.
    Raises:
        InputError, EnvironmentLack: see `SideBySide`.
    """
    values: list[float] = (-_run(subject, ids, arithmetic, device).nll).tolist()
    return values


def likeliest_next(subject: Subject, ids: Sequence[int], arithmetic: Arithmetic, device: str = "cpu") -> int:
    """The most likely id after the given ones. Arguments and errors are those of `emulated_logprobs`."""
    return int(_run(subject, [*ids, ids[-1]], arithmetic, device).top_at[-1])  # of the last id only the place counts


def _gpu_bytes_needed(served: ServedModel) -> int:
    """GPU memory that an emulation takes: two buffers of a stored layer, a decoded one, and what computes."""
    layer = largest_layer_bytes(served.subject.checkpoint, served.prefix)
    return (2 + DECODED_PER_STORED) * layer + COMPUTING_BYTES


def _run(subject: Subject, ids: Sequence[int], arithmetic: Arithmetic, device: str) -> RunningLogits:
    sample = torch.tensor(list(ids), dtype=torch.int64)
    served = ServedModel(subject)
    if torch.device(device).type == "cuda" and torch.cuda.mem_get_info(device)[0] < _gpu_bytes_needed(served):
        device = "cpu"
    run = SideBySide(served, None, [sample], [arithmetic], device, lambda *_: None)
    try:
        run.run()
        logits, _ = predict(run, lambda *_: None)
    finally:
        run.close()
    return logits[arithmetic]
