"""`nvquant_manifest.json` as verification reads it: checked for form, since it may have been edited or damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.source import read_json
from ..convert.manifest import MANIFEST_NAME
from ..errors import InputError
from ..recipe.schema import Recipe


@dataclass(frozen=True)
class RecordedInput:
    """What calibration observed at a group's input, and the amax that its scale was made from."""

    observed_amax: float
    low_percentile: float
    calibrated_amax: float


@dataclass(frozen=True)
class RecordedGroup:
    """What the manifest says of a fused group.

    Attributes:
        file: the shard that holds it.
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
    """What the manifest says of a run.

    Attributes:
        version: of the nvquant that ran.
        framing: how the calibration's samples were made; None without calibration.
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
        None where there is none; a sentence on what is wrong with it, where it cannot be used.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        return _parse(read_json(folder / MANIFEST_NAME, ""))
    except InputError as error:
        return str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # pydantic's errors are ValueErrors of many lines
        return f"{MANIFEST_NAME} lacks or misstates a key ({type(error).__name__}: {str(error).splitlines()[0]})"


def _parse(document: Mapping[str, Any]) -> Manifest:
    calibration = document["calibration"]
    return Manifest(
        version=str(document["nvquant"]),
        format=str(document["format"]),
        quantizer=str(document["quantizer"]),
        recipe=Recipe.model_validate(document["recipe"]),
        framing=None if calibration is None else str(calibration["framing"]),
        groups={
            name: _parse_group(name, _text(layer["file"]), record)
            for layer in document["layers"]
            for name, record in layer["groups"].items()
        },
        files={str(name): str(digest) for name, digest in document["files"].items()},
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a name")
    return value


def _parse_group(name: str, file: str, record: Mapping[str, Any]) -> RecordedGroup:
    inputs = record.get("input")
    keys = ("observed_amax", "low_percentile", "calibrated_amax")
    return RecordedGroup(
        name=name,
        file=file,
        scheme=str(record["scheme"]),
        members=tuple(_text(member) for member in record["members"]),
        weight_amax=float(record["weight_amax"]),
        input=None if inputs is None else RecordedInput(*(float(inputs[key]) for key in keys)),
        marlin_flushed_blocks=int(record["marlin_flushed_blocks"]),
    )
