"""The reader of `nvquant_manifest.json`, which checks its form because somebody may have edited or damaged it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.source import read_json
from ..convert.manifest import MANIFEST_NAME
from ..convert.manifest_form import GroupRecord, ManifestForm, held_to
from ..errors import InputError
from ..recipe.schema import Recipe


@dataclass(frozen=True)
class RecordedInput:
    """The observations of calibration at a group's input, and the amax behind its scale."""

    observed_amax: float
    low_percentile: float
    calibrated_amax: float


@dataclass(frozen=True)
class RecordedGroup:
    """The manifest's entry of a fused group.

    Attributes:
        file: the shard that contains it.
        input: None for a weight-only scheme.
    """

    name: str
    file: str
    scheme: str
    members: tuple[str, ...]
    weight_amax: float
    input: RecordedInput | None
    marlin_flushed_blocks: int


@dataclass(frozen=True)
class Manifest:
    """The manifest's entries of a run.

    Attributes:
        version: of the nvquant that ran.
        framing: how the calibration's samples were made. None without calibration.
        files: sha256 by file name.
    """

    version: str
    format: str
    quantizer: str
    recipe: Recipe
    framing: str | None
    groups: Mapping[str, RecordedGroup]
    files: Mapping[str, str]


def read_manifest(folder: Path) -> Manifest | str | None:
    """Read the manifest of a checkpoint.

    Returns:
        None where there is none, or a sentence on why it cannot be used.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        return _parse(held_to(ManifestForm, read_json(folder / MANIFEST_NAME, ""), MANIFEST_NAME))
    except InputError as error:
        return str(error)


def _parse(form: ManifestForm) -> Manifest:
    return Manifest(
        version=form.nvquant,
        format=form.format,
        quantizer=form.quantizer,
        recipe=form.recipe,
        framing=None if form.calibration is None else form.calibration.framing,
        groups={
            name: _parse_group(name, layer.file, record)
            for layer in form.layers
            for name, record in layer.groups.items()
        },
        files=form.files,
    )


def _parse_group(name: str, file: str, record: GroupRecord) -> RecordedGroup:
    inputs = record.input
    return RecordedGroup(
        name=name,
        file=file,
        scheme=record.scheme,
        members=record.members,
        weight_amax=record.weight_amax,
        input=None
        if inputs is None
        else RecordedInput(inputs.observed_amax, inputs.low_percentile, inputs.calibrated_amax),
        marlin_flushed_blocks=record.marlin_flushed_blocks,
    )
