"""JSON of strangers: what is no JSON, or beyond the bounds, ends in half a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvquant.checkpoint.json_text import MOST_DEPTH, MOST_VALUES, parse_json, read_json
from nvquant.checkpoint.regular import MissingFile
from nvquant.errors import InputError

REFUSED = {
    "NaN": (b'{"a": NaN}', "it contains NaN, which JSON does not allow"),
    "infinity": (b"[-Infinity]", "it contains -Infinity, which JSON does not allow"),
    "a float beyond floats": (b'{"a": 1e999}', "a number beyond the range of a float"),
    "a float without end": (b"[0." + b"3" * 1_000_000 + b"]", "a number beyond the range of a float"),
    "a number of 41 digits": (b"[" + b"9" * 41 + b"]", "a number of 41 digits"),
    "a number beyond Python's limit": (b"[" + b"9" * 5000 + b"]", "a number of 5,000 digits"),
    "half of a surrogate pair": (rb'{"a": ["\ud800"]}', "half of a surrogate pair"),
    "half of a pair in a name": (rb'[{"\uDFFF": 1}]', "half of a surrogate pair"),
    "deep lists": (b"[" * 200_000, "nests more than 100"),
    "lists one too deep": (b"[" * (MOST_DEPTH + 2) + b"]" * (MOST_DEPTH + 2), "nests more than 100"),
    "maps too deep": (b'{"a":' * 500 + b"1" + b"}" * 500, "nests more than 100"),
    "too many values": (b"[" + b"[]," * MOST_VALUES + b"0]", "more than 8,000,000 values"),
    "UTF-16": ("{}".encode("utf-16"), "byte 0 is not UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "byte order mark"),
    "a broken text": (b'{"a": 1', "line 1, column 8"),
    "nothing": (b"", "line 1, column 1"),
    "two texts": (b"{}{}", "line 1, column 3"),
    "control characters": (b'"\x01"', "control character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_json_is_refused_in_words(case: str) -> None:
    data, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        parse_json(data)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 100 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "value",
    [
        {"model_max_length": 1000000000000000019884624838656, "theta": 1e-320, "most": 1.7976931348623157e308},
        ["\U0001f600", "\x00", "a\nb", {"": None}, -(2**63), True, 0.1],
        [[[]], {}],
        "text",
    ],
)
def test_json_is_read_as_it_stands(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False, indent=2).encode()) == value


def test_equal_names_are_refused_where_that_is_asked_for() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="a name occurs twice"):
        parse_json(b'[{"b": {"a": 1, "a": 2}}]', unique=True)


def test_a_byte_order_mark_is_passed_over_where_it_may_stand() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]", with_mark=True) == [1]


def test_a_file_names_itself_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(MissingFile, match=r"config\.json is missing: every model has one\.$"):
        read_json(path, "every model has one")
    path.write_text("[NaN]")
    with pytest.raises(InputError, match=r"not readable JSON \(it contains NaN.+\): download it again\.$"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is not a JSON object: write it anew\.$"):
        read_json(path, way_out="write it anew")
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.rename(tmp_path.parent / "elsewhere.json")
    path.symlink_to(tmp_path.parent / "elsewhere.json")
    with pytest.raises(InputError, match="outside of its folder"):
        read_json(path)
