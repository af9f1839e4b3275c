"""The journal: one record for each shard that is whole, read back with suspicion."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from nvquant.checkpoint.digest import file_sha256
from nvquant.checkpoint.writer import TensorEntry
from nvquant.convert.journal import CLEARED_FOLDER, IDENTITY_NAME, STATE_FOLDER, Journal
from nvquant.errors import CheckFailed
from nvquant.plan.plan import PlannedShard
from nvquant.stream.manifest import LayerRecord, ShardRecord

ENTRIES = (TensorEntry("weight", "U8", (4,)),)
LAYER = PlannedShard("model-00001-of-00003.safetensors", 0, ENTRIES)
OTHER_LAYER = PlannedShard("model-00002-of-00003.safetensors", 1, ENTRIES)
REST = PlannedShard("model-00003-of-00003.safetensors", None, ENTRIES)
SHARDS = (LAYER, OTHER_LAYER, REST)
NOTE = LayerRecord(layer=0, file=LAYER.file, source_sha256="ab" * 32, groups={})


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path)
    journal.begin({"nvquant": "1"})
    return journal


def write(journal: Journal, shard: PlannedShard, data: bytes = b"data") -> str:
    (journal.partial / shard.file).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_hashed_whatever_its_size(tmp_path: Path) -> None:
    for size in (0, 1, (16 << 20) - 1, 16 << 20, (16 << 20) + 1):
        (tmp_path / "file").write_bytes(bytes(size))
        assert file_sha256(tmp_path / "file") == hashlib.sha256(bytes(size)).hexdigest()


def test_a_new_folder_has_no_identity_and_no_records(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.identity() is None
    assert journal.records(SHARDS) == journal.done(SHARDS) == {}


def test_identity_and_records_come_back_as_they_were_noted(journal: Journal) -> None:
    layer, rest = write(journal, LAYER), write(journal, REST, b"rest")
    journal.note(LAYER, layer, NOTE)
    journal.note(REST, rest, None)
    again = Journal(journal.partial)
    assert again.identity() == {"nvquant": "1"}
    expected = {
        LAYER.file: ShardRecord(sha256=layer, layer=NOTE),
        REST.file: ShardRecord(sha256=rest, layer=None),
    }
    assert again.records(SHARDS) == again.done(SHARDS) == expected
    assert {path.name for path in journal.folder.iterdir()} == {
        IDENTITY_NAME, f"{LAYER.file}.json", f"{REST.file}.json",
    }  # fmt: skip


def test_a_shard_without_a_record_or_a_record_without_a_shard_is_not_done(journal: Journal) -> None:
    write(journal, LAYER)
    journal.note(OTHER_LAYER, "ab" * 32, NOTE)
    assert journal.records(SHARDS) == journal.done(SHARDS) == {}


def test_a_half_written_record_does_not_count(journal: Journal) -> None:
    write(journal, LAYER)
    (journal.folder / f"{LAYER.file}.json.tmp").write_text('{"sha256": "')
    assert journal.done(SHARDS) == {}


def test_a_shard_with_other_bytes_is_named(journal: Journal) -> None:
    for shard in (LAYER, OTHER_LAYER):
        journal.note(shard, write(journal, shard), NOTE)
    write(journal, OTHER_LAYER, b"date")
    assert set(journal.records(SHARDS)) == {LAYER.file, OTHER_LAYER.file}
    with pytest.raises(CheckFailed, match=rf"{OTHER_LAYER.file} is damaged \(its sha256 differs from the journal's\)"):
        journal.done(SHARDS)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"sha256": 1, "layer": {}}', '{"sha256": "ab"}', '{"sha256": "ab", "layer": null}'],
)
def test_a_record_that_is_none_is_named(journal: Journal, text: str) -> None:
    write(journal, LAYER)
    (journal.folder / f"{LAYER.file}.json").write_text(text)
    with pytest.raises(CheckFailed, match=rf"{LAYER.file}\.json is damaged: remove this file"):
        journal.records(SHARDS)


def test_the_record_of_a_layer_is_none_of_the_rest(journal: Journal) -> None:
    journal.note(REST, write(journal, REST), NOTE)
    with pytest.raises(CheckFailed, match=rf"{REST.file}\.json is damaged"):
        journal.records(SHARDS)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00" * 100])
def test_a_damaged_identity_is_named(journal: Journal, text: str) -> None:
    (journal.folder / IDENTITY_NAME).write_text(text)
    with pytest.raises(CheckFailed, match=r"identity\.json is damaged: begin anew with --restart"):
        journal.identity()


def test_begin_again_replaces_the_identity_and_clear_removes_everything(journal: Journal) -> None:
    journal.begin({"nvquant": "2"})
    assert json.loads((journal.partial / STATE_FOLDER / IDENTITY_NAME).read_text()) == {"nvquant": "2"}
    write(journal, LAYER)
    journal.clear()
    assert [path.name for path in journal.partial.iterdir()] == [LAYER.file]
    journal.clear()


def test_clear_ends_what_a_killed_clear_left(journal: Journal) -> None:
    journal.folder.rename(journal.partial / CLEARED_FOLDER)
    journal.clear()
    assert not any(journal.partial.iterdir())
