"""The documentation says what the repository holds: links lead somewhere, numbers are those of the kept results, and
every `nvquant` command in it is one that nvquant takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from nvquant.cli.main import cli
from support.synthetic_gemma4 import write_synthetic_gemma4

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# A command, after a prompt, settings of the environment, a list's dash, a YAML key, or a launcher's `-m`.
COMMAND = re.compile(
    r"(?:\$ |- |- run: |run: )?(?:[A-Z_]+=\S* )*(?:(?:accelerate|torchrun|python)\b.* -m )?nvquant (?!\d)(.+)"
)


def test_links_lead_to_files_of_the_repository() -> None:
    link = re.compile(r"\]\((?!https?://|#)([^)#]+)")
    targets = [(page, target) for page in PAGES for target in link.findall(page.read_text(encoding="utf-8"))]
    assert [(page.name, target) for page, target in targets if not (page.parent / target).exists()] == []


def test_benchmarks_that_are_named_exist() -> None:
    program = re.compile(r"python (benchmarks/\w+\.py)")
    named = [(page.name, found) for page in PAGES for found in program.findall(page.read_text(encoding="utf-8"))]
    assert [(page, found) for page, found in named if not (ROOT / found).exists()] == []


def test_the_page_of_benchmarks_says_what_the_results_say() -> None:
    program = [sys.executable, ROOT / "benchmarks" / "plot.py", "--check"]
    checked = subprocess.run(program, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def code_blocks(text: str) -> Iterator[str]:
    """The lines of fenced and indented code blocks; a line that ends in a backslash goes on in the next one."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def whole_commands(text: str) -> list[str]:
    """The arguments of each command that could be typed as it stands."""
    return [found[1] for line in code_blocks(text) if (found := COMMAND.fullmatch(line))]


def named_commands(text: str) -> list[str]:
    """What a text names in passing (`nvquant convert --low-disk`) or as usage (`nvquant push CHECKPOINT [--json]…`)."""
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"[\[\]…]", " ", found) for found in re.findall(r"`nvquant ([^`]+)`", prose)]


def command_of(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """The command that the first words name, and the words behind it; fails where there is none."""
    command: click.Command = cli
    context = click.Context(cli, info_name="nvquant")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        below = command.get_command(context, words[0])
        assert below is not None, f"{context.command_path} has no command {words[0]}"
        command, context, words = below, click.Context(below, parent=context, info_name=words[0]), words[1:]
    return command, context, words


def parse(line: str) -> None:
    """Take a line as the command line would, but for files that are not there; fails where that would."""
    command, context, words = command_of(shlex.split(line, comments=True))
    try:
        command.make_context(str(context.info_name), words, parent=context.parent)
    except click.exceptions.Exit:  # --help, --version
        pass
    except click.BadParameter as error:
        if "does not exist" not in error.message:
            raise


def test_commands_of_the_documentation_are_taken_by_the_command_line() -> None:
    refused = []
    for page in PAGES:
        for line in whole_commands(page.read_text(encoding="utf-8")):
            try:
                # A shell's redirection is no word of ours.
                parse(re.split(r" (?:>|2>|\||&&|\|\|) ?", line)[0])
            except (AssertionError, click.ClickException) as error:
                refused.append((page.name, line, str(error)))
    assert refused == []


def test_options_that_the_documentation_names_exist() -> None:
    unknown = []
    named = [(page, line) for page in PAGES for line in named_commands(page.read_text(encoding="utf-8"))]
    for page, line in named:
        try:
            command, context, words = command_of(line.split())
        except AssertionError as error:
            unknown.append((page.name, f"nvquant {line}", str(error)))
            continue
        known = {
            name for parameter in command.get_params(context) for name in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        unknown += [(page.name, f"nvquant {line}", option) for option in sorted(given - known)]
    assert unknown == []


def test_examples_in_the_help_are_taken_by_the_command_line() -> None:
    context = click.Context(cli, info_name="nvquant")
    commands = [cli.get_command(context, name) for name in cli.list_commands(context)]
    epilogs = [command.epilog for command in commands if command is not None and command.epilog]
    assert len(epilogs) >= 3
    for epilog in epilogs:
        lines = whole_commands("\n".join("    " + line for line in epilog.splitlines()))
        assert lines
        for line in lines:
            parse(re.split(r" > ", line)[0])


def test_the_plan_that_the_first_screen_shows_is_what_plan_prints(tmp_path: Path) -> None:
    """Of the 31B's real headers, in a folder that is called as the model on the Hub."""
    write_synthetic_gemma4(tmp_path / "google" / "gemma-4-31b")
    first = whole_commands((ROOT / "README.md").read_text(encoding="utf-8"))[0]
    assert first.startswith("plan google/gemma-4-31b")
    command = [sys.executable, "-m", "nvquant", *shlex.split(first)]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for page in (ROOT / "README.md", ROOT / "docs" / "tutorial.md"):
        assert f"$ nvquant {first}\n{printed}" in page.read_text(encoding="utf-8"), page.name


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("convret ./model", "has no command convret"),
        ("convert ./model --recipes nvfp4", "No such option"),
        ("convert", "Missing parameter: model"),
        ("convert ./model --device tpu", "is not one of"),
        ("convert ./model --samples 0", "0 is not in the range"),
    ],
)
def test_a_wrong_command_would_be_seen(line: str, said: str) -> None:
    with pytest.raises((AssertionError, click.ClickException), match=said):
        parse(line)


def test_commands_are_found_in_every_form_that_the_pages_use() -> None:
    page = """
Say `nvquant plan`, then `nvquant verify CHECKPOINT [--against MODEL]…`.

    $ nvquant plan ./a  # first
    nvquant 0.1.0: ./a -> b
    accelerate launch --num_processes 2 -m nvquant convert ./a \\
        --recipe nvfp4

```yaml
    - run: HF_HUB_OFFLINE=1 nvquant demo
```
"""
    assert whole_commands(page) == ["plan ./a  # first", "convert ./a          --recipe nvfp4", "demo"]
    assert named_commands(page) == ["plan", "verify CHECKPOINT  --against MODEL  "]
