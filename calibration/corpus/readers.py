"""Readers: from the files of a package to units (chapters, pages, source files) of documents.

A reader gets the files that matched its source's patterns and a seeded random generator, and returns units in a fixed
order. A unit is the smallest thing that goes wholly into the calibration set or wholly into the held-out set.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from .markup import WHOLE, markdown_of, plain_markdown, plain_tex
from .rdata import string_vectors
from .text import (
    clean,
    code_blocks_of,
    documents_of,
    has_address,
    has_markup,
    paragraphs_of,
    unwrap,
    unwrap_loosely,
    without_empty_headings,
)

Messages = list[dict[str, str]]
Document = str | Messages


@dataclass(frozen=True)
class Unit:
    """A chapter, page or source file, cut into documents."""

    name: str
    documents: list[Document]


Reader = Callable[[dict[str, bytes], random.Random], list[Unit]]

# Paragraphs that state a licence; ORIGINS.md and LICENSES/ carry these notices for the whole set.
_BOILERPLATE = re.compile(
    r"Permission is hereby granted|PROVIDED \"AS IS\"|Redistribution and use in source|Licensed under the Apache"
    r"|All rights reserved|Project Gutenberg|governed by a BSD-style|IS PROVIDED BY THE COPYRIGHT HOLDERS"
    r"|in the public domain, and|license available|Licensed to PSF|WITHOUT WARRANTIES OR CONDITIONS",
    re.IGNORECASE,
)
# Paragraphs that nobody needs for calibration, above all in the older dictionaries.
_CRUDE = re.compile(
    r"\b(fuck|shit|cunt|nigg|faggot|bitch|asshole|penis|rape|negro|négress|nègre|afro-|mongolian|chinam[ae]n|heathen|savage|red-?skin|jew(s|ess)?\b)",
    re.IGNORECASE,
)
_LEADING_COMMENT = re.compile(r"\A\s*(?:/\*.*?\*/|(?:[ \t]*(?://|#(?!!)|--|;)[^\n]*\n)+)\s*", re.DOTALL)
_NOTICE = re.compile(r"copyright|licen[sc]e|SPDX|-\*-|^#!/|vim:", re.IGNORECASE)
MAX_DOCUMENTS_OF_A_FILE = 2


def _prose_unit(name: str, text: str, rng: random.Random) -> Unit:
    blocks = [block for block in paragraphs_of(clean(text)) if not _BOILERPLATE.search(block)]
    blocks = [block for block in blocks if not _CRUDE.search(block) and not has_markup(block) and len(block) > 3]
    blocks = [block for block in blocks if not has_address(block)]
    return Unit(name, list(documents_of(without_empty_headings(blocks), rng)))


def _nonempty(units: list[Unit]) -> list[Unit]:
    return [unit for unit in units if unit.documents]


def pages(
    root: tuple[str, str, str] = ("div", "role", "main"), encoding: str = "utf-8", without: str = r"\Z\A"
) -> Reader:
    """HTML pages, each a unit; ``root`` names the tag, attribute and value around the content.

    Pages whose path matches ``without`` are left out.
    """

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        texts = {name: markdown_of(data.decode(encoding, "replace"), root) for name, data in files.items()}
        chosen = [name for name, text in texts.items() if "\ufffd" not in text and not re.search(without, name)]
        return _nonempty([_prose_unit(name, texts[name], rng) for name in chosen])

    return read


def markdown_files(include_root: str = "") -> Reader:
    """Markdown files, each a unit; lines that include code are resolved below ``include_root`` or dropped."""

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        sources = {name: data.decode() for name, data in files.items()}
        included = {include_root + name.split(include_root)[-1]: text for name, text in sources.items() if include_root}
        texts = {
            name: plain_markdown(text, included, include_root) for name, text in sources.items() if name.endswith(".md")
        }
        return _nonempty([_prose_unit(name, text, rng) for name, text in texts.items()])

    return read


def tex_files(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
    """LaTeX chapters, kept as LaTeX."""
    return _nonempty([_prose_unit(name, plain_tex(data.decode()), rng) for name, data in files.items()])


def novels(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
    """Novels of an R data package, by chapter."""
    index, database = (next(data for name, data in files.items() if name.endswith(end)) for end in (".rdx", ".rdb"))
    units = []
    for title, lines in sorted(string_vectors(index, database).items()):
        chapters = re.split(r"(?m)^(?:VOLUME [IVX]+\s+)?CHAPTER [IVXLC\d]+\.?$", "\n".join(lines), flags=re.IGNORECASE)
        for number, chapter in enumerate(chapters[1:], 1):
            units.append(_prose_unit(f"{title}/{number:02d}", unwrap(clean(chapter)), rng))
    return _nonempty(units)


def work(
    chapter: str | None = None,
    *,
    lines: str = "wrapped",
    begin: str = r"\A",
    end: str = r"\Z",
    replace: tuple[str, str] = (r"\A", ""),
) -> Reader:
    """One plain text, or the text that a PHP class holds in ``$baseText``, by chapters.

    ``chapter`` is a pattern of the heading lines; without one, every 20 kB are a unit. ``lines`` says what a line is:
    "wrapped" (paragraphs end at blank lines), "loose" (at short lines) or "paragraphs" (every line is one). The text
    runs from ``begin`` to ``end``; ``replace`` is a pattern and what takes its place.
    """

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        (data,) = files.values()
        text = data.decode().replace("\r\n", "\n")
        text = text.partition("$baseText = <<<'EOT'\n")[2].partition("\nEOT;")[0] or text
        found_begin, found_end = re.search(begin, text), re.search(end, text)
        assert found_begin and found_end, "the text does not have the bounds its source gives"
        text = clean(re.sub(*replace, text[found_begin.start() : found_end.start()]))
        if lines == "paragraphs":
            text = text.replace("\n", "\n\n")
        else:
            text = unwrap_loosely(text) if lines == "loose" else unwrap(text)
        parts = re.split(f"(?m)^(?={chapter})", text) if chapter else sections_of(paragraphs_of(text))
        return _nonempty([_prose_unit(f"{number:03d}", part, rng) for number, part in enumerate(parts)])

    return read


def sections_of(paragraphs: list[str], section_bytes: int = 20_000) -> list[str]:
    """Join paragraphs into sections of about ``section_bytes``."""
    sections: list[list[str]] = [[]]
    size = 0
    for paragraph in paragraphs:
        if size > section_bytes:
            sections.append([])
            size = 0
        sections[-1].append(paragraph)
        size += len(paragraph.encode()) + 2
    return ["\n\n".join(section) for section in sections]


def source_files(holder: str = "", cut: str | None = None) -> Reader:
    """Source code, each file a unit of at most two documents, without notices.

    With ``holder``, files that state a copyright of somebody else are left out. Text after ``cut`` is left out.
    """

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        units = []
        for name, data in files.items():
            text = data.decode(errors="replace")
            if "\ufffd" in text or (holder and _states_other(holder, text)):
                continue
            text = re.split(cut, text)[0] if cut else text
            blocks = [block for block in code_blocks_of(without_notice(text)) if not _BOILERPLATE.search(block)]
            blocks = [block for block in blocks if not has_address(block)]
            documents = documents_of(blocks, rng)
            first = rng.randrange(max(len(documents) - MAX_DOCUMENTS_OF_A_FILE + 1, 1))
            units.append(Unit(name, list(documents[first : first + MAX_DOCUMENTS_OF_A_FILE])))
        return _nonempty(units)

    return read


def _states_other(holder: str, text: str) -> bool:
    notices = re.findall(r"(?i)copyright\b.*?\d{4}.*|\(c\)\s*\d{4}.*|written by.*|©.*", text)
    return any(not re.search(holder, notice) for notice in notices)


def without_notice(text: str) -> str:
    """Drop the comments at the head of a file as long as they state a copyright, a licence or an editor mode."""
    text = clean(text)
    while (found := _LEADING_COMMENT.match(text)) and _NOTICE.search(found[0]):
        text = text[found.end() :]
    return text


def declarations(*codes: str) -> Reader:
    """Translations of the Universal Declaration of Human Rights by the code of their file."""

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        texts = {PurePosixPath(name).stem: markdown_of(data.decode(), ("body", "", "")) for name, data in files.items()}
        return _nonempty([_prose_unit(code, texts[code], rng) for code in codes])

    return read


def electron_guides(locale: str, script: str) -> Reader:
    """Translated guides of Electron; paragraphs that are not mostly in letters of ``script`` stayed English and go."""

    def translated(paragraph: str) -> bool:
        words = re.sub(r"`[^`]*`", "", paragraph)
        letters = [letter for letter in words if letter.isalpha()]
        native = re.findall(f"(?i)[{script}]", words)
        return paragraph.lstrip().startswith("```") or 2 * len(native) > len(letters)

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        (data,) = files.values()
        units = []
        for name, page in sorted(json.loads(data)[locale].items()):
            paragraphs = paragraphs_of(markdown_of(page["html"], WHOLE)) if page["isTutorial"] else []
            units.append(_prose_unit(name, "\n\n".join(filter(translated, paragraphs)), rng))
        return _nonempty(units)

    return read


def theorems(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
    """A Metamath database: each theorem with the comment before it, without its compressed proof."""
    (data,) = files.values()
    text = re.sub(r"\$=.*?\$\.", "$.", data.decode("ascii", "replace"), flags=re.DOTALL)
    found = re.findall(r"\$\(((?:(?!\$\)).)*?)\$\)\s+(\S+) \$([ap]) (.*?) \$\.", text, flags=re.DOTALL)
    entries = []
    for comment, label, kind, statement in found:
        comment = re.sub(
            r"\s*\((?:Contributed|Revised|Proof shortened|Proof modification|New usage)[^)]*\)", "", comment
        )
        comment = re.sub(r"`` ?`?", "`", re.sub(r"~ (\S+)", r"\1", " ".join(comment.split())))
        if len(comment) < 60 or "OLD" in label or re.search(r"Obsolete|<HTML>|&\w+;", comment):
            continue
        title = "Theorem" if kind == "p" else "Axiom or definition"
        entries.append(f"{title} `{label}`. {comment}\n\n    {' '.join(statement.split())}")
    return _nonempty([_prose_unit(f"{n:04d}", part, rng) for n, part in enumerate(sections_of(entries, 10_000))])
