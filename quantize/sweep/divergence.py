"""The mean KL divergence of many lanes to the source, one part of the vocabulary and one lane at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..calibrate.lanes import Lane
from ..calibrate.record import finish_batch
from ..calibrate.skeleton import Skeleton
from ..errors import CheckFailed
from ..verify.numerics.head import Head
from ..verify.numerics.predictions import BLOCK_ELEMENTS
from ..verify.numerics.tokens import RunningDivergence, RunningLogits
from ..verify.threads import Progress


def mean_divergences(
    skeleton: Skeleton, batches: Sequence[Tensor], source: Lane, lanes: Mapping[str, Lane], progress: Progress
) -> dict[str, float]:
    """The mean KL divergence of each lane in nats, over all tokens but the first of each sequence.

    Args:
        skeleton: whose head all lanes use.
        batches: int64 [sequences, tokens] each.
        source, lanes: behind the last layer. Their hidden states are dropped.
        progress: called with (rows of the vocabulary done, all of them, words).
    Raises:
        CheckFailed: a lane's predictions are not finite.
        InputError: the model has no head that nvquant knows.
    """
    device, head = skeleton.device, Head(skeleton)
    targets = torch.cat([row[1:] for batch in batches for row in batch]).to(device)
    names = list(lanes)
    every = [source, *lanes.values()]
    finished = [_finished(skeleton, batches, lane, len(every)) for lane in every]
    logits = [RunningLogits(targets) for _ in every]
    divergence = [RunningDivergence(logits[0], other) for other in logits[1:]]
    for rows in head.ranges():
        weight = head.read(rows).to(device).float()
        height = max(1, BLOCK_ELEMENTS // len(weight))
        for begin in range(0, len(targets), height):
            done = rows.start + len(rows) * begin // len(targets)
            progress(done, head.rows, f"comparing the predictions of {len(lanes)} lanes, vocabulary")
            block = slice(begin, min(len(targets), begin + height))
            parts = (head.logits(lane[block].to(device).float(), rows.start, weight) for lane in finished)
            reference = next(parts)
            shrink = logits[0].add(block, reference, rows.start)
            shares = (reference - logits[0].top[block][:, None]).exp_()
            for other, running, part in zip(logits[1:], divergence, parts, strict=True):
                other.add(block, part, rows.start)
                running.add(block, shares, shrink, reference - part)
    means = {name: float(running.kl.mean()) for name, running in zip(names, divergence, strict=True)}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise CheckFailed(
                f"{name}: the predictions contain a NaN or an infinity", hint="check the weights of the source"
            )
    return means


def _finished(skeleton: Skeleton, batches: Sequence[Tensor], lane: Lane, lanes: int) -> Tensor:
    """The head's inputs, [scored tokens, hidden size], on the device while there is room."""
    done = [finish_batch(skeleton, batch, lane.hidden.fetch(at)) for at, batch in enumerate(batches)]
    rows = torch.cat([sequence[:-1] for batch in done for sequence in batch])
    lane.hidden.close()
    is_gpu = skeleton.device.type == "cuda"
    return rows.cpu() if is_gpu and rows.nbytes * lanes > torch.cuda.mem_get_info(skeleton.device)[0] // 3 else rows
