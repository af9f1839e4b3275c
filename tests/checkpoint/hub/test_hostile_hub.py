"""A mirror of the Hub that means harm: it writes no file but those of the cache, and gets no token but its own."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import get_session, hf_hub_download
from huggingface_hub.hf_api import ModelInfo
from nvquant.checkpoint.hub import guarded
from nvquant.checkpoint.hub.download import download
from nvquant.checkpoint.hub.forms import commit_of, etag_of, file_name_of, hash_of, repo_of, size_of
from nvquant.checkpoint.hub.guarded import guard_client, may_have_token
from nvquant.checkpoint.hub.ranges import RangeReader
from nvquant.checkpoint.hub.repository import find_model
from nvquant.errors import InputError
from support.hub_faults import Drip, Headers
from support.hub_server import HubServer

NAME = "Org/Tiny-Llama"
FIRST = "model-00001-of-00002.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ESCAPES = ["../../../../evil", "/tmp/evil", "a/../../evil", "..", "", "x" * 5000, "a\nb", "a\\b", "\x1b[31m", "ä" * 40]


@pytest.mark.parametrize("value", [*ESCAPES, COMMIT.upper(), COMMIT[:-1], COMMIT + "0", COMMIT + "\n", None, 5])
def test_a_commit_has_forty_digits(value: object) -> None:
    assert commit_of(COMMIT, "It") == COMMIT
    with pytest.raises(InputError, match="in place of a commit"):
        commit_of(value, "It")


@pytest.mark.parametrize("value", [*ESCAPES, "0" * 63, COMMIT + "\n", 5])
def test_a_hash_is_one_of_git_or_sha256(value: object) -> None:
    assert hash_of(COMMIT, "It") == COMMIT and hash_of("a" * 64, "It") == "a" * 64 and hash_of(None, "It") is None
    with pytest.raises(InputError, match="in place of the hash of a file"):
        hash_of(value, "It")


@pytest.mark.parametrize("value", [*ESCAPES, '"../../evil"', 'W/"a/b"', '"."', '".."', '"'])
def test_an_etag_can_be_the_name_of_a_file(value: str) -> None:
    for good in (f'"{COMMIT}"', f'W/"{COMMIT}"', "a" * 64):
        assert etag_of(good, "It") == good
    with pytest.raises(InputError, match="in place of an ETag"):
        etag_of(value, "It")


@pytest.mark.parametrize("value", [-1, 1 << 60, "-5", "9" * 5000, "²", True, 1.5, [1]])
def test_a_size_is_natural_and_bounded(value: object) -> None:
    assert size_of(5, "It") == size_of("5", "It") == 5 and size_of(None, "It") is None
    with pytest.raises(InputError, match="in place of the size of a file"):
        size_of(value, "It")


@pytest.mark.parametrize(
    "value",
    ["../evil", "/etc/passwd", "a/../../b", "a//b", "./a", "a/", "", "a\\b", "a\nb", "a\x00", "\u202ea", "x" * 300, 5],
)
def test_the_name_of_a_file_is_relative_and_inside(value: object) -> None:
    assert file_name_of("onnx/model.onnx", "It") == "onnx/model.onnx" and file_name_of(".gitattributes", "It")
    with pytest.raises(InputError, match="in place of the name of a file"):
        file_name_of(value, "It")


@pytest.mark.parametrize(
    "value", ["org", "org/a/b", "../evil", "org/..", "/a", "org/a\n", "", None, "org/" + "x" * 300]
)
def test_a_repository_has_an_owner_and_a_name(value: object) -> None:
    assert repo_of("Org/Tiny-Llama_2.5", "It") == "Org/Tiny-Llama_2.5"
    with pytest.raises(InputError, match="in place of a name"):
        repo_of(value, "It")


def info(**changes: Any) -> ModelInfo:
    sibling = {"rfilename": "config.json", "size": 5, "blobId": COMMIT, **changes.pop("sibling", {})}
    return ModelInfo(**{"id": NAME, "sha": COMMIT, "siblings": [sibling], **changes})


@pytest.mark.parametrize(
    "found",
    [
        {"sha": "../../evil"},
        {"id": "../../evil"},
        *({"sibling": {"rfilename": name}} for name in ("../evil", "/tmp/evil", "a\\..\\b")),
        {"sibling": {"blobId": "../../evil"}},
        {"sibling": {"size": -1}},
        {"sibling": {"size": 1 << 60}},
    ],
)
def test_what_the_hub_tells_of_a_model_is_held_to_its_form(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    answer = info(**found)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: answer)
    with pytest.raises(InputError, match=f"Hub model {NAME}: the server sent"):
        find_model(NAME)


@pytest.mark.parametrize(
    "headers",
    [
        *({"X-Repo-Commit": value} for value in ("../../../evil", "a" * 39, "/tmp/evil")),
        *({"X-Linked-Etag": value, "ETag": value} for value in ('"../../../../evil"', '"/tmp/evil"', '"a/b"')),
        {"X-Linked-Size": "-5"},
        {"X-Linked-Size": "9" * 40},
    ],
)
@pytest.mark.parametrize("name", ["config.json", FIRST])
def test_no_header_of_a_mirror_becomes_a_path(
    hub: HubServer, tmp_path: Path, headers: dict[str, str], name: str
) -> None:
    model = find_model(NAME)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    hub.fail(f"*/resolve/*/{name}", Headers(headers), times=50)
    with pytest.raises(InputError, match="in place of"):
        download(model, name)
    with pytest.raises(InputError, match="in place of"):
        RangeReader(model).read_into(name, 0, memoryview(bytearray(8)))
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


@pytest.fixture
def other() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server on another port of the same host, which notes the headers that it gets."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{COMMIT}"')
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(b"{}")

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as url:
        yield url, seen


def test_a_token_follows_no_redirect_to_another_port(
    hub: HubServer, other: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = other
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    model = find_model(NAME)
    hub.fail("*/resolve/*", Headers({"Location": f"{url}/stolen"}), times=50)
    with suppress(Exception):  # what came of it is not asked for here
        hf_hub_download(NAME, FIRST, revision=model.commit, endpoint=hub.endpoint, force_download=True)
    get_session().get(f"{url}/direct", headers={"authorization": "Bearer hf_abcdefghijklmnop", "cookie": "a=b"})
    assert seen
    for headers in seen:
        assert not {"authorization", "cookie"} & {name.lower() for name in headers}
    assert any("hf_abcdefghijklmnop" in str(request.headers) for request in hub.log)  # the Hub itself got it


@pytest.mark.parametrize(
    ("address", "is_trusted"),
    [
        ("https://hub.example/api", True),
        ("https://hub.example:443/api", True),
        ("https://HUB.example/api", True),
        ("http://hub.example/api", False),
        ("https://hub.example:8443/api", False),
        ("https://evil.hub.example/", False),
        ("https://hub.example@evil.example/", False),
    ],
)
def test_the_hub_is_known_by_scheme_host_and_port(address: str, is_trusted: bool) -> None:
    guard_client("https://hub.example")
    assert may_have_token(address) is is_trusted


class Telling(BaseHTTPRequestHandler):
    """Answers everything with the same body."""

    body = b""
    encoding: str | None = None

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        if self.encoding:
            self.send_header("Content-Encoding", self.encoding)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"null",
            b"5",
            b"[]",
            b"{}",
            b"<html>",
            b"\xff\xfe",
            b"[" * 200_000,
            b'{"id": 5}',
            b'{"id": "a/b", "siblings": 5}',
        ),
        *(b'{"id": "a/b", "siblings": [{}]}', b'{"id": "a/b", "sha": null, "siblings": [{"rfilename": 5}]}'),
        b'{"id": "a/b", "lastModified": 5, "siblings": []}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_an_answer_of_another_form_is_one_sentence(hub: HubServer, body: bytes) -> None:
    with listening(type("Bound", (Telling,), {"body": body})) as url, pytest.raises(InputError):
        find_model(NAME, endpoint=url)


def test_a_compressed_answer_is_not_unpacked(hub: HubServer) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    with listening(type("Bound", (Telling,), {"body": bomb, "encoding": "gzip"})) as url:
        with pytest.raises(InputError, match="is compressed without a request for it"):
            find_model(NAME, endpoint=url)


class Endless(BaseHTTPRequestHandler):
    """Begins to answer, and goes on for as long as somebody listens."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" " * (1 << 16))

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_an_answer_of_the_hub_has_an_end(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "MOST_ANSWER_BYTES", 1 << 20)
    with listening(Endless) as url, pytest.raises(InputError, match="has no end"):
        find_model(NAME, endpoint=url)


