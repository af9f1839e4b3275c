"""Checks of the tokenizer and the other side files, from the checkpoint alone: do they belong to this model?

Only tokenizer.json is read for ids. The rules allow the habits of released models: fewer tokens than the embedding has
rows, added tokens beyond them (Gemma 3 has one), an end that only generation_config.json names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..calibrate.ids import config_value
from ..checkpoint.json_text import parse_json
from ..checkpoint.regular import read_regular
from ..checkpoint.sidefiles import TEMPLATE_FOLDER, side_files
from ..checkpoint.source import read_json
from ..errors import InputError
from ..recipe.roles import text_config
from ..stream.manifest import Manifest
from .report import Finding, counted
from .subject import Subject

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model*", "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt",
)  # fmt: skip
# Their released tokenizers add BOS, and they collapse without it (perplexity 2645 for Gemma 2 9B; lm-evaluation-harness
# PR 2049). Gemma 4's adds none: whoever sends text to it has to.
ADD_BOS = ("gemma", "gemma2", "gemma3", "gemma3_text")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_tokenizer(subject: Subject) -> Finding:
    """Check that side files parse, that a tokenizer's settings have a vocabulary, that a model calibrated on text or
    chats has a tokenizer or a template for them, and that the tokens are those of this model."""
    names = side_files(subject.folder)
    faults = [fault for name in names if name.endswith(".json") for fault in _unreadable_json(subject.folder / name)]
    has_vocabulary = any(fnmatch(name, pattern) for name in names for pattern in VOCABULARIES)
    framing = subject.manifest.framing if isinstance(subject.manifest, Manifest) else None
    if not has_vocabulary and "tokenizer_config.json" in names:
        faults.append("tokenizer_config.json has no vocabulary beside it, such as tokenizer.json")
    elif not has_vocabulary and framing in ("prose", "chat"):
        faults.append("the manifest reports tokenized text, but there is no tokenizer")
    if framing == "chat" and not _has_chat_template(subject.folder, names):
        faults.append("the manifest reports framed chats, but there is no chat template")
    looked_at = counted(len(names), "side file") if names else "no side files"
    tokens = _tokens(_object(subject.folder / "tokenizer.json"))
    if tokens is not None:
        looked_at += f", {counted(len(tokens.trained), 'token')} and {len(tokens.added)} added ones"
        faults += [*_strange_ids(subject, tokens), *_strange_settings(subject, tokens)]
    return Finding(looked_at, faults)


@dataclass(frozen=True)
class _Tokens:
    """Ids by token: those that were trained, and those that were added."""

    trained: Mapping[str, int]
    added: Mapping[str, int]


def _tokens(tokenizer: Mapping[str, Any]) -> _Tokens | None:
    """The tokens of a tokenizer.json. None where it lists them in another form."""
    model, entries = tokenizer.get("model"), tokenizer.get("added_tokens")
    trained = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(trained, list):  # Unigram: [token, score] in the order of the ids
        trained = {str(entry[0]): at for at, entry in enumerate(trained) if isinstance(entry, list) and entry}
    if not isinstance(trained, Mapping) or not all(isinstance(number, int) for number in trained.values()):
        return None
    added = {
        str(entry.get("content")): entry["id"]
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int)
    }
    return _Tokens({token: number for token, number in trained.items() if token not in added}, added)


def _strange_ids(subject: Subject, tokens: _Tokens) -> Iterator[str]:
    """Ids that the model has no row for, and ends of a sequence that are no special token."""
    rows = config_value(subject.config, "vocab_size")
    if isinstance(rows, int) and tokens.trained:
        token, largest = max(tokens.trained.items(), key=lambda item: item[1])
        if largest >= rows:
            yield f"tokenizer.json has the token {token!r} with id {largest}, but the model's vocabulary has {rows}"
    generation = _object(subject.folder / "generation_config.json")
    ends = {*_ids(config_value(subject.config, "eos_token_id")), *_ids(generation.get("eos_token_id"))}
    special = set(tokens.added.values())
    if ends and special and not ends & special:
        plain = {number: token for token, number in tokens.trained.items()}
        words = ", ".join(f"{number} ({plain.get(number, 'unknown')!r})" for number in sorted(ends))
        yield f"the configs end a sequence at id {words}, which is not a special token in tokenizer.json"


def _strange_settings(subject: Subject, tokens: _Tokens) -> Iterator[str]:
    """Special tokens that tokenizer.json does not have, and a BOS that is left out where the model needs it."""
    settings = _object(subject.folder / "tokenizer_config.json")
    listed = settings.get("added_tokens_decoder")
    more = [entry.get("content") for entry in listed.values()] if isinstance(listed, Mapping) else []
    for key in SPECIAL_TOKENS:
        value = settings.get(key)
        token = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(token, str) and token not in {*tokens.added, *more} and token not in tokens.trained:
            yield f"tokenizer_config.json has {key} {token!r}, which tokenizer.json does not contain"
    kind = str(text_config(subject.config).get("model_type"))
    if kind in ADD_BOS and settings.get("add_bos_token") is False:
        yield f"tokenizer_config.json has add_bos_token false: {kind} models collapse on text without BOS"


def _ids(value: object) -> list[int]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, int)]


def _object(path: Path) -> Mapping[str, Any]:
    """A JSON object, empty where there is none, which another check reports."""
    try:
        return read_json(path, "")
    except InputError:
        return {}


def _unreadable_json(path: Path) -> list[str]:
    try:
        parse_json(read_regular(path, path.parent))
    except ValueError as error:
        return [f"{path.name} is not readable JSON ({error})"]
    except InputError as error:
        return [str(error)]
    return []


def _has_chat_template(folder: Path, names: list[str]) -> bool:
    if any(name.startswith(("chat_template.", f"{TEMPLATE_FOLDER}/")) for name in names):
        return True
    return "chat_template" in _object(folder / "tokenizer_config.json")
