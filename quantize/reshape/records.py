"""Folds in the manifest."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..stream.manifest import FoldingRecord, FoldRecord, HeadsRecord
from .folding import FoldedLayer
from .folds import Fold, Heads, Place
from .reshaping import Read, Reshaping


def folding_record(folded: FoldedLayer) -> FoldingRecord:
    """The manifest's entry for the folds of a layer."""
    facts = {"unfolded": dict(folded.reasons)} if folded.reasons else {}
    return FoldingRecord(folds=tuple(map(_record, folded.reshaping.folds)), error=folded.error, **facts)


def reshaping_of(records: Iterable[FoldingRecord], members: Mapping[str, Sequence[str]], read: Read) -> Reshaping:
    """The folds that a manifest records.

    Args:
        records: of some layers.
        members: names of the matrices of each fused group, by group.
        read: reads the source's norms.
    """
    return Reshaping([fold for one in records for fold in folds_of(one, members)], read)


def folds_of(record: FoldingRecord, members: Mapping[str, Sequence[str]]) -> list[Fold]:
    """The recorded folds of a layer.

    Args:
        members: see `reshaping_of`.
    """
    return [_fold(one, members) for one in record.folds]


def _record(fold: Fold) -> FoldRecord:
    place = fold.place
    facts: dict[str, object] = {"groups": place.groups}
    if place.norm is not None:
        facts |= {"norm": place.norm, "adds_one": place.adds_one}
    else:
        facts |= {"maker": place.maker, "first_row": place.first_row}
    if place.heads is not None:
        facts["heads"] = HeadsRecord(groups=place.heads.groups, queries=place.heads.queries, size=place.heads.size)
    exponents = base64.b64encode(fold.exponents.cpu().contiguous().numpy().tobytes()).decode()
    return FoldRecord.model_validate({**facts, "exponents": exponents})


def _fold(record: FoldRecord, members: Mapping[str, Sequence[str]]) -> Fold:
    heads = None if record.heads is None else Heads(record.heads.groups, record.heads.queries, record.heads.size)
    readers = tuple(module for group in record.groups for module in members.get(group, ()))
    place = Place(record.groups, readers, record.norm, record.adds_one, record.maker, record.first_row, heads)
    return Fold(place, _exponents(record))


def _exponents(record: FoldRecord) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(record.exponents)), dtype=torch.int8)
