"""Shards of a run: in the order of need, given up at its end, and there again for whoever asks later."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from nvquant.checkpoint.hub.repository import find_model
from nvquant.checkpoint.hub.shards import DownloadedShards
from nvquant.checkpoint.hub.source import open_hub_checkpoint
from nvquant.checkpoint.shard_bytes import ReadingOrder
from nvquant.errors import InputError
from support.hub_http import Request
from support.hub_server import HubServer

NAME = "Org/Tiny-Llama"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shards_asked_for(hub: HubServer) -> list[str]:
    """The shards of which whole files were asked for, in order."""
    gets = [request for request in hub.log if request.method == "GET" and request.path.startswith("/cdn/")]
    return [Path(request.path).name for request in gets if "Range" not in request.headers]


def test_shards_come_in_the_order_of_the_run(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvquant.checkpoint.hub.shards.WORKERS", 1)
    source = open_hub_checkpoint(find_model(NAME))
    of_second = next(name for name, file in source.files.items() if file == SECOND)
    of_first = next(name for name, file in source.files.items() if file == FIRST)
    source.begin(ReadingOrder([[of_second], [of_first]]))
    while source.content.fetched()[0] == 0:
        time.sleep(0.001)
    source.read(of_first)
    assert shards_asked_for(hub) == [SECOND, FIRST]
    assert source.content.fetched() == (sum(header.file_bytes for header in source.shards.values()),) * 2


def test_what_is_needed_now_goes_before_what_was_told_before(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvquant.checkpoint.hub.shards.WORKERS", 1)
    model = find_model(NAME)
    shards, seen, go_on = DownloadedShards(model), threading.Event(), threading.Event()

    def stall(request: Request) -> None:
        if request.path.endswith("config.json") and "/resolve/" in request.path:
            seen.set()
            go_on.wait(30)

    hub.on_request = stall
    waiting = [threading.Thread(target=shards.path, args=(file,)) for file in ("config.json",)]
    waiting[0].start()
    assert seen.wait(30)
    shards._coming(FIRST, is_urgent=False)
    waiting.append(threading.Thread(target=shards.path, args=(SECOND,)))
    waiting[1].start()
    while shards._queue != [SECOND, FIRST]:
        assert waiting[1].is_alive()
    go_on.set()
    for thread in waiting:
        thread.join(30)
    shards.path(FIRST)
    assert shards_asked_for(hub) == [SECOND, FIRST]


def test_an_end_gives_up_what_is_on_its_way_and_later_readers_get_it(hub: HubServer, folder: Path) -> None:
    shards, seen, go_on = DownloadedShards(find_model(NAME)), threading.Event(), threading.Event()

    def stall(request: Request) -> None:
        if request.path.startswith("/cdn/"):
            seen.set()
            go_on.wait(30)

    hub.on_request = stall
    failures: list[BaseException] = []

    def read() -> None:
        try:
            shards.path(FIRST)
        except InputError as error:
            failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    assert seen.wait(30)
    shards.end()
    reading.join(10)
    assert "the run has ended" in str(failures[0])
    go_on.set()
    assert shards.path(FIRST).read_bytes() == (folder / FIRST).read_bytes()
