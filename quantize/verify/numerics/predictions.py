"""The predictions of each lane for the next token, one part of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from ...calibrate.lanes import Lane
from ...calibrate.record import finish_batch
from ...calibrate.skeleton import Skeleton
from ...errors import InputError
from ...format.schemes import ARITHMETICS, Arithmetic
from ..threads import Progress
from .head import Head
from .lanes import LaneName
from .measure import SideBySide
from .served import ServedModel
from .tokens import RunningDivergence, RunningLogits, TokenScores

BLOCK_ELEMENTS = 1 << 24  # of logits at a time


def predict(run: SideBySide, progress: Progress) -> tuple[dict[LaneName, RunningLogits], dict[LaneName, TokenScores]]:
    """Run the head over the output of every lane.

    Returns:
        Each lane's own reduction, and each lane against the source, where there is a source.
    Raises:
        InputError: no head, or heads of different sizes.
    """
    samples = [row for batch in run.batches for row in batch]
    targets = torch.cat([sample[1:] for sample in samples]).to(run.device)
    lengths = [len(sample) - 1 for sample in samples]
    finished = {name: _finished(lane, run) for name, lane in run.lanes.items()}
    for name, arithmetic in _arithmetics(run.lanes).items():
        finished[name] = run.served.head_inputs(finished[name], arithmetic)
    run.close()
    logits = {name: RunningLogits(targets) for name in run.lanes}
    others = {name: other for name, other in logits.items() if name != "source"} if "source" in logits else {}
    divergence: dict[LaneName, RunningDivergence] = {
        name: RunningDivergence(logits["source"], other) for name, other in others.items()
    }
    heads = _Heads(run.lanes, run.served)
    for first, weights in heads.parts(run.device, progress):
        height = max(1, BLOCK_ELEMENTS // max(len(part) for part in weights.values()))
        for begin in range(0, len(targets), height):
            rows = slice(begin, min(len(targets), begin + height))
            _add_part(rows, first, heads.logits(rows, first, weights, finished), logits, divergence)
    scores: dict[LaneName, TokenScores] = {
        name: TokenScores(logits[name].nll.cpu(), part.kl.cpu(), part.agrees.cpu(), lengths)
        for name, part in divergence.items()
    }
    return logits, scores


def _finished(lane: Lane, run: SideBySide) -> Tensor:
    """The head's inputs, float [scored tokens, hidden size], on the device while there is room."""
    finished = [finish_batch(lane.skeleton, batch, lane.hidden.fetch(at)) for at, batch in enumerate(run.batches)]
    rows = torch.cat([sequence[:-1] for batch in finished for sequence in batch])
    if run.device.type == "cuda" and rows.nbytes * len(run.lanes) > torch.cuda.mem_get_info(run.device)[0] // 3:
        return rows.cpu()
    return rows


def _add_part(
    rows: slice,
    first: int,
    part: Mapping[LaneName, Tensor],
    logits: Mapping[LaneName, RunningLogits],
    divergence: Mapping[LaneName, RunningDivergence],
) -> None:
    shrink = {name: logits[name].add(rows, values, first) for name, values in part.items()}
    if not divergence:
        return
    source = part["source"]
    weights = (source - logits["source"].top[rows][:, None]).exp_()
    for name, running in divergence.items():
        running.add(rows, weights, shrink["source"], source - part[name])


def _arithmetics(lanes: Iterable[LaneName]) -> dict[LaneName, Arithmetic]:
    """The arithmetic of each lane of the checkpoint."""
    return {name: found for name in lanes for found in ARITHMETICS if name in (found, f"{found}_again")}


class _Heads:
    """The head of each model, read side by side. Lanes whose heads have the same rows share them.

    Args:
        served: the checkpoint, whose lanes may have a quantized head.
    """

    def __init__(self, lanes: Mapping[LaneName, Lane], served: ServedModel) -> None:
        skeletons: dict[int, Skeleton] = {id(lane.skeleton): lane.skeleton for lane in lanes.values()}
        heads = {key: Head(skeleton) for key, skeleton in skeletons.items()}
        self._of = {name: heads[id(lane.skeleton)] for name, lane in lanes.items()}
        self._keys: dict[LaneName, str] = {}
        self._readers: dict[str, Callable[[range], Tensor]] = {}
        arithmetics = _arithmetics(lanes)
        for name, head in self._of.items():
            key, reader = str(id(head)), head.read
            if served.head is not None and name in arithmetics:
                key = f"{key}, {served.loses_blocks(served.head, arithmetics[name])}"
                reader = partial(served.head_rows, arithmetic=arithmetics[name])
            self._keys[name] = key
            self._readers.setdefault(key, reader)
        sizes = {(head.rows, head.cols) for head in heads.values()}
        if len(sizes) > 1:
            raise InputError(
                f"the heads of the two models have different shapes {sorted(sizes)}", hint="compare like models"
            )
        self.rows = sizes.pop()[0]

    def parts(self, device: torch.device, progress: Progress) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Number of the first row, and each head's rows from there on, float32 on the device."""
        keys = list(self._readers)
        for rows in next(iter(self._of.values())).ranges():
            progress(rows.start, self.rows, "comparing predictions, vocabulary")
            weights = {key: read(rows) for key, read in self._readers.items()}
            if len(keys) == 2 and torch.equal(*weights.values()):
                shared = weights[keys[0]].to(device).float()
                yield rows.start, dict.fromkeys(keys, shared)
            else:
                yield rows.start, {key: part.to(device).float() for key, part in weights.items()}

    def logits(
        self, rows: slice, first: int, weights: Mapping[str, Tensor], finished: Mapping[LaneName, Tensor]
    ) -> dict[LaneName, Tensor]:
        """Each lane's logits of a part of the vocabulary for some of the tokens."""
        return {
            name: self._of[name].logits(finished[name][rows].to(weights[key].device).float(), first, weights[key])
            for name, key in self._keys.items()
        }
