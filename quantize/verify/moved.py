"""The tensors that distillation changed, as the manifest records them."""

from __future__ import annotations

from ..stream.distillation import DistillationRecord
from ..stream.manifest import Manifest
from .subject import Subject


def distillation_of(subject: Subject) -> DistillationRecord | None:
    """The recorded distillation. None where there is none."""
    return subject.manifest.distillation if isinstance(subject.manifest, Manifest) else None


def moved_norms(subject: Subject) -> frozenset[str]:
    """The names of the norms that distillation changed."""
    record = distillation_of(subject)
    return frozenset(() if record is None else record.norms)


def scale_change(subject: Subject, module: str) -> float:
    """The recorded change of a module's block scales. See `DistillationRecord.scales`."""
    record = distillation_of(subject)
    return 0.0 if record is None else record.scales.get(module, 0.0)
