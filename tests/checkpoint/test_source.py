"""Opening a checkpoint folder, and reading its tensors by byte range."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvquant.checkpoint import shard_bytes, source, uncached
from nvquant.checkpoint.shard_bytes import READ_CHUNK_BYTES, read_range
from nvquant.checkpoint.source import (
    INDEX_NAME,
    Checkpoint,
    open_checkpoint,
    read_json,
    tensor_bytes,
    torch_dtype,
)
from nvquant.errors import InputError
from safetensors.torch import save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "b.weight": torch.randn(3, 5, generator=generator),
        "c.scalar": torch.tensor(2.5),
        "d.scales": torch.rand(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "e.packed": torch.arange(10, dtype=torch.uint8).view(2, 5),
        "f.mask": torch.tensor([True, False, True]),
        "g.empty": torch.zeros(0, 3),
        "h.conv": torch.randn(4, 2, 3, generator=generator).half(),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    items = list(tensors().items())
    weight_map = {}
    for name, part in ((FIRST, items[:4]), (SECOND, items[4:])):
        save_file(dict(part), folder / name, metadata={"format": "pt"})
        weight_map.update({tensor: name for tensor, _ in part})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    edit(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_folder_gives_config_shards_and_the_place_of_each_tensor(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert list(checkpoint.shards) == [FIRST, SECOND]
    assert checkpoint.files["a.weight"] == FIRST and checkpoint.files["h.conv"] == SECOND
    assert checkpoint.path("h.conv") == folder / SECOND
    assert checkpoint.info("a.weight").shape == (6, 4)
    assert set(checkpoint.infos()) == set(tensors())
    with pytest.raises(KeyError):
        checkpoint.info("z")


def test_every_tensor_is_read_in_its_stored_dtype_and_shape(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name, wanted in tensors().items():
        found = checkpoint.read(name)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert bytes(tensor_bytes(found)) == bytes(tensor_bytes(wanted))


def test_a_single_file_needs_no_index(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX_NAME):
        (folder / name).unlink()
    save_file(tensors(), folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.shards) == ["model.safetensors"]
    assert torch.equal(checkpoint.read("b.weight"), tensors()["b.weight"])


def test_links_of_a_cached_snapshot_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", INDEX_NAME, FIRST, SECOND):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert torch.equal(open_checkpoint(snapshot).read("a.weight"), tensors()["a.weight"])


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME, FIRST])
def test_a_file_that_is_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert f"{name} is a link to a file outside of its folder" in refused(folder)


def test_rows_are_read_in_the_order_asked_for(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for name, rows in (("a.weight", [5, 0, 0, 3]), ("b.weight", []), ("h.conv", [2, 1]), ("g.empty", [])):
        assert torch.equal(checkpoint.read_rows(name, rows), tensors()[name][rows])


@pytest.mark.parametrize(
    ("rows", "gap", "reads"),
    [
        ([0, 1, 2, 3, 4, 5], 0, 1),
        ([1, 2, 4, 5], 0, 2),
        ([1, 2, 4, 5], 1, 1),
        ([5, 4, 3], 1, 3),
        ([2, 2, 3], 1, 2),
        ([0, 2, 4], 0, 3),
        ([0, 2, 5], 1, 2),
        ([0, 2, 5], 2, 1),
        ([], 1, 0),
    ],
)
def test_rows_near_each_other_are_read_at_once(
    folder: Path, rows: list[int], gap: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = tensors()["a.weight"]
    monkeypatch.setattr(source, "MOST_GAP_BYTES", gap * weight[0].nbytes)
    checkpoint = open_checkpoint(folder)
    seen: list[int] = []
    real = shard_bytes.read_range

    def counting(path: Path, begin: int, buffer: memoryview, known: Any) -> None:
        seen.append(begin)
        real(path, begin, buffer, known)

    monkeypatch.setattr(shard_bytes, "read_range", counting)
    assert torch.equal(checkpoint.read_rows("a.weight", rows), weight[rows])
    assert len(seen) == reads


def test_a_piece_holds_no_more_rows_than_a_chunk_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = tensors()["a.weight"]
    monkeypatch.setattr(source, "COPY_CHUNK_BYTES", 2 * weight[0].nbytes)
    seen: list[int] = []
    real = shard_bytes.read_range

    def noting(path: Path, begin: int, buffer: memoryview, known: Any) -> None:
        seen.append(len(buffer))
        real(path, begin, buffer, known)

    monkeypatch.setattr(shard_bytes, "read_range", noting)
    assert torch.equal(open_checkpoint(folder).read_rows("a.weight", [0, 1, 2, 3, 5]), weight[[0, 1, 2, 3, 5]])
    assert max(seen) == 2 * weight[0].nbytes


@pytest.mark.parametrize("rows", [[0, 6], [0, -1], [0, 10**9], [4, 5, 6], [-1, 0], [6]])
def test_a_row_outside_of_the_tensor_is_never_read(folder: Path, rows: list[int]) -> None:
    with pytest.raises(IndexError, match=r"a\.weight"):
        open_checkpoint(folder).read_rows("a.weight", rows)


def test_part_of_a_tensor_is_read_into_a_buffer(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    whole = bytes(tensor_bytes(tensors()["b.weight"]))
    buffer = bytearray(20)
    checkpoint.read_into("b.weight", memoryview(buffer), 8)
    assert bytes(buffer) == whole[8:28]
    for begin in (41, 60, -1):
        with pytest.raises(IndexError, match=r"b\.weight, which has 60"):
            checkpoint.read_into("b.weight", memoryview(buffer), begin)


def test_a_tensors_bytes_are_its_memory() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    view = tensor_bytes(tensor)
    assert len(view) == 12
    view[2:4] = struct.pack("<H", 0x3F80)
    assert tensor.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert bytes(tensor_bytes(torch.tensor(1.0))) == struct.pack("<f", 1)
    assert len(tensor_bytes(torch.zeros(0, 4))) == 0


def test_a_read_longer_than_a_chunk_is_put_together(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(READ_CHUNK_BYTES + 100)
        for at in (7, READ_CHUNK_BYTES - 2, READ_CHUNK_BYTES + 90):
            file.seek(at)
            file.write(b"mark")
    buffer = bytearray(READ_CHUNK_BYTES + 90)
    read_range(path, 6, memoryview(buffer))
    assert buffer[:5] == b"\0mark"
    assert buffer[READ_CHUNK_BYTES - 8 :][:4] == b"mark"
    assert buffer[READ_CHUNK_BYTES + 84 :] == b"mark\0\0"


def test_the_pieces_of_a_tensor_are_its_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(folder)
    for size in (1, 7, 16 << 20):
        monkeypatch.setattr("nvquant.checkpoint.source.COPY_CHUNK_BYTES", size)
        for name, wanted in tensors().items():
            pieces = [bytes(piece) for piece in checkpoint.pieces(name)]
            assert b"".join(pieces) == bytes(tensor_bytes(wanted))
            assert all(len(piece) == size for piece in pieces[:-1])


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def rewrite(path: Path) -> None:
    """The same size, other bytes; written a while after the header was read."""
    before = path.stat().st_mtime_ns
    path.write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(before + 1, before + 1))


def replace_by_an_older_one(path: Path) -> None:
    before = path.stat().st_mtime_ns
    path.with_suffix(".other").write_bytes(path.read_bytes())
    path.with_suffix(".other").rename(path)
    os.utime(path, ns=(before - 1, before - 1))


@pytest.mark.parametrize("change", [shrink, grow, rewrite, replace_by_an_older_one])
def test_a_shard_that_changes_during_the_run_is_refused_at_the_next_read(
    folder: Path, change: Callable[[Path], None]
) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.read("h.conv")
    change(folder / SECOND)
    reads: list[Callable[[], object]] = [
        lambda: checkpoint.read("h.conv"),
        lambda: checkpoint.read_rows("h.conv", [0]),
        lambda: list(checkpoint.pieces("h.conv")),
    ]
    for read in reads:
        with pytest.raises(InputError, match=r"00002\.safetensors changed while it was being read: wait .* again\.$"):
            read()
    assert torch.equal(checkpoint.read("a.weight"), tensors()["a.weight"])  # the other shard is as it was


def test_a_shard_touched_before_it_is_opened_is_read(folder: Path) -> None:
    os.utime(folder / SECOND, ns=(1, 1))
    assert torch.equal(open_checkpoint(folder).read("h.conv"), tensors()["h.conv"])


def test_a_file_that_ends_early_or_vanishes_is_told(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    size = (folder / SECOND).stat().st_size
    with pytest.raises(
        InputError, match=r"00002\.safetensors changed during the run and ended at byte [\d,]+: restore it"
    ):
        read_range(folder / SECOND, size - 4, memoryview(bytearray(8)))
    (folder / SECOND).unlink()
    with pytest.raises(InputError, match=r"00002\.safetensors cannot be read \(No such file or directory\)"):
        checkpoint.read("h.conv")


@pytest.mark.parametrize("name", ["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"])
def test_dtype_names_are_those_of_the_safetensors_library(name: str, tmp_path: Path) -> None:
    save_file({"t": torch.zeros(2, dtype=torch_dtype(name))}, tmp_path / "t.safetensors")
    assert f'"dtype":"{name}"'.encode() in (tmp_path / "t.safetensors").read_bytes()


@pytest.mark.parametrize(
    "target",
    ["../outside.safetensors", "/tmp/outside.safetensors", "sub/model.safetensors", "..", ".", "", "pytorch_model.bin"],
)
def test_the_index_cannot_lead_elsewhere(folder: Path, target: str) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({"a.weight": target}))
    message = refused(folder)
    assert INDEX_NAME in message and "tensor a.weight" in message


@pytest.mark.parametrize("target", [7, None, ["a"], {}, True])
def test_the_index_must_name_files(folder: Path, target: object) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({"a.weight": target}))
    assert INDEX_NAME in refused(folder)


@pytest.mark.parametrize(
    "target", ["n" * 230 + ".safetensors", "nul\0.safetensors", "a\nb.safetensors", "\x1b[31m.safetensors"]
)
def test_a_name_that_no_shard_has_is_refused_on_one_line(folder: Path, target: str) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({"a.weight": target}))
    message = refused(folder)
    assert "tensor a.weight" in message and "which is not the name of a shard" in message
    assert message.isprintable() and len(message) < 500


@pytest.mark.parametrize("name", ["a\nError: b", "\x1b[2J", "", "x" * 401])
def test_a_name_that_no_tensor_has_is_refused_in_the_index(folder: Path, name: str) -> None:
    edit_index(folder, lambda weight_map: weight_map.update({name: FIRST}))
    message = refused(folder)
    assert INDEX_NAME in message and "for a tensor" in message.replace("the name of a", "a")
    assert message.isprintable() and len(message) < 500


def test_an_index_that_lists_a_tensor_twice_is_refused(folder: Path) -> None:
    (folder / INDEX_NAME).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "a name occurs twice" in refused(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}'])
def test_an_index_without_a_weight_map_is_refused(folder: Path, content: str) -> None:
    (folder / INDEX_NAME).write_text(content)
    assert INDEX_NAME in refused(folder)


def test_what_index_and_shards_hold_must_agree(folder: Path) -> None:
    edit_index(folder, lambda weight_map: weight_map.pop("b.weight"))
    assert refused(folder) == (
        f"{folder}: {FIRST} contains b.weight, which the index does not list: download the index again."
    )
    edit_index(folder, lambda weight_map: weight_map.update({"b.weight": SECOND}))
    assert refused(folder) == (
        f"{folder}: the index lists b.weight in {SECOND}, which lacks it: download the shard again."
    )


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    both = tensors()
    save_file({name: both[name] for name in ("e.packed", "f.mask", "g.empty", "h.conv", "a.weight")}, folder / SECOND)
    assert refused(folder) == (
        f"{folder}: a.weight lies in {SECOND} and in {FIRST}: download the shards and the index again."
    )


@pytest.mark.parametrize("path", [INDEX_NAME, "config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b"nope"], ids=["empty", "cut", "binary", "deep", "word"]
)
def test_unreadable_json_is_refused_by_name(folder: Path, path: str, content: bytes) -> None:
    (folder / path).write_bytes(content)
    message = refused(folder)
    assert path in message and message.endswith("download it again.")


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 5000)):
        assert refused(path) == (
            f"{path} is not a folder: give the path of a model folder (with config.json) or a Hub id."
        )


def test_a_missing_or_odd_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    assert refused(folder) == f"{folder / 'config.json'} is not a JSON object: download it again."
    (folder / "config.json").unlink()
    assert refused(folder) == (
        f"{folder} holds no config.json, which every Hugging Face model has: download the model's files."
    )
    (folder / "config.json").mkdir()
    assert "config.json is a folder, not a file" in refused(folder)


def test_pickles_are_named_as_the_reason(folder: Path) -> None:
    for path in (FIRST, SECOND, INDEX_NAME):
        (folder / path).unlink()
    assert refused(folder) == (f"{folder} holds no model.safetensors and no {INDEX_NAME}: download the model's files.")
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(folder) and "pickle" in refused(folder)


def test_json_keeps_its_order(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"z": 1, "a": {"y": 2, "b": 3}}')
    value = read_json(tmp_path / "x.json", "hint")
    assert json.dumps(value) == '{"z": 1, "a": {"y": 2, "b": 3}}'


def test_opening_reads_headers_only(folder: Path, tmp_path: Path) -> None:
    """A checkpoint of 2 TB of holes opens at once, in a file system that could not hold it."""
    large = tmp_path / "large"
    shutil.copytree(folder, large)
    size = 2_000_000_000_000
    entries = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    blob = json.dumps(entries).encode()
    with (large / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(blob)) + blob)
        file.truncate(8 + len(blob) + size)
    (large / INDEX_NAME).unlink()
    checkpoint: Checkpoint = open_checkpoint(large)
    assert checkpoint.info("w").nbytes == size


def test_a_file_that_is_cut_off_between_the_check_and_the_read_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folder)
    name, file = next(iter(checkpoint.files.items()))
    real = uncached.read

    def cut_then_read(descriptor: int, buffer: memoryview, begin: int) -> int:
        os.truncate(folder / file, 64)
        return real(descriptor, buffer, begin)

    monkeypatch.setattr(uncached, "read", cut_then_read)
    with pytest.raises(InputError, match="changed while it was being read: wait until nothing writes it"):
        checkpoint.read(name)
