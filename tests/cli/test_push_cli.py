"""`nvquant push`: its words, its document and its exit codes, against a Hub; in its own process where that counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.commands import Command, Ended
from support.conversions import Conversions, TinyModels
from support.hub_faults import Status
from support.hub_http import Request
from support.hub_models import hub_for_this_process
from support.hub_server import HubServer
from support.hub_uploads import User

TOKEN = "hf_thisIsTheSecretOfTheTests"
REPO = "me/llama-NVFP4"
Push = Callable[..., Ended]


@pytest.fixture(scope="module")
def converted(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Conversions(tiny, tmp_path_factory.mktemp("conversions"))("llama", "nvfp4")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """The usual Hub of this process, on which its token may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as server:
        server.users[TOKEN] = User("me")
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Of a process whose usual Hub is the test's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return {**kept, **ours, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def push(environment: dict[str, str], tmp_path: Path) -> Push:
    """Run the command in a process of its own."""

    def run(*arguments: object) -> Ended:
        command = [sys.executable, "-m", "nvquant", "push", *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def test_a_push_says_where_it_is_and_how_to_prove_it_and_again_that_all_is_there(
    push: Push, hub: HubServer, converted: Path
) -> None:
    done = push(converted, REPO)
    assert done.code == 0, done.stderr
    size = sum(path.stat().st_size for path in converted.iterdir())
    commit = hub.repo(REPO).branches["main"]
    assert done.stdout.startswith(
        f"{hub.endpoint}/{REPO}: 13 files, 0.2 MB, 13 uploaded (0.2 MB), private, commit {commit}."
    )
    assert done.stdout.count("\n") == 1 and size < 300_000
    words = done.stderr.splitlines()
    assert words[-1] == f"Next: nvquant verify {REPO}"
    assert f"creating {REPO} (private)" in words and f"uploading 13 files to {REPO}" in words
    assert "\r" not in done.stderr and "%|" not in done.stderr  # no bars where nobody watches
    again = push(converted, REPO)
    assert again.code == 0
    assert again.stdout == (f"{hub.endpoint}/{REPO}: 13 files, 0.2 MB, nothing to upload, private, commit {commit}.\n")


def test_json_is_one_document(nvquant: Command, hub: HubServer, converted: Path) -> None:
    done = nvquant("push", converted, REPO, "--public", "--json", "--message", "My words")
    document = json.loads(done.stdout)
    assert document["repo"] == REPO and document["url"] == f"{hub.endpoint}/{REPO}"
    assert (document["is_private"], document["was_made"], document["passed"]) == (False, True, True)
    assert document["commit"] == hub.repo(REPO).branches["main"] and len(document["uploaded"]) == document["files"]
    assert hub.repo(REPO).find("main").title == "My words"


def test_against_a_source_numbers_are_measured_for_the_card(
    nvquant: Command, hub: HubServer, converted: Path, tiny: TinyModels
) -> None:
    done = nvquant("push", converted, REPO, "--against", tiny("llama"), "--base-model", "org/base")
    assert done.code == 0, done.stderr
    card = hub.files(REPO)["README.md"].decode()
    assert "W4A4, as GPUs with FP4 units compute it" in card and "base_model: org/base" in card
    assert "nvquant_layers.svg" in hub.files(REPO)
    assert "Licence and language may be missing from the card" in done.stderr  # org/base is not there


def test_an_earlier_verdict_is_taken_over(
    nvquant: Command, hub: HubServer, converted: Path, tiny: TinyModels, tmp_path: Path
) -> None:
    verified = nvquant("verify", converted, "--against", tiny("llama"), "--json")
    (tmp_path / "proof.json").write_text(verified.stdout)
    done = nvquant("push", converted, REPO, "--verify-json", tmp_path / "proof.json")
    assert done.code == 0, done.stderr
    stored = json.loads(hub.files(REPO)["nvquant_verify.json"])
    assert stored["numerics"] == json.loads(verified.stdout)["numerics"]


def test_what_came_from_the_hub_goes_back_with_its_commit_and_its_licence(
    nvquant: Command, hub: HubServer, tiny: TinyModels, tmp_path: Path
) -> None:
    source = {path.name: path for path in tiny("llama").iterdir() if path.is_file()}
    card = b"---\nlicense: apache-2.0\nmodel-index: []\n---\n# The source\n"
    commit = hub.add("model", "org/base", {**source, "README.md": card})
    output = tmp_path / "converted"
    done = nvquant("convert", "org/base", "--recipe", "nvfp4-a16", "--quantizer", "rtn", "-o", output)
    assert done.code == 0, done.stderr
    done = nvquant("push", output, REPO)
    assert done.code == 0, done.stderr
    written = hub.files(REPO)["README.md"].decode()
    assert "license: apache-2.0" in written and "base_model: org/base" in written and "model-index" not in written
    assert f"- Source's commit: `{commit}`" in written and "- Source's integrity: `" in written
    assert f"nvquant convert org/base@{commit} --recipe nvfp4-a16" in written
    assert nvquant("verify", REPO).code == 0


def test_a_failed_check_exits_with_1_and_its_name(
    nvquant: Command, hub: HubServer, converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in converted.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "nvquant_manifest.json").write_text(
        (folder / "nvquant_manifest.json").read_text().replace('"quantizer": "rtn"', '"quantizer": "mse"')
    )
    done = nvquant("push", folder, REPO)
    assert done.code == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ") and "weight_scales" in last and last.endswith("and a note in the card.")
    assert not hub.has("model", REPO)
    assert nvquant("push", folder, REPO, "--unverified").code == 0
    assert "did not pass verification" in hub.files(REPO)["README.md"].decode()


def test_a_dry_run_shows_the_card_and_the_files_and_makes_nothing(
    nvquant: Command, hub: HubServer, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = nvquant("push", converted, REPO, "--dry-run")
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("---\n") and f"vllm serve {REPO}" in done.stdout
    rows = {words[0]: words[1:] for line in done.stdout.splitlines() if len(words := line.split()) == 3}
    assert rows["config.json"] == [f"{(converted / 'config.json').stat().st_size:,}", "upload"]
    assert done.stderr.endswith(f"Nothing was uploaded to {REPO}. To upload, drop --dry-run.\n")
    assert not hub.has("model", REPO)
    document = json.loads(nvquant("push", converted, REPO, "--dry-run", "--json").stdout)
    assert document["exists"] is False and document["card"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}", "model"], "Error: model is not a repository's name: give it as org/name"),
        (["nowhere", REPO], "Error: nowhere is not a folder"),
        (["{}", REPO, "--base-model", "/data/base"], "Error: --base-model /data/base is not a model's id"),
        (["{}", "other/x"], "Error: The Hub does not let this token write to other/x (HTTP 403"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exits_with_2(
    nvquant: Command, hub: HubServer, converted: Path, arguments: list[str], words: str
) -> None:
    done = nvquant("push", *(argument.format(converted) for argument in arguments))
    assert done.code == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(words), done.stderr
    assert "Traceback" not in done.stderr and not hub.has("model", REPO)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, f"Error: Pushing to {REPO} requires a token with write access. Run `hf auth login`, or set HF_TOKEN."),
        ("hf_unknownToken", "Error: The Hub does not know this token"),
    ],
)
def test_without_a_token_that_may_write_nothing_begins(
    nvquant: Command,
    hub: HubServer,
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    words: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    done = nvquant("push", converted, REPO)
    assert done.code == 2 and done.stdout == "" and done.stderr.startswith(words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ENDPOINT", "http://127.0.0.1:9", f"Error: The Hub cannot be reached for {REPO} (ConnectError): run the same"),
        ("HF_HUB_OFFLINE", True, "Error: The Hub cannot be reached"),
    ],
)
def test_without_the_hub_nothing_begins(
    nvquant: Command,
    hub: HubServer,
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: object,
    words: str,
) -> None:
    monkeypatch.setattr(constants, name, value)
    done = nvquant("push", converted, REPO)
    assert done.code == 2 and done.stdout == "" and done.stderr.splitlines()[-1].startswith(words)
    assert hub.log == []


