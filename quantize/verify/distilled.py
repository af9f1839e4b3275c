"""The distillation that the manifest records, checked: how far norms moved from the source's, and its own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from math import expm1

from torch import Tensor

from ..checkpoint.source import Checkpoint
from ..stream.distillation import DistillationRecord, NormChange
from .folds import folds_of
from .moved import distillation_of
from .report import Finding, counted
from .subject import Subject

_TOLERANCE = 1e-9


def check_distilled(subject: Subject, source: Checkpoint) -> Finding:
    """Check that a distilled norm is the source's, after its fold, within the recorded bound. Nothing else may be
    recorded as changed but block scales of NVFP4 in decoder layers, which the check `weights` compares."""
    record = distillation_of(subject)
    assert record is not None
    faults = [*_misfits(subject, record)]
    folded = {} if faults else folds_of(subject, source).norms
    for name, change in record.norms.items() if not faults else ():
        info = source.infos().get(name)
        if info is not None and info.shape == subject.infos[name].shape:  # else it is for `names`
            before = folded[name] if name in folded else source.read(name)
            faults += _norm_faults(name, before, subject.checkpoint.read(name), change)
    total = ["no number" if one is None else f"{one:.4f}" for one in (record.total.before, record.total.after)]
    words = f"{record.tokens:,} tokens in {counted(record.steps, 'step')}, held-out KL {' to '.join(total)}"
    if not record.is_kept:
        return Finding(f"{words}, not kept ({record.reason})", faults)
    largest = max(record.scales.values(), default=0.0), max((one.largest for one in record.norms.values()), default=0.0)
    matrices = counted(len(record.scales), "matrix", "matrices")
    norms = counted(len(record.norms), "norm")
    return Finding(
        f"{words}, block scales of {matrices} changed by at most {expm1(largest[0]):.1%}, {norms} by at most "
        f"{largest[1]:.1%}",
        faults,
    )


def _misfits(subject: Subject, record: DistillationRecord) -> Iterator[str]:
    """A phrase for each recorded change that no distillation makes."""
    if not record.is_kept and (record.scales or record.norms):
        yield "changes are recorded of a distillation that was not kept"
    for module in record.scales:
        matrix = subject.sound.get(module)
        if matrix is None or not matrix.scheme.has_block_scales or module == subject.head:
            yield f"{module} is recorded as distilled, but has no block scales that distillation changes"
    for name in record.norms:
        if name not in subject.roles or len(subject.infos[name].shape) != 1:
            yield f"{name} is recorded as a distilled norm, but is none"


def _norm_faults(name: str, before: Tensor, after: Tensor, change: NormChange) -> Iterator[str]:
    largest = largest_norm_change(before, after, change.adds_one)
    if before.dtype != after.dtype or not largest <= change.largest + _TOLERANCE:
        yield f"{name} differs from the source's by {largest:.2%}, but {change.largest:.2%} are recorded"


def largest_norm_change(before: Tensor, after: Tensor, adds_one: bool) -> float:
    """The largest |after / before - 1| of a norm's factors. Infinite where a factor of zero changed."""
    old, new = (one.double() + int(adds_one) for one in (before, after))
    moved = (new / old - 1).abs().masked_fill(old == new, 0.0)
    return float(moved.nan_to_num(nan=float("inf")).max()) if moved.numel() else 0.0
