"""The real client sends and gets large files at the test Hub by way of Xet, as it does by default."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._xet import abort_xet_session
from support import hub_xet
from support.hub_faults import Corrupt, Drop, Hangup, Status
from support.hub_server import HubServer
from support.hub_uploads import GIT_ATTRIBUTES, User
from support.hub_xet_format import GROUPED_LZ4, LZ4, Malformed, chunk_header, read_shard, read_xorb, unpack_lz4

pytest.importorskip("hf_xet")

REPO = "me/model"
RANDOM = random.Random(0)
CONTENTS = {
    "README.md": b"---\nlicense: mit\n---\nHi",
    "random.safetensors": RANDOM.randbytes(300_001),
    "zeros.safetensors": bytes(200_000) + b"abc" * 50_000 + RANDOM.randbytes(999),
    "floats.safetensors": struct.pack("<50000f", *(RANDOM.gauss(0, 0.02) for _ in range(50_000))),  # bytes are grouped
}
BEGINNING = {".gitattributes": GIT_ATTRIBUTES}


@pytest.fixture(autouse=True)
def prepared(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account, and a client of Xet that waits less and has a cache of its own."""
    hub.users |= {"hf_mine": User("me"), "hf_reader": User("me", write=False)}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    abort_xet_session()  # the next one reads the variables
    yield
    abort_xet_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model to send."""
    (tmp_path / "folder").mkdir()
    for name, data in CONTENTS.items():
        (tmp_path / "folder" / name).write_bytes(data)
    return tmp_path / "folder"


def send(hub: HubServer, folder: Path) -> str:
    api = HfApi(endpoint=hub.endpoint, token="hf_mine")
    api.create_repo(REPO, exist_ok=True)
    return str(api.upload_folder(repo_id=REPO, folder_path=folder).oid)


def download(hub: HubServer, folder: Path, file: str, **options: Any) -> bytes:
    path = hf_hub_download(REPO, file, endpoint=hub.endpoint, cache_dir=folder / "cache", **options)
    return Path(path).read_bytes()


def asked(hub: HubServer, part: str) -> int:
    return sum(part in path for _, path in hub.requests)


def test_a_folder_arrives_by_way_of_xet(hub: HubServer, folder: Path) -> None:
    commit = send(hub, folder)
    assert hub.files(REPO, commit) == BEGINNING | CONTENTS
    assert asked(hub, "/xet/v1/xorbs/") == len(hub.received) >= 1 and not asked(hub, "/lfs/")
    assert hub.leaks == [] and any(secret.startswith("xet_") for secret in hub.secrets)
    assert send(hub, folder) == commit


def test_a_run_that_fails_at_the_commit_sends_nothing_again(hub: HubServer, folder: Path) -> None:
    hub.fail("*/commit/main", Status(400))
    with pytest.raises(HfHubHTTPError):
        send(hub, folder)
    sent = list(hub.received)
    assert hub.files(REPO) == BEGINNING and sent
    send(hub, folder)
    assert hub.files(REPO) == BEGINNING | CONTENTS and hub.received == sent


@pytest.mark.parametrize("fault", [Hangup(after=1000), Status(503)])
def test_a_xorb_that_breaks_off_is_sent_again(fault: Any, hub: HubServer, folder: Path) -> None:
    hub.fail("/xet/v1/xorbs/*", fault)
    hub.fail("/xet/v1/shards", Status(500))
    send(hub, folder)
    assert hub.files(REPO) == BEGINNING | CONTENTS
    assert asked(hub, "/v1/xorbs/") == 2 and asked(hub, "/v1/shards") == 2


def test_the_store_opens_to_its_own_passes_alone(hub: HubServer) -> None:
    hub.add("model", REPO, CONTENTS)
    place = f"{hub.cdn_url}{hub.store.place}"

    def get_pass(kind: str, token: str) -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        return get_session().get(f"{hub.endpoint}/api/models/{REPO}/xet-{kind}-token/main", headers=headers)

    def post(token: str) -> int:
        headers = {"Authorization": f"Bearer {token}"}
        return int(get_session().post(f"{place}/v1/xorbs/default/{'0' * 64}", content=b"", headers=headers).status_code)

    assert get_pass("write", "hf_reader").status_code == 403
    read, write = (get_pass(kind, "hf_mine") for kind in ("read", "write"))
    assert read.json()["casUrl"] == read.headers["X-Xet-Cas-Url"] == place
    assert [post(answer.json()["accessToken"]) for answer in (read, write)] == [403, 200]
    assert hub.leaks == []
    assert post("hf_mine") == 401 and len(hub.leaks) == 1


def test_files_come_by_way_of_xet_where_the_hub_says_so(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", REPO, CONTENTS)
    assert download(hub, tmp_path / "a", "zeros.safetensors") == CONTENTS["zeros.safetensors"]
    assert not asked(hub, "/xet")
    hub.xet = True
    folder = Path(snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "b", token="hf_other"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENTS
    assert asked(hub, "/xet/v1/reconstructions") == 3 and hub.leaks == []
    assert hub.bytes_sent(REPO) == sum(map(len, CONTENTS.values())) + len(CONTENTS["zeros.safetensors"])
    assert [file for file, _, _ in hub.sent_twice(REPO)] == ["zeros.safetensors"]


def test_a_file_of_several_xorbs(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_xet, "XORB_CHUNKS", 2)
    hub.xet = True
    hub.add("model", REPO, CONTENTS)
    assert download(hub, tmp_path, "random.safetensors") == CONTENTS["random.safetensors"]
    assert sorted(hub.sent[REPO, "random.safetensors"]) == [(0, 131072), (131072, 262144), (262144, 300001)]


def test_a_dropped_xorb_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.xet = True
    hub.add("model", REPO, CONTENTS)
    hub.fail("/cdn/*/random.safetensors", Drop(after=100_000))
    assert download(hub, tmp_path, "random.safetensors") == CONTENTS["random.safetensors"]
    assert hub.sent[REPO, "random.safetensors"][0] == (
        0,
        100_000 - 16,
    )  # two headers of chunks are no bytes of the file


def test_wrong_content_is_not_noticed_by_the_client(hub: HubServer, tmp_path: Path) -> None:
    hub.xet = True
    hub.add("model", REPO, CONTENTS)
    hub.fail("/cdn/*", Corrupt(at=1008))
    data, right = download(hub, tmp_path, "random.safetensors"), CONTENTS["random.safetensors"]
    assert [index for index in range(len(right)) if data[index] != right[index]] == [1000]


def test_lz4_frames() -> None:
    # Token 0x53: 5 literals, then a copy of 3 + 4 from 2 bytes back; the block ends with a token and 1 literal.
    block = b"\x53abcde\x02\x00\x10!"
    frame = bytes.fromhex("04224d18604073") + struct.pack("<I", len(block)) + block
    stored = struct.pack("<I", 1 << 31 | 3) + b"xyz"
    assert unpack_lz4(frame + stored + bytes(4)) == b"abcde" + b"dededed" + b"!xyz"
    long = b"\xff" + b"\xff\x00" + bytes(range(256)) + bytes(14) + b"\x01\x00\x05" + b"\x00"
    frame = bytes.fromhex("04224d18604073") + struct.pack("<I", len(long)) + long
    assert unpack_lz4(frame + bytes(4)) == bytes(range(256)) + bytes(14) + bytes(15 + 5 + 4)
    with pytest.raises(Malformed):
        unpack_lz4(b"1234567")


def test_xorbs_and_shards_that_lie() -> None:
    assert read_xorb(chunk_header(3) + b"abc" + chunk_header(2) + b"de" + b"XETBLOB...") == [b"abc", b"de"]
    with pytest.raises(Malformed):
        read_xorb(chunk_header(4, packed=3) + b"abc")
    with pytest.raises(Malformed):
        read_xorb(chunk_header(3, scheme=7) + b"abc")
    block = bytes.fromhex("04224d18604073") + struct.pack("<I", 1 << 31 | 6) + b"041523" + bytes(4)
    packed = {scheme: chunk_header(6, len(block), scheme) + block for scheme in (LZ4, GROUPED_LZ4)}
    assert read_xorb(packed[LZ4] + packed[GROUPED_LZ4]) == [b"041523", b"012345"]
    for shard in (bytes(48), bytes(48) + struct.pack("<32sIIQ", hashlib.sha256().digest(), 0, 0, 0)):
        with pytest.raises(Malformed):
            list(read_shard(shard))
