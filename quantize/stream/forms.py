"""What the records of a run are made of: a form with checked keys, and the types of its values.

Records come with a checkpoint, so their author may have written anything into them. Behind these types names are names,
hashes are hashes and numbers are numbers.
"""

from __future__ import annotations

from base64 import b64decode
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..quoting import visible

MOST_NAME_CHARACTERS = 4096
MOST_BASE64_CHARACTERS = 1 << 22


def _one_visible_line(text: str) -> str:
    if visible(text) != text or "\n" in text or "\t" in text:
        raise ValueError("it contains invisible characters")
    return text


def _decodable(text: str) -> str:
    b64decode(text, validate=True)  # binascii.Error is a ValueError
    return text


def _file_in_folder(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ValueError("it is not the name of a file in this folder")
    return name


Line = Annotated[str, Field(max_length=MOST_NAME_CHARACTERS), AfterValidator(_one_visible_line)]
Word = Annotated[str, Field(pattern=r"^\w[\w.+-]{0,99}\z")]
FileName = Annotated[Line, AfterValidator(_file_in_folder)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}\z")]
HubId = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}/\w[\w.-]{0,99}\z")]
Natural = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]
Amax = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Base64 = Annotated[
    str, AfterValidator(_decodable), Field(pattern=r"^[A-Za-z0-9+/]+={0,2}\z", max_length=MOST_BASE64_CHARACTERS)
]


class RecordForm(BaseModel):
    """A record whose other keys are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def as_json(self) -> dict[str, Any]:
        """The keys that were given, in the order of the form."""
        return self.model_dump(mode="json", exclude_unset=True)


class CalibrationRecord(RecordForm):
    """The calibration of the inputs' global scales."""

    name: Line
    samples: Natural
    sequence_length: Natural | None = None
    seed: Natural | None = None
    tokens: Natural
    framing: Word
    sha256: Sha256
