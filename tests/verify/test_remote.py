"""A checkpoint on the Hub under proof: whole, or by ranges, which say what they did not read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from nvquant.checkpoint.hub.repository import find_model
from nvquant.errors import InputError
from nvquant.verify.numerics.stage import NumericsOptions
from nvquant.verify.report import Report
from nvquant.verify.run import Verification, VerifyOptions
from nvquant.verify.structure import verify_structure
from nvquant.verify.threads import tell_nobody
from safetensors.torch import load_file, save_file
from support.commands import run_command
from support.hub_faults import Corrupt
from support.hub_models import hub_for_this_process
from support.hub_server import HubServer
from verify.checkpoints import GOOD

NAME, SOURCE = "me/Llama-NVFP4", "Org/Llama"
GOOD_NAME = "llama-ct"
UNREAD = {"unquantized"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with hub_for_this_process(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def published(hub: HubServer, good: Callable[[str], Path], models: dict[str, Path]) -> Path:
    """A good checkpoint under NAME, its source under SOURCE."""
    hub.add("model", NAME, good(GOOD_NAME))
    hub.add("model", SOURCE, models[GOOD[GOOD_NAME][0]])
    return good(GOOD_NAME)


def prove(by_ranges: bool, stages: tuple[str, ...] = ("structure",)) -> Report:
    options = VerifyOptions(stages, NumericsOptions(device="cpu"), by_ranges=by_ranges)  # type: ignore[arg-type]
    verification = Verification(find_model(NAME), None, options, tell_nobody)
    list(verification.run())
    return verification.report()


def broken(published: Path, folder: Path, hub: HubServer, name: str, scale: float) -> None:
    """The checkpoint with the tensors of that ending scaled."""
    copy = shutil.copytree(published, folder / "broken")
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        scaled = {key: value * scale if key.endswith(name) else value for key, value in tensors.items()}
        save_file(scaled, shard, metadata={"format": "pt"})
    hub.add("model", NAME, copy)


def test_by_ranges_every_check_holds_and_most_is_not_read(hub: HubServer, published: Path) -> None:
    report = prove(by_ranges=True)
    assert report.passed
    assert {check.name for check in report.checks if check.is_unread} == UNREAD
    packed = sum(t.nbytes for f in published.glob("*.safetensors") for k, t in load_file(f).items() if "packed" in k)
    assert report.checkpoint["unread_bytes"] >= packed
    whole = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    shards = sum(hub.bytes_sent_of(NAME, path.name) for path in published.glob("*.safetensors"))
    assert shards <= whole - report.checkpoint["unread_bytes"]
    assert hub.sent_twice(NAME) == []
    assert report.checkpoint["name"] == NAME
    assert report.checkpoint["commit"] == find_model(NAME).commit


def test_whole_it_is_proved_like_a_folder(hub: HubServer, published: Path) -> None:
    options = VerifyOptions(("structure",))
    local = Verification(published, None, options, tell_nobody)
    expected = [(check.name, check.passed, check.finding.looked_at) for check in local.run()]
    report = prove(by_ranges=False)
    assert [(check.name, check.passed, check.finding.looked_at) for check in report.checks] == expected
    assert "unread_bytes" not in report.checkpoint


@pytest.mark.parametrize(
    ("name", "scale", "check"),
    [("weight_global_scale", -1.0, "global_scales"), ("input_global_scale", 0.1, "input_scales")],
)
def test_by_ranges_wrong_scales_are_seen(
    hub: HubServer, published: Path, tmp_path: Path, name: str, scale: float, check: str
) -> None:
    broken(published, tmp_path, hub, name, scale)
    failed = {check.name for check in prove(by_ranges=True).checks if not check.passed}
    assert {check, "hashes"} <= failed


def test_by_ranges_a_shard_that_is_not_the_recorded_one_is_seen_by_its_published_hash(
    hub: HubServer, published: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(published, tmp_path / "changed")
    shard = sorted(copy.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # of a tensor that is not read
    shard.write_bytes(content)
    hub.add("model", NAME, copy)
    failed = [check.name for check in prove(by_ranges=True).checks if not check.passed]
    assert failed == ["hashes"]


def test_a_download_that_is_not_what_was_published_is_no_proof(hub: HubServer, published: Path) -> None:
    hub.fail("/cdn/*model-00001*", Corrupt(at=30), times=99, method="GET")
    with pytest.raises(InputError, match=r"model-00001-.* has the hash"):
        prove(by_ranges=False)


def test_other_weights_in_the_repository_are_strangers(hub: HubServer, published: Path) -> None:
    files = {path.name: path for path in published.iterdir()}
    hub.add("model", NAME, {**files, "pytorch_model.bin": b"pickle"})
    (index,) = [check for check in prove(by_ranges=True).checks if check.name == "index"]
    assert "pytorch_model.bin lies beside the shards" in index.finding.faults[0]


@pytest.mark.usefixtures("published")
def test_the_command_says_what_it_did_not_read(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, hub: HubServer
) -> None:
    junit = tmp_path / "junit.xml"
    ended = run_command(
        capfd, "verify", NAME.lower(), "--against", SOURCE, "--stage", "structure", "--junit", junit, "--device", "cpu"
    )
    assert ended.code == 0, ended.stderr
    assert "Passed: all 20 checks. Not read: unquantized, untouched, weights." in ended.stdout
    assert "of tensors, which stayed on the Hub. To download and check all of them, run" in ended.stdout
    assert "unread  weights" in ended.stdout
    skipped = [
        case.get("name") for case in ElementTree.parse(junit).iter("testcase") if case.find("skipped") is not None
    ]
    assert {"unquantized", "untouched", "weights"} <= set(skipped)
    whole = run_command(
        capfd,
        "verify",
        NAME,
        "--against",
        SOURCE,
        "--stage",
        "structure",
        "--stage",
        "numerics",
        "--json",
        "--min-top1",
        "0",
        "--samples",
        "2",
        "--sequence-length",
        "32",
        "--device",
        "cpu",
    )
    document = json.loads(whole.stdout)
    assert whole.code == 0, whole.stderr
    assert document["checkpoint"]["source"] == SOURCE
    assert document["numerics"]["source"] == SOURCE
    assert "unread_bytes" not in document["checkpoint"]


def test_a_repository_that_is_no_checkpoint_is_refused(hub: HubServer, models: dict[str, Path]) -> None:
    hub.add("model", NAME, models["llama"])
    with pytest.raises(InputError, match="Hub model me/Llama-NVFP4 is not quantized"):
        prove(by_ranges=True)
    hub.add("model", NAME, {"config.json": b"{}"})
    with pytest.raises(InputError, match=r"contains no \.safetensors file"):
        prove(by_ranges=True)


def test_a_folder_in_place_of_a_recorded_file_is_a_missing_file(good: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(good(GOOD_NAME), tmp_path / "checkpoint")
    manifest = json.loads((copy / "nvquant_manifest.json").read_text())
    manifest["files"]["notes"] = "0" * 64
    (copy / "nvquant_manifest.json").write_text(json.dumps(manifest))
    (copy / "notes").mkdir()
    (hashes,) = [check for check in verify_structure(copy).checks if check.name == "hashes"]
    assert list(hashes.finding.faults) == ["notes is in the manifest but missing"]


def test_by_ranges_fp8_scales_are_read_and_codes_are_not(
    hub: HubServer, good: Callable[[str], Path], tmp_path: Path
) -> None:
    hub.add("model", NAME, good("llama-fp8-ct"))
    (check,) = [check for check in prove(by_ranges=True).checks if check.name == "fp8"]
    assert check.passed
    assert check.detail == "12 matrices, 576 scales, 36,864 codes not read from the Hub"
    broken(good("llama-fp8-ct"), tmp_path, hub, "o_proj.weight_scale", -1.0)
    (check,) = [check for check in prove(by_ranges=True).checks if check.name == "fp8"]
    assert "64 of 64 scales cannot be right" in check.detail
