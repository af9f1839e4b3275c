"""What a source is: text of one kind and language out of one package."""

from __future__ import annotations

from dataclasses import dataclass

from .readers import Reader


@dataclass(frozen=True)
class Source:
    """Where text of one kind and language comes from, and how many bytes of it each set takes.

    ``id`` is a key of ``works.WORKS``, ``package`` one of ``packages.PACKAGES``; ``patterns`` choose its files.
    ``heldout_units`` is a pattern of the units that are kept for the held-out set; without one the seed decides.
    """

    id: str
    package: str
    patterns: tuple[str, ...]
    read: Reader
    kind: str
    language: str
    offline_bytes: int
    heldout_bytes: int = 0
    heldout_units: str = ""


# Folders inside Debian packages.
DOC = "usr/share/doc/"
FAKER = "usr/share/php/Faker/Provider/"
RUST = "usr/src/rustc-1.63.0/"
# Where the content of pages lies that have no better mark.
BODY = ("body", "", "")
SECTION = ("div", "class", "section")
ARTICLE = ("article", "role", "main")
MAIN = ("main", "role", "main")


def html(folder: str, *pages_below: str) -> tuple[str, ...]:
    """Patterns of the HTML pages of a Debian package's documentation."""
    return tuple(f"{DOC}{folder}/html/{path}.html" for path in pages_below)
