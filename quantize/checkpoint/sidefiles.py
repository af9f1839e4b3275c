"""Files that travel with the weights: tokenizer, chat template, generation and processor settings, licence, and custom
code that the configs name. This is an allow-list: no other weights travel."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from .custom_code import code_files
from .regular import is_file, read_regular, regular_path, unreadable

SIDE_FILE_PATTERNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
TEMPLATE_FOLDER = "additional_chat_templates"
MANIFEST_NAME = "nvquant_manifest.json"
"""nvquant's record of a conversion, which no source has."""


def side_files(folder: Path) -> list[str]:
    """Names (relative to the folder, sorted) of the side files that a checkpoint has.

    Raises:
        InputError: one is not a file, or a link out of the folder or to nowhere, or the folder cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if any(fnmatch(path.name, known) for known in SIDE_FILE_PATTERNS)]
        found += (folder / TEMPLATE_FOLDER).glob("*.jinja")
        found += map(folder.joinpath, code_files(folder))
    except OSError as error:
        raise unreadable(folder, error, "check the folder's rights") from error
    files = [path for path in found if is_file(path) and not _leads_to_a_folder(path)]
    for path in files:
        regular_path(path, folder, "put the file itself in its place, or remove it")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def flat_side_files(folder: Path) -> list[str]:
    """`side_files` that lie in the folder itself: all except those of the template folder."""
    return [name for name in side_files(folder) if "/" not in name]


def read_side_file(folder: Path, name: str) -> bytes:
    """All bytes of a side file.

    Raises:
        InputError: it is not a regular file of the folder, is too large, or cannot be read.
    """
    return read_regular(folder / name, folder)


def _leads_to_a_folder(path: Path) -> bool:
    return path.parent.name != TEMPLATE_FOLDER and path.is_dir()
