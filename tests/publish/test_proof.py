"""What is proved before a push, and which earlier proofs are taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from nvquant.checkpoint.source import open_checkpoint
from nvquant.errors import InputError
from nvquant.publish.proof import failed_checks, prove, read_earlier, without_folders
from nvquant.report.document import stages_run
from nvquant.report.markdown import render_markdown
from nvquant.report.page import page_of
from publish.conftest import told
from support import reports


def write(folder: Path, document: Any) -> Path:
    path = folder / "proof.json"
    path.write_text(json.dumps(document))
    return path


def test_structure_always_runs_and_numerics_with_a_source(proved: dict[str, Any], measured: dict[str, Any]) -> None:
    assert stages_run(proved) == ["structure"] and proved["passed"]
    assert stages_run(measured) == ["structure", "numerics"] and measured["numerics"]["nll_source"] > 0


def test_numbers_of_an_earlier_proof_are_taken_over_and_structure_runs_anew(
    converted: Path, measured: dict[str, Any], tmp_path: Path
) -> None:
    served = {**measured, "serve": reports.serve()}
    earlier = read_earlier(write(tmp_path, served), converted)
    joined = prove(converted, None, earlier, told)
    assert joined["numerics"] == measured["numerics"]
    assert joined["serve"]["server"]["command"].startswith("vllm serve gemma-4-31b-nvfp4")  # without its folders
    assert stages_run(joined) == ["structure", "numerics", "serve"] and joined["passed"]
    names = [check["name"] for check in joined["checks"]]
    assert "untouched" not in names and "kl" in names  # the one needs the source, the other was measured with it
    assert joined["checkpoint"]["source_bytes"] == measured["checkpoint"]["source_bytes"]


def test_a_source_is_not_measured_again_where_an_earlier_proof_has_its_numbers(
    converted: Path, tiny: Callable[[str], Path], measured: dict[str, Any], tmp_path: Path
) -> None:
    changed = {**measured, "numerics": {**measured["numerics"], "perplexity_source": 7.0}}
    earlier = read_earlier(write(tmp_path, changed), converted)
    joined = prove(converted, open_checkpoint(tiny("llama")), earlier, told)
    assert joined["numerics"]["perplexity_source"] == 7.0
    assert "untouched" in [check["name"] for check in joined["checks"]]


def test_what_failed_earlier_still_fails(converted: Path, measured: dict[str, Any], tmp_path: Path) -> None:
    checks = [{**check, "passed": check["name"] != "kl", "faults": ["too much"]} for check in measured["checks"]]
    for numerics in (measured["numerics"], None):  # measured and above its limit, or not even measured
        earlier = read_earlier(write(tmp_path, {**measured, "checks": checks, "numerics": numerics}), converted)
        joined = prove(converted, None, earlier, told)
        assert failed_checks(joined) == ["kl"] and not joined["passed"]


def test_a_proof_of_another_checkpoint_is_refused(
    converted: Path, copy: Callable[[], Path], proved: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, proved)
    read_earlier(path, converted)
    for name in ("nvquant_manifest.json", "config.json"):
        folder = copy()
        (folder / name).write_text((folder / name).read_text().replace("0.", "1.", 1))
        with pytest.raises(InputError, match=r"proof\.json belongs to another checkpoint \(llama-nvfp4"):
            read_earlier(path, folder)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_proof_that_names_no_bytes_is_refused(
    converted: Path, copy: Callable[[], Path], proved: dict[str, Any], tmp_path: Path
) -> None:
    older = {**proved, "checkpoint": {"name": "llama", "bytes": proved["checkpoint"]["bytes"]}}
    with pytest.raises(InputError, match="does not identify the bytes it describes"):
        read_earlier(write(tmp_path, older), converted)
    (folder := copy()).joinpath("nvquant_manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest of nvquant, .*\. Drop --verify-json"):
        read_earlier(write(tmp_path, proved), folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["checks"][0].update(stage="a"),
        lambda found: found["checks"][0].update(stage=None),
        lambda found: found["checks"][0].update(name=[1]),
        lambda found: found["checks"][0].update(passed="yes"),
        lambda found: found["checks"][0].update(faults={"a": 1}),
        lambda found: found["checks"][0].update(faults=[1]),
        lambda found: found.update(numerics=[1]),
        lambda found: found.update(serve="x"),
        lambda found: found.update(bench=3),
    ],
)
def test_a_proof_of_another_form_is_refused(
    change: Callable[[dict[str, Any]], None], converted: Path, proved: dict[str, Any], tmp_path: Path
) -> None:
    found = deepcopy(proved)
    change(found)
    with pytest.raises(InputError, match="is not a document of `nvquant verify --json`"):
        read_earlier(write(tmp_path, found), converted)


@pytest.mark.parametrize("found", [{}, {"checks": []}, {"checks": [1], "checkpoint": {}}, {"checks": {}}, {"a": 1}])
def test_another_json_is_refused(found: Any, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a document of `nvquant verify --json`"):
        read_earlier(write(tmp_path, found), converted)


def test_no_folder_of_the_machine_is_in_a_proof(copy: Callable[[], Path], tiny: Callable[[str], Path]) -> None:
    folder = copy()
    (folder / "model.safetensors.index.json").write_text("{")
    found = prove(folder, open_checkpoint(tiny("llama")), None, told)
    assert "index" in failed_checks(found) and "numerics" in stages_run(found)
    text = json.dumps(found)
    assert "checkpoint/model.safetensors.index.json is" in text
    assert str(folder.parent) not in text and str(tiny("llama").parent) not in text


def test_the_home_folder_becomes_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    found = {"checks": [{"faults": ["/home/ada/models/out/config.json, and /home/ada/x"]}], "n": 1}
    assert without_folders(found, [Path("/home/ada/models/out")]) == {
        "checks": [{"faults": ["out/config.json, and ~/x"]}],
        "n": 1,
    }


@pytest.mark.parametrize("key", ["faults", "stage", "looked_at", "name"])
@pytest.mark.parametrize("value", [5, None, {"a": 1}, [5]])
def test_a_document_of_another_form_is_refused_before_any_work(
    converted: Path, measured: dict[str, Any], tmp_path: Path, key: str, value: Any
) -> None:
    checks = [{**check, key: value, "passed": False} for check in measured["checks"]]
    with suppress(InputError):  # or a page can be made of it all the same
        earlier = read_earlier(write(tmp_path, {**measured, "checks": checks}), converted)
        render_markdown(page_of(earlier))
