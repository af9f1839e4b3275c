"""`nvquant verify`: its words, its document and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nvquant.cli.main import main
from nvquant.verify.report import SHOWN_FAULTS, Check, Finding
from verify.breaking import edit_tensors
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
    assert lines[-1] == "Passed: all 21 checks."
    assert all(line.startswith("ok ") for line in lines[:-1])


def test_a_failed_check_exits_with_1_and_names_the_offender(
    copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-ct")
    hash_wrong(made.folder)
    chat_template_missing(made.folder)
    code, out, _ = run(capsys, made.folder, "--against", made.source)
    assert code == 1
    assert "FAILED  side_files     4 side files of the source\n           chat_template.jinja is missing\n" in out
    assert out.endswith("FAILED: 2 of 21 checks: hashes, side_files.\n")


def test_json_is_one_document_with_four_keys_a_check(
    copy: Callable[[str], Copy], capsys: pytest.CaptureFixture[str]
) -> None:
    made = copy("llama-mo")
    hash_wrong(made.folder)
    code, out, _ = run(capsys, made.folder, "--json")
    document = json.loads(out)
    assert code == 1
    assert set(document) == {"passed", "checks"}
    assert document["passed"] is False
    assert all(set(check) == {"stage", "name", "passed", "detail"} for check in document["checks"])
    assert {check["stage"] for check in document["checks"]} == {"structure"}
    assert [check["name"] for check in document["checks"] if not check["passed"]] == ["hashes"]


def test_only_the_first_few_faults_are_shown() -> None:
    check = Check("structure", "names", Finding("9 tensors", [f"{i} is missing" for i in range(SHOWN_FAULTS + 3)]))
    assert check.detail == "9 tensors; 0 is missing; 1 is missing; 2 is missing; 3 is missing; 4 is missing; and 3 more"


@pytest.mark.parametrize("stage", ["numerics", "serve"])
def test_a_stage_that_does_not_exist_yet_is_refused(
    stage: str, good: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, good("llama-ct"), "--stage", stage)
    assert code == 2
    assert "--stage" in err


def test_wrong_input_exits_with_2_and_one_sentence(
    good: Callable[[str], Path], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([tmp_path / "nowhere"], "is not a folder"),
        ([tmp_path], "config.json is missing"),
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