def test_a_proof_of_another_checkpoint_is_refused(
    nvquant: Command, hub: HubServer, converted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "proof.json"
    of_another = {"name": "other", "manifest_sha256": "0", "config_sha256": "0"}
    path.write_text(json.dumps({"checks": [], "checkpoint": of_another}))
    done = nvquant("push", converted, REPO, "--verify-json", path)
    assert done.code == 2 and done.stderr.startswith(f"Error: {path} belongs to another checkpoint (other")


def test_a_push_that_was_killed_goes_on_by_the_same_command_and_sends_nothing_twice(
    push: Push, hub: HubServer, converted: Path, environment: dict[str, str]
) -> None:
    put, last = (
        threading.Event(),
        list(json.loads((converted / "nvquant_manifest.json").read_text())["files"].values())[-1],
    )

    def stop_at_the_last(request: Request) -> None:
        if request.method == "PUT" and request.path.endswith(last) and not put.is_set():
            put.set()
            killed.send_signal(signal.SIGKILL)
            killed.wait()

    hub.on_request = stop_at_the_last
    command = [sys.executable, "-m", "nvquant", "push", converted, REPO]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert killed.wait(120) == -signal.SIGKILL and put.is_set()
    assert set(hub.files(REPO)) == {".gitattributes"}  # nothing to be seen of half a checkpoint
    done = push(converted, REPO)
    assert done.code == 0, done.stderr
    whole = Counter(sha256 for sha256, size in hub.received if size)
    assert whole[last] <= 2 and {whole[sha256] for sha256 in whole if sha256 != last} == {1}
    assert all(hub.files(REPO)[path.name] == path.read_bytes() for path in converted.iterdir())
    assert hub.repo(REPO).private and len(hub.repo(REPO).commits) == 2


@pytest.mark.parametrize("fault", [None, 403, 503])
def test_no_token_and_no_signature_gets_into_any_stream_or_file(
    push: Push, hub: HubServer, converted: Path, tmp_path: Path, fault: int | None
) -> None:
    if fault:
        hub.fail("/cdn/*", Status(fault, retry_after=0), method="PUT", times=2 if fault == 503 else 1000)
    done = push(converted, REPO, "--debug", "--json")
    assert done.code == (2 if fault == 403 else 0), done.stderr
    assert ("Traceback" in done.stderr) == (fault == 403)
    assert hub.received or fault == 403
    assert hub.secrets and hub.leaks == []
    written = [path.read_bytes() for folder in (tmp_path, converted) for path in folder.rglob("*") if path.is_file()]
    everything = [done.stdout.encode(), done.stderr.encode(), *written]
    everything += hub.files(REPO).values() if hub.has("model", REPO) else []
    for secret in (TOKEN, *hub.secrets):
        assert not [text for text in everything if secret.encode() in text]
