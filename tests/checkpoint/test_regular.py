"""Files of strangers: only regular files of the folder itself are opened, and nothing waits."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.checkpoint.regular import MissingFile, is_file, open_regular, read_regular, regular_path
from nvquant.errors import InputError

SECRET = b"a secret of this machine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(SECRET)
    (folder / "config.json").write_bytes(b"{}")
    return folder


def a_link_outside(path: Path) -> None:
    path.symlink_to(path.parent.parent / "secret")


def a_relative_link_outside(path: Path) -> None:
    path.symlink_to("../secret")


def a_link_through_a_linked_folder(path: Path) -> None:
    (path.parent / "inner").symlink_to("..")
    path.symlink_to("inner/secret")


def a_link_to_a_hidden_file(path: Path) -> None:
    (path.parent / ".git").mkdir()
    (path.parent / ".git/config").write_bytes(SECRET)
    path.symlink_to(".git/config")


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_blob_beside_what_is_no_snapshot(path: Path) -> None:
    (path.parent.parent / "blobs").mkdir()
    (path.parent.parent / "blobs/0").write_bytes(SECRET)
    path.symlink_to("../blobs/0")


LINKS = [
    a_link_outside, a_relative_link_outside, a_link_through_a_linked_folder, a_link_to_a_hidden_file,
    a_link_to_a_device, a_blob_beside_what_is_no_snapshot,
]  # fmt: skip


@pytest.mark.parametrize("make", LINKS, ids=lambda make: str(make.__name__))
def test_a_link_that_leaves_the_folder_is_refused_by_name(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "LICENSE")
    for use in (open_regular, regular_path, read_regular):
        with pytest.raises(InputError, match=r"LICENSE is a link to a file outside of its folder: ") as caught:
            use(folder / "LICENSE", folder)
        assert SECRET.decode() not in str(caught.value)


IRREGULAR: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_file_is_refused_at_once(folder: Path, kind: str) -> None:
    IRREGULAR[kind](folder / "vocab.txt")
    with pytest.raises(InputError, match=rf"vocab\.txt is {kind}, not a file: "):
        open_regular(folder / "vocab.txt")


@pytest.mark.parametrize(
    ("target", "says"), [("vocab.txt", "a link that leads back to itself"), ("nowhere", "a link that leads nowhere")]
)
def test_a_link_without_a_file_is_not_taken_for_a_missing_file(folder: Path, target: str, says: str) -> None:
    (folder / "vocab.txt").symlink_to(target)
    assert is_file(folder / "vocab.txt")
    with pytest.raises(InputError, match=says) as caught:
        read_regular(folder / "vocab.txt", folder)
    assert not isinstance(caught.value, MissingFile)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800", "config.json/x"])
def test_a_name_that_the_system_refuses_is_no_file_and_ends_in_a_sentence(folder: Path, name: str) -> None:
    assert not is_file(folder / name)
    with pytest.raises(InputError, match=r"cannot be read \(.*\): try anew\.$"):
        read_regular(folder / name, folder, "try anew")


def test_a_missing_file_is_told_apart_and_says_the_way_out(folder: Path) -> None:
    assert not is_file(folder / "LICENSE")
    with pytest.raises(MissingFile, match=re.escape(f"{folder / 'LICENSE'} is missing: download it again.")):
        read_regular(folder / "LICENSE", folder, "download it again")


def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    with pytest.raises(InputError, match=r"config\.json is larger than the 100,000,000 bytes"):
        read_regular(folder / "config.json", folder)
    (folder / "config.json").write_bytes(b"12345")
    assert read_regular(folder / "config.json", folder, most=5) == b"12345"
    with pytest.raises(InputError, match=r"larger than the 4 bytes"):
        read_regular(folder / "config.json", folder, most=4)


def test_links_inside_the_folder_and_into_the_blobs_of_a_snapshot_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    (tmp_path / "models--org--name" / "blobs" / "f00").write_bytes(b"from the cache")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/f00")
    (snapshot / "LICENSE").write_bytes(b"own")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "given").symlink_to(snapshot)  # the user's own link to the folder
    for folder in (snapshot, tmp_path / "given"):
        assert read_regular(folder / "config.json", folder) == b"from the cache"
        assert read_regular(folder / "additional_chat_templates/x.jinja", folder) == b"from the cache"
        assert read_regular(folder / "NOTICE", folder) == b"own"


def test_blobs_of_another_repository_are_foreign(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    other = tmp_path / "models--org--private" / "blobs"
    other.mkdir(parents=True)
    (other / "f00").write_bytes(SECRET)
    (snapshot / "config.json").symlink_to(other / "f00")
    (tmp_path / "models--org--name" / "blobs").symlink_to(other)
    (snapshot / "LICENSE").symlink_to("../../blobs/f00")
    for name in ("config.json", "LICENSE"):
        with pytest.raises(InputError, match="outside of its folder"):
            read_regular(snapshot / name, snapshot)


def test_a_file_that_the_user_named_may_be_a_link(folder: Path) -> None:
    (folder / "mine").symlink_to("../secret")
    with open_regular(folder / "mine") as file:
        assert file.read() == SECRET
