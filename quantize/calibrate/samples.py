"""Calibration samples: from a name on the command line to token ids, equal for equal name, model, sizes and seed."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import InputError
from .chat import chat_samples
from .datasets import find_dataset
from .ids import IDS_SUFFIX, check_vocabulary, holds_ids, read_id_samples
from .rows import data_suffix
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
    """

    name: str
    samples: tuple[torch.Tensor, ...]
    tokens: int
    sha256: str
    framing: Framing
    sequence_length: int | None = None
    seed: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The entry for manifests and reports."""
        return {"name": self.name, "samples": len(self.samples), "tokens": self.tokens, "sha256": self.sha256}


def load_calibration(
    name: str, *, model_folder: Path, config: Mapping[str, Any], samples: int, sequence_length: int, seed: int
) -> CalibrationSet:
    """Make the calibration samples that `name` names.

    Models with a chat template get conversations in it, the others packed text. For models that have a BOS token,
    position 0 is BOS and position 1 is not. With token ids no tokenizer is loaded, and the rows are the file's first,
    whatever the seed.

    Args:
        name: a shipped set, a YAML spec, a Hub data set `org/name[@revision]`, a file of text or one of token ids.
        model_folder: where the tokenizer and its chat template are.
        config: the model's config.json.
        samples: how many.
        sequence_length: tokens in each, at most. Packed text has exactly that many.
        seed: of the order of the documents.

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
        made = read_id_samples(path, config, samples=samples, sequence_length=sequence_length)
    else:
        title, sources = _sources(name, path)
        tokenizer = ModelTokenizer(model_folder)
        piece = max(LEAST_PIECE_CHARACTERS, PIECE_CHARACTERS_PER_TOKEN * sequence_length)
        documents = read_documents(sources, seed=seed, piece_characters=piece)
        framing = "chat" if tokenizer.has_chat_template else "prose"
        frame = _chats if tokenizer.has_chat_template else _packed
        made, remark = frame(tokenizer, documents, samples, sequence_length)
    if len(made) < samples:
        raise _too_few(title, len(made), samples, sequence_length, remark)
    check_vocabulary(made, config, title)
    return replace(_calibration_set(title, made, framing), sequence_length=sequence_length, seed=seed)


def prose_samples(
    tokenizer: ModelTokenizer, documents: Iterable[Document], *, samples: int, sequence_length: int
) -> list[list[int]]:
    """Documents one after the other, a blank line between them, cut into samples of exactly `sequence_length` tokens.

    Each sample begins with BOS if the model has one, and has no other. Fewer are returned when the documents run out.
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    length = sequence_length - len(bos)
    made: list[list[int]] = []
    stream: list[int] = []
    for document in documents:
        stream += tokenizer.encode_text(document.plain + BETWEEN_DOCUMENTS)
        while len(stream) >= length:
            made.append(bos + stream[:length])
            if len(made) == samples:
                return made
            stream = stream[length:]
    return made


def _chats(
    tokenizer: ModelTokenizer, documents: Iterable[Document], samples: int, sequence_length: int
) -> tuple[list[torch.Tensor], str]:
    """Samples of a chat model, and a remark for an error about their number."""
    try:
        chats = chat_samples(tokenizer, documents, samples=samples, sequence_length=sequence_length)
    except ChatTemplateError as refusal:
        raise InputError(
            f"The model's chat template cannot render a question and an answer ({refusal})",
            hint="repair chat_template.jinja",
        ) from refusal
    remark = ""
    if chats.refused:
        remark = f" (the chat template refused {chats.refused} documents: {chats.reason})"
        logger.warning("The chat template refused %d documents: %s", chats.refused, chats.reason)
    return [torch.tensor(ids, dtype=torch.int64) for ids in chats.samples], remark


def _packed(
    tokenizer: ModelTokenizer, documents: Iterable[Document], samples: int, sequence_length: int
) -> tuple[list[torch.Tensor], str]:
    made = prose_samples(tokenizer, documents, samples=samples, sequence_length=sequence_length)
    return [torch.tensor(ids, dtype=torch.int64) for ids in made], ""


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


def _sources(name: str, path: Path | None) -> tuple[str, list[Source]]:
    """Title and sources of the text that `name`, or the file `path`, names."""
    if path is not None:
        if path.suffix not in SPEC_SUFFIXES:
            return path.name, [Source(path)]
        return _spec_sources(load_spec(path))
    if name in shipped_names():
        return _spec_sources(load_spec(shipped_folder() / f"{name}.yaml"))
    repo, _, revision = name.partition("@")
    if re.fullmatch(REPO_PATTERN, repo):
        dataset = find_dataset(repo, revision or None)
        return f"{repo}@{dataset.commit}", [Source(dataset)]
    raise InputError(
        f"--calibration {name} is not a shipped set ({', '.join(shipped_names())})",
        where="--calibration",
        hint="Give one of these, a Hub data set org/name, or a file",
    )


def _spec_sources(spec: CalibrationSpec) -> tuple[str, list[Source]]:
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
        sources.append(Source(shipped, Columns(part.messages, part.text, kind="kind"), part.weight))
    return spec.name, sources


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
