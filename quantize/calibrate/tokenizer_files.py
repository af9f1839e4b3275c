"""The files of a tokenizer, checked before transformers reads them: the packages they require and their token ids."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from ..checkpoint.json_text import quoted, read_json
from ..checkpoint.regular import is_file, read_regular
from ..errors import InputError

# Released vocabularies have at most a few hundred thousand tokens. The tokenizers library allocates a table up to the
# largest id: 5.4 GB for one token with the id 1,360,000,000 (tokenizers 0.22).
MOST_TOKEN_ID = (1 << 24) - 1
# Files that transformers reads without another package.
_COMPLETE = ("tokenizer.json", "vocab.json", "vocab.txt")
_SENTENCEPIECE = ("tokenizer.model", "tokenizer.model.v*", "spiece.model", "sentencepiece.bpe.model")
_TIKTOKEN = ("*.tiktoken", "tiktoken.model")
# transformers 5.17 reads SentencePiece files with both packages, and blames tiktoken if one of them is missing.
_REQUIRED = (
    (_SENTENCEPIECE, ("sentencepiece", "protobuf")),
    (_TIKTOKEN, ("tiktoken",)),
    (("tekken.json",), ("mistral-common",)),
)
_FIRST_LINE_BYTES = 512


def missing_packages(folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """A tokenizer file that only other packages can read, and those of them that are not installed.

    Returns:
        the file's name and the packages' names as pip takes them, or None if nothing is missing.
    """
    if any(is_file(folder / name) for name in _COMPLETE):
        return None
    names = sorted(path.name for path in folder.iterdir())
    for patterns, packages in _REQUIRED:
        for name in (name for name in names if any(fnmatch(name, pattern) for pattern in patterns)):
            required = ("tiktoken",) if patterns is _SENTENCEPIECE and _is_tiktoken(folder, name) else packages
            missing = tuple(package for package in required if not _is_installed(package))
            if missing:
                return name, missing
    return None


def lack_of_packages(folder: Path) -> str | None:
    """`missing_packages` as the end of a sentence: "… requires sentencepiece: run `pip install sentencepiece`"."""
    found = missing_packages(folder)
    if found is None:
        return None
    name, packages = found
    return f"{name} requires {' and '.join(packages)}: run `pip install {' '.join(packages)}`"


def refuse_large_ids(folder: Path) -> None:
    """Refuse a vocabulary whose ids would make the tokenizers library take gigabytes.

    Raises:
        InputError: an id is negative or above `MOST_TOKEN_ID`, or a file is damaged.
    """
    for name, ids_of in _IDS.items():
        path = folder / name
        if not is_file(path):
            continue
        for token, number in ids_of(read_json(path, way_out="put the model's tokenizer files there")):
            if isinstance(number, str) and number.isdecimal() and len(number) < 40:
                number = int(number)
            if isinstance(number, int) and not 0 <= number <= MOST_TOKEN_ID:
                raise InputError(
                    f"{path} gives the token {quoted(token)} the id {number}, and ids end at {MOST_TOKEN_ID:,}",
                    where=path,
                    hint=(
                        "put the model's tokenizer files there, or give token ids with --calibration, which need none"
                    ),
                )


def _of_tokenizer(value: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    model = value.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    added = value.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")


def _of_settings(value: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    added = value.get("added_tokens_decoder")
    for number, token in added.items() if isinstance(added, dict) else ():
        yield token.get("content") if isinstance(token, dict) else token, number


def _of_vocabulary(value: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield from value.items()


_IDS = {
    "tokenizer.json": _of_tokenizer,
    "tokenizer_config.json": _of_settings,
    "vocab.json": _of_vocabulary,
    "added_tokens.json": _of_vocabulary,
}


def _is_tiktoken(folder: Path, name: str) -> bool:
    """Whether a file holds lines of base64 and a rank, which is tiktoken's form, under a name of SentencePiece."""
    first = read_regular(folder / name, folder)[:_FIRST_LINE_BYTES].partition(b"\n")[0].split()
    return len(first) == 2 and first[1].isdigit()


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