def test_a_file_has_no_more_bytes_than_were_published(hub: HubServer) -> None:
    model = find_model(NAME)
    short = replace(model, files={**model.files, FIRST: replace(model.files[FIRST], size=1000)})
    with pytest.raises(InputError, match="more than the 1,000 bytes that it published"):
        download(short, FIRST)


def test_a_file_that_drips_for_ever_ends_the_run(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = find_model(NAME)
    monkeypatch.setattr(guarded, "PACE_SECONDS", 0.2)
    hub.fail(f"*/{FIRST}", Drip(0.02), times=99)
    with pytest.raises(InputError, match=r"bytes of a file in \d s, too few to complete it"):
        download(model, FIRST)
    with pytest.raises(InputError, match=r"bytes of a file in \d s, too few to complete it"):
        RangeReader(model).read_into(FIRST, 0, memoryview(bytearray(900)))


def test_a_reader_that_takes_its_time_makes_no_file_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(guarded.time, "monotonic", lambda: now[0])

    def sent(seconds: float) -> Iterator[bytes]:
        for _ in range(4):
            now[0] += seconds
            yield b"x" * 100

    for piece in guarded._paced(sent(1.0), "It"):
        now[0] += 1e6
        assert len(piece) == 100
    with pytest.raises(InputError, match="It brings 200 bytes of a file in 400 s"):
        list(guarded._paced(sent(200.0), "It"))
