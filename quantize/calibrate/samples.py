"""Calibration samples: from a name on the command line to token ids, equal for equal name, model, sizes and seed."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import InputError
from .chat import Chats, thinking_switch
from .datasets import find_dataset
from .ids import IDS_SUFFIX, check_vocabulary, holds_ids, id_kinds, read_id_samples
from .kinds import KIND_COLUMN, KindStreams, draw_by_kind, kinds_in
from .rows import TABLE_SUFFIXES, data_suffix
from .specs import REPO_PATTERN, CalibrationSpec, load_spec, shipped_folder, shipped_names
from .text import Columns, Document, Source, read_documents
from .tokenizer import ChatTemplateError, ModelTokenizer

logger = logging.getLogger("nvquant.calibrate.samples")

Framing = Literal["prose", "chat", "ids"]
SPEC_SUFFIXES = (".yaml", ".yml")
BETWEEN_DOCUMENTS = "\n\n"
# A piece of a long text: some two sequences of English, so that 16 samples come from at least eight places.
PIECE_CHARACTERS_PER_TOKEN = 8
LEAST_PIECE_CHARACTERS = 4000


@dataclass(frozen=True)
class CalibrationSet:
    """The samples that calibrate a model.

    Attributes:
        name: for the manifest: a shipped set's or spec's name, `org/name@commit`, or a file's name without its folder.
        samples: int64 vectors of 2 to `sequence_length` token ids, none of them padding.
        tokens: sum of their lengths.
        sha256: of lengths and ids, little-endian int64, in order. It is equal if and only if the samples are.
        framing: `prose` (BOS and packed text), `chat` (the model's own template) or `ids` (as given).
        sequence_length, seed: the requested values, to repeat the request.
        kinds: the kind of text of each sample, where each is of one kind. Empty where they are not known.
    """

    name: str
    samples: tuple[torch.Tensor, ...]
    tokens: int
    sha256: str
    framing: Framing
    sequence_length: int | None = None
    seed: int | None = None
    kinds: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The entry for manifests and reports."""
        return {"name": self.name, "samples": len(self.samples), "tokens": self.tokens, "sha256": self.sha256}


@dataclass(frozen=True)
class _Text:
    """The text that a name means: its title, its sources, and the shares of its kinds (None: as they come)."""

    title: str
    sources: list[Source]
    kinds: Mapping[str, float] | None = None


@dataclass(frozen=True)
class _Made:
    """Samples, the kind of each where it is known, and a remark for an error about their number."""

    samples: list[list[int]]
    kinds: tuple[str, ...] = ()
    remark: str = ""


def load_calibration(
    name: str,
    *,
    model_folder: Path,
    config: Mapping[str, Any],
    samples: int,
    sequence_length: int,
    seed: int,
    in_equal_kinds: bool = False,
) -> CalibrationSet:
    """Make the calibration samples that `name` names.

    Models with a chat template get conversations in it, the others packed text. For models that have a BOS token,
    position 0 is BOS and position 1 is not. With token ids no tokenizer is loaded, and the rows are the file's first,
    whatever the seed. Where a spec gives shares of kinds, each sample is of one kind.

    Args:
        name: a shipped set, a YAML spec, a Hub data set `org/name[@revision]`, a file of text or one of token ids.
        model_folder: where the tokenizer and its chat template are.
        config: the model's config.json.
        samples: how many.
        sequence_length: tokens in each, at most. Packed text has exactly that many.
        seed: of the order of the documents.
        in_equal_kinds: for evaluation: equal numbers of samples of each kind that a table's column `kind` or a spec
            lists. The kinds of rows of token ids are noted.

    Raises:
        InputError: no such set or file, nothing usable in it, too little for the request, no tokenizer, ids out of the
            vocabulary.
        EnvironmentLack: Parquet without pyarrow.
    """
    if samples < 1:
        raise InputError(f"--samples {samples} is too few", where="--samples", hint="give at least 1")
    if sequence_length < 2:
        raise InputError(
            f"--sequence-length {sequence_length} is too short", where="--sequence-length", hint="give at least 2"
        )
    path = _as_file(name)
    if path is not None and holds_ids(path):
        title, remark = path.name, ""
        framing: Framing = "ids"
        tensors = read_id_samples(path, config, samples=samples, sequence_length=sequence_length)
        kinds = id_kinds(path, samples) if in_equal_kinds else ()
    else:
        text = _text(name, path)
        title = text.title
        tokenizer = ModelTokenizer(model_folder)
        framing = "chat" if tokenizer.has_chat_template else "prose"
        if in_equal_kinds:
            text = _in_equal_kinds(text, path, samples)
        made = _framed(tokenizer, text, samples, sequence_length, seed)
        tensors = [torch.tensor(ids, dtype=torch.int64) for ids in made.samples]
        kinds, remark = made.kinds, made.remark
    if len(tensors) < samples:
        raise _too_few(title, len(tensors), samples, sequence_length, remark)
    check_vocabulary(tensors, config, title)
    found = _calibration_set(title, tensors, framing)
    return replace(found, sequence_length=sequence_length, seed=seed, kinds=kinds)


def packed_samples(
    tokenizer: ModelTokenizer, documents: Iterable[Document], *, sequence_length: int
) -> Iterator[list[int]]:
    """Documents one after the other, a blank line between them, cut into samples of exactly `sequence_length` tokens.

    Each sample begins with BOS if the model has one, and has no other. Documents are read only as far as needed.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = sequence_length - len(bos)
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode_text(document.plain + BETWEEN_DOCUMENTS)
        while len(stream) >= length:
            yield bos + stream[:length]
            stream = stream[length:]


def _framed(tokenizer: ModelTokenizer, text: _Text, samples: int, sequence_length: int, seed: int) -> _Made:
    """Samples of a text, framed as the model requires, of kinds in their shares where the text has shares."""
    piece = max(LEAST_PIECE_CHARACTERS, PIECE_CHARACTERS_PER_TOKEN * sequence_length)
    documents = read_documents(text.sources, seed=seed, piece_characters=piece)
    streams: dict[str, Iterator[Document]] = {"": documents}
    if text.kinds is not None:
        of_kind = KindStreams(documents, text.kinds, text.title)
        streams = {kind: of_kind.of(kind) for kind in text.kinds}
    if not tokenizer.has_chat_template:
        packed = {
            kind: packed_samples(tokenizer, stream, sequence_length=sequence_length) for kind, stream in streams.items()
        }
        return _drawn(packed, text, samples)
    try:
        chats = _chats(tokenizer, streams, sequence_length)
        made = _drawn(chats, text, samples)
    except ChatTemplateError as refusal:
        raise InputError(
            f"The model's chat template cannot render a question and an answer ({refusal})",
            hint="repair chat_template.jinja",
        ) from refusal
    refused = sum(stream.refused for stream in chats.values())
    if not refused:
        return made
    reason = next(stream.reason for stream in chats.values() if stream.refused)
    logger.warning("The chat template refused %d documents: %s", refused, reason)
    return replace(made, remark=f" (the chat template refused {refused} documents: {reason})")


def _chats(
    tokenizer: ModelTokenizer, streams: Mapping[str, Iterator[Document]], sequence_length: int
) -> dict[str, Chats]:
    """The chats of each kind. Every second kind begins with thinking, so that the first samples are mixed too."""
    switch = thinking_switch(tokenizer)
    return {
        kind: Chats(tokenizer, stream, sequence_length=sequence_length, switch=switch, thinks_first=at % 2 == 1)
        for at, (kind, stream) in enumerate(streams.items())
    }


def _drawn(streams: Mapping[str, Iterator[list[int]]], text: _Text, samples: int) -> _Made:
    if text.kinds is None:
        return _Made(list(islice(streams[""], samples)))
    drawn = list(islice(draw_by_kind(streams, text.kinds), samples))
    return _Made([ids for _, ids in drawn], tuple(kind for kind, _ in drawn))


def _in_equal_kinds(text: _Text, path: Path | None, samples: int) -> _Text:
    """The text with equal shares of the kinds of its file or spec, unchanged where it has none.

    More kinds than samples cannot all be there, so the last ones are skipped.
    """
    if path is not None and path.suffix not in SPEC_SUFFIXES and data_suffix(path.name) in TABLE_SUFFIXES:
        kinds = kinds_in(path)
        sources = [replace(source, columns=Columns(kind=KIND_COLUMN)) for source in text.sources]
    else:
        kinds, sources = tuple(text.kinds or ()), text.sources
    if not kinds:
        return text
    if len(kinds) > samples:
        logger.warning("%s has %d kinds: only the first %d are measured", text.title, len(kinds), samples)
    return _Text(text.title, sources, dict.fromkeys(kinds[:samples], 1.0))


def _as_file(name: str) -> Path | None:
    """The file with the path `name`, None for a Hub id or a shipped set, which wins over a file of that name."""
    if name in shipped_names():
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"--calibration {name} is a folder", where="--calibration", hint="name one file in it")
    is_file_name = data_suffix(path.name) or path.suffix in (*SPEC_SUFFIXES, IDS_SUFFIX)
    if path.exists() and not is_file_name:
        raise InputError(
            f"--calibration {name} has no known suffix",
            where="--calibration",
            hint="use .txt, .jsonl, .json, .csv, .parquet, .safetensors or .yaml",
        )
    return path if is_file_name else None


def _text(name: str, path: Path | None) -> _Text:
    """The text that `name`, or the file `path`, names."""
    if path is not None:
        if path.suffix not in SPEC_SUFFIXES:
            return _Text(path.name, [Source(path)])
        return _spec_sources(load_spec(path))
    if name in shipped_names():
        return _spec_sources(load_spec(shipped_folder() / f"{name}.yaml"))
    repo, _, revision = name.partition("@")
    if re.fullmatch(REPO_PATTERN, repo):
        dataset = find_dataset(repo, revision or None)
        return _Text(f"{repo}@{dataset.commit}", [Source(dataset)])
    raise InputError(
        f"--calibration {name} is not a shipped set ({', '.join(shipped_names())})",
        where="--calibration",
        hint="Give one of these, a Hub data set org/name, or a file",
    )


def _spec_sources(spec: CalibrationSpec) -> _Text:
    sources = []
    for part in spec.parts:
        if part.hub is not None:
            dataset = find_dataset(part.hub, part.revision, part.files)
            sources.append(Source(dataset, Columns(part.messages, part.text), part.weight))
            continue
        shipped = shipped_folder() / str(part.bundled)
        if not shipped.is_file():
            raise InputError(
                f"nvquant ships no text {part.bundled}", where=spec.name, hint="name a shipped text or a Hub data set"
            )
        sources.append(Source(shipped, Columns(part.messages, part.text, KIND_COLUMN), part.weight))
    return _Text(spec.name, sources, spec.kinds)


def _too_few(title: str, available: int, samples: int, sequence_length: int, remark: str) -> InputError:
    if available == 0:
        return InputError(
            f"--calibration {title} has too little text for one sample of {sequence_length} tokens{remark}",
            where="--calibration",
            hint="use a shorter --sequence-length or a larger set",
        )
    return InputError(
        f"--calibration {title} has only {available} samples of {sequence_length} tokens, not {samples}{remark}",
        where="--calibration",
        hint=f"use --samples {available} or a larger set",
    )


def _calibration_set(title: str, samples: list[torch.Tensor], framing: Framing) -> CalibrationSet:
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.numpy().astype("<i8").tobytes())
    tokens = sum(len(ids) for ids in samples)
    logger.info("calibration %s: %d samples, %d tokens, %s", title, len(samples), tokens, framing)
    return CalibrationSet(title, tuple(samples), tokens, digest.hexdigest(), framing)
