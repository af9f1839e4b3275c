"""`nvquant_manifest.json` and the records of a run's journal: their forms, which are checked when they are read.

A manifest contains the inputs of a run, its observations, and the hash of every shard. It contains no time, host or
path, so equal runs give equal files. A manifest comes with a checkpoint, so its author may have written anything into
it. Behind this module its names are names, its hashes are hashes and its numbers are numbers.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_serializer

from ..checkpoint.json_text import read_json
from ..checkpoint.sidefiles import MANIFEST_NAME as MANIFEST_NAME
from ..errors import InputError
from ..recipe.schema import Recipe
from .distillation import DistillationRecord
from .forms import (
    Amax,
    Base64,
    CalibrationRecord,
    Commit,
    FileName,
    HubId,
    Line,
    Natural,
    Sha256,
    Word,
)
from .forms import RecordForm as _Form


class HubSource(_Form):
    """A source on the Hub."""

    id: HubId
    commit: Commit


class SourceShard(_Form):
    """The recorded facts of a shard of the source: its header's hash for a folder, its ETag for a model on the Hub."""

    bytes: Natural | None = None
    mtime_ns: int | None = None
    etag: Annotated[str, Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?\z")] | None = None
    header_sha256: Sha256 | None = None


class Source(_Form):
    """The source of a checkpoint.

    Attributes:
        decoded: the forms that its tensors were decoded from. None for an unquantized source.
    """

    hub: HubSource | None = None
    decoded: Line | None = None
    integrity: Line | None = None
    config_sha256: Sha256 | None = None
    shards: dict[FileName, SourceShard] = Field(default_factory=dict)


class Run(_Form):
    """The circumstances of the computation."""

    device: Word
    dtype: Word
    attention: Line | None = None
    batch_size: Annotated[int, Field(ge=1, lt=1 << 31, strict=True)] | None = None
    processor: Line | None = None
    versions: dict[Word, Word] = Field(default_factory=dict)


class InputRecord(_Form):
    """The observations of calibration at a group's input, and the amax behind its global scale."""

    observed_amax: Amax
    low_percentile: Amax
    calibrated_amax: Amax
    tokens: Natural | None = None


class FeedbackRecord(_Form):
    """The course of error feedback in a fused group.

    Attributes:
        damping: the part of the Gram matrix's mean diagonal that was added to its diagonal.
        pull_damping: likewise, for the target. None without a target of its own.
        dead_columns: columns whose inputs were all zero. They keep their weights.
        outgrown_blocks: blocks whose updated weights outgrew the largest block scale, and were clipped.
    """

    damping: Amax
    pull_damping: Amax | None = None
    dead_columns: Natural = 0
    outgrown_blocks: Natural = 0


class CastRecord(_Form):
    """A fused group that keeps the codes of its quantized source.

    Attributes:
        source: the form of the source.
        exponent: of MXFP4's global scale as a multiplier, a power of two. None of FP8, whose scales stay too.
        blocks: of 16 values, in MXFP4.
        shifted: blocks with the same values under another scale, and therefore other codes.
        rounded: blocks that lost bits, because no scale was small enough.
    """

    source: Word
    exponent: Annotated[int, Field(ge=-149, le=127, strict=True)] | None = None
    blocks: Natural = 0
    shifted: Natural = 0
    rounded: Natural = 0


class GroupRecord(_Form):
    """A fused group. A scheme whose inputs need no calibration has no `input`.

    Attributes:
        weight_amax: behind the global scale. With error feedback, it is that of the target, not of the source.
        input_bound: the largest magnitude that the norm before the head can give, behind the head's input scale.
        feedback: None for a quantizer without error feedback.
        cast: None for a group that was quantized.
    """

    scheme: Word
    members: Annotated[tuple[Line, ...], Field(min_length=1)]
    weight_amax: Amax
    input: InputRecord | None = None
    input_bound: Amax | None = None
    marlin_flushed_blocks: Natural = 0
    feedback: FeedbackRecord | None = None
    cast: CastRecord | None = None


class CachedRecord(_Form):
    """The largest magnitude of an attention module's keys or values. A model without calibration may have neither.

    Attributes:
        bound: proved from the norm in front of them, whatever the text.
        observed: in calibration. Not recorded with a bound.
    """

    bound: Amax | None = None
    observed: Amax | None = None

    @property
    def largest(self) -> float | None:
        """The bound, or else the observation. None if neither is known."""
        return self.observed if self.bound is None else self.bound


class AttentionRecord(_Form):
    """What an FP8 KV cache stores of an attention module."""

    k: CachedRecord
    v: CachedRecord


class HeadsRecord(_Form):
    """See `reshape.folds.Heads`."""

    groups: Annotated[int, Field(ge=1, lt=1 << 20, strict=True)]
    queries: Annotated[int, Field(ge=1, lt=1 << 20, strict=True)]
    size: Annotated[int, Field(ge=1, lt=1 << 20, strict=True)]


class FoldRecord(_Form):
    """An exact change of scale between the tensor that makes a value and the fused groups that read it.

    Attributes:
        exponents: int8 each, eighths of an octave. See `reshape.folds.Fold`, also for the others.
    """

    groups: Annotated[tuple[Line, ...], Field(min_length=1)]
    norm: Line | None = None
    adds_one: bool = False
    maker: Line | None = None
    first_row: Natural = 0
    heads: HeadsRecord | None = None
    exponents: Base64

    @property
    def channels(self) -> int:
        """The number of exponents."""
        return len(b64decode(self.exponents))


class FoldingRecord(_Form):
    """The folds of a layer.

    Attributes:
        error: of the folded layer's output in float32, relative to the layer's change of its input.
        unfolded: for every fused group whose input is not folded, why not.
    """

    folds: tuple[FoldRecord, ...]
    error: Amax
    unfolded: dict[Line, Line] = Field(default_factory=dict)


class ResidualRecord(_Form):
    """The order of the residual stream's channels, or the reason why there is none.

    Attributes:
        order: int32 each, in base64: the place in the source of each channel.
        axes: by the names of the tensors that follow, see `checkpoint.reordered.Reordered`.
    """

    order: Base64 | None = None
    axes: dict[Line, Annotated[int, Field(ge=0, le=1, strict=True)]] = Field(default_factory=dict)
    reason: Line = ""

    @property
    def places(self) -> list[int]:
        """`order` as numbers."""
        data = b64decode(self.order or "")
        return [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]


class LayerRecord(_Form):
    """A layer, and the shard that contains it.

    Attributes:
        source_sha256: of the layer's source (`stream.reading.layer_digest`).
        kv_cache: by attention module. None without an FP8 KV cache.
        folding: None where no folds were looked for.
    """

    layer: Natural | None = None
    file: FileName
    source_sha256: Sha256 | None = None
    groups: dict[Line, GroupRecord]
    kv_cache: dict[Line, AttentionRecord] | None = None
    folding: FoldingRecord | None = None


class HeadRecord(_Form):
    """The quantized head, and the shard that contains it and nothing else.

    Attributes:
        name: of its module.
    """

    name: Line
    file: FileName
    group: GroupRecord


@dataclass(frozen=True)
class RecordedGroup:
    """The manifest's entry of a fused group.

    Attributes:
        file: the shard that contains it.
    """

    name: str
    file: str
    record: GroupRecord


class Identity(_Form):
    """All facts that determine the bytes of a run's output. A manifest begins with them.

    Attributes:
        nvquant: version of the nvquant that ran.
        fold: `auto` where exact folds were made. Otherwise it is not recorded.
        calibration: None without calibration.
    """

    nvquant: Word
    source: Source
    recipe: Recipe
    format: Word
    quantizer: Word
    fold: Literal["auto"] | None = None
    run: Run
    calibration: CalibrationRecord | None

    @field_serializer("recipe")
    def _without_calibration(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe without its wish for a calibration, because `calibration` has that of the run, and without an
        unquantized head or an open choice of folds, so that manifests of earlier releases stay equal."""
        unset = [name for name, is_set in (("head", recipe.head_scheme), ("fold", recipe.fold)) if not is_set]
        return recipe.model_dump(mode="json", exclude={"calibration", *unset})


class Manifest(Identity):
    """`nvquant_manifest.json`.

    Attributes:
        residual: None where no order was looked for.
        head: None where the head is not quantized.
        distillation: None where no distillation was requested.
        files: sha256 of every shard, by file name.
    """

    residual: ResidualRecord | None = None
    layers: tuple[LayerRecord, ...]
    head: HeadRecord | None = None
    distillation: DistillationRecord | None = None
    files: dict[FileName, Sha256]

    @property
    def framing(self) -> str | None:
        """How the calibration's samples were made. None without calibration."""
        return None if self.calibration is None else self.calibration.framing

    @property
    def attention(self) -> dict[str, AttentionRecord]:
        """What an FP8 KV cache stores, by attention module."""
        return {name: record for layer in self.layers for name, record in (layer.kv_cache or {}).items()}

    @cached_property
    def groups(self) -> dict[str, RecordedGroup]:
        """The fused groups by name, that of a quantized head last."""
        found = {
            name: RecordedGroup(name, layer.file, record)
            for layer in self.layers
            for name, record in layer.groups.items()
        }
        if self.head is not None:
            found[self.head.name] = RecordedGroup(self.head.name, self.head.file, self.head.group)
        return found


class FileNames(_Form):
    """The file names alone of a manifest or of a journal's list."""

    files: dict[FileName, str] | tuple[FileName, ...]


class ShardRecord(_Form):
    """A shard in a run's journal. `layer` is None for the rest of the model, `head` for all but the quantized head."""

    sha256: Sha256
    layer: LayerRecord | None
    head: HeadRecord | None = None


_WORDS = {"missing": "is missing", "string_pattern_mismatch": "does not have the form that nvquant writes"}
Form = TypeVar("Form", bound=_Form)


def held_to(form: type[Form], document: Mapping[str, Any], where: str) -> Form:
    """Check the form of a document, and return it parsed.

    Args:
        where: the name of the file in messages.
    Raises:
        InputError: the document has another form. The message names the first wrong key.
    """
    try:
        return form.model_validate(document)
    except (ValidationError, RecursionError) as error:
        problem = "it is nested too deeply"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            at = ".".join(str(part)[:80] for part in first["loc"]) or "the document"
            wrong = _WORDS.get(first["type"], f"is wrong: {first['msg'].removeprefix('Value error, ')}")
            problem = f"{at} {wrong}"
        raise InputError(f"{where} has a missing or wrong key ({problem}).") from error


def read_manifest(folder: Path) -> Manifest | str | None:
    """Read the manifest of a checkpoint.

    Returns:
        None where there is none, or a sentence on why it cannot be used.
    """
    if not (folder / MANIFEST_NAME).exists():
        return None
    try:
        return held_to(Manifest, read_json(folder / MANIFEST_NAME, ""), MANIFEST_NAME)
    except InputError as error:
        return str(error)
