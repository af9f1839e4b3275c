"""Shards as written: literal bytes, alignment, what other readers make of them, and what an error leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvquant.checkpoint.headers import DTYPE_BYTES, parse_header, read_header
from nvquant.checkpoint.source import open_checkpoint, tensor_bytes
from nvquant.checkpoint.writer import (
    ALIGNMENT,
    TensorEntry,
    build_header,
    order_entries,
    write_bytes,
    write_json,
    write_shard,
)
from nvquant.errors import CheckFailed, InputError
from safetensors import safe_open
from safetensors.torch import load_file

PROPERTY = settings(derandomize=True, database=None, deadline=None, max_examples=150)
ENTRIES = (TensorEntry("s", "F32", (1,)), TensorEntry("p.weight_packed", "U8", (1, 3)), TensorEntry("z", "F8_E4M3", ()))
DATA = {"s": bytes.fromhex("0000803f"), "p.weight_packed": b"\x01\x23\x45", "z": b"\x38"}
HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"p.weight_packed":{"dtype":"U8","shape":[1,3],"data_offsets":[4,7]},'
    b'"z":{"dtype":"F8_E4M3","shape":[],"data_offsets":[7,8]}}'
)


def contents(entry: TensorEntry) -> Iterator[memoryview]:
    data = DATA[entry.name]
    for at in range(0, len(data), 2):  # in pieces
        yield memoryview(data)[at : at + 2]


def test_a_small_shard_has_these_very_bytes(tmp_path: Path) -> None:
    digest = write_shard(tmp_path / "x.safetensors", ENTRIES, contents)
    padded = HEADER + b" " * (-len(HEADER) % 8)
    wanted = len(padded).to_bytes(8, "little") + padded + bytes.fromhex("0000803f 012345 38")
    assert (tmp_path / "x.safetensors").read_bytes() == wanted
    assert digest == hashlib.sha256(wanted).hexdigest()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_names_are_stored_as_utf8_and_read_back(tmp_path: Path) -> None:
    entry = TensorEntry('größe "quoted" \\ back', "U8", (2,))
    write_shard(tmp_path / "x.safetensors", [entry], lambda _: [memoryview(b"ab")])
    assert list(read_header(tmp_path / "x.safetensors").tensors) == [entry.name]
    assert load_file(tmp_path / "x.safetensors")[entry.name].tolist() == [97, 98]
    assert "größe".encode() in (tmp_path / "x.safetensors").read_bytes()


def test_wide_dtypes_come_first_then_names() -> None:
    entries = [TensorEntry(name, dtype, (3,)) for name in "ba" for dtype in ("U8", "BF16", "F32", "F8_E4M3", "F64")]
    ordered = order_entries(TensorEntry(f"{e.name}.{e.dtype}", e.dtype, e.shape) for e in entries)
    assert [entry.name for entry in ordered] == [
        *("a.F64", "b.F64", "a.F32", "b.F32", "a.BF16", "b.BF16"),
        *("a.F8_E4M3", "a.U8", "b.F8_E4M3", "b.U8"),
    ]


@PROPERTY
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    ).filter(lambda table: "__metadata__" not in table)
)
def test_every_tensor_is_aligned_and_the_header_says_what_was_asked_for(
    table: dict[str, tuple[str, list[int]]],
) -> None:
    entries = order_entries(TensorEntry(name, dtype, tuple(shape)) for name, (dtype, shape) in table.items())
    blob = build_header(entries)
    assert len(blob) % ALIGNMENT == 0
    header = parse_header(Path("x"), blob[8:], len(blob) + sum(entry.nbytes for entry in entries))
    assert {(t.name, t.dtype, t.shape) for t in header.tensors.values()} == {
        (e.name, e.dtype, e.shape) for e in entries
    }
    assert all(info.begin % DTYPE_BYTES[info.dtype] == 0 for info in header.tensors.values())


def test_the_safetensors_library_reads_every_dtype_that_is_written(tmp_path: Path) -> None:
    tensors = {
        "m.weight_packed": torch.arange(64, dtype=torch.uint8).view(4, 16),
        "m.weight_scale": torch.rand(4, 2).to(torch.float8_e4m3fn),
        "m.weight_global_scale": torch.tensor([123.5]),
        "m.weight_scale_2": torch.tensor(0.25),
        "norm.weight": torch.randn(7).bfloat16(),
        "h.weight": torch.randn(3, 3).half(),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(3),
        "nothing": torch.zeros(0, 4),
    }
    names = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.bfloat16: "BF16"}
    names |= {torch.float16: "F16", torch.bool: "BOOL", torch.int64: "I64"}
    entries = order_entries(TensorEntry(n, names[t.dtype], tuple(t.shape)) for n, t in tensors.items())
    path = tmp_path / "model.safetensors"
    write_shard(path, entries, lambda entry: [tensor_bytes(tensors[entry.name])])
    with safe_open(path, framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
        assert set(shard.keys()) == set(tensors)
        for name, wanted in tensors.items():
            found = shard.get_tensor(name)
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert bytes(tensor_bytes(found)) == bytes(tensor_bytes(wanted))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert all(bytes(tensor_bytes(checkpoint.read(n))) == bytes(tensor_bytes(t)) for n, t in tensors.items())


def test_json_is_indented_by_two_in_the_order_given_with_a_final_newline(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 8}, "weight_map": {"z": "größe.safetensors", "a": "x.safetensors"}}
    write_json(tmp_path / "index.json", index)
    assert (tmp_path / "index.json").read_text(encoding="utf-8") == (
        '{\n  "metadata": {\n    "total_size": 8\n  },\n  "weight_map": {\n    "z": "größe.safetensors",\n'
        '    "a": "x.safetensors"\n  }\n}\n'
    )


@pytest.mark.parametrize("size", [0, 2, 4, 30])
def test_contents_of_the_wrong_size_leave_no_file(tmp_path: Path, size: int) -> None:
    def wrong(entry: TensorEntry) -> list[memoryview]:
        return [memoryview(bytes(size) if entry.name == "p.weight_packed" else DATA[entry.name])]

    with pytest.raises(CheckFailed, match=rf"x\.safetensors: p\.weight_packed has {size} bytes, but the plan has 3\."):
        write_shard(tmp_path / "x.safetensors", ENTRIES, wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_contents_are_made_leaves_no_file(tmp_path: Path) -> None:
    def broken(entry: TensorEntry) -> Iterator[memoryview]:
        yield memoryview(DATA[entry.name])[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.safetensors", ENTRIES, broken)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"earlier")
    with pytest.raises(CheckFailed):
        write_shard(tmp_path / "x.safetensors", ENTRIES, lambda entry: [])
    assert (tmp_path / "x.safetensors").read_bytes() == b"earlier"
    write_shard(tmp_path / "x.safetensors", ENTRIES, contents)
    assert (tmp_path / "x.safetensors").read_bytes().endswith(b"\x01\x23\x45\x38")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk, a write beyond `size` fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_in_one_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    entry = TensorEntry("w", "U8", (1 << 20,))
    says = r"cannot be written \(.+\): free space or choose another folder with -o\.$"
    with largest_file(1 << 16):
        with pytest.raises(InputError, match=says):
            write_shard(tmp_path / "x.safetensors", [entry], lambda _: [memoryview(bytes(1 << 20))])
        with pytest.raises(InputError, match=says):
            write_bytes(tmp_path / "tokenizer.json", bytes(1 << 20))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent" / "x.safetensors", tmp_path / "file" / "x.safetensors"):
        with pytest.raises(InputError, match=rf"^{path} cannot be written \("):
            write_shard(path, ENTRIES, contents)
        with pytest.raises(InputError, match=rf"^{path} cannot be written \("):
            write_json(path, {})


def test_a_shard_is_on_the_disk_before_it_gets_its_name_and_its_name_before_anybody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    synced: list[tuple[bool, list[str]]] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((is_folder, sorted(entry.name for entry in tmp_path.iterdir())))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    write_shard(path, ENTRIES, contents)
    assert synced == [(False, ["x.safetensors.tmp"]), (True, ["x.safetensors"])]


def test_a_piece_may_be_reused_as_soon_as_the_next_one_is_asked_for(tmp_path: Path) -> None:
    entry = TensorEntry("w", "U8", (1 << 22,))
    buffer = bytearray(1 << 16)

    def reused(_entry: TensorEntry) -> Iterator[memoryview]:
        for value in range(64):
            buffer[:] = bytes([value]) * len(buffer)
            yield memoryview(buffer)

    digest = write_shard(tmp_path / "x.safetensors", [entry], reused)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[-entry.nbytes :] == b"".join(bytes([value]) * len(buffer) for value in range(64))
    assert digest == hashlib.sha256(data).hexdigest()


def test_an_entrys_size_is_that_of_its_dtype_and_shape() -> None:
    assert TensorEntry("a", "F32", ()).nbytes == 4
    assert TensorEntry("a", "BF16", (3, 0)).nbytes == 0
    assert TensorEntry("a", "U8", (21504, 2688)).nbytes == 57_802_752
    assert json.loads(build_header([TensorEntry("a", "U8", (2,))])[8:])["a"]["data_offsets"] == [0, 2]
