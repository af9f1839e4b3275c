"""The documents of a run: each goes through one module, comes back as it was, and is refused where it is damaged."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import nvquant
import pytest
from nvquant.errors import InputError
from nvquant.recipe.load import load_recipe
from nvquant.stream.manifest import (
    MANIFEST_NAME,
    CalibrationRecord,
    FileNames,
    GroupRecord,
    HubSource,
    Identity,
    InputRecord,
    LayerRecord,
    Manifest,
    Run,
    ShardRecord,
    Source,
    SourceShard,
    held_to,
    read_manifest,
)

SHARD = "model-00001-of-00002.safetensors"
INPUT = InputRecord(observed_amax=3.0, low_percentile=0.5, calibrated_amax=12.0, tokens=9)
GROUPS = {
    "model.layers.0.mlp.down_proj": GroupRecord(
        scheme="nvfp4",
        members=("model.layers.0.mlp.down_proj",),
        weight_amax=0.75,
        input=INPUT,
        marlin_flushed_blocks=2,
    ),
    "model.layers.0.self_attn.qkv_proj": GroupRecord(
        scheme="fp8", members=("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"), weight_amax=0.25
    ),
}
LAYER = LayerRecord(layer=0, file=SHARD, source_sha256="ab" * 32, groups=GROUPS)
IDENTITY = Identity(
    nvquant="1.2.3",
    source=Source(config_sha256="cd" * 32, shards={SHARD: SourceShard(bytes=9, mtime_ns=1, header_sha256="ef" * 32)}),
    recipe=load_recipe("nvfp4-fp8"),
    format="modelopt",
    quantizer="mse",
    run=Run(device="cpu", dtype="bfloat16", attention="sdpa", batch_size=1, versions={"torch": "2.9.0"}),
    calibration=CalibrationRecord(
        name="offline", samples=2, sequence_length=64, seed=0, tokens=122, framing="ids", sha256="01" * 32
    ),
)
MANIFEST = Manifest.model_validate(IDENTITY.as_json() | {"layers": [LAYER.as_json()], "files": {SHARD: "23" * 32}})
DOCUMENTS = {
    "manifest": MANIFEST,
    "identity": IDENTITY,
    "identity without calibration": IDENTITY.model_copy(update={"calibration": None}),
    "identity of a model on the Hub": IDENTITY.model_copy(
        update={
            "source": Source(
                hub=HubSource(id="google/gemma-4-31b", commit="0" * 40),
                integrity="sha256 of every shard",
                shards={SHARD: SourceShard(bytes=9, etag="1" * 64)},
            )
        }
    ),
    "shard of a layer": ShardRecord(sha256="45" * 32, layer=LAYER),
    "shard of the rest": ShardRecord(sha256="45" * 32, layer=None),
    "files": FileNames(files=(SHARD, "config.json")),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_comes_back_as_it_was_written(name: str) -> None:
    document = DOCUMENTS[name]
    written = json.loads(json.dumps(document.as_json()))
    read = held_to(type(document), written, "document.json")
    assert read.as_json() == document.as_json()
    assert json.dumps(read.as_json()) == json.dumps(document.as_json())  # the order of keys too


def test_what_was_not_given_is_not_written() -> None:
    fp8 = GROUPS["model.layers.0.self_attn.qkv_proj"].as_json()
    assert list(fp8) == ["scheme", "members", "weight_amax"]
    assert "hub" not in IDENTITY.as_json()["source"]
    assert "calibration" not in IDENTITY.as_json()["recipe"]  # `calibration` has that of the run


def test_a_manifest_gives_its_groups_with_their_files() -> None:
    group = MANIFEST.groups["model.layers.0.self_attn.qkv_proj"]
    assert (group.name, group.file, group.record.scheme) == ("model.layers.0.self_attn.qkv_proj", SHARD, "fp8")
    assert list(MANIFEST.groups) == list(GROUPS)
    assert MANIFEST.framing == "ids"


def test_amaxes_keep_every_bit() -> None:
    record = GroupRecord(scheme="fp8", members=("a",), weight_amax=0.1234567165374756)
    assert held_to(GroupRecord, json.loads(json.dumps(record.as_json())), "x") == record


def test_unknown_keys_are_ignored_and_known_ones_are_not() -> None:
    document = MANIFEST.as_json() | {"written_by_a_later_version": 1}
    assert held_to(Manifest, document, "x").as_json() == MANIFEST.as_json()


def damaged(*path: str | int, value: Any) -> dict[str, Any]:
    """The manifest with another value somewhere."""
    document = json.loads(json.dumps(MANIFEST.as_json()))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return dict(document)


GROUP = ("layers", 0, "groups", "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "nvquant is missing"),
        (damaged("files", SHARD, value="23"), f"files.{SHARD} does not have the form that nvquant writes"),
        (damaged("files", value={"../x.safetensors": "23" * 32}), "it is not the name of a file in this folder"),
        (damaged("layers", 0, "file", value="/etc/passwd"), "it is not the name of a file in this folder"),
        (damaged("layers", 0, "file", value="a\x1b[2J"), "it contains invisible characters"),
        (damaged("layers", 0, "source_sha256", value="AB" * 32), "source_sha256 does not have the form"),
        (damaged(*GROUP, "weight_amax", value=-1.0), "weight_amax is wrong"),
        (damaged(*GROUP, "weight_amax", value=float("nan")), "weight_amax is wrong"),
        (damaged(*GROUP, "weight_amax", value="0.5"), "weight_amax is wrong"),
        (damaged(*GROUP, "members", value=[]), "members is wrong"),
        (damaged(*GROUP, "members", value=["a\nb"]), "members.0 is wrong: it contains invisible characters"),
        (damaged(*GROUP, "scheme", value="fp8; rm"), "scheme does not have the form that nvquant writes"),
        (damaged(*GROUP, "input", "calibrated_amax", value=float("inf")), "calibrated_amax is wrong"),
        (damaged(*GROUP, "marlin_flushed_blocks", value=-1), "marlin_flushed_blocks is wrong"),
        (damaged(*GROUP, "feedback", value={}), "feedback.damping is missing"),
        (damaged(*GROUP, "feedback", value={"damping": float("nan")}), "feedback.damping is wrong"),
        (damaged(*GROUP, "feedback", value={"damping": 0.03, "outgrown_blocks": -1}), "outgrown_blocks is wrong"),
        (damaged("recipe", "quantize", value=[]), "recipe.quantize is wrong"),
        (damaged("recipe", "quantize", 0, "scheme", value="fp5"), "recipe.quantize.0.scheme is wrong"),
        (damaged("calibration", "samples", value=1.5), "calibration.samples is wrong"),
        (damaged("format", value=["modelopt"]), "format is wrong"),
    ],
)
def test_a_damaged_manifest_is_refused_by_its_first_wrong_key(
    document: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        held_to(Manifest, document, MANIFEST_NAME)
    message = str(caught.value)
    assert message.startswith(f"{MANIFEST_NAME} has a missing or wrong key (")
    assert words in message
    assert "\n" not in message
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    assert isinstance(read_manifest(tmp_path), str)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"nvquant": ' + "[" * 100_000])
def test_what_is_no_document_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text, encoding="latin-1")
    found = read_manifest(tmp_path)
    assert isinstance(found, str)
    assert MANIFEST_NAME in found


def test_a_manifest_is_read_or_absent(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(MANIFEST.as_json()))
    assert read_manifest(tmp_path) == MANIFEST


@pytest.mark.parametrize("document", [{"sha256": "45"}, {"layer": None}, {"sha256": "45" * 32, "layer": {"file": "x"}}])
def test_a_damaged_record_of_the_journal_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^record\.json has a missing or wrong key"):
        held_to(ShardRecord, document, "record.json")


# A module that reads one of these keys by itself reads a document that nobody checked.
KEYS = {"observed_amax", "low_percentile", "source_sha256", "header_sha256", MANIFEST_NAME}


def test_no_other_module_reads_or_writes_the_documents_keys() -> None:
    root = Path(nvquant.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).as_posix()
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if words := {word for word in constants if isinstance(word, str)} & KEYS:
            found[module] = words
    assert found == {"checkpoint/sidefiles.py": {MANIFEST_NAME}}
