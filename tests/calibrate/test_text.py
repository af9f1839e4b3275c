from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from nvquant.calibrate import rows
from nvquant.calibrate.rows import data_suffix, read_rows, read_text, seeded_order
from nvquant.calibrate.specs import CalibrationSpec, load_spec, shipped_folder, shipped_names
from nvquant.calibrate.text import Columns, Document, Source, document_of, read_documents, split_text
from nvquant.errors import EnvironmentLack, InputError

ROWS: list[dict[str, object]] = [{"text": f"Text number {index}."} for index in range(30)]


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def documents(*sources: Source, seed: int = 0, piece_characters: int = 4000) -> list[Document]:
    return list(read_documents(sources, seed=seed, piece_characters=piece_characters))


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    """The same rows in the form that the suffixes ask for."""
    match data_suffix(path.name):
        case ".jsonl":
            data = lines(rows)
        case ".json":
            data = json.dumps(rows, indent=1).encode()
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            data = path.read_bytes()
        case _:
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
            return path
    packers = {".xz": lzma.compress, ".gz": gzip.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(data))
    return path


FORMS = ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.xz", "a.parquet"]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_table_gives_all_its_rows_once_shuffled_by_the_seed(name: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / name, ROWS)
    in_order = list(read_rows(path, None))
    assert [row for _, row in in_order] == ROWS
    assert [number for number, _ in in_order] == list(range(1, 31))
    shuffled = list(read_rows(path, 1))
    assert shuffled != in_order and sorted(shuffled, key=lambda item: item[0]) == in_order
    assert shuffled == list(read_rows(path, 1)) != list(read_rows(path, 2))


@given(count=st.integers(0, 200), seed=st.integers(0, 2**40))
def test_seeded_order_is_a_permutation(count: int, seed: int) -> None:
    assert sorted(seeded_order(count, seed)) == list(range(count))


def test_seeded_order_is_what_it_was_when_manifests_were_written() -> None:
    assert seeded_order(8, 0) == [7, 4, 3, 2, 6, 0, 5, 1]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.JSONL", ".jsonl"),
        ("b/c.jsonl.xz", ".jsonl"),
        ("a.b.parquet", ".parquet"),
        ("a.txt.gz", ".txt"),
        *((name, "") for name in ("a.bin", "gz", ".gz", "a.xz", "jsonl")),
    ],
)
def test_data_suffix(name: str, suffix: str) -> None:
    assert data_suffix(name) == suffix


@given(text=st.text("ab \n.", max_size=400), limit=st.integers(1, 60))
def test_pieces_are_short_and_lose_nothing_but_space(text: str, limit: int) -> None:
    pieces = split_text(text, limit)
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_pieces_end_at_blank_lines_where_there_are_any() -> None:
    text = "\n\n".join("A paragraph of some length." for _ in range(20))
    assert all(piece.endswith("length.") and piece.startswith("A para") for piece in split_text(text, 100))


def test_text_files_are_cut_into_pieces_and_shuffled(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeff" + "\n\n".join(f"Paragraph {i}." for i in range(50)), encoding="utf-8")
    found = documents(Source(tmp_path / "a.txt"), piece_characters=40)
    words = " ".join(document.text for document in found)
    assert sorted(words.split()) == sorted("\n\n".join(f"Paragraph {i}." for i in range(50)).split())
    assert found[0].text != "Paragraph 0.\n\nParagraph 1." and "\ufeff" not in words
    assert found != documents(Source(tmp_path / "a.txt"), piece_characters=40, seed=1)


def test_a_book_among_notes_gives_one_piece_before_the_notes_are_used_up(tmp_path: Path) -> None:
    book = "\n\n".join(f"Chapter {i}. " + "Words. " * 20 for i in range(40))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([{"text": book}, *ROWS]))
    found = documents(Source(path), piece_characters=400)
    assert sum("Chapter" in document.text for document in found[:31]) == 1
    assert sum("Chapter" in document.text for document in found[31:]) == len(found) - 31 > 10
    firsts = {
        next(
            text
            for text in (d.text for d in documents(Source(path), piece_characters=400, seed=seed))
            if "Chapter" in text
        )
        for seed in range(6)
    }
    assert len(firsts) > 1


CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"conversation": CHAT, "text": "unused"},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"messages": json.dumps(CHAT)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, CHAT[1]]},
        {"messages": [{**CHAT[0], "name": None}, CHAT[1]]},
    ],
)
def test_every_shape_of_dialogue_becomes_turns(row: dict[str, object]) -> None:
    document = document_of(row, Columns(), "row 1")
    assert document == Document("dialogue", turns=tuple(CHAT))
    assert document.plain == "Why?\n\nSo."


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": " Some text.\n"}, Columns()),
        ({"content": "Some text.", "id": 7}, Columns()),
        ({"messages": None, "text": "Some text."}, Columns()),
        ({"body": "Some text.", "title": "Other", "messages": CHAT}, Columns(text="body")),
    ],
)
def test_every_shape_of_text_becomes_a_document(row: dict[str, object], columns: Columns) -> None:
    assert document_of(row, columns, "row 1") == Document("prose", "Some text.")


