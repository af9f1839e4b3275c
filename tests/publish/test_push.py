"""A push against a Hub that the real client speaks to: what gets there, what is refused, and what happens on a bad
network."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import CheckFailed, InputError
from nvquant.publish.files import CARD_NAME, CHART_NAME, VERIFY_NAME
from nvquant.publish.frontmatter import split_card
from nvquant.publish.proof import prove
from nvquant.publish.push import PushRequest, PushResult, prepare, push
from nvquant.publish.target import MARKER, check_rights
from nvquant.verify.structure import verify_structure
from publish.conftest import TOKEN, told
from support.hub_faults import Hangup, LostAnswer, Status
from support.hub_http import Request
from support.hub_repos import make_blob
from support.hub_server import HubServer
from support.hub_uploads import User

REPO = "me/llama-NVFP4"
CARD = b"---\nlicense: mit\nlanguage: [en]\ntags: [chat]\n---\n# The source\n"


@pytest.fixture
def request_for(hub: HubServer, converted: Path, proved: dict[str, Any]) -> PushRequest:
    """A push of the small checkpoint whose source is on the Hub."""
    hub.add("model", "org/base", {"README.md": CARD, "config.json": b"{}"})
    return PushRequest(converted, REPO, proved, base_model="org/base", endpoint=hub.endpoint)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of the shards, which go to the Hub's storage for large files."""
    files: dict[str, str] = json.loads((folder / "nvquant_manifest.json").read_text())["files"]
    return files


def test_a_new_repository_is_private_and_holds_the_checkpoint_its_card_and_its_proof(
    hub: HubServer, request_for: PushRequest, converted: Path
) -> None:
    said: list[str] = []
    result = push(replace(request_for, say=said.append))
    files = hub.files(REPO)
    own = {path.name: path.read_bytes() for path in converted.iterdir()}
    assert {name: files[name] for name in own} == own
    assert set(files) - set(own) == {CARD_NAME, VERIFY_NAME, ".gitattributes"}
    assert json.loads(files[VERIFY_NAME]) == request_for.document
    data, body = split_card(files[CARD_NAME].decode())
    assert data["license"] == "mit" and data["base_model"] == "org/base" and MARKER in body
    assert hub.repo(REPO).private and result.is_private and result.was_made and result.passed
    assert result.commit == hub.repo(REPO).branches["main"] and result.url == f"{hub.endpoint}/{REPO}"
    assert set(result.uploaded) == {*own, CARD_NAME, VERIFY_NAME} and result.files == len(own) + 2
    assert said == [
        f"hashing {result.files} files",
        f"creating {REPO} (private)",
        f"uploading {result.files} files to {REPO}",
    ]
    assert len(hub.repo(REPO).commits) == 2  # the Hub's own first one, and everything at once


