# ruff: noqa: T201
"""Make ``offline.jsonl.xz``, ``heldout.jsonl.xz`` and ``ORIGINS.md`` again from Debian, PyPI and npm packages.

Run in a checkout of the repository:

    python -m calibration.build --list               # the commands that download the packages (Debian 12, amd64)
    python -m calibration.build --packages FOLDER    # check their SHA-256 and build into this folder

The same archives give the same bytes: every choice is drawn from a generator seeded with the source's name, and the
lines are compressed with fixed LZMA2 filters. Checked with CPython 3.10, 3.11 and 3.13. Debian replaces packages by
security updates; the exact versions stay at https://snapshot.debian.org. ``--any-version`` builds from other versions,
with other bytes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import lzma
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from .corpus.archives import read_members, sha256_of
from .corpus.origins import origins_page
from .corpus.packages import PACKAGES
from .corpus.readers import Document, Unit
from .corpus.source import Source
from .corpus.sources import SOURCES
from .corpus.text import MIN_BYTES, code_blocks_of, paragraphs_of

SEED = "nvquant calibration 1"
# Paragraphs shorter than this may repeat: headings, short turns, lines of code.
REPEAT_CHARACTERS = 100
# A unit gives this many documents before the others had their turn.
FIRST_DOCUMENTS = 3
XZ_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24, "lc": 4, "lp": 0, "pb": 0}
]


@dataclass(frozen=True)
class Line:
    """One line of a file: a document and what is said about it."""

    kind: str
    source: str
    language: str
    content: Document

    @property
    def nbytes(self) -> int:
        """Bytes of the text alone, in UTF-8."""
        return _nbytes(self.content)

    def json(self) -> str:
        """Return the line as JSON."""
        name = "text" if isinstance(self.content, str) else "messages"
        entry = {"kind": self.kind, "source": self.source, "language": self.language, name: self.content}
        return json.dumps(entry, ensure_ascii=False, separators=(",", ":"))


def _nbytes(content: Document) -> int:
    if isinstance(content, str):
        return len(content.encode())
    return sum(len(message["content"].encode()) for message in content)


def choose(source: Source, units: list[Unit], rng: random.Random) -> tuple[list[Document], list[Document]]:
    """Split shuffled units into documents for the calibration and for the held-out set, each within its budget."""
    units = sorted(units, key=lambda unit: unit.name)
    rng.shuffle(units)
    heldout: list[Document] = []
    rest = []
    for unit in units:
        missing = source.heldout_bytes - sum(map(_nbytes, heldout))
        if missing >= MIN_BYTES and re.match(source.heldout_units, unit.name):
            heldout += fitting(unit.documents[:FIRST_DOCUMENTS], missing)
        elif not source.heldout_units or not re.match(source.heldout_units, unit.name):
            rest.append(unit)
    queue = [document for unit in rest for document in unit.documents[:FIRST_DOCUMENTS]]
    queue += [document for unit in rest for document in unit.documents[FIRST_DOCUMENTS:]]
    return fitting(queue, source.offline_bytes), heldout


def fitting(documents: list[Document], budget: int) -> list[Document]:
    """Take documents from the front until the budget is spent; the last is shortened at a paragraph or turn."""
    taken: list[Document] = []
    for document in documents:
        if budget < MIN_BYTES:
            break
        if _nbytes(document) > budget:
            shortened = _shortened(document, budget)
            if shortened is None:
                continue
            document = shortened
        taken.append(document)
        budget -= _nbytes(document)
    return taken


def _shortened(document: Document, budget: int) -> Document | None:
    if isinstance(document, str):
        paragraphs = paragraphs_of(document)
        shorter: list[Document] = ["\n\n".join(paragraphs[:count]) for count in range(1, len(paragraphs))]
    else:
        shorter = [document[:count] for count in range(2, len(document), 2)]
    return next((part for part in reversed(shorter) if MIN_BYTES <= _nbytes(part) <= budget), None)


class Repeats:
    """Remembers paragraphs, so that each stays in one document only."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def strip(self, line: Line) -> Line | None:
        """Return the line without blocks met before, or None when too little is left of it.

        A conversation stays whole or goes.
        """
        content = line.content
        if not isinstance(content, str):
            turns = [message["content"] for message in content]
            return None if any([self._met(turn) for turn in turns]) else line  # every turn is to be remembered
        blocks = code_blocks_of(content) if line.kind == "code" else paragraphs_of(content)
        text = "\n\n".join(block for block in blocks if not self._met(block))
        return replace(line, content=text) if len(text.encode()) >= MIN_BYTES else None

    def _met(self, block: str) -> bool:
        # By the words alone: the same paragraph may stand in two versions of a page.
        keys = {re.sub(r"\W+", " ", paragraph).strip().lower() for paragraph in block.split("\n\n")}
        keys = {key for key in keys if len(key) >= REPEAT_CHARACTERS}
        met = bool(keys & self._seen)
        self._seen |= keys
        return met


