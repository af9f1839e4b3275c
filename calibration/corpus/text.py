"""Cleaning text and cutting it into documents."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable

MIN_BYTES = 1_000
MAX_BYTES = 30_000
# Aimed at by turns, so that short and long documents are there; 8 kB are about 2048 tokens of English.
TARGET_BYTES = (5_000, 8_000, 9_000, 10_000, 12_000, 12_000, 16_000, 24_000)

_REPLACED = {
    "\r\n": "\n",
    "\r": "\n",
    "\u2028": "\n",
    "\u2029": "\n\n",
    "\u00a0": " ",
    "\u202f": " ",
}
_DROPPED = re.compile("[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u2060\ufeff\ufffc\ue000-\uf8ff]")
_FENCE = re.compile(r"^\s*(?:[-*>] +|\d+\. +)?(?:```|~~~)")


def clean(text: str) -> str:
    """Return ``text`` in NFC with plain newlines, without control characters, trailing blanks or triple blank lines."""
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    text = unicodedata.normalize("NFC", _DROPPED.sub("", text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def unwrap(text: str) -> str:
    """Join the lines of hard-wrapped prose paragraphs; code, verse, lists and headings keep their lines."""
    paragraphs = []
    for paragraph in paragraphs_of(text):
        lines = paragraph.split("\n")
        wrapped = len(lines) > 1 and all(45 <= len(line) <= 90 for line in lines[:-1])
        items = re.findall(r"^ *(?:[-*+]|\d+\.) ", paragraph, re.MULTILINE)
        prose = len(items) < 2 and not re.search(r"^ *(```|~~~)|^    ", paragraph, re.MULTILINE)
        paragraphs.append(" ".join(line.strip() for line in lines) if wrapped and prose else paragraph)
    return "\n\n".join(paragraphs)


_TAG = re.compile(
    r"</?(?:a|abbr|b|br|code|div|em|font|h[1-6]|i|img|kbd|li|ol|p|pre|span|strong|sub|sup|table|td|tr|ul)\b[^<>]*>"
)


def has_markup(text: str) -> bool:
    """Say whether HTML tags are left outside code, that is outside fences, indented lines and backticks."""
    prose = re.sub(r"(?ms)^[ >]*```.*?^[ >]*```|`[^`\n]+`|^(?: {4}|\t).*$|^>>>.*$", "", text)
    return bool(_TAG.search(prose))


_ADDRESS = re.compile(
    r"[\w.+-]+(?:@| at )(?!example|localhost|domain|host|foo|server|my)[\w-]+(?:\.| dot )(?:[a-z]{2,4})\b"
)


def has_address(text: str) -> bool:
    """Say whether an e-mail address of a person or list is in the text."""
    return bool(_ADDRESS.search(text))


def paragraphs_of(text: str) -> list[str]:
    """Split at blank lines outside fenced code."""
    paragraphs: list[str] = []
    lines: list[str] = []
    fenced = False
    for line in text.split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        if line.strip() or fenced:
            lines.append(line)
        elif lines:
            paragraphs.append("\n".join(lines))
            lines = []
    if lines:
        paragraphs.append("\n".join(lines))
    return paragraphs


def without_empty_headings(blocks: list[str]) -> list[str]:
    """Drop Markdown headings that nothing follows before the next heading of their level or above."""
    kept: list[str] = []
    level_below = 0  # of the heading that comes next in the text; 0 after a paragraph
    for block in reversed(blocks):
        found = re.match(r"(#{1,6}) ", block)
        level = len(found[1]) if found and "\n" not in block else 0
        if level and (not kept or 0 < level_below <= level):
            continue
        kept.append(block)
        level_below = level
    return kept[::-1]


def code_blocks_of(text: str) -> list[str]:
    """Split source code at blank lines that are followed by an unindented line."""
    return [block for block in re.split(r"\n\n+(?=[^\s)}\]])", text) if block.strip()]


def documents_of(blocks: Iterable[str], rng: random.Random) -> list[str]:
    """Join blocks into documents of about ``TARGET_BYTES`` each; a remainder under ``MIN_BYTES`` is dropped."""
    documents: list[str] = []
    current: list[str] = []
    size = 0
    target = rng.choice(TARGET_BYTES)
    for block in blocks:
        block_bytes = len(block.encode()) + 2
        if block_bytes > MAX_BYTES - MIN_BYTES:
            continue
        if current and (size >= target or size + block_bytes > MAX_BYTES):
            documents.append("\n\n".join(current))
            current, size, target = [], 0, rng.choice(TARGET_BYTES)
        current.append(block)
        size += block_bytes
    if current and size >= MIN_BYTES:
        documents.append("\n\n".join(current))
    return documents


def unwrap_loosely(text: str, full_line: int = 62) -> str:
    """Join hard-wrapped lines where paragraphs are not separated: a line shorter than ``full_line`` ends one."""
    paragraphs = [""]
    for line in text.split("\n"):
        paragraphs[-1] += (" " if paragraphs[-1] else "") + line.strip()
        if len(line) < full_line:
            paragraphs.append("")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
