"""Safetensors headers: what a good one says, and every way in which one can lie."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.checkpoint.headers import DTYPE_BYTES, HEADER_LIMIT_BYTES, Header, parse_header, read_header
from nvquant.errors import InputError
from safetensors.torch import save_file

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=200)
SHARD = Path("model-00001-of-00002.safetensors")
Entry = dict[str, Any]


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(entries: object, data_bytes: int = 0) -> Header:
    blob = json.dumps(entries).encode()
    return parse_header(SHARD, blob, 8 + len(blob) + data_bytes)


def assert_is_for_the_user(error: InputError, names: str) -> None:
    text = str(error)
    assert error.exit_code == 2
    assert names in text
    assert text.endswith(".")
    assert "\n" not in text
    assert len(re.findall(r"[.!?](?= [A-Z]|$)", text)) == 1, text


def test_a_header_gives_absolute_offsets_in_the_order_of_the_data(tmp_path: Path) -> None:
    blob = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(blob)) + blob + bytes(16))
    header = read_header(path)
    start = 8 + len(blob)
    assert (header.path, header.data_start, header.file_bytes) == (path, start, start + 16)
    assert header.mtime_ns == path.stat().st_mtime_ns
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b"]
    a, b = header.tensors.values()
    assert (a.name, a.dtype, a.shape, a.begin, a.end, a.nbytes) == ("a", "F32", (), start, start + 4, 4)
    assert (b.name, b.dtype, b.shape, b.begin, b.end, b.nbytes) == ("b", "BF16", (2, 3), start + 4, start + 16, 12)


def test_a_file_of_the_safetensors_library_is_read_as_it_wrote_it(tmp_path: Path) -> None:
    dtypes = {
        "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
        "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip
    tensors = {f"t.{name}": torch.zeros(3, 5).to(dtype) for name, dtype in dtypes.items()}
    tensors |= {"scalar": torch.ones(()), "empty": torch.ones(0, 7)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        **{f"t.{name}": (name, (3, 5)) for name in dtypes},
        "scalar": ("F32", ()),
        "empty": ("F32", (0, 7)),
    }
    assert header.metadata == {"format": "pt"}
    assert all(info.nbytes == 15 * DTYPE_BYTES[name[2:]] for name, info in header.tensors.items() if name[:2] == "t.")


def test_a_file_without_tensors_is_good() -> None:
    assert parse({}).tensors == {}
    assert parse({"__metadata__": {}}).metadata == {}
    assert parse({}).mtime_ns == 0  # of bytes without a file nobody knows it


def test_empty_tensors_may_share_a_place() -> None:
    header = parse({"b": tensor("U8", [4], 0, 4), "a": tensor("U8", [0], 0, 0), "c": tensor("U8", [2, 0], 4, 4)}, 4)
    assert list(header.tensors) == ["a", "b", "c"]


GOOD = {"a": tensor("U8", [4], 0, 4), "b": tensor("BF16", [2, 2], 4, 12)}
LIES: list[tuple[str, object, int, str]] = [
    ("a list", [], 0, "header that is not a JSON object"),
    ("a number", 7, 0, "header that is not a JSON object"),
    ("metadata null", {"__metadata__": None}, 0, "__metadata__ that is not a map of strings"),
    ("metadata of numbers", {"__metadata__": {"a": 1}}, 0, "__metadata__ that is not a map of strings"),
    ("entry null", {"a": None}, 0, "entry 'a' lacks dtype, shape or data_offsets"),
    ("entry a list", {"a": ["U8", [1], [0, 1]]}, 0, "entry 'a' lacks dtype, shape or data_offsets"),
    ("entry a string", {"a": "dtype"}, 0, "entry 'a' lacks dtype, shape or data_offsets"),
    ("no dtype", {"a": {"shape": [1], "data_offsets": [0, 1]}}, 1, "entry 'a' lacks dtype"),
    ("no shape", {"a": {"dtype": "U8", "data_offsets": [0, 1]}}, 1, "entry 'a' lacks dtype"),
    ("no offsets", {"a": {"dtype": "U8", "shape": [1]}}, 1, "entry 'a' lacks dtype"),
    ("one offset", {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, 1, "entry 'a' lacks dtype"),
    ("three offsets", {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, 1, "entry 'a' lacks dtype"),
    ("offsets a number", {"a": {"dtype": "U8", "shape": [1], "data_offsets": 1}}, 1, "entry 'a' lacks dtype"),
    ("shape null", {"a": {"dtype": "U8", "shape": None, "data_offsets": [0, 1]}}, 1, "entry 'a' lacks dtype"),
    ("shape a string", {"a": {"dtype": "U8", "shape": "1", "data_offsets": [0, 1]}}, 1, "is not a natural number"),
    ("shape of floats", {"a": tensor("U8", [1.0], 0, 1)}, 1, "is not a natural number"),  # type: ignore[list-item]
    ("shape of booleans", {"a": tensor("U8", [True], 0, 1)}, 1, "is not a natural number"),
    ("negative shape", {"a": tensor("U8", [-1, -4], 0, 4)}, 4, "is not a natural number"),
    ("huge offset", {"a": tensor("U8", [2**63], 0, 2**63)}, 4, "is not a natural number"),
    ("4300 digits", {"a": tensor("U8", [10**4299], 0, 10**4299)}, 4, "a number of 4,300 digits"),
    ("huge product", {"a": tensor("U8", [2**62] * 9, 0, 4)}, 4, "an impossible shape"),
    ("huge axis of nothing", {"a": tensor("U8", [0, 2**62, 2], 0, 0)}, 0, "an impossible shape"),
    ("17 axes", {"a": tensor("U8", [1] * 17, 0, 1)}, 1, "an impossible shape (17 axes)"),
    ("a million axes", {"a": tensor("U8", [1] * 1_000_000, 0, 1)}, 1, "an impossible shape (1,000,000 axes)"),
    ("long name", {"x" * 100_000: tensor("U8", [1], 0, 1)}, 1, "a name of 100,000 characters"),
    ("negative offset", {"a": tensor("U8", [4], -4, 0)}, 0, "is not a natural number"),
    ("reversed", {"a": tensor("U8", [4], 4, 0)}, 4, "offsets that do not fit its shape [4] and dtype U8"),
    (
        "unknown dtype",
        {"a": tensor("BF17", [1], 0, 2)},
        2,
        "tensor a has the dtype 'BF17', which nvquant does not read",
    ),
    ("dtype a list", {"a": {**GOOD["a"], "dtype": ["U8"]}}, 4, "tensor a has the dtype ['U8']"),
    ("dtype an object", {"a": {**GOOD["a"], "dtype": {}}}, 4, "tensor a has the dtype {}"),
    ("dtype null", {"a": {**GOOD["a"], "dtype": None}}, 4, "tensor a has the dtype None"),
    ("overlap", {"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 2, 6)}, 6, "tensor b overlaps another"),
    ("same place", {"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 0, 4)}, 4, "tensor b overlaps another"),
    ("hole", {"a": tensor("U8", [4], 0, 4), "b": tensor("U8", [4], 8, 12)}, 12, "tensor b leaves a gap"),
    ("hole at the start", {"a": tensor("U8", [4], 4, 8)}, 8, "tensor a leaves a gap"),
    ("file too short", GOOD, 11, "but its header describes"),
    ("file too long", GOOD, 13, "but its header describes"),
    ("line feed in a name", {"a\nb": tensor("U8", [1], 0, 1)}, 1, r"'a\nb' for the name of a tensor"),
    ("half a surrogate pair", {"\ud800": tensor("U8", [1], 0, 1)}, 1, "half of a surrogate pair"),
    ("empty name", {"": tensor("U8", [1], 0, 1)}, 1, "'' for the name of a tensor"),
]


@pytest.mark.parametrize(("entries", "data_bytes", "says"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_lie_is_refused_in_one_sentence_that_names_the_shard(entries: object, data_bytes: int, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(entries, data_bytes)
    assert says in str(caught.value)
    assert_is_for_the_user(caught.value, SHARD.name)


@pytest.mark.parametrize(
    ("blob", "says"),
    [
        (b'{"a": ', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON"),
        (b'{"a": {}, "a": {}}', "is not JSON (a name occurs twice in one map)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"a":' * 200_000, "is not JSON"),
    ],
    ids=["cut off", "not UTF-8", "UTF-16", "a name twice", "5000 digits", "deep lists", "deep objects"],
)
def test_what_is_not_plain_json_is_refused(blob: bytes, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_header(SHARD, blob, 8 + len(blob))
    assert says in str(caught.value)
    assert_is_for_the_user(caught.value, SHARD.name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "its header length is out of range"),
        (b"1234567", "its header length is out of range"),
        (struct.pack("<Q", 0) + b"{}", "its header length is out of range"),
        (struct.pack("<Q", 1) + b"{}", "its header length is out of range"),
        (struct.pack("<Q", HEADER_LIMIT_BYTES + 1) + b"{}", "its header length is out of range"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "its header length is out of range"),
        (struct.pack("<Q", 3) + b"{}", "ends at byte 10, inside its own header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "its header length is out of range"),
    ],
)
def test_a_wrong_header_length_is_refused_before_it_is_believed(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / SHARD.name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert_is_for_the_user(caught.value, SHARD.name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path / SHARD.name, "is missing: "), (tmp_path, "is a folder, not a file: ")):
        with pytest.raises(InputError, match=says) as caught:
            read_header(path)
        assert_is_for_the_user(caught.value, path.name)


def test_a_truncated_shard_is_told_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / SHARD.name
    save_file({"w": torch.zeros(1000, 1000)}, path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1_000_000)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value) == (
        f"{SHARD.name} ends at byte {size - 1_000_000:,} but its header describes {size:,} bytes: "
        "download the shard again."
    )


def assert_tiles_the_data(header: Header) -> None:
    position = header.data_start
    for info in header.tensors.values():
        assert info.begin == position
        position = info.end
    assert position == header.file_bytes


LEAVES = st.sampled_from([None, True, 0, -1, 2**65, 1.5, "", "U8", "a", [], {}])
JSON = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.sampled_from(["a", "dtype", "shape"]), LEAVES)
SMALL = st.integers(-1, 8)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BYTES, "BF17"]) | JSON,
        "shape": st.lists(SMALL, max_size=3) | JSON,
        "data_offsets": st.lists(SMALL, min_size=2, max_size=2) | JSON,
    },
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | JSON, max_size=4)


@PROPERTY
@given(HEADERS, st.integers(0, 16))
def test_any_json_is_read_or_refused_and_never_anything_else(entries: dict[str, Any], data_bytes: int) -> None:
    try:
        assert_tiles_the_data(parse(entries, data_bytes))
    except InputError as error:
        assert_is_for_the_user(error, SHARD.name)


@PROPERTY
@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        parse_header(SHARD, content, 8 + len(content))
    except InputError as error:
        assert error.exit_code == 2


@PROPERTY
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_good_header_with_some_bytes_overwritten_is_read_or_refused(at: int, patch: bytes) -> None:
    good = json.dumps({"__metadata__": {"format": "pt"}, **GOOD}).encode()
    at %= len(good)
    blob = (good[:at] + patch + good[at + len(patch) :])[: len(good)]
    try:
        assert_tiles_the_data(parse_header(SHARD, blob, 8 + len(blob) + 12))
    except InputError as error:
        assert SHARD.name in str(error)
