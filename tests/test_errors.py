"""An error has fields, one place makes its sentence, and `--json` prints the fields."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import pytest
from nvquant.errors import InputError, NonFiniteError, NvquantError, ShapeError, phrase
from support.commands import Command, run_command
from support.conversions import TinyModels


@pytest.fixture
def nvquant(capfd: pytest.CaptureFixture[str]) -> Command:
    return partial(run_command, capfd)


@pytest.mark.parametrize(
    ("what", "where", "hint", "sentence"),
    [
        ("it is gone", "a.bin", "download it again", "a.bin: it is gone: download it again."),
        ("a.bin ends early", "a.bin", "download it again", "a.bin ends early: download it again."),
        ("it does nothing here", "--x", "Drop the option", "--x: it does nothing here. Drop the option."),
        ("it needs a package", None, "`pip install x`", "it needs a package: `pip install x`."),
        ("The cause.", "vLLM stopped", "vLLM 0.33 repairs it", "vLLM stopped: The cause. vLLM 0.33 repairs it."),
        ("One sentence.", None, None, "One sentence."),
    ],
)
def test_a_sentence_is_made_of_the_fields(what: str, where: str | None, hint: str | None, sentence: str) -> None:
    assert phrase(what, where, hint) == sentence
    assert str(InputError(what, where=where, hint=hint)) == sentence


def test_errors_of_weights_name_the_weight() -> None:
    assert str(ShapeError("w", (2, 7))) == (
        "w has shape [2, 7], whose last axis is not a multiple of 16: remove it from the recipe's quantize list."
    )
    assert str(NonFiniteError("w", 3, 5)) == (
        "w holds a NaN or an infinity at row 3, column 5: the source model is damaged, download it again."
    )
    assert ShapeError("w", (2, 7)).as_json() == {
        "what": "w has shape [2, 7], whose last axis is not a multiple of 16",
        "where": "w",
        "hint": "remove it from the recipe's quantize list",
        "exit_code": 2,
    }


def test_an_error_keeps_its_fields_through_a_process_and_takes_a_further_sentence() -> None:
    error = InputError("it is gone", where=Path("a.bin"), hint="use --calibration")
    error.rename("--calibration", "--text")
    error.add("Two layers are kept.")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.bin: it is gone: use --text. Two layers are kept."
    assert copy.as_json() == error.as_json()
    assert error.as_json()["hint"] == "use --text. Two layers are kept."


def test_fields_are_quoted_as_the_sentence_is() -> None:
    found = NvquantError("a\x1b[31m\n::error::x", where="hf_abcdefghijkl", hint="b\x1b").as_json()
    assert json.dumps(found).isprintable() and "\\x1b" in found["what"] and found["where"] == "hf_…"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("plan", "./nowhere"), 2, "nowhere is not a folder"),
        (("plan",), 2, "Missing argument 'MODEL'."),
        (("plan", "a", "--format", "gguf"), 2, "'gguf' is not one of"),
        (("convert", "MODEL", "--low-disk"), 2, "--low-disk works only for models on the Hub"),
        (("verify", "MODEL"), 2, "is not quantized"),
    ],
)
def test_with_json_a_failure_is_one_document_beside_its_sentence(
    nvquant: Command, tiny: TinyModels, arguments: tuple[str, ...], code: int, words: str
) -> None:
    given = [tiny("llama") if word == "MODEL" else word for word in arguments]
    ended = nvquant(*given, "--json")
    error = json.loads(ended.stdout)["error"]
    assert list(json.loads(ended.stdout)) == ["error"]
    assert list(error) == ["what", "where", "hint", "exit_code"]
    assert ended.code == error["exit_code"] == code
    assert words in error["what"]
    assert "Error: " in ended.stderr and words in ended.stderr
    alone = nvquant(*given)
    assert (alone.code, alone.stdout, alone.stderr) == (code, "", ended.stderr)


def test_of_several_ranks_the_first_prints_the_document(nvquant: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    ended = nvquant("plan", "./nowhere", "--json")
    assert ended.code == 2 and ended.stdout == ""
