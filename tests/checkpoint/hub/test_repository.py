"""What a name on the Hub means: the right spelling, a pinned commit, and what is published of each file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants
from nvquant.checkpoint.hub.repository import find_model, hub_name
from nvquant.checkpoint.hub.source import open_hub_checkpoint
from nvquant.errors import InputError
from support.hub_faults import Status
from support.hub_server import HubServer

NAME = "Org/Tiny-Llama"
FIRST = "model-00001-of-00002.safetensors"


def test_a_model_is_pinned_to_a_commit_with_its_published_hashes(hub: HubServer, folder: Path) -> None:
    model = find_model(NAME)
    assert model.commit == find_model(NAME, "v1").commit == find_model(NAME, model.commit[:40]).commit
    content = (folder / FIRST).read_bytes()
    assert (model.file(FIRST).size, model.file(FIRST).sha256) == (len(content), hashlib.sha256(content).hexdigest())
    config = (folder / "config.json").read_bytes()
    blob = hashlib.sha1(b"blob %d\0%s" % (len(config), config)).hexdigest()
    assert (model.file("config.json").etag, model.file("config.json").sha256) == (blob, None)
    assert hub.bytes_sent(NAME) == 0


@pytest.mark.parametrize("answer", [307, 404])
def test_the_case_of_a_name_does_not_matter(hub: HubServer, answer: int) -> None:
    hub.repo(NAME).wrong_case = answer
    assert find_model("org/tiny-llama").repo == NAME


def test_a_model_that_was_renamed_is_found_under_both_names(hub: HubServer) -> None:
    hub.rename(NAME, "Org/New")
    assert find_model(NAME).repo == find_model("Org/New").repo == "Org/New"


def test_a_branch_that_moves_does_not_move_what_was_found(hub: HubServer, folder: Path) -> None:
    model = find_model(NAME)
    hub.add("model", NAME, {"config.json": b"{}"})
    assert find_model(NAME).commit != model.commit
    checkpoint = open_hub_checkpoint(model, low_disk=True)
    assert (checkpoint.folder / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    name = next(iter(checkpoint.files))
    assert checkpoint.read(name).numel() > 0


@pytest.mark.parametrize(
    ("name", "revision", "sentence"),
    [
        ("Org/None", None, "Org/None does not exist or is private: check the name"),
        ("Org/Private", None, "Org/Private does not exist or is private: check the name"),
        (NAME, "v2", "has no revision v2: give a commit, branch or tag"),
        ("Org/Down", None, r"The Hub refused model Org/Down \(HTTP 500\): try again"),
        ("Org/Slow", None, r"limits the request rate \(HTTP 429\)"),
        ("Org/Forbidden", None, r"the token does not permit this \(HTTP 403\)"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: HubServer, name: str, revision: str | None, sentence: str) -> None:
    hub.add("model", "Org/Private", {"config.json": b"{}"}, token="secret", private=True)
    hub.fail("/api/models/Org/Down*", Status(500), times=9)
    hub.fail("/api/models/Org/Slow*", Status(429, retry_after=0), times=9)
    hub.fail("/api/models/Org/Forbidden*", Status(403), times=9)
    with pytest.raises(InputError, match=sentence) as caught:
        find_model(name, revision)
    assert "http" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("token", [None, "of somebody else"])
def test_a_gated_model_says_what_to_do(hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    hub.add("model", "Org/Gated", {"config.json": b"{}"}, token="secret")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match="is gated: accept its terms on its page, and run `hf auth login`") as caught:
        open_hub_checkpoint(find_model("Org/Gated"))
    assert token is None or token not in str(caught.value)


def test_a_gated_model_opens_with_its_token_which_no_other_host_sees(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    hub.add("model", "Org/Gated", folder, token="secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    checkpoint = open_hub_checkpoint(find_model("Org/Gated"), low_disk=True)
    assert checkpoint.read("model.norm.weight").numel() == 512
    assert hub.leaks == []


def test_without_the_hub_the_cache_is_enough(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    online = open_hub_checkpoint(find_model(NAME))
    weight = online.read("model.norm.weight")
    for file in online.shards:
        online.content.path(file)  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.log)
    model = find_model(NAME)
    assert model.is_offline
    assert model.commit == online.hub.commit  # type: ignore[union-attr]
    assert bool((open_hub_checkpoint(model).read("model.norm.weight") == weight).all())
    assert len(hub.log) == before
    with pytest.raises(InputError, match="Hub cannot be reached for model Org/Other, and the cache lacks it"):
        find_model("Org/Other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("google/gemma-4-31b", ("google/gemma-4-31b", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("name", None),
        ("./org/name", None),
        ("../name", None),
        ("org/name/more", None),
        ("org/", None),
    ],
)
def test_what_can_be_a_name(text: str, expected: tuple[str, str | None] | None) -> None:
    assert hub_name(text) == expected
