"""The test Hub answers the real client as the Hub would: names, revisions, large files elsewhere, refusals."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.hub_server import HubServer

LARGE = bytes(range(256)) * 2000
NAME = "Org/Model-1B"
CARD = b"---\nlicense: mit\nbase_model: org/base\nbase_model_relation: quantized\ntags: [nvfp4]\n---\nHi"
FILES = {"README.md": CARD, "config.json": b"{}", "sub/model.safetensors": LARGE}


def api(hub: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def download(hub: HubServer, folder: Path, file: str, name: str = NAME, **options: Any) -> bytes:
    return Path(hf_hub_download(name, file, endpoint=hub.endpoint, cache_dir=folder, **options)).read_bytes()


def get(url: str, follow: bool = True, method: str = "GET", **headers: str) -> Any:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return get_session().request(method, url, headers=named, follow_redirects=follow)


def address(hub: HubServer, file: str = "sub/model.safetensors", revision: str = "main") -> str:
    return f"{hub.endpoint}/{NAME}/resolve/{revision}/{file}"


def test_info_tells_of_files_as_git_and_lfs_have_them(hub: HubServer) -> None:
    commit = hub.add("model", NAME, FILES, tags=("v1",))
    info = api(hub).model_info(NAME, revision="v1", files_metadata=True)
    assert (info.id, info.sha, info.gated, info.private) == (NAME, commit, False, False)
    assert info.card_data is not None and info.card_data.license == "mit"
    assert info.tags == ["nvfp4", "license:mit", "base_model:org/base", "base_model:quantized:org/base", "region:us"]
    siblings = {each.rfilename: each for each in info.siblings or []}
    plain, large = siblings["config.json"], siblings["sub/model.safetensors"]
    assert (plain.size, plain.blob_id, plain.lfs) == (2, "9e26dfeeb6e641a33dae4961196235bdb965b21b", None)
    sha256 = hashlib.sha256(LARGE).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(LARGE)}\n".encode()
    assert large.lfs == {"size": len(LARGE), "sha256": sha256, "pointer_size": len(pointer)}
    assert large.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert [each.size for each in api(hub).model_info(NAME).siblings or []] == [None] * 3


def test_tree_and_paths_agree_with_info(hub: HubServer) -> None:
    commit = hub.add("model", NAME, FILES)
    whole = {each.path: each for each in api(hub).list_repo_tree(NAME, recursive=True, revision=commit)}
    assert sorted(whole) == ["README.md", "config.json", "sub", "sub/model.safetensors"]
    assert [each.path for each in api(hub).list_repo_tree(NAME)] == ["README.md", "config.json", "sub"]
    assert [each.path for each in api(hub).list_repo_tree(NAME, "sub")] == ["sub/model.safetensors"]
    found = api(hub).get_paths_info(NAME, ["sub/model.safetensors", "sub", "none"])
    assert [each.path for each in found] == ["sub/model.safetensors", "sub"]
    assert found[0] == whole["sub/model.safetensors"]
    assert [each.commit_id for each in api(hub).list_repo_commits(NAME)] == [commit]


def test_lists_search_whatever_the_case(hub: HubServer) -> None:
    for name in (NAME, "Org/other", "else/model-1b-nvfp4"):
        hub.add("model", name, {})
    hub.add("dataset", "Org/model-data", {})
    hub.add("model", "Org/model-hidden", {}, private=True, token="hf_reader")

    def found(token: str | bool = False, **query: Any) -> list[str]:
        return [each.id for each in api(hub, token).list_models(**query)]

    assert found(search="MODEL") == [NAME, "else/model-1b-nvfp4"]
    assert found(search="model", author="Org", token="hf_reader") == [NAME, "Org/model-hidden"]
    assert found(search="model", limit=1) == [NAME]


def test_another_case_leads_to_the_right_name(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", NAME, FILES)
    assert api(hub).model_info("org/model-1b").id == NAME
    assert download(hub, tmp_path, "config.json", "ORG/MODEL-1B") == b"{}"
    assert get(f"{hub.endpoint}/api/models/org/model-1b", follow=False).headers["Location"] == f"/api/models/{NAME}"
    hub.repo(NAME).wrong_case = 404
    with pytest.raises(RepositoryNotFoundError):
        api(hub).model_info("org/model-1b")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_an_old_name_leads_to_the_new_one(kind: str, hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add(kind, "org/first", FILES)
    hub.rename("org/first", "org/second", kind)
    hub.rename("org/second", NAME, kind)
    info = api(hub).repo_info("org/first", repo_type=kind)
    assert (info.id, info.sha) == (NAME, commit)
    assert api(hub).list_repo_files("org/second", repo_type=kind) == sorted(FILES)
    for file in FILES:
        assert download(hub, tmp_path, file, "org/first", repo_type=kind) == FILES[file]


def test_large_files_come_from_another_host_that_gets_no_token(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("model", NAME, FILES)
    head = get(address(hub), follow=False, method="HEAD")
    assert (head.status_code, head.headers["X-Repo-Commit"]) == (302, commit)
    assert head.headers["X-Linked-Size"] == str(len(LARGE))
    assert head.headers["X-Linked-ETag"] == f'"{hashlib.sha256(LARGE).hexdigest()}"'
    assert hub.secrets[-1] in head.headers["Location"]
    assert not head.headers["Location"].startswith(hub.endpoint) and "127.0.0.1" not in head.headers["Location"]
    plain = get(address(hub, "config.json"), method="HEAD")
    assert (plain.status_code, plain.headers["Content-Length"]) == (200, "2")
    assert plain.headers["ETag"] == '"9e26dfeeb6e641a33dae4961196235bdb965b21b"'
    assert download(hub, tmp_path, "sub/model.safetensors", token="hf_mine") == LARGE
    assert hub.leaks == []
    assert get(head.headers["Location"], Authorization="Bearer hf_mine").status_code == 400
    assert hub.leaks == [f"/cdn/{NAME}/resolve/main/sub/model.safetensors"]


def test_an_address_of_the_other_host_expires(hub: HubServer) -> None:
    hub.add("model", NAME, FILES)
    hub.cdn_expires_after = 2
    url = get(address(hub), follow=False).headers["Location"]
    assert [get(url).status_code for _ in range(3)] == [200, 200, 403]
    assert get(address(hub)).content == LARGE
    assert get(url.replace(hub.secrets[0], "0" * 32)).status_code == 403
    assert len(set(hub.secrets)) == 2


@pytest.mark.parametrize("file", ["model.safetensors", "plain.json"])
def test_ranges_of_bytes(file: str, hub: HubServer) -> None:
    hub.add("model", NAME, {file: LARGE})
    size = len(LARGE)
    for asked, first, end in (
        ("bytes=10-19", 10, 20),
        ("bytes=0-0", 0, 1),
        (f"bytes={size - 5}-", size - 5, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=100-{size + 50}", 100, size),
    ):
        answer = get(address(hub, file), Range=asked)
        assert (answer.status_code, answer.content) == (206, LARGE[first:end])
        assert answer.headers["Content-Range"] == f"bytes {first}-{end - 1}/{size}"
        assert hub.sent[NAME, file][-1] == (first, end)
    beyond = get(address(hub, file), Range=f"bytes={size}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    etag = get(address(hub, file)).headers["ETag"]
    assert get(address(hub, file), Range="bytes=0-3", If_Match=etag, If_Range=etag).status_code == 206
    assert get(address(hub, file), Range="bytes=0-3", If_Match='"other"').status_code == 412
    assert get(address(hub, file), Range="bytes=0-3", If_Range='"other"').content == LARGE


def test_a_branch_moves_and_a_commit_stays(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("model", NAME, {"a.json": b"old", "model.safetensors": b"old"}, tags=("v1",))
    other = hub.add("model", NAME, {"a.json": b"other"}, branch="dev/x")
    new = hub.add("model", NAME, {"a.json": b"new", "model.safetensors": b"new"})
    again = hub.add("model", NAME, {"a.json": b"old", "model.safetensors": b"old"})
    assert len({old, other, new, again}) == 4
    for revision, commit in (("v1", old), (old, old), (old[:7], old), ("dev/x", other), (new, new), ("main", again)):
        assert api(hub).model_info(NAME, revision=revision).sha == commit
    assert download(hub, tmp_path, "a.json", revision="dev/x") == b"other"
    assert download(hub, tmp_path, "model.safetensors", revision=new) == b"new"
    refs = api(hub).list_repo_refs(NAME)
    assert {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]} == {
        **{"main": again, "dev/x": other},
        "v1": old,
    }
    with pytest.raises(RevisionNotFoundError):
        api(hub).model_info(NAME, revision="v2")
    with pytest.raises(EntryNotFoundError):
        download(hub, tmp_path, "none.json")


def test_a_gated_model_is_seen_by_all_and_read_by_some(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", NAME, FILES, gated="manual", token="hf_reader")
    assert api(hub).model_info(NAME).gated == "manual"
    assert api(hub).list_repo_files(NAME) == sorted(FILES)
    for token, status in ((False, 401), ("hf_other", 403)):
        with pytest.raises(GatedRepoError) as caught:
            download(hub, tmp_path, "config.json", token=token)
        assert caught.value.response.status_code == status
    assert download(hub, tmp_path, "sub/model.safetensors", token="hf_reader") == LARGE


def test_a_private_model_is_missing_to_others(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", NAME, FILES, private=True, token="hf_reader")
    for token, status in ((False, 401), ("hf_other", 404)):
        for call in (
            api(hub, token).model_info,
            lambda name, token=token: download(hub, tmp_path, "a", name, token=token),
        ):
            for name in (NAME, "org/model-1b", "org/none"):
                with pytest.raises(RepositoryNotFoundError) as caught:
                    call(name)
                assert caught.value.response.status_code == status
    assert api(hub, "hf_reader").model_info(NAME).private
    assert download(hub, tmp_path, "config.json", token="hf_reader") == b"{}"


def test_bytes_are_counted_by_file_and_range(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", NAME, FILES)
    hub.add("model", "org/other", FILES)
    get(address(hub), method="HEAD")
    api(hub).model_info(NAME)
    assert (hub.bytes_sent(NAME), hub.sent_twice(NAME)) == (0, [])
    snapshot_download(NAME, endpoint=hub.endpoint, cache_dir=tmp_path)
    assert hub.bytes_sent(NAME) == sum(map(len, FILES.values())) and hub.bytes_sent("org/other") == 0
    assert sorted(hub.downloads()) == sorted(FILES) and hub.sent_twice(NAME) == []
    for asked in ("bytes=100-199", "bytes=150-249", "bytes=150-159"):
        get(address(hub), Range=asked)
    assert hub.bytes_sent_of(NAME, "sub/model.safetensors") == len(LARGE) + 210
    doubles = hub.sent_twice(NAME)
    assert {file for file, _, _ in doubles} == {"sub/model.safetensors"}
    assert {at for _, first, end in doubles for at in range(first, end)} == set(range(100, 250))
    assert sum(end - first for _, first, end in doubles) == 150


def test_every_request_is_seen_before_its_answer(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", NAME, FILES)
    seen: list[tuple[str, str, int]] = []
    hub.on_request = lambda request: seen.append((request.method, request.path, hub.bytes_sent(NAME)))
    download(hub, tmp_path, "sub/model.safetensors")
    resolve = f"/{NAME}/resolve/main/sub/model.safetensors"
    assert seen == [("HEAD", resolve, 0), ("GET", f"/cdn{resolve}", 0)]
    assert hub.requests == [each[:2] for each in seen] and "Range" not in hub.log[-1].headers


def test_what_goes_wrong_in_the_server_fails_the_test() -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), HubServer() as hub:
        hub.on_request = broken
        with pytest.raises(HfHubHTTPError):
            api(hub).whoami("hf_mine")


def test_a_large_file_is_not_held_in_memory(hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as stream:
        stream.truncate(48_000_000)
    hub.add("model", NAME, {path.name: path})
    tracemalloc.start()
    try:
        with get_session().stream("GET", address(hub, path.name), follow_redirects=True) as answer:
            assert sum(map(len, answer.iter_bytes(1 << 16))) == 48_000_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_after_the_end_nothing_answers_and_no_thread_is_left() -> None:
    before = threading.active_count()
    with HubServer() as hub:
        hub.add("model", NAME, FILES)
        assert get(address(hub)).content == LARGE  # the client keeps both connections
    assert threading.active_count() == before
    with pytest.raises(Exception, match=r"refused|reset|disconnected"):
        get(hub.endpoint)


def test_two_hubs_at_once_know_nothing_of_each_other(hub: HubServer) -> None:
    reads: list[Callable[[], Any]] = []
    with HubServer() as other:
        for each in (hub, other):
            each.add("model", NAME, {"a.json": each.endpoint.encode()})
            reads.append(lambda each=each: get(address(each, "a.json")).text)
        assert [read() for read in reads] == [hub.endpoint, other.endpoint]
    assert reads[0]() == hub.endpoint
