"""Whole files: proved by their published hash, fetched once, and fetched in spite of a bad network."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants
from nvquant.checkpoint.hub import download as module
from nvquant.checkpoint.hub import patience
from nvquant.checkpoint.hub.download import Counter, download
from nvquant.checkpoint.hub.repository import find_model
from nvquant.errors import InputError
from support.hub_faults import Corrupt, Drop, Hangup, Status, Truncate
from support.hub_server import HubServer

NAME = "Org/Tiny-Llama"
FIRST = "model-00001-of-00002.safetensors"


def test_a_file_comes_once_and_is_hashed_once(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counter = find_model(NAME), Counter()
    path = download(model, FIRST, counter=counter)
    size = (folder / FIRST).stat().st_size
    assert path.read_bytes() == (folder / FIRST).read_bytes()
    assert counter.bytes == size
    monkeypatch.setattr(module, "content_hash", lambda *_: pytest.fail("hashed again"))
    assert download(find_model(NAME), FIRST) == path
    assert hub.bytes_sent_of(NAME, FIRST) == size


def test_a_file_that_was_touched_in_the_cache_is_hashed_again_and_replaced(hub: HubServer, folder: Path) -> None:
    model = find_model(NAME)
    path = download(model, FIRST)
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.resolve().write_bytes(blob)
    assert download(model, FIRST).read_bytes() == (folder / FIRST).read_bytes()


@pytest.mark.parametrize(
    "fault", [Drop(after=1_000_000), Hangup(), Status(503), Status(429, retry_after=0), Status(502)], ids=repr
)
def test_what_may_pass_is_asked_for_again_and_nothing_comes_twice(
    hub: HubServer, folder: Path, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # of huggingface_hub's own retries
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what huggingface_hub loses with a connection
    hub.fail(f"*/resolve/*/{FIRST}", fault, times=2)  # type: ignore[arg-type]
    assert download(find_model(NAME), FIRST).read_bytes() == (folder / FIRST).read_bytes()
    assert hub.bytes_sent_of(NAME, FIRST) <= (folder / FIRST).stat().st_size + 2 * (1 << 18)  # on the wire


def test_no_message_of_huggingface_hub_names_a_signed_address(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    words = io.StringIO()
    for handler in logging.getLogger("huggingface_hub").handlers:
        monkeypatch.setattr(handler, "stream", words)
    hub.fail("/cdn/*", Drop(after=1000), method="GET")
    download(find_model(NAME), FIRST)
    assert "/repos/" in words.getvalue()  # it does name the address
    assert not any(secret in words.getvalue() for secret in hub.secrets)


@pytest.mark.parametrize("fault", [Corrupt(at=4711), Truncate(to=1000)], ids=repr)
def test_a_wrong_content_is_fetched_again_and_then_right(hub: HubServer, folder: Path, fault: object) -> None:
    hub.fail(f"/cdn/*{FIRST}", fault, method="GET")  # type: ignore[arg-type]
    assert download(find_model(NAME), FIRST).read_bytes() == (folder / FIRST).read_bytes()


def test_a_content_that_stays_wrong_is_refused_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.fail(f"/cdn/*{FIRST}", Corrupt(at=4711), times=9, method="GET")
    with pytest.raises(InputError, match=rf"{FIRST} has the hash [0-9a-f]+…, but the Hub published [0-9a-f]+…"):
        download(find_model(NAME), FIRST)
    blobs = (tmp_path / "cache").rglob("*")
    assert max((path.stat().st_size for path in blobs if path.is_file()), default=0) < 100_000


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, r"does not accept this token \(HTTP 401\)"),
        (403, r"does not permit this \(HTTP 403\)"),
        (404, r"refused model .* \(HTTP 404\)"),
        (429, r"limits the request rate \(HTTP 429\)"),
        (500, r"refused model .* \(HTTP 500\)"),
    ],
)
def test_what_does_not_pass_is_one_sentence(
    hub: HubServer, status: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "MOST_FAILURES", 2)
    monkeypatch.setattr("time.sleep", lambda _: None)
    model = find_model(NAME)
    hub.fail("*/resolve/*", Status(status, retry_after=0), times=99)
    with pytest.raises(InputError, match=sentence) as caught:
        download(model, FIRST)
    assert "http:" not in str(caught.value)


def test_waiting_ends_when_nobody_needs_the_file_any_more(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    model, closed = find_model(NAME), threading.Event()
    closed.set()
    hub.fail("*/resolve/*", Status(429, retry_after=60), times=9)
    with pytest.raises(InputError, match="the run has ended"):
        download(model, FIRST, closed)


def test_a_name_that_is_not_listed_is_refused(hub: HubServer) -> None:
    with pytest.raises(InputError, match=r"has no file model\.bin at commit [0-9a-f]{12}"):
        download(find_model(NAME), "model.bin")
