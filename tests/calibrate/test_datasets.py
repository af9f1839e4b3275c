from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_session, hf_hub_download, snapshot_download
from nvquant.calibrate.datasets import HubDataset, find_dataset
from nvquant.calibrate.text import Columns, Source, read_documents
from nvquant.errors import InputError
from support.hub_server import HubServer
from support.tiny_tokenizer import write_tiny_tokenizer

CHATS = [
    {"messages": [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": f"Because {i}. " * 30}]}
    for i in range(20)
]


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, object]]) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def find(hub: HubServer, tmp_path: Path, repo: str = "org/name", *args: object) -> HubDataset:
    return find_dataset(repo, *args, endpoint=hub.endpoint, cache=tmp_path / "cache")


def test_a_revision_becomes_a_commit_and_nothing_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("dataset", "org/name", {"README.md": b"# Hi", "data/train.jsonl": lines(CHATS)}, tags=("v1",))
    for revision in (None, "main", "v1", commit):
        found = find(hub, tmp_path, "org/name", revision)
        assert (found.commit, found.files) == (commit, ("data/train.jsonl",))
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("files", "patterns", "chosen"),
    [
        (["data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet"], (), [1, 0]),
        (["a.csv", "b.jsonl", "c.parquet"], (), [2]),
        (["README.md", "dataset_infos.json", "LICENSE.txt", "x.txt"], (), [3]),
        (["all.jsonl", "some.jsonl.gz"], (), [0, 1]),
        (["data/train_sft-0.parquet", "data/train_gen-0.parquet"], ("data/train_sft-*",), [0]),
        (["train.jsonl", "validation.jsonl"], ("val*",), [1]),
        (["en/a.jsonl", "de/a.jsonl", "fr/a.jsonl"], ("de/*", "en/*"), [1, 0]),
    ],
)
def test_files_are_chosen_by_pattern_or_by_kind(
    files: list[str], patterns: tuple[str, ...], chosen: list[int], hub: HubServer, tmp_path: Path
) -> None:
    hub.add("dataset", "org/name", dict.fromkeys(files, b"x"))
    assert find(hub, tmp_path, "org/name", None, patterns).files == tuple(files[index] for index in chosen)


def test_only_the_files_that_are_needed_are_downloaded_and_only_once(hub: HubServer, tmp_path: Path) -> None:
    hub.add(
        "dataset", "org/name", {f"train-{i}.jsonl": lines([{"text": f"{i} {j}"} for j in range(5)]) for i in range(4)}
    )
    for _ in range(2):
        documents = read_documents([Source(find(hub, tmp_path))], seed=0, piece_characters=99)
        texts = [next(documents).text for _ in range(7)]
        assert {text[0] for text in texts[:5]} == {"0"} and {text[0] for text in texts[5:]} == {"1"}
    assert hub.downloads() == ["train-0.jsonl", "train-1.jsonl"]