def test_the_named_column_of_messages_wins() -> None:
    row = {"chosen": CHAT, "messages": CHAT[:1], "kind": "x"}
    assert document_of(row, Columns(messages="chosen"), "row 1") == Document("dialogue", turns=tuple(CHAT))
    assert document_of(row, Columns(messages="chosen", kind="kind"), "row 1") == Document("x", turns=tuple(CHAT))


@pytest.mark.parametrize(
    "row",
    [
        {"text": ""},
        {"text": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": []}]},
        {"prompt": "", "completion": None},
    ],
)
def test_rows_without_words_or_with_more_than_words_are_left_out(row: dict[str, object]) -> None:
    assert document_of(row, Columns(), "row 1") is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x", "b": "y"}, r"row 1 has neither text nor messages nor input_ids \(columns: a, b\)"),
        ({"a": "x", "b": None}, "neither text nor messages"),
        ({"label": 3}, "neither text nor messages"),
        ({"text": 3}, "the text is a number, not a string"),
        ({"messages": "hello"}, "row 1: messages is a string, not a list of turns"),
        ({"messages": {"role": "user"}}, "row 1: messages is an object, not a list of turns"),
        ({"messages": ["hello"]}, "row 1: messages contains a string, not a turn"),
        ({"messages": [{"speaker": "me"}]}, "contains a turn with speaker: write role and content"),
        ({"prompt": "x", "completion": 3}, "row 1: completion is a number, not a list of turns"),
    ],
)
def test_unusable_rows_are_refused_by_number_and_column(row: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        document_of(row, Columns(), "row 1")


def test_a_column_named_in_the_spec_must_exist() -> None:
    for columns in (Columns(messages="chats"), Columns(text="chats")):
        with pytest.raises(InputError, match=r"no column chats \(columns: body\)"):
            document_of({"body": "x"}, columns, "row 1")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.csv", b"text\n", "a.csv has no rows"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text":', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', r"a\.jsonl, line 2 is not a JSON object"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, row 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1 is not valid JSON \(byte 10 is not UTF-8\)"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt cannot be read"),
        ("a.jsonl.xz", lzma.compress(lines(ROWS))[:-20], r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-20], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", lines(ROWS), r"a\.jsonl\.gz cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet is not a complete Parquet file"),
    ],
)
def test_damaged_files_are_refused_by_name(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        documents(Source(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.xz", "a.csv.gz"])
def test_what_unpacks_to_more_than_any_file_holds_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_WHOLE_BYTES", 1_000_000)
    pack = gzip.compress if name.endswith("gz") else lzma.compress
    (tmp_path / name).write_bytes(pack(b" " * 5_000_000))
    with pytest.raises(InputError, match=rf"{name} contains more than 1,000,000 bytes: split it"):
        documents(Source(tmp_path / name))


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_LINE_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 2000)
    with pytest.raises(InputError, match=r"a\.jsonl has a line of more than 1,000 bytes"):
        documents(Source(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("value", [b"9" * 5000, b"NaN", b"[" * 100_000, b'"\\ud800"', b"1e999"])
def test_a_row_that_is_no_json_is_refused_by_its_line(value: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b", "more": ' + value + b"}\n")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2 is not valid JSON") as caught:
        documents(Source(tmp_path / "a.jsonl"))
    assert len(str(caught.value)) < 250


def test_names_of_columns_are_repeated_in_brief(tmp_path: Path) -> None:
    row = {"x" * 70_000: [1], "a\nError: b": [2], **{f"column{i}": [i] for i in range(100)}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="has neither text nor messages") as caught:
        documents(Source(tmp_path / "a.jsonl"))
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable() and "90 more" in str(caught.value)


def test_a_device_and_a_pipe_are_no_calibration_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "b.jsonl")
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(InputError, match=rf"{name} is (not a file|a device|a pipe)"):
            documents(Source(tmp_path / name))


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt"):
        with pytest.raises(InputError, match=rf"{name} is not a file"):
            documents(Source(tmp_path / name))
    with pytest.raises(InputError, match="is not a file"):
        read_text(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentLack, match=r"pip install 'nvquant\[data\]'"):
        documents(Source(tmp_path / "a.parquet"))


def test_sources_are_mixed_by_weight_in_characters(tmp_path: Path) -> None:
    for name, length, count in (("short", 100, 900), ("long", 1000, 90)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name + "x" * (length - len(name))}] * count))
    sources = [Source(tmp_path / "short.jsonl", weight=3), Source(tmp_path / "long.jsonl", weight=1)]
    given_characters: Counter[str] = Counter()
    for document in islice(read_documents(sources, seed=0, piece_characters=4000), 600):
        given_characters[document.text[:4]] += len(document.text)
    assert given_characters["shor"] / given_characters["long"] == pytest.approx(3, rel=0.05)


