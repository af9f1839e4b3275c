"""The bundled calibration and held-out text: size, schema, origins, mix, cleanliness, separation."""

from __future__ import annotations

import json
import lzma
import re
import unicodedata
from collections import Counter, defaultdict
from importlib import resources
from typing import Any

import pytest
import yaml

PACKAGE = resources.files("nvquant.calibration")
FILES = ("offline", "heldout")
KINDS = {"prose", "technical", "code", "language", "mathematics", "dialogue"}
# Shares of the bytes of text by kind.
BOUNDS = {
    "prose": (0.10, 0.20),
    "technical": (0.20, 0.35),
    "code": (0.15, 0.25),
    "language": (0.15, 0.25),
    "mathematics": (0.09, 0.15),
    "dialogue": (0.09, 0.15),
}
LEAST_BYTES = {"offline": {"technical": 2_500_000}, "heldout": {"technical": 60_000}}
# Tags of pages; words in angle brackets that are no HTML, such as <key>, may stand in prose.
TAG = re.compile(
    r"</?(?:a|abbr|b|br|code|div|em|font|h[1-6]|i|img|kbd|li|ol|p|pre|span|strong|sub|sup|table|td|tr|ul)\b[^<>]*>"
)
CODE = re.compile(
    r"^[ >]*(?:[-*] +|\d+\. +)?```.*?^[ >]*```|`[^`\n]+`|^(?: {4}|\t).*?$|^>>>.*?$", re.DOTALL | re.MULTILINE
)

Line = dict[str, Any]


def read(name: str) -> list[Line]:
    data = lzma.decompress((PACKAGE / f"{name}.jsonl.xz").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in data.split("\n") if line]


@pytest.fixture(scope="module")
def lines() -> dict[str, list[Line]]:
    return {name: read(name) for name in FILES}


def text_of(line: Line) -> str:
    return str(line["text"]) if "text" in line else "\n\n".join(turn["content"] for turn in line["messages"])


def bytes_of(line: Line) -> int:
    contents = [line["text"]] if "text" in line else [turn["content"] for turn in line["messages"]]
    return sum(len(content.encode()) for content in contents)


def origins() -> dict[str, list[str]]:
    """Cells of the table of sources, by source id."""
    page = (PACKAGE / "ORIGINS.md").read_text(encoding="utf-8")
    table = page.partition("## Sources")[2].partition("##")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")]
    return {row[0]: row for row in rows[2:]}


def test_the_archives_are_small() -> None:
    assert len((PACKAGE / "offline.jsonl.xz").read_bytes()) < 2_500_000
    assert len((PACKAGE / "heldout.jsonl.xz").read_bytes()) < 250_000


