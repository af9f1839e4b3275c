"""Ranges of bytes: the right ones, each once, in spite of a bad network, and only of the published content."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from nvquant.checkpoint.hub import patience
from nvquant.checkpoint.hub.ranges import RangeReader
from nvquant.checkpoint.hub.repository import find_model
from nvquant.errors import InputError
from support.hub_faults import Drop, Fault, Hangup, Headers, IgnoreRange, Status, Truncate
from support.hub_server import HubServer

NAME = "Org/Tiny-Llama"
FIRST = "model-00001-of-00002.safetensors"
BEGIN, END = 10_000, 3_000_000


def read(hub: HubServer, begin: int = BEGIN, end: int = END) -> bytes:
    buffer = bytearray(end - begin)
    RangeReader(find_model(NAME)).read_into(FIRST, begin, memoryview(buffer))
    return bytes(buffer)


def test_a_range_is_what_lies_there(hub: HubServer, folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    assert read(hub) == content[BEGIN:END]
    assert read(hub, 0, 8) == content[:8]
    assert read(hub, len(content) - 5, len(content)) == content[-5:]
    assert hub.sent[NAME, FIRST] == [(BEGIN, END), (0, 8), (len(content) - 5, len(content))]


@pytest.mark.parametrize(
    "fault",
    [Drop(after=500_000), Truncate(to=500_000), Hangup(), Status(500), Status(503), Status(429, retry_after=0)],
    ids=repr,
)
@pytest.mark.parametrize("where", ["/cdn/*", "/Org/*/resolve/*"])
def test_what_breaks_off_goes_on_behind_the_last_byte(hub: HubServer, folder: Path, fault: Fault, where: str) -> None:
    hub.fail(where, fault, times=3)
    assert read(hub) == (folder / FIRST).read_bytes()[BEGIN:END]
    twice = sum(end - begin for _, begin, end in hub.sent_twice(NAME))
    assert twice <= 1 << 18  # what was on the wire when the connection ended


def test_an_address_that_expired_is_asked_for_again(hub: HubServer, folder: Path) -> None:
    hub.cdn_expires_after = 2
    reader, content = RangeReader(find_model(NAME)), (folder / FIRST).read_bytes()
    for begin in range(0, 50_000, 10_000):
        buffer = bytearray(10_000)
        reader.read_into(FIRST, begin, memoryview(buffer))
        assert buffer == content[begin : begin + 10_000]
    assert hub.sent_twice(NAME) == []


@pytest.mark.parametrize(
    ("pattern", "fault", "sentence"),
    [
        ("/Org/*/resolve/*", Headers({"X-Linked-ETag": '"' + "0" * 64 + '"'}), "another ETag or size than published"),
        ("/Org/*/resolve/*", Headers({"X-Repo-Commit": "0" * 40}), "another ETag or size than published"),
        (
            "/cdn/*",
            Headers({"Content-Range": "bytes 0-5/6"}),
            r"another range of .* than requested \(bytes 0-5/6 of \d+\)",
        ),
        ("/cdn/*", IgnoreRange(), r"the server does not send .* in ranges \(HTTP 200\): run without --low-disk"),
        ("/cdn/*", Status(416), r"HTTP 416"),
    ],
)
def test_another_content_than_published_is_refused(
    hub: HubServer, pattern: str, fault: Fault, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "MOST_FAILURES", 2)
    hub.fail(pattern, fault, times=99)
    with pytest.raises(InputError, match=sentence):
        read(hub)


def test_a_network_that_stays_away_is_one_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_FAILURES", 3)
    hub.fail("/cdn/*", Hangup(), times=99)
    with pytest.raises(InputError, match="Hub cannot be reached for model") as caught:
        read(hub)
    assert not any(secret in str(caught.value) for secret in hub.secrets)


def test_an_end_ends_the_waiting_and_not_what_is_read_later(hub: HubServer, folder: Path) -> None:
    reader = RangeReader(find_model(NAME))
    hub.fail("/cdn/*", Status(429, retry_after=600), times=99)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            reader.read_into(FIRST, 0, memoryview(bytearray(8)))
        except InputError as error:
            failures.append(error)

    waiting = threading.Thread(target=run)
    waiting.start()
    while not hub.log[-1].path.startswith("/cdn/"):
        time.sleep(0.01)
    while waiting.is_alive():
        reader.end()
        waiting.join(timeout=0.05)
    assert "the run has ended" in str(failures[0])
    hub.recover()
    buffer = bytearray(8)
    reader.read_into(FIRST, 0, memoryview(buffer))
    assert buffer == (folder / FIRST).read_bytes()[:8]