def ordered(lines: list[Line]) -> list[Line]:
    """Shuffle, then interleave the kinds so that every prefix has about the shares of the whole."""
    rng = random.Random(f"{SEED}/order")
    queues: dict[str, list[Line]] = defaultdict(list)
    for line in sorted(lines, key=Line.json):
        queues[line.kind].append(line)
    totals = {kind: sum(line.nbytes for line in queue) for kind, queue in queues.items()}
    for _, queue in sorted(queues.items()):
        rng.shuffle(queue)
    used: Counter[str] = Counter()
    result = []
    while any(queues.values()):
        kind = min((used[kind] / totals[kind], kind) for kind, queue in queues.items() if queue)[1]
        result.append(queues[kind].pop())
        used[kind] += result[-1].nbytes
    return result


def write(path: Path, lines: list[Line]) -> None:
    """Write JSON lines compressed with fixed filters."""
    data = "".join(line.json() + "\n" for line in lines).encode()
    path.write_bytes(lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=XZ_FILTERS))
    print(
        f"{path.name}: {len(lines)} lines, {len(data):,} bytes, {path.stat().st_size:,} compressed, {sha256_of(path)}"
    )


def build(packages: Path, any_version: bool) -> tuple[list[Line], list[Line]]:
    """Return the lines of the calibration and of the held-out set."""
    offline: list[Line] = []
    heldout: list[Line] = []
    for package in PACKAGES:
        sources = [source for source in SOURCES if source.package == package]
        archive = _archive(packages, package, any_version)
        files = read_members(archive, tuple(pattern for source in sources for pattern in source.patterns))
        for source in sources:
            rng = random.Random(f"{SEED}/{source.id}/{source.kind}/{source.language}")
            matching = {
                name: data
                for name, data in files.items()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in source.patterns)
            }
            chosen = choose(source, source.read(matching, rng), rng)
            for lines, documents in zip((offline, heldout), chosen, strict=True):
                lines += [Line(source.kind, source.id, source.language, document) for document in documents]
    repeats = Repeats()
    heldout = [line for line in map(repeats.strip, heldout) if line is not None]
    return [line for line in map(repeats.strip, offline) if line is not None], heldout


def _archive(folder: Path, package: str, any_version: bool) -> Path:
    name, sha256 = PACKAGES[package]
    if any_version:
        stem = re.compile(rf"{re.escape(package)}[-_]\d".replace(r"\-", "[-_]"))
        return next(path for path in sorted(folder.iterdir()) if stem.match(path.name))
    path = folder / name
    if not path.is_file():
        raise SystemExit(f"{name} is not in {folder}: download it, see --list.")
    if sha256_of(path) != sha256:
        raise SystemExit(f"{name} has another SHA-256 than the bundled text was made from: see --any-version.")
    return path


def commands() -> list[str]:
    """Return the commands that download the packages."""
    result = []
    for package, (name, _) in PACKAGES.items():
        version = re.split(r"[-_](?=\d)", name.replace("%3a", ":"), maxsplit=1)[-1]
        if name.endswith(".deb"):
            result.append(f"apt-get download {package}={name.split('_')[1].replace('%3a', ':')}")
        elif name.endswith(".tar.gz"):
            result.append(f"pip download --no-deps --no-binary :all: {package}=={version.removesuffix('.tar.gz')}")
        else:
            result.append(f"npm pack {package}@{version.removesuffix('.tgz')}")
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="folder with the downloaded archives")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the files made")
    parser.add_argument("--list", action="store_true", help="print the commands that download the packages")
    parser.add_argument("--any-version", action="store_true", help="take other versions of the packages too")
    arguments = parser.parse_args()
    if arguments.list or arguments.packages is None:
        print("\n".join(commands()))
        return
    offline, heldout = build(arguments.packages, arguments.any_version)
    write(arguments.out / "offline.jsonl.xz", ordered(offline))
    write(arguments.out / "heldout.jsonl.xz", ordered(heldout))
    (arguments.out / "ORIGINS.md").write_text(origins_page(offline, heldout), encoding="utf-8")


if __name__ == "__main__":
    main()
