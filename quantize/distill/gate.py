"""The gate: trained tensors are kept only if held-out text of all kinds together gains and no kind loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibrate.samples import CalibrationSet
from ..stream.distillation import Divergences
from ..verify.numerics.tokens import standard_error
from .divergence import Divergence
from .options import BATCH_SEQUENCES, Progress
from .resident import Resident, padded
from .student import Student

STANDARD_ERRORS = 2
ALL = "all kinds together"


@dataclass(frozen=True)
class Verdict:
    """The judgement of a training.

    Attributes:
        heldout: by kind of text. Empty where kinds are not known.
        total: over all of the text.
        is_kept: whether to keep the trained tensors.
        reason: in words.
    """

    heldout: dict[str, Divergences]
    total: Divergences
    is_kept: bool
    reason: str


def measure(teacher: Resident, student: Student, text: CalibrationSet, progress: Progress) -> tuple[Tensor, Tensor]:
    """The KL divergence of each held-out token before and after the training, float64 [tokens], on the CPU."""
    divergence = Divergence(teacher, student)
    before, after = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for at in range(0, len(text.samples), BATCH_SEQUENCES):
            batch, real = padded(text.samples[at : at + BATCH_SEQUENCES])
            real = real.to(teacher.device)
            source = teacher.hidden(batch)[real]
            after.append(divergence.of_tokens(source, student.hidden(batch)[real]).cpu())
            with student.untrained():
                before.append(divergence.of_tokens(source, student.hidden(batch)[real]).cpu())
            progress(min(at + BATCH_SEQUENCES, len(text.samples)), len(text.samples), "measuring held-out sequences")
    return torch.cat(before), torch.cat(after)


def judge(before: Tensor, after: Tensor, lengths: Sequence[int], kinds: Sequence[str]) -> Verdict:
    """Judge a training by its differences on the same tokens, with sequences as the independent units.

    Args:
        before, after: float64 [tokens], KL divergences.
        lengths: tokens of each sequence, in order.
        kinds: of each sequence. Empty where they are not known.
    """
    places: dict[str, list[int]] = {}
    for at, kind in enumerate(kinds):
        places.setdefault(kind, []).append(at)
    heldout = {kind: _divergences(before, after, lengths, rows) for kind, rows in places.items()}
    total = _divergences(before, after, lengths, range(len(lengths)))
    if heldout and all(one.error is not None for one in heldout.values()):
        # The kinds are given, not drawn: differences between them are no noise.
        errors = [(one.error or 0.0) * one.tokens / total.tokens for one in heldout.values()]
        total = total.model_copy(update={"error": math.hypot(*errors)})
    worse = [kind for kind, one in heldout.items() if not _difference(one) <= _noise(one)]
    if worse:
        reason = f"the kind {worse[0]} lost ({_words(heldout[worse[0]])})"
    elif not _difference(total) < -_noise(total):
        reason = f"{ALL} gained nothing beyond the noise ({_words(total)})"
    else:
        return Verdict(heldout, total, True, f"{ALL} gained, and no kind lost ({_words(total)})")
    return Verdict(heldout, total, False, reason)


def _divergences(before: Tensor, after: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Divergences:
    parts = [(one.split(list(lengths))) for one in (before, after)]
    old, new = (torch.cat([part[at] for at in rows]) for part in parts)
    error = standard_error(new - old, [lengths[at] for at in rows])
    means = [float(one.mean()) for one in (old, new)]
    first, second = (max(0.0, mean) if math.isfinite(mean) else None for mean in means)
    known = error if error is not None and math.isfinite(error) else None
    return Divergences(before=first, after=second, error=known, sequences=len(rows), tokens=len(old))


def _difference(one: Divergences) -> float:
    """After less before. NaN where one of them is no number."""
    return math.nan if one.before is None or one.after is None else one.after - one.before


def _noise(one: Divergences) -> float:
    return STANDARD_ERRORS * (one.error or 0.0)


def _words(one: Divergences) -> str:
    before, after = ("no number" if value is None else f"{value:.4f}" for value in (one.before, one.after))
    return f"KL {before} to {after}{'' if one.error is None else f', difference ± {one.error:.4f}'}"
