"""`nvquant verify`: its words, its document and its exit codes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from nvquant.cli.main import main
from nvquant.verify.report import SHOWN_FAULTS, Check, Finding
from support.conversions import random_samples, write_ids
from verify.breaking import LAYER, bytes_of, edit_tensors
from verify.checkpoints import Copy
from verify.faults_files import chat_template_missing, hash_wrong


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, arguments)])
    code = stop.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


def test_a_good_checkpoint_exits_with_0_and_a_line_a_check(
    copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-ct")
    code, out, _ = run(capsys, made.folder, "--against", made.source, "--stage", "structure")
    lines = out.splitlines()
    assert code == 0
    size = sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    assert lines[0] == f"ok      headers        4 files, 92 tensors, {size:,} bytes"
    assert lines[-1] == "Passed: all 23 checks."
    assert all(line.startswith("ok ") for line in lines[:-1])


def test_a_failed_check_exits_with_1_and_names_the_offender(
    copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-ct")
    hash_wrong(made.folder)
    chat_template_missing(made.folder)
    code, out, _ = run(capsys, made.folder, "--against", made.source, "--stage", "structure")
    assert code == 1
    assert "FAILED  side_files     4 side files of the source\n           chat_template.jinja is missing\n" in out
    assert out.endswith("FAILED: 2 of 23 checks: hashes, side_files.\n")


def test_json_is_one_document_with_six_keys_a_check(
    copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-mo")
    hash_wrong(made.folder)
    code, out, _ = run(capsys, made.folder, "--json")
    document = json.loads(out)
    assert code == 1
    assert set(document) == {"passed", "checks", "checkpoint", "numerics", "serve"}
    assert document["passed"] is False
    keys = {"stage", "name", "passed", "detail", "looked_at", "faults"}
    assert all(set(check) == keys for check in document["checks"])
    assert {check["stage"] for check in document["checks"]} == {"structure"}
    assert [check["name"] for check in document["checks"] if not check["passed"]] == ["hashes"]
    assert (document["numerics"], document["serve"]) == (None, None)


# Predictions of random weights are nearly even, so that the likeliest token is no firm thing.
FEW = ("--samples", "2", "--sequence-length", "64", "--min-top1", "0.2")


def test_with_a_source_structure_and_numerics_are_proved(
    good: Callable[[str], Path], models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, good("llama-ct"), "--against", models["llama"], "--json", *FEW)
    document = json.loads(out)
    assert code == 0 and document["passed"]
    assert [check["stage"] for check in document["checks"]] == ["structure"] * 23 + ["numerics"] * 7
    assert document["numerics"]["text"]["name"] == "heldout.jsonl.xz"
    assert document["numerics"]["text"]["sequences"] == 2
    assert document["numerics"]["thresholds"] == {"max_kl": None, "min_top1": 0.2, "max_delta_nll": 1.0}
    assert document["checkpoint"]["name"] == "llama-ct" and document["checkpoint"]["source"] == "llama"
    assert document["checkpoint"]["recipe"] == "nvfp4-full"


def test_numerics_without_a_source_is_refused_before_any_work(
    good: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, good("llama-ct"), "--stage", "numerics")
    assert (code, out) == (2, "")
    assert err == "Error: --stage numerics compares with the source: name it with --against MODEL.\n"


@pytest.mark.parametrize(("option", "value", "check"), [("--max-kl", "0.0000001", "kl"), ("--min-top1", "1", "top1")])
def test_a_limit_that_is_not_kept_exits_with_1_and_names_its_check(
    option: str,
    value: str,
    check: str,
    good: Callable[[str], Path],
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [good("llama-ct"), "--against", models["llama"], "--stage", "numerics", *FEW]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.endswith("Passed: all 7 checks.\n")
    code, out, _ = run(capsys, *arguments, option, value)
    assert code == 1
    assert out.endswith(f"FAILED: 1 of 7 checks: {check}.\n")
    assert f"FAILED  {check} " in out


def test_text_of_ones_own_is_measured(
    good: Callable[[str], Path], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = write_ids(tmp_path / "mine.jsonl", random_samples((30, 20)))
    arguments = [good("llama-ct"), "--against", models["llama"], "--stage", "numerics", "--json", "--text", ids]
    code, out, _ = run(capsys, *arguments, *FEW)
    text = json.loads(out)["numerics"]["text"]
    assert code == 0
    assert (text["name"], text["framing"], text["tokens"], text["scored"]) == ("mine.jsonl", "ids", 50, 48)
    code, _, err = run(capsys, *arguments, "--samples", "3")
    assert code == 2
    assert err.startswith("Error: --text ") and "not 3" in err


def test_reports_are_written_whatever_the_verdict(
    copy: Callable[[str], Copy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-ct")
    hash_wrong(made.folder)
    folder, junit = tmp_path / "a" / "report", tmp_path / "b" / "checks.xml"
    code, out, _ = run(
        capsys, made.folder, "--against", made.source, *FEW, "--json", "--report", folder, "--junit", junit
    )
    assert code == 1
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "report.json", "junit.xml"}
    document = json.loads((folder / "report.json").read_text())
    assert document["checks"] == json.loads(out)["checks"]
    assert document["numerics"] == json.loads(out)["numerics"]
    suites = ElementTree.parse(junit).getroot()
    assert len(suites.findall(".//failure")) == 1
    run_ones = [case for case in suites.findall(".//testcase") if case.find("skipped") is None]
    assert len(run_ones) == 30  # the stage serve was not asked for


@pytest.mark.parametrize("option", ["--report", "--junit"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    option: str, good: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, good("llama-ct"), option, tmp_path / "file" / "inside" / "report")
    assert (code, out) == (2, "")
    assert err.startswith("Error: ") and "is not writable" in err
    assert err.count("\n") == 1


def test_numbers_that_json_does_not_know_are_words(
    copy: Callable[[str], Copy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-ct")
    with edit_tensors(made.folder) as tensors:
        norm = tensors[f"{LAYER}.input_layernorm.weight"]
        norm.data[:] = bytes_of(torch.full((64,), math.nan, dtype=torch.bfloat16))
    code, out, _ = run(capsys, made.folder, "--against", made.source, "--stage", "numerics", "--json", *FEW)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(out, parse_constant=refuse)
    assert code == 1
    assert document["numerics"]["arithmetics"]["w4a4"]["nll"] == "NaN"
    assert document["numerics"]["layers"][1]["w4a4"]["relative_error"] == "Infinity"
    failed = {check["name"] for check in document["checks"] if not check["passed"]}
    assert {"predictions", "nll", "layers", "inputs"} <= failed


def test_what_cannot_be_walked_any_more_keeps_its_verdict(
    copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    """Structure failed: the checkpoint is to blame, so this is a failed check and no wrong request."""
    made = copy("llama-ct")
    with edit_tensors(made.folder) as tensors:
        del tensors["model.norm.weight"]
    code, out, err = run(capsys, made.folder, "--against", made.source, *FEW)
    assert code == 1
    assert "FAILED  predictions    not measured\n" in out
    assert "lacks model.norm.weight" in out
    assert out.endswith("FAILED: 2 of 24 checks: names, predictions.\n")
    assert "Error" not in err
    code, out, err = run(capsys, made.folder, "--against", made.source, "--stage", "numerics", *FEW)
    assert (code, err.count("Error")) == (1, 0)
    assert "FAILED  complete " in out and "model.norm.weight is not stored" in out
    assert out.endswith("FAILED: 2 of 2 checks: complete, predictions.\n")


def test_only_the_first_few_faults_are_shown() -> None:
    check = Check("structure", "names", Finding("9 tensors", [f"{i} is missing" for i in range(SHOWN_FAULTS + 3)]))
    assert check.detail == "9 tensors; 0 is missing; 1 is missing; 2 is missing; 3 is missing; 4 is missing; and 3 more"


def test_wrong_input_exits_with_2_and_one_sentence(
    good: Callable[[str], Path], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([tmp_path / "nowhere"], "is not a folder"),
        ([tmp_path], "holds no config.json"),
        ([models["llama"]], "is not quantized"),
        ([good("llama-ct"), "--against", tmp_path / "nowhere"], "is not a folder"),
        ([good("llama-ct"), "--against", good("llama-mo")], "is quantized already"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("Error: ") and words in err
        assert err.count("\n") == 1


def test_damage_is_told_without_a_traceback(copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]) -> None:
    made = copy("llama-a16-ct")
    with edit_tensors(made.folder) as tensors:
        for stored in tensors.values():
            stored.data[:] = b"\xff" * len(stored.data)
    code, out, err = run(capsys, made.folder, "--against", made.source)
    assert code == 1
    assert "Traceback" not in out + err
