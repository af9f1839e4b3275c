"""What commands print is quoted in one place."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import nvquant.cli
import pytest
from nvquant.cli.main import COMMANDS, cli
from nvquant.cli.output import Output, send_warnings_to_stderr
from nvquant.convert.progress import Progress
from support.commands import Command
from support.conversions import TinyModels

FOLDER = Path(nvquant.cli.__file__).parent
# output.py quotes; main.py shows errors, whose text is quoted already; verify.py shows workflow commands of its own.
MAY_ECHO = {"output.py": None, "main.py": None, "verify.py": 1}


@pytest.fixture
def loggers() -> Iterator[None]:
    """What a quiet command sets for its process."""
    level = logging.getLogger("nvquant").level
    yield
    logging.getLogger("nvquant").setLevel(level)


def test_no_command_prints_past_the_function_that_quotes() -> None:
    calls = {
        path.name: sum(
            isinstance(node, ast.Attribute) and ast.unparse(node) in ("click.echo", "click.secho", "sys.stdout.write")
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
        )
        for path in sorted(FOLDER.glob("*.py"))
    }
    assert {name: count for name, count in calls.items() if MAY_ECHO.get(name, 0) not in (None, count)} == {}


def test_whatever_is_printed_can_be_seen_and_commands_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process of its own
    nasty = "\x1b[31mred\n::error::pwned \u202e hf_abcdefghijk"
    out_of = Output()
    out_of.tell(nasty)
    out_of.say(nasty)
    out_of.table(["name", "bytes"], [[nasty, "[bold]5[/bold]"]])
    Output(is_json=True).report(lambda: {"name": nasty}, lambda: None)
    send_warnings_to_stderr()
    logging.getLogger("nvquant.x").warning("The Hub has it under the name %s", nasty)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "\x1b" not in text and "\u202e" not in text
        assert not any(line.lstrip().startswith("::") for line in text.splitlines())
    assert "[bold]5[/bold]" in out
    assert "hf_abc" not in err and err.count("hf_…") == 2


def everything(out: Output) -> None:
    out.say("a message")
    out.stages()(0, 0, "a phase")
    with out.conversion() as sink:
        sink(Progress("layers"))
    out.tell("a detail")
    out.table(["column"], [["row"]])
    out.report(lambda: {"key": "value"}, lambda: out.result("the result"))
    out.fail("it failed")


@pytest.mark.parametrize(
    ("is_json", "is_quiet", "stdout", "messages"),
    [
        (False, False, "a detail\ncolumn\nrow   \nthe result\n", True),
        (True, False, '{\n  "key": "value"\n}\n', True),
        (False, True, "the result\n", False),
        (True, True, '{\n  "key": "value"\n}\n', False),
    ],
)
def test_each_mode_decides_for_each_method(
    is_json: bool, is_quiet: bool, stdout: str, messages: bool, capsys: pytest.CaptureFixture[str], loggers: None
) -> None:
    everything(Output(is_json, is_quiet))
    out, err = capsys.readouterr()
    assert out == stdout
    *said, last = err.splitlines()
    assert last == "Error: it failed"
    assert [line in said for line in ("a message", "a phase")] == [messages, messages]
    assert any("phase=layers" in line for line in said) is messages
    assert bool(said) is messages


def test_a_command_asks_for_no_mode() -> None:
    for path in FOLDER.glob("*.py"):
        if path.name not in ("output.py", "main.py"):  # main.py prints errors
            assert not re.search(r"\bif (not )?(as_json|out\.is_json)\b", path.read_text("utf-8")), path


QUIET = ("convert", "distill", "verify", "push", "bench", "demo", "sweep")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_with_progress_can_be_quiet(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert ("--quiet" in [option for parameter in command.params for option in parameter.opts]) is (name in QUIET)


def test_a_quiet_chain_prints_results_alone(
    nvquant: Command, tiny: TinyModels, tmp_path: Path, loggers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = nvquant("convert", tiny("llama"), "-o", "out", "--recipe", "nvfp4-a16", "--device", "cpu", "--quiet")
    assert (made.code, made.stderr) == (0, "")
    assert made.stdout.startswith("out: 71 tensors") and made.stdout.count("\n") == 1
    proved = nvquant("verify", "out", "-q", "--report", "proof")
    assert (proved.code, proved.stderr) == (0, "")
    assert re.fullmatch(r"Passed: all \d+ checks\.\n", proved.stdout)
    refused = nvquant("convert", tiny("llama"), "-o", "out", "--recipe", "nvfp4-full", "--device", "cpu", "--quiet")
    assert refused.code == 2 and refused.stdout == ""
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1