def test_parquet_dialogues_keep_their_turns(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", "org/name", {"data/train-00000-of-00001.parquet": parquet(CHATS)})
    source = Source(find(hub, tmp_path), Columns(messages="messages"))
    found = list(read_documents([source], seed=0, piece_characters=99))
    assert sorted(json.dumps(document.turns) for document in found) == sorted(
        json.dumps(row["messages"]) for row in CHATS
    )


def test_without_the_hub_the_cache_serves(tmp_path: Path) -> None:
    with HubServer() as hub:
        commit = hub.add("dataset", "org/name", {"train-0.jsonl": lines(CHATS), "train-1.jsonl": lines(CHATS)})
        find(hub, tmp_path).download("train-0.jsonl")
    found = find(hub, tmp_path)
    assert (found.commit, found.files) == (commit, ("train-0.jsonl",))
    assert found.download("train-0.jsonl").read_bytes() == lines(CHATS)


def test_a_name_that_moves_on_does_not_change_the_data(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("dataset", "org/name", {"a.jsonl": b"old"})
    found = find(hub, tmp_path)
    assert found.commit == old != hub.add("dataset", "org/name", {"a.jsonl": b"new"})
    assert found.download("a.jsonl").read_bytes() == b"old"


def test_without_hub_and_cache_the_way_out_is_named(tmp_path: Path) -> None:
    with HubServer() as hub:
        pass
    with pytest.raises(InputError, match=r"Hub cannot be reached for data set org/name, .* `offline` or a local file"):
        find(hub, tmp_path)


def test_what_the_hub_refuses_is_said_in_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    hub.add("dataset", "org/name", {"a.jsonl": lines(CHATS), "b.bin": b""})
    hub.add("dataset", "org/gated", {"a.jsonl": lines(CHATS)}, token="hf_secret")
    hub.add("dataset", "org/images", {"a.png": b""})
    hub.failures["/api/datasets/org/broken"] = 500
    for repo, args, message in (
        ("org/none", (), "org/none does not exist or is private"),
        ("org/gated", (), "org/gated is gated: accept its terms"),
        ("org/name", ("v9",), "org/name has no revision v9"),
        ("org/broken", (), r"refused data set org/broken \(HTTP 500\)"),
        ("org/images", (), r"has no file \*\.parquet, .* \(it has a\.png\)"),
        ("org/name", (None, ("*.csv",)), r"has no file \*\.csv \(it has a\.jsonl, b\.bin\)"),
    ):
        with pytest.raises(InputError, match=message):
            find(hub, tmp_path, repo, *args).download("a.jsonl")


def test_a_hub_data_set_by_its_name_alone_in_a_fresh_process(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("dataset", "org/chats", {"data/train.jsonl": lines(CHATS)}, tags=("v1",))
    model = write_tiny_tokenizer(tmp_path / "model", "gemma4")
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        "{name: mixture, description: d, licence: l, "
        "parts: [{hub: org/chats, revision: v1, files: 'data/*', weight: 2}]}"
    )
    code = (
        "import json, sys; from pathlib import Path; from nvquant.calibrate.samples import load_calibration as load\n"
        "made = [load(name, model_folder=Path(sys.argv[1]), config={}, samples=4, sequence_length=64, seed=0)"
        " for name in sys.argv[2:]]\n"
        "print(json.dumps([[each.name, each.sha256, each.framing, each.tokens] for each in made]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), "org/chats", "org/chats@v1", f"org/chats@{commit}", str(spec)],
        env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads(done.stdout)
    assert [name for name, *_ in made] == [f"org/chats@{commit}"] * 3 + ["mixture"]
    assert [rest for _, *rest in made] == [made[0][1:]] * 4
    assert made[0][2:] == ["chat", 256]


def test_the_server_speaks_to_the_real_client_about_models_too(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    commit = hub.add("model", "org/model", folder)
    api = HfApi(endpoint=hub.endpoint)
    assert sorted(api.list_repo_files("org/model")) == ["config.json", "sub/model.safetensors"]
    assert api.model_info("org/model", revision=commit).sha == commit
    (info,) = api.get_paths_info("org/model", ["sub/model.safetensors"])
    assert info.size == 10240
    path = hf_hub_download("org/model", "sub/model.safetensors", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == bytes(range(256)) * 40
    whole = Path(snapshot_download("org/model", endpoint=hub.endpoint, cache_dir=tmp_path / "cache"))
    assert (whole / "config.json").read_bytes() == b"{}"
    assert hub.downloads() == ["sub/model.safetensors", "config.json"]


def test_the_server_sends_byte_ranges(hub: HubServer) -> None:
    hub.add("model", "org/model", {"a": bytes(range(100))})
    response = get_session().get(f"{hub.endpoint}/org/model/resolve/main/a", headers={"Range": "bytes=10-19"})
    assert response.status_code == 206 and response.content == bytes(range(10, 20))
    assert response.headers["Content-Range"] == "bytes 10-19/100"
