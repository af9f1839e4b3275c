"""What commands print is quoted in one place."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import nvquant.cli
import pytest
from nvquant.cli.output import emit_json, print_table, say, send_warnings_to_stderr, tell

FOLDER = Path(nvquant.cli.__file__).parent
# output.py quotes; main.py shows errors, whose text is quoted already; verify.py shows workflow commands of its own.
MAY_ECHO = {"output.py": None, "main.py": None, "verify.py": 1}


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
    tell(nasty)
    say(nasty)
    print_table(["name", "bytes"], [[nasty, "[bold]5[/bold]"]])
    emit_json({"name": nasty})
    send_warnings_to_stderr()
    logging.getLogger("nvquant.x").warning("The Hub has it under the name %s", nasty)
    out, err = capsys.readouterr()
    for text in (out, err):
        assert "\x1b" not in text and "\u202e" not in text
        assert not any(line.lstrip().startswith("::") for line in text.splitlines())
    assert "[bold]5[/bold]" in out
    assert "hf_abc" not in err and err.count("hf_…") == 2
