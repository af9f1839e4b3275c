"""Files that travel with the weights: tokenizer, chat template, generation and processor settings, licence. An
allow-list: never other weights."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

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


def side_files(folder: Path) -> list[str]:
    """Names (relative to the folder, sorted) of the side files that a checkpoint has."""
    names = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SIDE_FILE_PATTERNS)
    ]
    names += [f"{TEMPLATE_FOLDER}/{path.name}" for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")]
    return sorted(names)
