"""Python files that a checkpoint's configs name in `auto_map`. Servers with --trust-remote-code import them.

nvquant never runs this code. It reads the names, and the import lines of the files as the loader of transformers does
(`get_relative_imports`, transformers 5.17). Only files beside config.json count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .json_text import read_json
from .regular import is_file, read_regular

CONFIGS = (
    "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
MOST_CODE_BYTES = 5_000_000
MOST_FILES = 200
_MOST_DEPTH = 20  # of the maps in a config
# `module.Class`. `org/name--module.Class` is code of another repository and stays there.
_REFERENCE = re.compile(r"([\w-]{1,200})\.\w{1,200}")
_FROM_MODULE = re.compile(
    r"^[ \t]*(?:from[ \t]+\.([\w-]{1,200})[ \t]+import\b|import[ \t]+\.([\w-]{1,200})[ \t]*$)", re.M
)
_FROM_FOLDER = re.compile(r"^[ \t]*from[ \t]+\.[ \t]+import[ \t]*(?:\(([^)]{0,4000})\)|([^\n#]{0,4000}))", re.M)


def code_files(folder: Path) -> list[str]:
    """Names, sorted, of the Python files in a folder that its configs name, and of the files that these import."""
    return sorted(name for name in _named(folder) if is_file(folder / name))


def code_names(folder: Path) -> list[str]:
    """`code_files` and the names of absent files, sorted. Imports of an absent file are unknown."""
    return sorted(_named(folder))


def missing_code(folder: Path) -> dict[str, str]:
    """Python files that loaders need and the folder lacks, each with the file that names it."""
    named = _named(folder).items()
    return {name: by for name, by in named if by is not None and not is_file(folder / name)}


def lack_of_code(folder: Path) -> str | None:
    """The first missing file and the file that needs it, as "modeling_x.py, which auto_map in config.json names"."""
    for name, by in missing_code(folder).items():
        return f"{name}, which {by} imports" if by.endswith(".py") else f"{name}, which auto_map in {by} names"
    return None


def _named(folder: Path) -> dict[str, str | None]:
    """Files that configs or code name, each with the file that requires it, or None if nothing requires it."""
    found: dict[str, str | None] = {}
    for config in CONFIGS:
        for module, is_needed in _modules(_config(folder, config)):
            name = f"{module}.py"
            found[name] = found.get(name) or (config if is_needed else None)
    waiting = list(found)
    while waiting and len(found) < MOST_FILES:
        importer = waiting.pop()
        text = _text(folder, importer)
        needed = [first or second for first, second in _FROM_MODULE.findall(text)]
        offered = [part for first, second in _FROM_FOLDER.findall(text) for part in re.findall(r"\w+", first or second)]
        for module, by in (*((module, importer) for module in needed), *((module, None) for module in offered)):
            name = f"{module}.py"
            if name not in found:
                waiting.append(name)
            found[name] = found.get(name) or by
    return found


def _modules(config: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Modules in the auto_maps of a config, and whether loaders of this folder need them.

    An auto_map of an inner config is often left over from the model of which the folder's model was built.
    """
    waiting: list[tuple[Mapping[str, Any], int]] = [(config, 0)]
    while waiting:
        part, depth = waiting.pop()
        for key, value in part.items():
            if key == "auto_map" and isinstance(value, Mapping):
                for reference in value.values():
                    for one in reference if isinstance(reference, list) else [reference]:
                        match = _REFERENCE.fullmatch(one) if isinstance(one, str) else None
                        if match:
                            yield match[1], depth == 0
            elif isinstance(value, Mapping) and depth < _MOST_DEPTH:
                waiting.append((value, depth + 1))


def _config(folder: Path, name: str) -> Mapping[str, Any]:
    """A config, empty if it cannot be read: the reader that needs it refuses it with its own sentence."""
    try:
        return read_json(folder / name, "") if is_file(folder / name) else {}
    except InputError:
        return {}


def _text(folder: Path, name: str) -> str:
    """The code of a file, empty if there is none or too much."""
    try:
        return read_regular(folder / name, folder, most=MOST_CODE_BYTES).decode("utf-8", errors="replace")
    except InputError:
        return ""
