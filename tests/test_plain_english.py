"""Documents, help and messages follow the part of "Plain English" in CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from nvquant.cli.main import COMMANDS, cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("calibration/*.md"),
        *ROOT.glob("integrations/*/*.md"),
    ]
)
ROOMS = sorted(path.parent.name for path in (ROOT / "quantize").glob("*/__init__.py"))
LEAST_WORDS = 4  # of a text that counts as a message
# Modules whose texts are programs, style sheets, lines of vLLM's log, or prose that a model reads.
STYLE_SHEETS = {"publish/chart.py", "sweep/chart.py"}
NO_MESSAGES = {*STYLE_SHEETS, "calibrate/template.py", "serving/log.py", "verify/served_tokens.py"}

TOLD = re.compile(r"\b(?:is|are|was|were|be|been)(?: not| never| only)? (?:told|asked|held|said)\b", re.IGNORECASE)
# A clause that begins with "what" and has it as its subject or object: no question ends it.
WHAT = re.compile(r"(?:^|[.:;,(] (?:(?:and|but|or) )?)[Ww]hat [a-z](?![^.!]*\?)")
SEMICOLON = re.compile(r";(?:\s|$)")


def faults_of(text: str, semicolons: bool) -> list[str]:
    """The pieces of a text that break a rule.

    Args:
        semicolons: whether the rule against semicolons applies.
    """
    rules = [TOLD, WHAT, SEMICOLON] if semicolons else [TOLD, WHAT]
    plain = " ".join(text.split())
    return [plain[max(0, found.start() - 20) : found.end() + 20] for rule in rules for found in rule.finditer(plain)]


def prose_of(markdown: str) -> Iterator[str]:
    """The paragraphs, list items, headings and table cells of a page, without code and without what links lead to."""
    text = re.sub(r"^( *)```.*?^\1```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`\n]+`", "`code`", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-|#]|\d+\.) ?)", text):
        if not paragraph.startswith("    "):
            yield from paragraph.strip().strip("|").split("|")


def message_of(node: ast.expr) -> str:
    """The constant text of an expression, with a word in place of each value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(message_of(value) if isinstance(value, ast.Constant) else "VALUE" for value in node.values)
    if isinstance(node, ast.BinOp):
        return message_of(node.left) + message_of(node.right)
    if isinstance(node, ast.IfExp):
        return f"{message_of(node.body)}\n{message_of(node.orelse)}"
    return ""


def messages_of(source: str) -> list[str]:
    """The texts of a module that a user may read: all of some words that are no docstring and no part of another."""
    tree = ast.parse(source)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.JoinedStr, ast.BinOp, ast.IfExp)) and message_of(node):
            skipped |= {id(part) for part in ast.walk(node) if part is not node}
    texts = [message_of(node) for node in ast.walk(tree) if isinstance(node, ast.expr) and id(node) not in skipped]
    return [text for text in texts if len(text.split()) >= LEAST_WORDS]


def every_command() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli, info_name="nvquant")
    yield "nvquant", cli
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from command.commands.items()


def test_documents_are_plain() -> None:
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").partition("## Plain English")[0]  # that section quotes what to avoid
        found[str(page.relative_to(ROOT))] = [fault for part in prose_of(text) for fault in faults_of(part, False)]
    assert {page: faults for page, faults in found.items() if faults} == {}


def test_help_is_plain() -> None:
    found: list[tuple[str, str]] = []
    for name, command in every_command():
        helps = [
            (option.name, text) for option in command.params if (text := getattr(option, "help", None)) is not None
        ]
        for text in [command.help or "", COMMANDS.get(name, ""), *(text for _, text in helps)]:
            found += [(name, fault) for fault in faults_of(text, semicolons=True)]
        no_sentence = [(option, text) for option, text in helps if not re.fullmatch(r"[A-Z].*\.", text, re.DOTALL)]
        found += [(name, f"{option}: no sentence: {text}") for option, text in no_sentence]
    assert found == []


def test_messages_are_plain() -> None:
    found = {}
    for path in sorted(path for room in ROOMS for path in (ROOT / "quantize" / room).rglob("*.py")):
        module = str(path.relative_to(ROOT / "quantize"))
        if module not in NO_MESSAGES:
            texts = messages_of(path.read_text(encoding="utf-8"))
            found[module] = [fault for text in texts for fault in faults_of(text, semicolons=True)]
    assert {module: faults for module, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        ("The file is complete; push it.", False),
        ("None is asked for by default.", False),
        ("The bytes are not held against the hash.", False),
        ("What differs is refused.", False),
        ("The bytes are those, and what is left is copied.", False),
        ("What does the report contain?", True),
        ("This shows what the run reads.", True),
        ("The server holds the weights. Two GPUs are held-out.", False),
        ("Drop one of the two options.", True),
    ],
)
def test_each_rule_finds_its_faults(text: str, is_plain: bool) -> None:
    assert (faults_of(text, semicolons=True) == []) is is_plain


def test_messages_are_found_in_every_form() -> None:
    source = '''
"""A docstring; of a module."""
HINT = "a hint; kept as data"
raise InputError(f"{name}: it is gone; " + "look there" if name else "there is none; at all")
click.echo("a line; of output")
log.warning("%s is late; wait", name)
say(f"{x} and more; {y}")
key = "a; b"
'''
    assert sorted(messages_of(source)) == [
        "%s is late; wait",
        "VALUE and more; VALUE",
        "VALUE: it is gone; look there\nthere is none; at all",
        "a hint; kept as data",
        "a line; of output",
    ]
