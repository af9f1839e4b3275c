"""The real client creates repositories at the test Hub and sends folders to it, again where it was interrupted."""

from __future__ import annotations

import hashlib
import random
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationDelete, HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError
from support.hub_faults import Hangup, LostAnswer, Status
from support.hub_server import HubServer
from support.hub_uploads import GIT_ATTRIBUTES, User

REPO = "team/model"
TEXTS = {"README.md": b"---\nlicense: mit\n---\nHi", "config.json": b"{}"}
SHARDS = {f"model-{number}.safetensors": random.Random(number).randbytes(200_000) for number in (1, 2)}
BEGINNING = {".gitattributes": GIT_ATTRIBUTES}

# httpx 0.28 says so of the client's own PUT.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def prepared(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two accounts, and the way of `basic` transfers."""
    hub.users |= {"hf_mine": User("me", ("team",)), "hf_reader": User("me", ("team",), write=False)}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model to send."""
    for name, data in (TEXTS | SHARDS).items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    return tmp_path / "folder"


def api(hub: HubServer, token: str | bool = "hf_mine") -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def send(hub: HubServer, folder: Path, **options: Any) -> str:
    return str(api(hub).upload_folder(repo_id=REPO, folder_path=folder, **options).oid)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_token_tells_who_it_is(hub: HubServer) -> None:
    about = api(hub).whoami()
    assert (about["name"], [org["name"] for org in about["orgs"]]) == ("me", ["team"])
    assert about["auth"]["accessToken"]["role"] == "write"
    assert api(hub, "hf_reader").whoami()["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        api(hub, "hf_other").whoami()
    assert caught.value.response.status_code == 401


def test_a_repository_is_created_once_and_stays_private(hub: HubServer) -> None:
    assert str(api(hub).create_repo(REPO, private=True)) == f"{hub.endpoint}/{REPO}"
    assert api(hub).create_repo(REPO, exist_ok=True, private=False).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub).create_repo(REPO)
    assert caught.value.response.status_code == 409
    assert hub.files(REPO) == BEGINNING and api(hub).model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        api(hub, False).model_info(REPO)
    assert api(hub).create_repo("data", repo_type="dataset").repo_id == "me/data"
    assert not hub.repo("me/data", "dataset").private
    api(hub).update_repo_settings(REPO, private=False, gated="auto")
    assert api(hub, False).model_info(REPO).gated == "auto"
    api(hub).delete_repo(REPO)
    assert not api(hub).repo_exists(REPO)


@pytest.mark.parametrize(
    ("token", "name", "status"),
    [("hf_mine", "others/model", 403), ("hf_reader", REPO, 403), ("hf_other", REPO, 401), (False, REPO, 401)],
)
def test_who_may_not_write_is_refused(token: str | bool, name: str, status: int, hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub, token).create_repo(name)
    assert caught.value.response.status_code == status
    hub.add("model", name, {"a": b"1"})
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub, token).upload_file(repo_id=name, path_or_fileobj=b"2", path_in_repo="a")
    assert caught.value.response.status_code == status and hub.files(name) == {"a": b"1"}


def test_a_folder_arrives_and_comes_back(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    api(hub).create_repo(REPO, private=True)
    commit = send(hub, folder, commit_message="First")
    assert hub.files(REPO) == BEGINNING | TEXTS | SHARDS == hub.files(REPO, commit)
    entries = {each.path: each for each in api(hub).list_repo_tree(REPO)}
    assert entries["config.json"].lfs is None
    assert entries["model-1.safetensors"].lfs["sha256"] == sha256(SHARDS["model-1.safetensors"])
    path = hf_hub_download(REPO, "model-2.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path, token="hf_reader")
    assert Path(path).read_bytes() == SHARDS["model-2.safetensors"]
    assert [each.title for each in api(hub).list_repo_commits(REPO)] == ["First", "Add files"]
    assert sorted(hub.received) == sorted((sha256(data), len(data)) for data in SHARDS.values())
    assert hub.leaks == []


def test_what_is_there_is_not_sent_again(hub: HubServer, folder: Path) -> None:
    api(hub).create_repo(REPO)
    first = send(hub, folder)
    assert send(hub, folder) == first
    (folder / "model-3.safetensors").write_bytes(SHARDS["model-1.safetensors"])
    assert send(hub, folder) != first
    assert set(hub.files(REPO)) == {*BEGINNING, *TEXTS, *SHARDS, "model-3.safetensors"}
    assert len(hub.received) == 2


def test_other_files_stay_and_some_are_deleted(hub: HubServer, folder: Path) -> None:
    hub.add(
        "model", REPO, {"other.txt": b"1", "old/a.txt": b"2", "old/b.txt": b"3", "gone.txt": b"4", "config.json": b""}
    )
    send(hub, folder, delete_patterns=["gone.*"])
    assert hub.files(REPO) == TEXTS | SHARDS | {"other.txt": b"1", "old/a.txt": b"2", "old/b.txt": b"3"}
    api(hub).delete_folder("old", REPO)
    api(hub).delete_file("other.txt", REPO)
    assert hub.files(REPO) == TEXTS | SHARDS


def test_a_put_that_breaks_off_is_repeated(hub: HubServer, folder: Path, waits: list[float]) -> None:
    api(hub).create_repo(REPO)
    hub.fail("/cdn/*", Hangup(after=50_000), method="PUT")
    send(hub, folder)
    assert hub.files(REPO) == BEGINNING | TEXTS | SHARDS and len(waits) == 1
    sizes = sorted(size for _, size in hub.received)
    assert 50_000 <= sizes[0] < 200_000 and sizes[1:] == [200_000, 200_000]


def test_a_client_that_dies_in_a_put_leaves_nothing(hub: HubServer) -> None:
    url = urlsplit(hub.sign_upload(f"/{REPO}.git/info/lfs/objects", sha256(bytes(100_000))))
    with socket.create_connection(("127.0.0.1", url.port or 0)) as client:
        client.sendall(
            f"PUT {url.path}?{url.query} HTTP/1.1\r\nContent-Length: 100000\r\n\r\n".encode() + bytes(70_000)
        )
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""  # the server hung up
    assert hub.received == [(sha256(bytes(100_000)), 70_000)]
    assert hub.objects.blobs == {} and list(Path(str(hub.objects.folder)).iterdir()) == []


def test_a_run_that_fails_at_the_commit_goes_on_where_it_was(hub: HubServer, folder: Path) -> None:
    api(hub).create_repo(REPO)
    for status in (503, 409):
        hub.fail("*/commit/main", Status(status))
        with pytest.raises(HfHubHTTPError) as caught:
            send(hub, folder)
        assert caught.value.response.status_code == status and hub.files(REPO) == BEGINNING
    send(hub, folder)
    assert hub.files(REPO) == BEGINNING | TEXTS | SHARDS and len(hub.received) == 2


def test_a_commit_whose_answer_is_lost_is_there(hub: HubServer, folder: Path) -> None:
    api(hub).create_repo(REPO)
    hub.fail("*/commit/main", LostAnswer())
    with pytest.raises(Exception, match="disconnected"):
        send(hub, folder)
    assert hub.files(REPO) == BEGINNING | TEXTS | SHARDS
    assert send(hub, folder) == hub.repo(REPO).branches["main"] and len(hub.repo(REPO).commits) == 2


def test_a_commit_upon_an_old_state_is_refused(hub: HubServer, folder: Path) -> None:
    old = hub.add("model", REPO, {"a": b"1"})
    new = hub.add("model", REPO, {"a": b"2"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        send(hub, folder, parent_commit=old)
    assert caught.value.response.status_code == 412
    assert hub.repo(REPO).history("main")[0].commit == new
    send(hub, folder, parent_commit=new)
    with pytest.raises(HfHubHTTPError):
        api(hub).create_commit(REPO, [CommitOperationDelete("a")], commit_message="x", revision="none")


def test_wrong_content_is_not_taken(hub: HubServer) -> None:
    url = hub.sign_upload(f"/{REPO}.git/info/lfs/objects", sha256(b"right"))
    assert get_session().put(url, content=b"wrong").status_code == 400
    assert hub.objects.blobs == {} and list(Path(str(hub.objects.folder)).iterdir()) == []
    assert get_session().get(url).status_code == 403
    assert get_session().put(url, content=iter([b"ri", b"ght"])).status_code == 200  # in chunks
    assert [blob.read() for blob in hub.objects.blobs.values()] == [b"right"]


def test_a_commit_cannot_name_what_never_arrived(hub: HubServer) -> None:
    hub.add("model", REPO, {})
    lines = (
        b'{"key": "header", "value": {"summary": "x"}}\n'
        b'{"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": "%s", "size": 1}}\n'
    )
    answer = get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content=lines % sha256(b"x").encode(),
        headers={"Authorization": "Bearer hf_mine"},
    )
    assert (answer.status_code, hub.files(REPO)) == (400, {})


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("license: [mit", "YAML"),
        ("- mit", "must be a mapping"),
        ("tags: {a: 1}", '"tags" must be strings'),
        ("base_model: 7", '"base_model" must be strings'),
        ("base_model_relation: parent", "base_model_relation"),
    ],
)
def test_a_card_that_the_hub_does_not_understand(head: str, message: str, hub: HubServer) -> None:
    hub.add("model", REPO, {})
    card = f"---\n{head}\n---\nHi".encode()
    with pytest.raises(ValueError, match=message):
        api(hub).upload_file(repo_id=REPO, path_or_fileobj=card, path_in_repo="README.md")
    with pytest.raises(BadRequestError):
        hub.fail("*/commit/*", Status(400))
        api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo="config.json")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api(hub).upload_file(repo_id=REPO, path_or_fileobj=b"Hi", path_in_repo="README.md")
