"""Every fault of the test Hub reaches the real client as it would from a bad network, as often as planned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, get_session, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from support.hub_faults import (
    Corrupt,
    Drop,
    Fault,
    Hangup,
    Headers,
    IgnoreRange,
    LostAnswer,
    Stall,
    StallBody,
    Status,
    Truncate,
)
from support.hub_server import HubServer

NAME = "org/model"
LARGE = bytes(range(256)) * 2000
FILES = {"config.json": b'{"a": 1}', "model-00001.safetensors": LARGE, "model-00002.safetensors": LARGE[::-1]}
SECOND = "model-00002.safetensors"


@pytest.fixture(autouse=True)
def model(hub: HubServer) -> None:
    hub.add("model", NAME, FILES)


def download(hub: HubServer, folder: Path, file: str = SECOND) -> bytes:
    return Path(hf_hub_download(NAME, file, endpoint=hub.endpoint, cache_dir=folder, token=False)).read_bytes()


def get(hub: HubServer, file: str = SECOND, method: str = "GET", **headers: str) -> Any:
    url = f"{hub.endpoint}/{NAME}/resolve/main/{file}"
    return get_session().request(method, url, headers=headers, follow_redirects=True)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_status_comes_as_often_as_planned(status: int, hub: HubServer) -> None:
    hub.fail("/api/models/*", Status(status, retry_after=7 if status == 429 else None), times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi(endpoint=hub.endpoint, token=False).model_info(NAME)
        assert caught.value.response.status_code == status
        assert caught.value.response.headers.get("Retry-After") == ("7" if status == 429 else None)
    assert HfApi(endpoint=hub.endpoint, token=False).model_info(NAME).id == NAME


def test_a_status_says_what_the_hub_says(hub: HubServer) -> None:
    hub.fail("*/resolve/*", Status(404, code="EntryNotFound", message="It is gone"))
    with pytest.raises(EntryNotFoundError, match="It is gone"):
        HfApi(endpoint=hub.endpoint, token=False).hf_hub_download(NAME, SECOND)
    hub.failures[f"/{NAME}/resolve/main/{SECOND}"] = 418
    assert [get(hub).status_code for _ in range(3)] == [418] * 3


def test_the_client_waits_as_long_as_it_is_told(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("/cdn/*", Status(429, retry_after=7), times=2)
    assert download(hub, tmp_path) == FILES[SECOND]
    assert waits == [8.0, 8.0]


def test_faults_choose_by_pattern_host_and_method(hub: HubServer) -> None:
    hub.fail("*/model-00002*", Status(500), method="HEAD")
    hub.fail("/cdn/*/model-00002*", Status(502))
    assert get(hub, "model-00001.safetensors").content == LARGE
    assert get(hub, method="HEAD").status_code == 500
    assert (get(hub, method="HEAD").status_code, get(hub).status_code) == (502, 200)


def test_a_dropped_download_goes_on_and_what_was_sent_twice_is_known(
    hub: HubServer, tmp_path: Path, waits: list[float]
) -> None:
    hub.fail("*/resolve/*/model-00002*", Drop(after=1000), times=2)
    assert download(hub, tmp_path) == FILES[SECOND]
    assert hub.sent[NAME, SECOND] == [(0, 1000), (0, 1000), (0, len(LARGE))]  # the client forgets a piece begun
    assert hub.sent_twice(NAME) == [(SECOND, 0, 1000)] and len(waits) == 2
    assert hub.bytes_sent(NAME) == len(LARGE) + 2000


def test_a_dropped_download_of_a_small_file(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("*", Drop(after=3))
    assert download(hub, tmp_path, "config.json") == FILES["config.json"]
    assert hub.sent[NAME, "config.json"] == [(0, 3), (0, 8)]


def test_a_dropped_answer_of_the_api(hub: HubServer) -> None:
    hub.fail("/api/models/*", Drop(after=10))
    with pytest.raises(Exception, match=r"incomplete|without sending complete"):
        HfApi(endpoint=hub.endpoint).model_info(NAME)


def test_a_truncated_file_is_noticed_by_its_size(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("/cdn/*", Truncate(to=5000))
    with pytest.raises(OSError, match="should be of size 512000 but has size 5000"):
        download(hub, tmp_path)
    hub.fail("*", Truncate(to=5000))
    answer = get(hub)
    assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, LARGE[::-1][:5000], "5000")


@pytest.mark.parametrize("at", [0, 70_000, 511_999])
def test_wrong_content_is_not_noticed_by_the_client(at: int, hub: HubServer, tmp_path: Path) -> None:
    hub.fail("/cdn/*", Corrupt(at))
    data, right = download(hub, tmp_path), FILES[SECOND]
    assert [index for index in range(len(right)) if data[index] != right[index]] == [at]


def test_headers_that_do_not_match(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("/cdn/*", Headers({"content-range": "bytes 5-9/10", "X-New": "1"}))
    answer = get(hub, Range="bytes=0-4")
    assert (answer.status_code, answer.headers["Content-Range"], answer.headers["X-New"]) == (206, "bytes 5-9/10", "1")
    hub.fail("*/resolve/*", Headers({"X-Linked-ETag": '"other"', "X-Linked-Size": None}), method="HEAD")
    path = Path(hf_hub_download(NAME, SECOND, endpoint=hub.endpoint, cache_dir=tmp_path, token=False))
    assert path.resolve().name == "other"


def test_a_range_that_is_ignored(hub: HubServer) -> None:
    hub.fail("*", IgnoreRange())
    whole, part = get(hub, Range="bytes=5-9"), get(hub, Range="bytes=5-9")
    assert (whole.status_code, whole.content, part.status_code) == (200, FILES[SECOND], 206)


@pytest.mark.parametrize("fault", [Stall(30), StallBody(30, after=1000)])
def test_a_stall_ends_in_a_timeout_and_not_in_a_hanging_test(fault: Fault, tmp_path: Path) -> None:
    began = time.monotonic()
    with HubServer() as hub:
        hub.add("model", NAME, FILES)
        hub.fail("/cdn/*", fault)
        with pytest.raises(Exception, match="timed out"):
            get_session().get(f"{hub.endpoint}/{NAME}/resolve/main/{SECOND}", timeout=0.2)
        assert hub.bytes_sent(NAME) in (0, 1000)
    assert time.monotonic() - began < 5


def test_a_short_stall_only_takes_time(hub: HubServer) -> None:
    hub.fail("/cdn/*", Stall(0.2))
    hub.fail("/cdn/*", StallBody(0.2, after=100_000))
    began = time.monotonic()
    assert get(hub).content == FILES[SECOND]
    assert 0.4 <= time.monotonic() - began < 1.5


@pytest.mark.parametrize("fault", [Hangup(), LostAnswer()])
def test_a_connection_without_an_answer(fault: Fault, hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("/cdn/*", fault)
    assert download(hub, tmp_path) == FILES[SECOND]
    assert hub.bytes_sent(NAME) == len(LARGE) and len(waits) == 1


def test_a_hub_that_is_down(hub: HubServer, tmp_path: Path, waits: list[float]) -> None:
    hub.fail("*", Status(503), times=99)
    with pytest.raises(LocalEntryNotFoundError):
        download(hub, tmp_path)
    assert len(hub.requests) > 3 and hub.bytes_sent(NAME) == 0
