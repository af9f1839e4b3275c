"""The folds that the manifest records, checked and applied to the source, so that other checks compare exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..checkpoint.reordered import Reordered, reordered
from ..checkpoint.source import Checkpoint, tensor_bytes
from ..errors import InputError
from ..reshape.records import reshaping_of
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..stream.manifest import FoldingRecord, FoldRecord, Manifest, ResidualRecord
from ..weights.stored import StoredMatrix
from .moved import moved_norms
from .report import Finding, counted
from .subject import Subject


def in_recorded_order(subject: Subject, source: Checkpoint) -> Checkpoint:
    """The source with the channels of its residual stream in the order of the checkpoint. An order that does not fit
    changes nothing, and `check_folds` reports it."""
    record = _residual(subject)
    if record is None or record.order is None:
        return source
    try:
        return reordered(source, record.places, record.axes)
    except (KeyError, ValueError):
        return source


def _residual(subject: Subject) -> ResidualRecord | None:
    return subject.manifest.residual if isinstance(subject.manifest, Manifest) else None


def has_folds(subject: Subject) -> bool:
    """Whether the manifest records folds, or an order of channels."""
    residual = _residual(subject)
    return (residual is not None and residual.order is not None) or any(record.folds for record in _records(subject))


def check_folds(subject: Subject, source: Checkpoint) -> Finding:
    """Check that the recorded folds fit the tensors, and that each stored norm is the source's after its fold."""
    records = _records(subject)
    folds = [fold for record in records for fold in record.folds]
    faults = list(_misfits(subject, source))
    residual, is_ordered = _residual(subject), isinstance(source, Reordered)
    moved = moved_norms(subject)
    if residual is not None and residual.order is not None and not is_ordered:
        faults.append("the order of the residual stream's channels does not fit the source")
    if not faults:
        for name, norm in folds_of(subject, source).norms.items():
            if name not in moved and bytes(tensor_bytes(subject.checkpoint.read(name))) != bytes(tensor_bytes(norm)):
                faults.append(f"{name} is not the source's norm after its fold")
    worst = max((record.error for record in records), default=0.0)
    words = f"{counted(len(folds), 'fold')} with a largest error of {worst:.1e} in float32"
    reasons = Counter(reason for record in records for reason in record.unfolded.values())
    words += "".join(f", {counted(count, 'input')} not folded ({reason})" for reason, count in reasons.most_common(3))
    words += ", channels of the residual stream in another order" if is_ordered else ""
    words += f", no order of channels ({residual.reason})" if residual is not None and residual.reason else ""
    return Finding(words, faults)


def folds_of(subject: Subject, source: Checkpoint) -> Reshaping:
    """The recorded folds, to be applied to the source. No folds where the manifest's do not fit, which `check_folds`
    reports."""
    records = _records(subject)
    if not has_folds(subject) or next(_misfits(subject, source), None) is not None:
        return UNCHANGED
    return reshaping_of(records, _members(subject), source.read)


def _records(subject: Subject) -> list[FoldingRecord]:
    manifest = subject.manifest
    layers = manifest.layers if isinstance(manifest, Manifest) else ()
    return [layer.folding for layer in layers if layer.folding is not None]


def _members(subject: Subject) -> Mapping[str, tuple[str, ...]]:
    groups = subject.manifest.groups if isinstance(subject.manifest, Manifest) else {}
    return {name: group.record.members for name, group in groups.items()}


def _misfits(subject: Subject, source: Checkpoint) -> Iterator[str]:
    """A phrase for each record that cannot be applied."""
    members, used = _members(subject), set[str]()
    for fold in (fold for record in _records(subject) for fold in record.folds):
        names = [*fold.groups, *(name for name in (fold.norm, fold.maker and f"{fold.maker} as maker") if name)]
        twice = [name for name in names if name in used]
        used.update(names)
        reason = f"{twice[0]} has a second fold" if twice else _misfit(subject, source, fold, members)
        if reason is not None:
            yield f"the fold of {fold.groups[0]} does not fit: {reason}"


def _misfit(
    subject: Subject, source: Checkpoint, fold: FoldRecord, members: Mapping[str, tuple[str, ...]]
) -> str | None:
    readers: list[StoredMatrix] = []
    for group in fold.groups:
        if group not in members or any(module not in subject.sound for module in members[group]):
            return f"{group} is not quantized"
        readers += [subject.sound[module] for module in members[group]]
    channels = fold.channels
    wanted = channels if fold.heads is None else channels * fold.heads.queries
    if any(reader.cols != wanted for reader in readers):
        return f"it has {wanted} channels"
    if fold.heads is not None and fold.heads.groups * fold.heads.size != channels:
        return "its heads have other sizes"
    if (fold.norm is None) == (fold.maker is None):
        return "it has not exactly one maker"
    if fold.maker is not None:
        maker = subject.sound.get(fold.maker)
        fits = maker is not None and fold.first_row + channels <= maker.rows
        return None if fits else f"{fold.maker} is not quantized, or has fewer rows"
    return _misfit_of_norm(subject, source, fold.norm or "", channels)


def _misfit_of_norm(subject: Subject, source: Checkpoint, norm: str, channels: int) -> str | None:
    try:
        infos = [checkpoint.info(norm) for checkpoint in (source, subject.checkpoint)]
    except (KeyError, InputError):
        return f"{norm} is missing"
    if any(info.shape != (channels,) for info in infos) or infos[0].dtype != infos[1].dtype:
        return f"{norm} is not a norm of {channels} channels"
    return None
