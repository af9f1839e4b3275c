"""Conversion of a model on the Hub: the bytes of a local one, whatever the network does, each byte fetched once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.hub.repository import find_model
from nvquant.checkpoint.hub.source import open_hub_checkpoint
from nvquant.checkpoint.source import read_json
from nvquant.convert.engine import SPOOL_FOLDER
from nvquant.convert.journal import STATE_FOLDER
from nvquant.convert.options import ConvertOptions
from nvquant.convert.output import check_cache, partial_folder
from nvquant.convert.pipeline import convert
from nvquant.errors import InputError
from nvquant.format.layouts import COMPRESSED_TENSORS
from nvquant.plan.plan import Plan, compute_plan
from nvquant.recipe.load import load_recipe
from nvquant.stream.manifest import MANIFEST_NAME
from support.conversions import TinyModels, calibration_of, contents, converted, random_samples, write_ids
from support.hub_faults import Corrupt, Drop, Hangup, Status
from support.hub_models import hub_for_this_process
from support.hub_server import HubServer

NAME = "Org/Model"
SHARDS = "*/resolve/*.safetensors"
MODELS = ["llama", "gemma4", "gemma4_e2b"]  # tied; with towers; with embeddings in every layer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as server:
        yield server


def plan_of(low_disk: bool = False, recipe: str = "nvfp4-full") -> Plan:
    source = open_hub_checkpoint(find_model(NAME), low_disk)
    return compute_plan(source, load_recipe(recipe), COMPRESSED_TENSORS, source.name)


def run(output: Path, low_disk: bool = False, **options: Any) -> Path:
    plan = plan_of(low_disk)
    ids = write_ids(output.with_suffix(".jsonl"), random_samples())
    convert(plan, ConvertOptions(output, "rtn", **options), calibration_of(plan.source.folder, ids))
    return output


def without_manifest(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name != MANIFEST_NAME}


@pytest.mark.parametrize("low_disk", [False, True], ids=["downloaded", "low-disk"])
@pytest.mark.parametrize("model", MODELS)
def test_the_output_is_that_of_the_local_model_and_no_weight_comes_twice(
    hub: HubServer, tiny: TinyModels, tmp_path: Path, model: str, low_disk: bool
) -> None:
    hub.add("model", NAME, tiny(model))
    made = run(tmp_path / "out", low_disk)
    assert without_manifest(made) == without_manifest(converted(tiny(model), tmp_path / "local"))
    again = [(file, begin) for file, begin, _ in hub.sent_twice(NAME)]
    headers = {} if low_disk else open_hub_checkpoint(find_model(NAME)).shards
    assert all(begin < headers[file].data_start for file, begin in again)
    source = read_json(made / MANIFEST_NAME, "")["source"]
    assert source["hub"] == {"id": NAME, "commit": find_model(NAME).commit}
    assert ("ETag" in source["integrity"], "sha256" in source["integrity"]) == (low_disk, not low_disk)


@pytest.mark.parametrize("low_disk", [False, True], ids=["downloaded", "low-disk"])
def test_a_folded_model_gets_an_order_of_channels_only_where_its_weights_stay(
    hub: HubServer, tiny: TinyModels, tmp_path: Path, low_disk: bool
) -> None:
    hub.add("model", NAME, tiny("llama"))
    made = run(tmp_path / "out", low_disk, fold=True)
    residual = read_json(made / MANIFEST_NAME, "")["residual"]
    again = [(file, begin) for file, begin, _ in hub.sent_twice(NAME)]
    headers = {} if low_disk else open_hub_checkpoint(find_model(NAME)).shards
    assert all(begin < headers[file].data_start for file, begin in again)
    if low_disk:
        assert residual == {"reason": "the source comes over the network, and is read once only"}
    else:
        assert without_manifest(made) == without_manifest(converted(tiny("llama"), tmp_path / "local", fold=True))


def test_shards_come_by_xet_too_and_a_store_that_fails_for_a_while_changes_no_byte(
    hub: HubServer, tiny: TinyModels, tmp_path: Path
) -> None:
    hub.xet = True
    hub.add("model", NAME, tiny("llama"))
    hub.fail("/xet/*", Status(503), times=1)
    made = run(tmp_path / "out")
    assert any(path.startswith("/xet/") for _, path in hub.requests)
    assert without_manifest(made) == without_manifest(converted(tiny("llama"), tmp_path / "local"))


def test_low_disk_holds_no_more_than_the_output_and_the_tensors_around_the_layers(
    hub: HubServer, tiny: TinyModels, tmp_path: Path
) -> None:
    hub.add("model", NAME, tiny("gemma4"))
    plan = plan_of(low_disk=True)
    outer = sum(info.nbytes for name, info in plan.source.infos().items() if "language_model.layers" not in name)
    layers = sum(shard.file_bytes for shard in plan.shards)
    before = held(tmp_path)
    seen: list[int] = []
    hub.on_request = lambda _: seen.append(held(tmp_path) - before)
    run(tmp_path / "out", low_disk=True)
    source_bytes = sum(info.nbytes for info in plan.source.infos().values())
    assert max(seen) <= layers + outer + 300_000  # hidden states, ids and records of a tiny run
    assert held(tmp_path / "cache") < source_bytes / 20
    assert not (partial_folder(tmp_path / "out") / STATE_FOLDER / SPOOL_FOLDER).exists()


def held(folder: Path) -> int:
    """Bytes of all files below, each counted once, as far as they are there at this moment."""
    sizes = {}
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                status = os.lstat(Path(root) / file)
            except OSError:
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


@pytest.mark.parametrize("low_disk", [False, True], ids=["downloaded", "low-disk"])
@pytest.mark.parametrize(
    "fault",
    [Drop(after=5000), Status(503), Status(429, retry_after=0), Hangup()],
    ids=lambda fault: type(fault).__name__,
)
def test_a_bad_network_changes_no_byte(
    hub: HubServer, tiny: TinyModels, tmp_path: Path, low_disk: bool, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.add("model", NAME, tiny("llama"))
    plan_of(low_disk)  # its own requests are not the matter here
    hub.fail(SHARDS, fault, times=4)
    made = run(tmp_path / "out", low_disk)
    assert without_manifest(made) == without_manifest(converted(tiny("llama"), tmp_path / "local"))


def test_a_shard_with_a_wrong_hash_ends_the_run_before_anything_is_made_of_it(
    hub: HubServer, tiny: TinyModels, tmp_path: Path
) -> None:
    hub.add("model", NAME, tiny("llama"))
    plan_of()
    hub.fail("/cdn/*", Corrupt(at=-1 + 50_000), times=99, method="GET")
    with pytest.raises(InputError, match=r"has the hash .*, but the Hub published"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("low_disk", [False, True], ids=["downloaded", "low-disk"])
def test_a_run_that_the_network_ended_goes_on_and_fetches_no_finished_layer_again(
    hub: HubServer, tiny: TinyModels, tmp_path: Path, low_disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvquant.checkpoint.hub.patience.MOST_FAILURES", 1)
    hub.add("model", NAME, tiny("llama"))
    plan = plan_of(low_disk)
    last = [name for name in plan.source.files if ".layers.2." in name]
    shard = plan.source.files[last[0]]
    ranges = [(plan.source.info(name).begin, plan.source.info(name).end) for name in last]
    hub.on_request = lambda request: end_the_network(hub, request, ranges if low_disk else None, shard)
    with pytest.raises(InputError, match=r"2 of 3 layers are complete and kept|Hub cannot be reached|refused"):
        run(tmp_path / "out", low_disk)
    records = [read_json(path, "") for path in partial_folder(tmp_path / "out").glob(f"{STATE_FOLDER}/model*.json")]
    whole = [record["layer"]["layer"] for record in records if record["layer"] is not None]
    assert whole or not low_disk
    hub.on_request = None
    hub.recover()
    hub.sent.clear()
    made = run(tmp_path / "out", low_disk)
    assert without_manifest(made) == without_manifest(converted(tiny("llama"), tmp_path / "local"))
    if low_disk:
        names = plan.tensors_by_layer()
        assert [name for layer in whole for name in names[layer] if was_sent(hub, plan, name)] == []


def was_sent(hub: HubServer, plan: Plan, name: str) -> bool:
    """Whether any byte of the tensor left the server."""
    info = plan.source.info(name)
    sent = hub.sent.get((NAME, plan.source.files[name]), [])
    return any(first < info.end and info.begin < end for first, end in sent)


def end_the_network(hub: HubServer, request: Any, ranges: list[tuple[int, int]] | None, shard: str) -> None:
    """From the first request for these bytes on (or for that shard), nothing is answered any more."""
    if "/resolve/" not in request.path or not request.path.endswith(shard) or request.method != "GET":
        return
    asked = (request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
    first = int(asked[0])
    if ranges is None or any(begin <= first < end for begin, end in ranges):
        hub.fail(SHARDS, Hangup(), times=10_000)


def test_a_commit_that_moved_is_another_run(hub: HubServer, tiny: TinyModels, tmp_path: Path) -> None:
    hub.add("model", NAME, tiny("llama"))
    run(tmp_path / "out")
    hub.add("model", NAME, tiny("llama"), tags=("v2",))  # the same files in another commit
    hub.add("model", NAME, {"NOTICE": b"new", **{path.name: path for path in tiny("llama").iterdir()}})
    with pytest.raises(InputError, match=r"source\.hub\.commit"):
        run(tmp_path / "out")


def test_stopping_does_not_wait_for_a_download(hub: HubServer, tiny: TinyModels, tmp_path: Path) -> None:
    hub.add("model", NAME, tiny("llama"))
    asked, ended = threading.Event(), threading.Event()

    def stall(request: Any) -> None:
        if request.path.startswith("/cdn/") and request.method == "GET" and "Range" not in request.headers:
            asked.set()
            ended.wait(60)

    hub.on_request = stall
    command = [
        sys.executable,
        "-m",
        "nvquant",
        "convert",
        NAME,
        "--recipe",
        "nvfp4-a16",
        "--device",
        "cpu",
        "-o",
        "out",
    ]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "other-cache")}
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert asked.wait(60)
        time.sleep(1)
        started.send_signal(signal.SIGINT)
        _, words = started.communicate(timeout=20)
    finally:
        started.kill()
        ended.set()
    assert started.returncode == 130, words
    assert "Stopped" in words


def test_a_cache_without_room_is_refused_before_the_download(
    hub: HubServer, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("model", NAME, tiny("llama"))
    plan = plan_of()
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("nvquant.convert.output.shutil.disk_usage", lambda _: full)
    with pytest.raises(InputError, match=r"bytes to download, but the disk of the cache, .* use --low-disk"):
        check_cache(plan.source, tmp_path / "out", plan.file_bytes)