@pytest.mark.parametrize("name", FILES)
def test_every_line_follows_the_schema(lines: dict[str, list[Line]], name: str) -> None:
    assert lines[name]
    for line in lines[name]:
        content = "messages" if line["kind"] == "dialogue" else "text"
        assert set(line) == {"kind", "source", "language", content}
        assert line["kind"] in KINDS
        assert 1_000 <= bytes_of(line) <= 30_000
        if content == "messages":
            roles = [turn["role"] for turn in line["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            assert all(set(turn) == {"role", "content"} and turn["content"].strip() for turn in line["messages"])


@pytest.mark.parametrize("name", FILES)
def test_every_source_has_an_origin_and_a_licence(lines: dict[str, list[Line]], name: str) -> None:
    table = origins()
    for source in {line["source"] for line in lines[name]}:
        _, work, licence, holder, archive, *_ = table[source]
        assert work and holder and archive
        assert not re.search(r"GPL|GFDL|CC-BY|NC|ND", licence.replace("AND", "")), f"{source} is under {licence}"


def test_the_table_of_origins_counts_right(lines: dict[str, list[Line]]) -> None:
    everything = [line for name in FILES for line in lines[name]]
    documents = Counter(line["source"] for line in everything)
    sizes: Counter[str] = Counter()
    for line in everything:
        sizes[line["source"]] += bytes_of(line)
    stated = {source: (int(row[-2]), int(row[-1].replace(",", ""))) for source, row in origins().items()}
    assert stated == {source: (documents[source], sizes[source]) for source in documents}


def test_a_notice_travels_for_every_licence_that_asks_for_one() -> None:
    files = {entry.name.removesuffix(".txt") for entry in (PACKAGE / "LICENSES").iterdir()}
    without_notice = {"LicenseRef-public-domain", "CC0-1.0", "Ruby"}
    licences = {part for row in origins().values() for part in re.split(r" (?:OR|AND|WITH) ", row[2])}
    assert {licence.removeprefix("LicenseRef-") for licence in licences - without_notice} <= files


@pytest.mark.parametrize("name", FILES)
def test_each_kind_has_its_share(lines: dict[str, list[Line]], name: str) -> None:
    sizes: Counter[str] = Counter()
    for line in lines[name]:
        sizes[line["kind"]] += bytes_of(line)
    shares = {kind: size / sizes.total() for kind, size in sizes.items()}
    assert set(shares) == KINDS
    for kind, (low, high) in BOUNDS.items():
        assert low <= shares[kind] <= high, f"{kind} has {shares[kind]:.1%}"
    for kind, least in LEAST_BYTES[name].items():
        assert sizes[kind] >= least


def test_documentation_is_technical_and_no_work_of_it_is_prose(lines: dict[str, list[Line]]) -> None:
    """Dialogues out of a manual's questions, its mathematics and its translations have kinds of their own."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for name in FILES:
        for line in lines[name]:
            kinds[line["source"]].add(line["kind"])
    assert all("prose" not in found for source, found in kinds.items() if source.endswith(("-docs", "-books")))
    assert len([source for source, found in kinds.items() if "technical" in found]) >= 18


def test_some_technical_works_are_held_out_whole(lines: dict[str, list[Line]]) -> None:
    works = {name: {line["source"] for line in lines[name] if line["kind"] == "technical"} for name in FILES}
    assert len(works["heldout"] - {line["source"] for line in lines["offline"]}) >= 2


def test_many_languages_and_scripts_are_there(lines: dict[str, list[Line]]) -> None:
    natural = {line["language"] for line in lines["offline"] if line["kind"] in {"language", "dialogue"}} - {"en"}
    assert len(natural) >= 30
    assert {"ru", "ja", "zh", "ar", "el", "ko", "hi"} <= natural
    programming = {line["language"] for line in lines["offline"] if line["kind"] == "code"}
    assert len(programming) >= 10


@pytest.mark.parametrize("name", FILES)
def test_text_is_clean(lines: dict[str, list[Line]], name: str) -> None:
    for line in lines[name]:
        text = text_of(line)
        where = f"{name}: {line['source']}, {text[:60]!r}"
        unwanted = {character for character in set(text) if unicodedata.category(character) in {"Cc", "Co", "Cs"}}
        assert unwanted <= {"\n", "\t"}, where
        assert "\ufffd" not in text and "\ufeff" not in text, where
        assert unicodedata.is_normalized("NFC", text), where
        assert not re.search(r"project gutenberg", text, re.IGNORECASE), where
        if line["kind"] != "code":
            assert not TAG.search(CODE.sub("", text)), where


def test_held_out_paragraphs_are_not_in_the_calibration_set(lines: dict[str, list[Line]]) -> None:
    def paragraphs(name: str) -> set[str]:
        texts = (" ".join(part.split()) for line in lines[name] for part in re.split(r"\n\s*\n", text_of(line)))
        return {text for text in texts if len(text) >= 200}

    heldout = paragraphs("heldout")
    assert len(heldout) > 300
    assert not heldout & paragraphs("offline")


def test_there_is_text_of_every_kind_for_512_samples_of_2048_tokens(lines: dict[str, list[Line]]) -> None:
    # Vocabularies of 256k tokens take fewer than 5 characters a token on this mix; 1.05 leaves room for cut ends.
    weights = yaml.safe_load((PACKAGE / "offline.yaml").read_text(encoding="utf-8"))["kinds"]
    characters: Counter[str] = Counter()
    for line in lines["offline"]:
        characters[line["kind"]] += len(text_of(line))
    assert set(weights) == KINDS
    for kind, weight in weights.items():
        assert characters[kind] / 5 >= 512 * 2048 * weight / sum(weights.values()) * 1.05, kind


def test_a_prefix_is_already_varied(lines: dict[str, list[Line]]) -> None:
    prefix = lines["offline"][:64]
    sizes: Counter[str] = Counter()
    for line in prefix:
        sizes[line["kind"]] += bytes_of(line)
    assert set(sizes) == KINDS and min(sizes.values()) > 0.05 * sizes.total()
    assert len({line["source"] for line in prefix}) >= 20


@pytest.mark.parametrize("name", ["offline", "ultrachat", "cnn_dailymail", "nemotron"])
def test_a_spec_names_a_source_for_every_part(name: str) -> None:
    spec = yaml.safe_load((PACKAGE / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(spec) - {"kinds"} == {"name", "description", "licence", "parts"}
    assert spec["name"] == name
    assert sum(part["weight"] for part in spec["parts"]) == pytest.approx(1)
    for part in spec["parts"]:
        assert ("hub" in part) != ("bundled" in part)
        if "bundled" in part:
            assert (PACKAGE / part["bundled"]).is_file()
        else:
            assert ("messages" in part) != ("text" in part) and part["files"].endswith(".parquet")