def test_everything_gets_there_by_xet_too(
    hub: HubServer, request_for: PushRequest, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    push(request_for)
    files = hub.files(REPO)
    assert all(files[path.name] == path.read_bytes() for path in converted.iterdir())
    assert any(request.path.startswith("/xet/") for request in hub.log)
    assert not any("/lfs/" in request.path for request in hub.log)


def test_the_numbers_bring_the_chart(hub: HubServer, request_for: PushRequest, measured: dict[str, Any]) -> None:
    push(replace(request_for, document=measured))
    files = hub.files(REPO)
    assert files[CHART_NAME].startswith(b"<svg ") and f"]({CHART_NAME})" in files[CARD_NAME].decode()


def test_a_chart_goes_with_the_numbers_it_showed(
    hub: HubServer, request_for: PushRequest, measured: dict[str, Any]
) -> None:
    push(replace(request_for, document=measured))
    assert push(request_for).deleted == (CHART_NAME,)
    assert CHART_NAME not in hub.files(REPO)


def test_what_was_pushed_passes_verification_where_it_is_downloaded(
    hub: HubServer, request_for: PushRequest, measured: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    push(replace(request_for, document=measured))
    folder = tmp_path / "downloaded"
    for name, content in hub.files(REPO).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert {CARD_NAME, VERIFY_NAME, CHART_NAME, ".gitattributes"} <= {path.name for path in folder.iterdir()}
    report = verify_structure(folder, tiny("llama"))
    assert report.passed and len(report.checks) == 23
    again = prove(folder, None, json.loads((folder / VERIFY_NAME).read_text()), told)
    assert again["numerics"] == measured["numerics"]


def test_public_makes_a_new_repository_public(hub: HubServer, request_for: PushRequest) -> None:
    assert not push(replace(request_for, is_public=True)).is_private
    assert not hub.repo(REPO).private


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_that_exists_stays_as_visible_as_it_is(
    hub: HubServer, request_for: PushRequest, private: bool
) -> None:
    hub.add("model", REPO, {".gitattributes": b"*.safetensors filter=lfs\n", "logo.png": b"png"}, private=private)
    result = push(replace(request_for, is_public=private))
    assert (hub.repo(REPO).private, result.is_private, result.was_made) == (private, private, False)
    assert hub.files(REPO)["logo.png"] == b"png"


def test_pushing_the_same_again_uploads_nothing(hub: HubServer, request_for: PushRequest) -> None:
    first = push(request_for)
    hub.log.clear()
    second = push(request_for)
    assert (second.uploaded, second.uploaded_bytes, second.deleted) == ((), 0, ())
    assert (second.commit, second.files, second.bytes) == (first.commit, first.files, first.bytes)
    assert {request.method for request in hub.log if "validate" not in request.path} <= {"GET", "HEAD"}
    assert len(hub.repo(REPO).commits) == 2


def test_only_what_changed_is_sent(hub: HubServer, request_for: PushRequest, measured: dict[str, Any]) -> None:
    push(request_for)
    hub.received.clear()
    assert set(push(replace(request_for, document=measured)).uploaded) == {CARD_NAME, VERIFY_NAME, CHART_NAME}
    assert hub.received == []


def test_files_of_another_checkpoint_are_refused_by_name_or_deleted_in_the_same_commit(
    hub: HubServer, request_for: PushRequest
) -> None:
    foreign = {"model-00001-of-00002.safetensors": b"old", "pytorch_model.bin": b"old", "notes.md": b"notes"}
    hub.add("model", REPO, foreign)
    with pytest.raises(InputError, match=r"\(model-00001-of-00002\.safetensors, pytorch_model\.bin\)\. .* --replace"):
        push(request_for)
    assert set(hub.files(REPO)) == set(foreign)
    result = push(replace(request_for, replace=True))
    assert result.deleted == ("model-00001-of-00002.safetensors", "pytorch_model.bin")
    assert not set(result.deleted) & set(hub.files(REPO)) and hub.files(REPO)["notes.md"] == b"notes"
    assert len(hub.repo(REPO).commits) == 2


def test_a_readme_of_somebodys_stays_and_one_of_nvquants_is_replaced(hub: HubServer, request_for: PushRequest) -> None:
    hub.add("model", REPO, {"README.md": b"# My own words\n"})
    result = push(request_for)
    assert result.kept_card and hub.files(REPO)["README.md"] == b"# My own words\n"
    assert push(request_for).uploaded == ()
    assert push(replace(request_for, replace=True)).uploaded == (CARD_NAME,)
    assert MARKER in hub.files(REPO)["README.md"].decode()
    hub.add("model", "org/base", {"README.md": CARD.replace(b"mit", b"apache-2.0"), "config.json": b"{}"})
    result = push(request_for)
    assert result.uploaded == (CARD_NAME,) and b"license: apache-2.0" in hub.files(REPO)["README.md"]


def test_a_readme_that_holds_data_alone_is_nobodys(hub: HubServer, request_for: PushRequest) -> None:
    hub.add("model", REPO, {"README.md": b"---\nlicense: mit\n---\n"})
    assert not push(request_for).kept_card


def test_a_checkpoint_that_fails_is_refused_with_the_names_of_its_checks(
    hub: HubServer, request_for: PushRequest, copy: Callable[[], Path]
) -> None:
    folder = copy()
    shard = folder / "model-00004-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    failed = replace(request_for, folder=folder, document=prove(folder, None, None, told))
    with pytest.raises(CheckFailed, match=r"fails 1 of 18 checks \(hashes\)\. .* --unverified"):
        push(failed)
    assert hub.log == []
    result = push(replace(failed, unverified=True))
    assert not result.passed
    body = split_card(hub.files(REPO)[CARD_NAME].decode())[1]
    assert "did not pass verification" in body.split("# llama-NVFP4")[1].splitlines()[2]
    assert json.loads(hub.files(REPO)[VERIFY_NAME])["passed"] is False


def test_nothing_unverified_hides_behind_a_readme_of_somebodys(
    hub: HubServer, request_for: PushRequest, proved: dict[str, Any]
) -> None:
    hub.add("model", REPO, {"README.md": b"# My own words\n"})
    unchecked = replace(request_for, document={**proved, "checks": []}, unverified=True)
    with pytest.raises(InputError, match=r"has a README\.md that nvquant did not write"):
        push(unchecked)
    push(replace(unchecked, replace=True))
    assert b"was not verified" in hub.files(REPO)[CARD_NAME]


def test_what_was_not_verified_or_was_changed_since_is_refused(
    request_for: PushRequest, copy: Callable[[], Path], proved: dict[str, Any]
) -> None:
    with pytest.raises(CheckFailed, match=r"was not verified\. Verify it first"):
        push(replace(request_for, document={**proved, "checks": []}))
    (folder := copy()).joinpath("config.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not the verified checkpoint\. Verify it again"):
        push(replace(request_for, folder=folder))


def test_a_dry_run_changes_nothing_and_needs_no_token(
    hub: HubServer, request_for: PushRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    parcel = prepare(request_for)
    assert not hub.has("model", REPO) and parcel.target.commit is None
    assert {request.method for request in hub.log} <= {"GET", "HEAD"}
    document = parcel.as_json()
    assert document["card"] == parcel.card and document["exists"] is False
    assert {"config.json", CARD_NAME, VERIFY_NAME} <= {file["name"] for file in document["upload"]}


def test_a_connection_that_drops_in_a_put_is_taken_up_again(
    hub: HubServer, request_for: PushRequest, converted: Path
) -> None:
    hub.fail("/cdn/*", Hangup(after=1000), method="PUT", times=2)
    push(request_for)
    sent = Counter(sha256 for sha256, _ in hub.received)
    assert set(sent) == set(hashes(converted).values()) and sent.total() == len(sent) + 2


def test_a_push_that_broke_off_goes_on_with_what_is_missing(
    hub: HubServer, request_for: PushRequest, converted: Path
) -> None:
    first, *others = hashes(converted).values()
    hub.fail(f"/cdn/*/{first}", Hangup(after=1000), method="PUT", times=1000)
    with pytest.raises(InputError, match=rf"^The Hub cannot be reached for {REPO} \(\w+\): run the same command again"):
        push(request_for)
    assert set(hub.files(REPO)) == {".gitattributes"}  # nothing is seen of it before it is whole
    hub._planned.clear()
    before = Counter(sha256 for sha256, _ in hub.received)
    assert before[first] > 1 and len(before) > 2
    result = push(request_for)
    assert not result.was_made and result.is_private and len(hub.repo(REPO).commits) == 2
    sent = Counter(sha256 for sha256, _ in hub.received)
    assert sent[first] == before[first] + 1 and [sent[other] for other in others] == [1] * len(others)


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(hub: HubServer, request_for: PushRequest) -> None:
    hub.fail(f"/api/models/{REPO}/commit/main", LostAnswer())
    result = push(request_for)
    assert result.commit == hub.repo(REPO).branches["main"] and len(hub.repo(REPO).commits) == 2


PASSING = [
    *("/api/whoami-v2", f"/api/models/{REPO}", "/api/validate-yaml", "/api/repos/create"),
    *(f"/{REPO}.git/info/lfs/objects/batch", "/cdn/*", f"/{REPO}.git/info/lfs/objects/verify"),
    *(f"/api/models/{REPO}/{verb}" for verb in ("preupload/main", "commit/main", "revision/*")),
]


@pytest.mark.parametrize(
    ("path", "status"), [*((path, 503) for path in PASSING), *((PASSING[-2], status) for status in (429, 500, 504))]
)
def test_a_hub_that_fails_in_passing_is_asked_again(
    hub: HubServer, request_for: PushRequest, converted: Path, path: str, status: int
) -> None:
    hub.fail(path, Status(status, retry_after=0))
    result = push(request_for)
    assert result.commit == hub.repo(REPO).branches["main"] and len(hub.repo(REPO).commits) == 2
    assert hub.files(REPO)["config.json"] == (converted / "config.json").read_bytes()
    assert [planned.times for planned in hub._planned] == [0]


REFUSALS = {
    401: r"The Hub does not know this token, or hides me/llama-NVFP4 from it \(HTTP 401",
    403: r"The Hub does not let this token write to me/llama-NVFP4 \(HTTP 403: no room\)\. Use a token with write",
    413: r"The Hub refused the upload to me/llama-NVFP4 \(HTTP 413: no room\)",
    429: r"The Hub limits the rate of requests \(HTTP 429: no room\). Wait a few minutes",
    500: r"The Hub failed \(HTTP 500: no room\) during the upload to me/llama-NVFP4: run the same command again",
}


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("path", ["/api/repos/create", f"/api/models/{REPO}/commit/main"])
def test_a_hub_that_keeps_refusing_ends_the_push_in_one_sentence(
    hub: HubServer, request_for: PushRequest, path: str, status: int
) -> None:
    hub.fail(path, Status(status, retry_after=0, message="no room"), times=1000)
    with pytest.raises(InputError, match=REFUSALS[status]) as refusal:
        push(request_for)
    text = str(refusal.value)
    assert "\n" not in text and hub.endpoint not in text and TOKEN not in text


def test_a_name_of_somebody_elses_is_refused(hub: HubServer, request_for: PushRequest) -> None:
    with pytest.raises(
        InputError, match=r"does not let this token write to other/x \(HTTP 403: You don't have the rights"
    ):
        push(replace(request_for, repo="other/x"))


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, r"Pushing to me/x requires a token with write access. Run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", r"The Hub does not know this token, .*HTTP 401"),
        ("hf_reader", r"The token \(a test's\) is read-only. Create one with write access to me at https://"),
    ],
)
def test_rights_are_looked_at_before_any_work(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    hub.users["hf_reader"] = User("me", write=False)
    with pytest.raises(InputError, match=words) as refusal:
        check_rights("me/x", hub.endpoint)
    assert "hf_" not in str(refusal.value).replace("HF_TOKEN", "")


def test_a_repository_that_changed_meanwhile_is_not_overwritten(hub: HubServer, request_for: PushRequest) -> None:
    hub.add("model", REPO, {"logo.png": b"png"})
    once = threading.Event()

    def somebody_commits(request: Request) -> None:
        if request.method == "PUT" and not once.is_set():
            once.set()
            hub.add("model", REPO, {"logo.png": b"another"})

    hub.on_request = somebody_commits
    with pytest.raises(InputError, match=f"{REPO} changed during the upload: run the same command again"):
        push(request_for)
    assert set(hub.files(REPO)) == {"logo.png"}
    push(request_for)
    assert hub.files(REPO)["logo.png"] == b"another"


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00004.safetensors", VERIFY_NAME])
def test_a_file_that_is_another_on_the_hub_is_noticed(hub: HubServer, request_for: PushRequest, name: str) -> None:
    def spoil(request: Request) -> None:
        if re.fullmatch(rf"/api/models/{REPO}/revision/\w{{40}}", request.path):
            files: Any = hub.repo(REPO).find("main").files
            files[name] = make_blob(name, b"something else")

    hub.on_request = spoil
    with pytest.raises(CheckFailed, match=rf"lacks {name}, or has it with another size"):
        push(request_for)


def test_a_file_that_is_not_there_is_noticed(hub: HubServer, request_for: PushRequest) -> None:
    def lose(request: Request) -> None:
        if "/revision/" in request.path and request.path.startswith(f"/api/models/{REPO}/"):
            files: Any = hub.repo(REPO).find("main").files
            del files["tokenizer.json"]

    hub.on_request = lose
    with pytest.raises(CheckFailed, match=r"lacks tokenizer\.json, or"):
        push(request_for)


def test_a_card_that_the_hub_does_not_take_is_told_before_anything_is_made(
    hub: HubServer, request_for: PushRequest
) -> None:
    hub.add("model", "org/base", {"README.md": b"---\nlicense: [mit, bsd]\n---\n", "config.json": b"{}"})
    with pytest.raises(InputError, match=r'metadata \("license" must be a string\)'):
        push(request_for)
    assert not hub.has("model", REPO)


@pytest.mark.parametrize("why", ["missing", "gated", "without a card"])
def test_a_source_whose_card_cannot_be_read_is_no_obstacle(hub: HubServer, request_for: PushRequest, why: str) -> None:
    hub.remove("model", "org/base")
    if why == "gated":
        hub.add("model", "org/base", {"README.md": CARD, "config.json": b"{}"}, token="hf_another", gated="manual")
    if why == "without a card":
        hub.add("model", "org/base", {"config.json": b"{}"})
    said: list[str] = []
    push(replace(request_for, say=said.append))
    data = split_card(hub.files(REPO)[CARD_NAME].decode())[0]
    assert "license" not in data and data["base_model"] == "org/base"
    assert any(words.startswith("Licence and language may be missing") for words in said) == (why != "without a card")


def test_the_sources_folder_gives_the_cards_data_where_the_hub_does_not(
    hub: HubServer, request_for: PushRequest, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(CARD.replace(b"mit", b"bsd"))
    said: list[str] = []
    push(replace(request_for, base_model=None, source=tmp_path, say=said.append))
    assert said[0].startswith(
        "The card names no source. To add its name on the Hub, use `nvquant push --base-model ID`"
    )
    data = split_card(hub.files(REPO)[CARD_NAME].decode())[0]
    assert data["license"] == "bsd" and "base_model" not in data


def test_a_repository_is_known_under_its_new_name(hub: HubServer, request_for: PushRequest) -> None:
    hub.add("model", "me/old", {"logo.png": b"png"})
    hub.rename("me/old", REPO)
    result = push(replace(request_for, repo="me/old"))
    assert result.repo == REPO and f"vllm serve {REPO}\n" in hub.files(REPO)[CARD_NAME].decode()


def test_no_token_leaves_for_another_host_and_none_is_written(
    hub: HubServer, request_for: PushRequest, tmp_path: Path
) -> None:
    result: PushResult = push(request_for)
    assert hub.leaks == [] and hub.received
    assert TOKEN not in json.dumps(result.as_json())
    written = [*hub.files(REPO).values(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    for secret in (TOKEN, *hub.secrets):
        assert not [content for content in written if secret.encode() in content]


def test_the_checkpoints_folder_is_left_as_it_was(
    hub: HubServer, request_for: PushRequest, copy: Callable[[], Path]
) -> None:
    folder = copy()
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")}
    push(replace(request_for, folder=folder))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*")} == before
    assert open_checkpoint(folder).shards
