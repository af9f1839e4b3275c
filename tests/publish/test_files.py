"""Which files travel, and by which hashes the Hub knows them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.hub.repository import HubFile
from nvquant.errors import InputError
from nvquant.publish.files import LocalFile, checkpoint_files, hash_files


def test_the_checkpoints_own_files_travel_and_nothing_else_that_lies_there(copy: Callable[[], Path]) -> None:
    folder = copy()
    own = {path.name for path in folder.iterdir()}
    (folder / "LICENSE.md").write_text("terms")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for stray in ("README.md", "notes.txt", "stray.safetensors", "pytorch_model.bin", "run.py", "nvquant_verify.json"):
        (folder / stray).write_bytes(b"stray")
    for hidden in (".cache/huggingface/token", "nvquant_run/identity.json", ".git/config"):
        (folder / hidden).parent.mkdir(parents=True)
        (folder / hidden).write_text("secret")
    assert {file.name for file in checkpoint_files(folder)} == own | {
        *("LICENSE.md", "additional_chat_templates/tools.jinja")
    }


def test_both_configs_of_the_modelopt_layout_travel(conversions: Callable[..., Path]) -> None:
    names = {file.name for file in checkpoint_files(conversions("llama", "nvfp4-full", "modelopt"))}
    assert {"config.json", "hf_quant_config.json", "nvquant_manifest.json", "model.safetensors.index.json"} <= names


def test_a_folder_without_a_whole_checkpoint_is_refused(copy: Callable[[], Path], tmp_path: Path) -> None:
    folder = copy()
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard model-00002-of-00004\.safetensors is missing"):
        checkpoint_files(folder)
    with pytest.raises(InputError, match="is not a folder: give the output of a conversion"):
        checkpoint_files(tmp_path / "nowhere")


def test_a_file_is_known_by_gits_hash_or_by_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some text\n" * 1000)
    by_git = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
    for file in (LocalFile("file", path), LocalFile("file", path.read_bytes())):
        assert file.git_id == by_git and file.size == 10_000
        assert file.is_published_as(HubFile("file", 10_000, by_git))
        assert file.is_published_as(HubFile("file", 10_000, file.sha256))
        assert not file.is_published_as(HubFile("file", 10_001, file.sha256))
        assert not file.is_published_as(HubFile("file", 10_000, "0" * 64))
        assert not file.is_published_as(HubFile("file", 10_000, "0" * 40))
        assert not file.is_published_as(HubFile("file", 10_000, None))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.json cannot be read \(No such file or directory\)"):
        hash_files([LocalFile("gone.json", tmp_path / "gone.json")])


@pytest.mark.parametrize("name", ["LICENSE", "generation_config.json", "additional_chat_templates/x.jinja"])
def test_a_link_that_leads_out_of_the_folder_is_refused_by_name(copy: Callable[[], Path], name: str) -> None:
    folder = copy()
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match=name):
        checkpoint_files(folder)
