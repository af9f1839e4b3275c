"""Whatever goes wrong, a user reads one sentence: errors that no code foresaw, and streams that are closed or full."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest
from nvquant.cli import main as cli
from nvquant.errors import InputError
from support.tiny_models import tiny_llama

NVQUANT = (sys.executable, "-m", "nvquant")


def ended(error: BaseException, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    @click.command("recipes")
    @click.option("--debug", is_flag=True)
    def fails(debug: bool) -> None:
        raise error

    monkeypatch.setattr(cli._LazyGroup, "get_command", lambda *_: fails)
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


ERRORS: dict[str, tuple[BaseException, int, str]] = {
    "a fault of ours": (KeyError("a\nError: b\x1b[31m"), 2, "(KeyError at test_last_resort.py:"),
    "a recursion": (RecursionError("maximum recursion depth exceeded"), 2, "(RecursionError at "),
    "a character that no stream takes": ("\ud800".encode, 2, "UnicodeEncodeError"),  # type: ignore[dict-item]
    "a file": (PermissionError(errno.EACCES, "Permission denied", "some/file"), 2, "Error: 'some/file': Permission"),
    "two files": (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), 2, "Error: 'a' and 'b': Cross-device"),
    "no room for a file": (OSError(errno.ENOSPC, "No space left on device", "out/x"), 3, "Error: 'out/x': No space"),
    "no memory": (MemoryError(), 3, "This machine ran out of memory"),
    "a message without end": (InputError("x" * 100_000 + ": give another file."), 2, "x: give another file."),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_sentence(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code, words = ERRORS[case]
    if callable(error):
        with pytest.raises(UnicodeEncodeError) as caught:
            error()
        error = caught.value
    assert ended(error, ["recipes"], monkeypatch) == code
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and words in said
    assert len(said.splitlines()) == 1 and len(said) < 1500 and said.rstrip("\n").isprintable()


def test_debug_shows_the_traceback_of_any_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(KeyError("hf_abcdefghijkl"), ["recipes", "--debug"], monkeypatch) == 2
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "hf_abcdef" not in said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("streams") / "model")


def shell(line: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A line of bash in which "$@" is nvquant with these words."""
    return subprocess.run(
        ["bash", "-c", line, "bash", *NVQUANT, *map(str, words)], capture_output=True, text=True, timeout=100
    )


def test_a_reader_that_goes_away_ends_the_command_without_a_word(model: Path) -> None:
    for words in (["plan", model], ["plan", model, "--json"], ["recipes", "show", "nvfp4"], ["--help"]):
        done = shell('"$@" | true; exit ${PIPESTATUS[0]}', *words)
        assert (done.returncode, done.stderr) in ((3, ""), (0, ""))  # 0: it was read before the reader went
    done = shell('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', "plan", "nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_full_disk_behind_the_results_is_one_sentence(model: Path) -> None:
    for words in (["plan", model], ["plan", model, "--json"], ["recipes"], ["--help"]):
        done = shell('"$@" > /dev/full', *words)
        assert done.returncode == 3
        assert done.stderr == (
            "Error: The results cannot be written (No space left on device): write them to a place with free space.\n"
        )


def test_closed_streams_are_no_error(model: Path) -> None:
    for close in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        assert shell(f'"$@" {close}', "plan", model).returncode == 0
        assert shell(f'"$@" {close}', "plan", "nowhere").returncode == 2
    assert "embedding" in shell('"$@" <&- 2>&-', "plan", model).stdout
    assert shell('"$@" >&- 2>/dev/full', "plan", "nowhere").returncode == 2
    assert shell('"$@" 2>/dev/full', "plan", "--no-such-option").returncode == 2