def test_a_source_that_runs_dry_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "many.jsonl").write_bytes(lines(ROWS[1:]))
    found = documents(Source(tmp_path / "one.jsonl", weight=9), Source(tmp_path / "many.jsonl"))
    assert sorted(document.text for document in found) == sorted(str(row["text"]) for row in ROWS)


SPEC = {
    "name": "mine",
    "description": "For tests.",
    "licence": "CC0",
    "parts": [{"hub": "org/name", "revision": "abc", "files": "data/*.parquet", "messages": "chosen", "weight": 2}],
}


def write_spec(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump(SPEC | changes))
    return path


def test_a_spec_reads_as_written(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path / "mine.yaml"))
    assert spec == CalibrationSpec.model_validate(SPEC)
    assert spec.parts[0].files == ("data/*.parquet",) and spec.parts[0].weight == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licence": None}, "mine.yaml: licence: "),
        ({"parts": []}, "mine.yaml: parts: "),
        ({"weights": 1}, "mine.yaml: weights: "),
        ({"parts": [{"hub": "a/b", "weight": 0}]}, r"mine.yaml: parts\.0\.weight: "),
        ({"parts": [{"hub": "a/b", "bundled": "c"}]}, "either hub or bundled"),
        ({"parts": [{"text": "c"}]}, "either hub or bundled"),
        ({"parts": [{"hub": "b"}]}, r"parts\.0\.hub: "),
        ({"parts": [{"bundled": "c", "revision": "d"}]}, "belong to hub"),
        ({"parts": [{"bundled": "../c"}]}, "bare file name"),
        ({"parts": [{"hub": "a/b", "text": "c", "messages": "d"}]}, "either messages or text"),
    ],
)
def test_a_wrong_spec_is_refused_by_its_key(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_spec(write_spec(tmp_path / "mine.yaml", **changes))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"a: [", r"mine\.yaml:1: the text is not YAML"), (b"3", "mine.yaml: the top level: "), (b"\xff", "is not UTF-8")],
)
def test_a_file_that_is_no_spec_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_spec(tmp_path / "mine.yaml")


def test_shipped_names_are_the_yaml_files(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yaml", "offline.jsonl.xz", "__init__.py"):
        (tmp_path / name).touch()
    assert shipped_names(tmp_path) == ("a", "b")


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_spec_is_valid_and_bears_its_files_name(name: str) -> None:
    spec = load_spec(shipped_folder() / f"{name}.yaml")
    assert spec.name == name and spec.description and spec.licence


CSV_ROWS = [{"number": f"{i}", "text": f"Row {i}: one, two; three\t| four."} for i in range(4)]


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with mark"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_columns_of_a_csv_are_divided_by_its_own_delimiter(
    delimiter: str, newline: str, mark: str, tmp_path: Path
) -> None:
    stream = io.StringIO(mark, newline="")
    stream.seek(0, io.SEEK_END)
    writer = csv.DictWriter(stream, ["number", "text"], delimiter=delimiter, lineterminator=newline)
    writer.writeheader()
    writer.writerows(CSV_ROWS)
    (tmp_path / "a.csv").write_bytes(stream.getvalue().encode())
    assert [row for _, row in read_rows(tmp_path / "a.csv", None)] == CSV_ROWS
    assert {document.text for document in documents(Source(tmp_path / "a.csv"))} == {row["text"] for row in CSV_ROWS}


def test_excels_first_line_states_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"sep=;\r\nid;text\r\n7;a, b, c\r\n")
    assert [row for _, row in read_rows(tmp_path / "a.csv", None)] == [{"id": "7", "text": "a, b, c"}]


def test_one_column_stays_one_whatever_its_texts_hold(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text\na; b\n"c, d"\n')
    assert [row for _, row in read_rows(tmp_path / "a.csv", None)] == [{"text": "a; b"}, {"text": "c, d"}]


def test_roles_of_turns_may_be_in_capitals() -> None:
    turns = [{"from": who, "value": who} for who in ("SYSTEM", "Human", "GPT", "USER ", "Assistant", "Critic")]
    document = document_of({"conversations": turns}, Columns(), "row 1")
    assert document is not None
    assert [turn["role"] for turn in document.turns] == ["system", "user", "assistant", "user", "assistant", "Critic"]
