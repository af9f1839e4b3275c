"""Files that travel with the weights: tokenizer, chat template, generation and processor settings, licence. An
allow-list: never other weights."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from ..errors import InputError
from .json_text import read_json
from .regular import is_file, read_regular, regular_path, unreadable

_MODULE = re.compile(r"[A-Za-z_]\w{0,99}\.\w{1,100}")
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
# Custom code is copied and never run. The modules that auto_map names import others of the folder.
CODE_PATTERN = "*.py"
_NAME_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
              "video_preprocessor_config.json", "image_processor_config.json")  # fmt: skip


def side_files(folder: Path) -> list[str]:
    """Names (relative to the folder, sorted) of the side files that a checkpoint has.

    Raises:
        InputError: one is a link out of the folder or to nowhere, or no file; or the folder cannot be read.
    """
    try:
        found = [path for path in folder.iterdir() if any(fnmatch(path.name, known) for known in SIDE_FILE_PATTERNS)]
        found += (folder / TEMPLATE_FOLDER).glob("*.jinja")
        if _named_code(folder):
            found += folder.glob(CODE_PATTERN)
    except OSError as error:
        raise unreadable(folder, error, "check the folder's rights") from error
    files = [path for path in found if is_file(path) and not _leads_to_a_folder(path)]
    for path in files:
        regular_path(path, folder, "put the file itself in its place, or remove it")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def missing_code(folder: Path) -> list[str]:
    """Files of custom code that an auto_map of the folder names and that the folder lacks, sorted.

    Code of another repository (`org/name--module.Class`) is not meant.
    """
    return [name for name in _named_code(folder) if not is_file(folder / name)]


def _named_code(folder: Path) -> list[str]:
    """File names of the modules that the auto_map of any config names."""
    names: set[str] = set()
    for config in _NAME_CODE:
        try:
            found = read_json(folder / config, "").get("auto_map") if is_file(folder / config) else None
        except InputError:
            continue  # whoever needs the file refuses it with its own sentence
        waiting = [found]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
            elif isinstance(value, str) and _MODULE.fullmatch(value):
                names.add(value.partition(".")[0] + ".py")
    return sorted(names)


def read_side_file(folder: Path, name: str) -> bytes:
    """All bytes of a side file.

    Raises:
        InputError: it is no regular file of the folder, is too large, or cannot be read.
    """
    return read_regular(folder / name, folder)


def _leads_to_a_folder(path: Path) -> bool:
    return path.parent.name != TEMPLATE_FOLDER and path.is_dir()
