"""A page for each command, generated from click: the output of `nvquant COMMAND --help` as Markdown.

This module knows no command by name. Every command that `nvquant.cli.main.cli` lists gets a page and a menu entry.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

import click

# click sets a paragraph apart by this line; its lines are kept as they are.
AS_IS = "\b"


@dataclass(frozen=True)
class CommandPage:
    """A page of the site: its address below the documentation's folder, its title, its Markdown."""

    path: str
    title: str
    text: str


def command_pages(root: click.Command, name: str, folder: str = "commands") -> list[CommandPage]:
    """The overview of a group of commands, then a page for each command in it, commands of commands included.

    Args:
        root: the group.
        name: what it is called as, `nvquant`.
        folder: where the pages lie.
    """
    # Defaults are always told, also where --help leaves them out.
    context = click.Context(root, info_name=name, show_default=True, **root.context_settings)
    found = list(_walk(root, context))
    codes = _exit_codes(root)
    pages = [CommandPage(f"{folder}/index.md", "Overview", _overview(found, context, codes))]
    for command, its in found[1:]:
        title = its.command_path.removeprefix(f"{name} ")
        pages.append(CommandPage(f"{folder}/{_file(its)}", title, _page(command, its, codes)))
    return pages


def _walk(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from _walk(below, click.Context(below, parent=context, info_name=name, show_default=True))


def _file(context: click.Context) -> str:
    return "-".join(context.command_path.split()[1:]) + ".md"


def _page(command: click.Command, context: click.Context, codes: dict[str, str]) -> str:
    parts = [f"# {context.command_path}", _prose(command.help), _usage(command, context)]
    parts += [_arguments(command, context), _subcommands(command, context), _options(command, context)]
    if command.epilog:
        parts += ["## Examples", re.sub(r"^Examples:\n+", "", _prose(command.epilog))]
    parts += ["## Exit codes", _codes_table(codes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _overview(found: list[tuple[click.Command, click.Context]], context: click.Context, codes: dict[str, str]) -> str:
    rows = [
        [f"[`{its.command_path}`]({_file(its)})", _cell(command.get_short_help_str(limit=200))]
        for command, its in found[1:]
    ]
    root = found[0][0]
    parts = ["# Commands", _prose(_without_codes(root.help or "")), _usage(root, context)]
    parts += [_table(["command", "effect"], rows), _options(root, context), "## Exit codes", _codes_table(codes)]
    return "\n\n".join(parts) + "\n"


def _usage(command: click.Command, context: click.Context) -> str:
    return _block(" ".join([context.command_path, *command.collect_usage_pieces(context)]))


def _arguments(command: click.Command, context: click.Context) -> str:
    rows = []
    for argument in command.get_params(context):
        if isinstance(argument, click.Argument):
            how = "required" if argument.required else "optional"
            rows.append([f"`{argument.make_metavar(context).strip('[]')}`", how + ", several" * (argument.nargs == -1)])
    return "## Arguments\n\n" + _table(["argument", ""], rows) if rows else ""


def _subcommands(command: click.Command, context: click.Context) -> str:
    if not isinstance(command, click.Group):
        return ""
    below = [(its, one) for one, its in _walk(command, context)][1:]
    rows = [[f"[`{its.command_path}`]({_file(its)})", _cell(one.get_short_help_str(200))] for its, one in below]
    return "## Commands\n\n" + _table(["command", "effect"], rows)


def _options(command: click.Command, context: click.Context) -> str:
    rows = []
    for option in command.get_params(context):
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None:
            words, default = _split_default(record[1])
            declared = record[0].replace(" RANGE", "")
            rows.append([f"`{declared}`", _cell(words), _default_cell(default)])
    return "## Options\n\n" + _table(["option", "effect", "default"], rows)


def _split_default(words: str) -> tuple[str, str]:
    """What click wrote behind the help, `[default: 1; x>=1]`, parted: the rest stays with the help."""
    behind = re.search(r"\s*\[((?:default: |x|[-\d]|required)[^\[\]]*)\]$", words)
    if behind is None:
        return words, ""
    extras = behind[1].split("; ")
    default = "".join(one.removeprefix("default: ") for one in extras if one.startswith("default: "))
    rest = ", ".join(_range(one) for one in extras if not one.startswith("default: "))
    return words[: behind.start()] + (f" ({rest})" if rest else ""), default.strip('"')


def _default_cell(default: str) -> str:
    """A value as code. click puts a description of a default in parentheses, and that stays text."""
    if default.startswith("(") and default.endswith(")"):
        return _cell(default[1:-1])
    return f"`{default}`" if default else ""


def _range(extra: str) -> str:
    """`x>=1` and `0<=x<=1` in words."""
    words = re.sub(r"^(\S+)<=x<=(\S+)$", r"\1 to \2", extra)
    return re.sub(r"^x>(\S+)$", r"above \1", re.sub(r"^x>=(\S+)$", r"at least \1", words))


def _prose(help_text: str | None) -> str:
    """A docstring in click's own form as Markdown: paragraphs, and blocks that are kept as they are."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(help_text or "")):
        lines = paragraph.strip("\n").splitlines()
        if lines and lines[0].strip() == AS_IS:
            parts.append(_kept(lines[1:]))
        else:
            parts.append(_escaped(" ".join(line.strip() for line in lines)))
    return "\n\n".join(part for part in parts if part)


def _kept(lines: list[str]) -> str:
    """A block kept as it is; a line that ends in a colon and stands before indented ones introduces them."""
    if len(lines) > 1 and lines[0].endswith(":") and lines[1].startswith(" "):
        return f"{_escaped(lines[0])}\n\n{_block(inspect.cleandoc(chr(10).join(lines[1:])))}"
    return _block("\n".join(lines))


def _without_codes(help_text: str) -> str:
    return re.sub(r"\x08\n\s*Exit codes:.*?(?=\n\s*\n|\Z)", "", help_text, flags=re.DOTALL)


def _exit_codes(root: click.Command) -> dict[str, str]:
    """Code → meaning, as the group's help lists them for all commands."""
    listed = re.search(r"Exit codes:(.*?)\.?\s*(?:\n\s*\n|\Z)", root.help or "", re.DOTALL)
    if listed is None:
        raise ValueError(
            "the help of `nvquant` lists no exit codes (`Exit codes:`, then a line for each), which every page shows"
        )
    return {
        code: meaning for line in listed[1].strip().splitlines() for code, _, meaning in [_words(line).partition(" ")]
    }


def _words(line: str) -> str:
    return " ".join(line.split())


def _codes_table(codes: dict[str, str]) -> str:
    return _table(["code", "meaning"], [[code, _cell(meaning)] for code, meaning in codes.items()])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    return _escaped(_words(text))


def _escaped(text: str) -> str:
    """Text whose signs mean nothing in Markdown, but for code in backticks, which stays code."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*_\[\]<>#|])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _block(text: str) -> str:
    return f"```text\n{text}\n```"
