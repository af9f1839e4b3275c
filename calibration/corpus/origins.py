"""The text of ORIGINS.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol

from .packages import PACKAGES
from .sources import SOURCES
from .works import WORKS


class Entry(Protocol):
    """A line of a file, as far as ORIGINS.md tells of it."""

    @property
    def kind(self) -> str:
        """One of prose, technical, code, language, mathematics and dialogue."""

    @property
    def source(self) -> str:
        """Source id."""

    @property
    def language(self) -> str:
        """Language of the text."""

    @property
    def nbytes(self) -> int:
        """Bytes of the text alone, in UTF-8."""


_HEAD = """# Origins of the bundled text

`offline.jsonl.xz` (calibration) and `heldout.jsonl.xz` (evaluation) hold excerpts of the works below. Each line names
its `source`. Each source keeps its own licence, and its notices are in `LICENSES/`. The rest of the project is
Apache-2.0. `build.py` writes this page and both files.

The works were changed as follows. Pages were converted to Markdown, hard-wrapped prose was unwrapped, and texts were
cut into documents of 1 to 30 kB. Licence headers, repeated paragraphs, crude paragraphs, damaged files and the
compressed proofs of set.mm were removed. Questions and answers of FAQ pages, compiler error pages and chat lines became
turns of conversations. We wrote the sentences in which a user quotes a compiler error or requests a term (Apache-2.0).

"""

_PUBLIC_DOMAIN = """
`LicenseRef-public-domain`: works published before 1930 whose authors died before 1940, works of the
United States government, and works dedicated to the public domain by their authors (SQLite, Docutils, the Jargon File,
Alexandria). Transcriptions add no copyright. If a package marks one as CC-BY-SA (Wikisource) or with the Project
Gutenberg licence, only the work itself was taken, without headers, notes and trademark. The Universal Declaration of
Human Rights is a document of the United Nations. The OHCHR publishes its translations for free use.
"""


def origins_page(offline: Iterable[Entry], heldout: Iterable[Entry]) -> str:
    """Return the page for the lines of the two files."""
    sets = {"offline": list(offline), "heldout": list(heldout)}
    parts = [_HEAD, _shares(sets), "\n## Sources\n\n", _sources(sets), _PUBLIC_DOMAIN, "\n## Packages\n\n", _packages()]
    return "".join(parts)


def _shares(sets: dict[str, list[Entry]]) -> str:
    rows = ["| kind | offline documents | bytes | share | held-out documents | bytes |", "|---|--:|--:|--:|--:|--:|"]
    total = sum(entry.nbytes for entry in sets["offline"])
    for kind in ("prose", "technical", "code", "language", "mathematics", "dialogue"):
        offline, heldout = ([entry for entry in entries if entry.kind == kind] for entries in sets.values())
        size = sum(entry.nbytes for entry in offline)
        rows.append(
            f"| {kind} | {len(offline)} | {size:,} | {size / total:.1%} | {len(heldout)} "
            f"| {sum(entry.nbytes for entry in heldout):,} |"
        )
    sizes = [sum(entry.nbytes for entry in entries) for entries in sets.values()]
    rows.append(f"| all | {len(sets['offline'])} | {sizes[0]:,} | 100 % | {len(sets['heldout'])} | {sizes[1]:,} |")
    return "\n".join(rows) + "\n"


def _sources(sets: dict[str, list[Entry]]) -> str:
    packages: dict[str, set[str]] = defaultdict(set)
    for source in SOURCES:
        packages[source.id].add(PACKAGES[source.package][0].removesuffix(".deb").replace("%3a", ":"))
    rows = [
        "| source | work | licence | holder | from | kinds | languages | documents | bytes |",
        "|---|---|---|---|---|---|---|--:|--:|",
    ]
    for name, work in sorted(WORKS.items()):
        entries = [entry for group in sets.values() for entry in group if entry.source == name]
        kinds = ", ".join(sorted({entry.kind for entry in entries}))
        languages = ", ".join(sorted({entry.language for entry in entries}))
        size = sum(entry.nbytes for entry in entries)
        rows.append(
            f"| {name} | {work.title} | {work.licence} | {work.holder} | {', '.join(sorted(packages[name]))} "
            f"| {kinds} | {languages} | {len(entries)} | {size:,} |"
        )
    return "\n".join(rows) + "\n"


def _packages() -> str:
    rows = ["Debian 12 (`.deb`), PyPI (`.tar.gz`) and npm (`.tgz`).", "", "| archive | SHA-256 |", "|---|---|"]
    rows += [f"| {name.replace('%3a', ':')} | {sha256} |" for name, sha256 in PACKAGES.values()]
    return "\n".join(rows) + "\n"
