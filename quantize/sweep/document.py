"""`sweep.json`: the measurements of a sweep, with the identity of the run.

It is written after every walk of the source, so a sweep that ended early resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..checkpoint.source import read_json
from ..stream.forms import Line, Natural, Word
from ..stream.manifest import Identity, ResidualRecord, held_to
from .candidates import UNQUANTIZED, Candidate
from .choice import Form, Ladder

NAME = "sweep.json"
Divergence = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class GroupForm(_Part):
    """A group in one scheme. See `choice.Form`."""

    kl: Divergence
    tensor_bytes: Natural
    weight_bytes: Natural


class GroupMeasurement(_Part):
    """A fused group.

    Attributes:
        forms: by scheme, the recipe's first and `bf16` last.
    """

    name: Line
    layer: Natural
    members: tuple[Line, ...]
    weights: Natural
    forms: dict[Word, GroupForm]

    @property
    def ladder(self) -> Ladder:
        """The forms for a choice."""
        forms = [Form(scheme, one.kl, one.tensor_bytes, one.weight_bytes) for scheme, one in self.forms.items()]
        return Ladder(self.name, self.weights, tuple(forms))


class PointRecord(_Part):
    """A point of the curve. See `choice.Point`."""

    group: Line | None
    scheme: Word | None
    tensor_bytes: Natural
    bits: float
    kl: Divergence


class RecipeRecord(_Part):
    """A recipe for a budget.

    Attributes:
        target: the budget as an option.
        file: its name in this folder.
        file_bytes: of all shards of the checkpoint.
        kl: the forecast.
        groups: number of fused groups by scheme.
    """

    target: Line
    name: Line
    file: Line
    bits: float
    file_bytes: Natural
    kl: Divergence
    groups: dict[Word, Natural]


class SweepDocument(Identity):
    """A sweep.

    Attributes:
        residual: the order of the residual stream's channels. None without folds.
        ends: the mean KL divergences with all groups in the recipe's schemes, and in FP8.
        groups: the groups measured so far, in the order of the layers.
        curve: empty until all groups are measured.
    """

    residual: ResidualRecord | None = None
    ends: tuple[Divergence, ...] = ()
    groups: tuple[GroupMeasurement, ...] = ()
    curve: tuple[PointRecord, ...] = ()
    recipes: tuple[RecipeRecord, ...] = ()

    def with_(self, **values: Any) -> SweepDocument:
        """A copy with other values."""
        return self.model_copy(update=values)

    @property
    def layers(self) -> frozenset[int]:
        """The measured layers."""
        return frozenset(group.layer for group in self.groups)

    @property
    def ladders(self) -> list[Ladder]:
        """The forms of all groups, for a choice."""
        return [group.ladder for group in self.groups]


def measurement(candidate: Candidate, alone: Sequence[float]) -> GroupMeasurement:
    """The entry of a group.

    Args:
        alone: the mean KL divergence of each of its schemes.
    """
    values = dict(zip(candidate.schemes, alone, strict=True)) | {UNQUANTIZED: 0.0}
    forms = {
        scheme: GroupForm(
            kl=kl, tensor_bytes=candidate.tensor_bytes[scheme], weight_bytes=candidate.weight_bytes[scheme]
        )
        for scheme, kl in values.items()
    }
    return GroupMeasurement(
        name=candidate.group.name,
        layer=candidate.layer,
        members=candidate.group.members,
        weights=candidate.weights,
        forms=forms,
    )


def read_document(folder: Path) -> dict[str, Any] | None:
    """The JSON of the sweep in a folder, or None where there is none.

    Raises:
        InputError: it is not readable JSON.
    """
    path = folder / NAME
    return read_json(path, "", way_out="remove it") if path.exists() else None


def parsed(document: dict[str, Any], folder: Path) -> SweepDocument:
    """A sweep from its JSON.

    Raises:
        InputError: it has another form.
    """
    return held_to(SweepDocument, document, str(folder / NAME))
