"""Calibration sets described in YAML: the shipped ones of package `nvquant.calibration`, and a user's own.

name: ultrachat
description: Dialogues on everyday topics.
licence: MIT
parts:
  - hub: HuggingFaceH4/ultrachat_200k
    revision: 8049631c405ae6576f93f445c6b8166f76f5505a
    files: data/train_sft-*.parquet
    messages: messages
    weight: 1
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..checkpoint.regular import read_regular
from ..errors import InputError
from ..recipe.yaml_text import YamlFault, parse_yaml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SHIPPED_PACKAGE = "nvquant.calibration"
REPO_PATTERN = r"^[\w.-]+/[\w.-]+$"


class Part(BaseModel):
    """One source of documents.

    Attributes:
        hub: id of a Hub data set, `org/name`.
        bundled: file name of a text shipped with nvquant.
        revision: commit, branch or tag of the Hub data set. A commit makes the set reproducible.
        files: glob patterns of its files. The default is the training files of the preferred kind.
        messages, text: column of the dialogues or of the text, where it has an unusual name.
        weight: share of the text taken from this part, relative to the other parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: str | None = Field(default=None, pattern=REPO_PATTERN)
    bundled: str | None = None
    revision: str | None = None
    files: tuple[str, ...] = ()
    messages: str | None = None
    text: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @field_validator("files", mode="before")
    @classmethod
    def _one_pattern_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_one_source(self) -> Part:
        if (self.hub is None) == (self.bundled is None):
            raise ValueError("name either hub or bundled, one of the two")
        if self.bundled is not None and (self.revision or self.files):
            raise ValueError("revision and files belong to hub, not to bundled")
        if self.bundled is not None and PurePosixPath(self.bundled).name != self.bundled:
            raise ValueError("bundled is a bare file name of a shipped text")
        if self.messages is not None and self.text is not None:
            raise ValueError("name either messages or text, not both")
        return self


class CalibrationSpec(BaseModel):
    """A named mixture of parts.

    Attributes:
        kinds: share of the tokens of each kind of text, relative to the other kinds. Each sample is then of one kind,
            and other kinds are skipped. None takes the documents as they come.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    description: str
    licence: str
    parts: tuple[Part, ...] = Field(min_length=1)
    kinds: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = Field(default=None, min_length=1)


def shipped_folder() -> Traversable:
    """The folder of the shipped texts and specs."""
    return resources.files(SHIPPED_PACKAGE)


def shipped_names(folder: Traversable | None = None) -> tuple[str, ...]:
    """Names that `--calibration` accepts on their own: the YAML files of the package, sorted."""
    entries = (folder or shipped_folder()).iterdir()
    return tuple(sorted(PurePosixPath(entry.name).stem for entry in entries if entry.name.endswith(".yaml")))


def load_spec(source: Path | Traversable) -> CalibrationSpec:
    """Read and check a YAML spec.

    Raises:
        InputError: missing file, YAML that does not parse, unknown or missing keys.
    """
    if not source.is_file():
        raise InputError(f"{source} is not a file", where=source, hint="name an existing YAML spec with --calibration")
    data = read_regular(source) if isinstance(source, Path) else source.read_bytes()
    try:
        return CalibrationSpec.model_validate(parse_yaml(data)[1])
    except YamlFault as error:
        raise InputError(
            f"{source.name}:{error.line}: {error.problem}", where=source.name, hint="give a YAML spec"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"]) or "the top level"
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{where}: {what}",
            where=source.name,
            hint="A spec has name, description, licence, parts and optionally kinds",
        ) from error
