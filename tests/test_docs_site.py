"""The documentation's site builds without a warning, has a page for each command, and no link of it leads nowhere."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import click
import pytest
from nvquant.cli.main import cli

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/nvquant/nvquant/"
FILES_OF_THE_REPOSITORY = re.compile(re.escape(REPOSITORY) + r"(?:blob|tree)/main/(.+)")
needs_mkdocs = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs: pip install .[docs]")


def build(top: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Never with --quiet, which hides warnings from --strict too.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def commands_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_commands", ROOT / "docs" / "site" / "commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Page(HTMLParser):
    """What a page links to, which anchors it has, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.links += [found[name] for name in ("href", "src") if name in found]
        self.anchors |= {found["id"]} if "id" in found else set()

    def handle_data(self, data: str) -> None:
        self.words += data


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            its = click.Context(below, parent=context, info_name=name)
            yield below, its
            yield from walk(below, its)


def every_command() -> list[tuple[click.Command, click.Context]]:
    return list(walk(cli, click.Context(cli, info_name="nvquant")))


@needs_mkdocs
def test_every_command_has_a_page_that_names_every_option_argument_and_example(site: Path) -> None:
    assert len(every_command()) >= 9
    for command, context in every_command():
        page = Page(site / "commands" / "-".join(context.command_path.split()[1:]) / "index.html")
        assert context.command_path in page.words
        for parameter in command.params:
            named = [parameter.name.upper()] if isinstance(parameter, click.Argument) and parameter.name else []
            named += [*parameter.opts, *parameter.secondary_opts] if isinstance(parameter, click.Option) else []
            assert [name for name in named if name not in page.words] == [], context.command_path
        examples = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("nvquant")]
        assert [line for line in examples if line not in page.words] == []
        assert "the environment lacks something" in page.words


@needs_mkdocs
def test_every_command_is_in_the_menu_of_the_front_page(site: Path) -> None:
    links = Page(site / "index.html").links
    for _, context in every_command():
        assert f"commands/{'-'.join(context.command_path.split()[1:])}/" in links


@needs_mkdocs
def test_the_front_page_is_the_readme(site: Path) -> None:
    title = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert f">{title}<" in (site / "index.html").read_text(encoding="utf-8")


@needs_mkdocs
def test_no_link_of_the_site_leads_nowhere(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 20
    lost = [
        f"{name}: {link}"
        for name, page in pages.items()
        for link in page.links
        if leads_nowhere(link, name, pages, site)
    ]
    assert lost == []


def leads_nowhere(link: str, name: str, pages: dict[str, Page], site: Path) -> bool:
    if of_repository := FILES_OF_THE_REPOSITORY.match(link):
        return not (ROOT / of_repository[1].partition("#")[0]).exists()
    parts = urlsplit(link)
    if parts.scheme:  # another server, which a test does not ask
        return parts.scheme not in ("https", "mailto")
    path = posixpath.join(posixpath.dirname(name), unquote(parts.path)) if parts.path else name
    path = posixpath.normpath(path.removeprefix("/nvquant/") or ".")  # the page 404 knows not where it is shown
    if (site / path).is_dir():
        path = posixpath.normpath(posixpath.join(path, "index.html"))
    if not (site / path).is_file():
        return True
    return bool(parts.fragment) and path in pages and parts.fragment not in pages[path].anchors


@needs_mkdocs
def test_pages_load_nothing_from_another_server(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"(https?://[^\"]+)", path.read_text("utf-8")
        )
        foreign = {urlsplit(link).netloc for link in loaded}
        # A badge is a picture of the place that it tells of; the canonical address is no load.
        assert foreign <= {"nvquant.github.io", "github.com", "img.shields.io"}, path


@needs_mkdocs
@pytest.mark.parametrize(
    ("page", "added", "said"),
    [
        ("recipes.md", "[gone](../benchmarks/gone.py)", "'../benchmarks/gone.py'"),
        ("recipes.md", "[gone](verification.md#no-such-heading)", "'verification.md#no-such-heading'"),
        ("new.md", "no link, but in no menu", "new.md"),
    ],
    ids=["file", "anchor", "menu"],
)
def test_a_broken_link_or_a_page_in_no_menu_fails_the_build(page: str, added: str, said: str, tmp_path: Path) -> None:
    top = tmp_path / "top"
    shutil.copytree(ROOT / "docs", top / "docs")
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, top / name)
    for name in ("benchmarks", "calibration", "integrations", "recipes", "quantize"):
        (top / name).symlink_to(ROOT / name)
    with (top / "docs" / page).open("a", encoding="utf-8") as file:
        file.write(f"\n\n# More\n\n{added}\n")
    built = build(top, tmp_path / "site")
    assert built.returncode != 0
    assert re.search(rf"WARNING.*{re.escape(said)}|WARNING.*\n.*{re.escape(said)}", built.stderr)


def test_a_new_command_gets_its_page_by_itself(commands_module: ModuleType) -> None:
    @click.group(help="All of them.\n\n\b\nExit codes:\n  0  fine\n  3  a | b")
    def group() -> None: ...

    @group.command("new", help="Do WHAT *now*.\n\nSee `a_b`.", epilog="\b\nExamples:\n  tool new x --n 2\n")
    @click.argument("what")
    @click.option("--n", type=click.IntRange(min=1), default=4, help="How <many>.")
    @click.option("--kind", type=click.Choice(["a", "b"]), help="Which.")
    @click.option("--deep/--flat", default=True, help="How.")
    @click.option("--size", type=click.IntRange(min=2), show_default="the *best*", help="Size.")
    def new(what: str, n: int, kind: str, deep: bool, size: int) -> None: ...

    overview, page = commands_module.command_pages(group, "tool")
    assert [overview.path, page.path, page.title] == ["commands/index.md", "commands/new.md", "new"]
    assert overview.text.startswith("# Commands\n\nAll of them.\n\n```text\ntool [OPTIONS] COMMAND [ARGS]...\n```")
    assert "| [`tool new`](new.md) | Do WHAT \\*now\\*. |" in overview.text
    assert page.text.startswith(
        "# tool new\n\nDo WHAT \\*now\\*.\n\nSee `a_b`.\n\n```text\ntool new [OPTIONS] WHAT\n```"
    )
    assert "| `WHAT` | required |" in page.text
    assert "| `--n INTEGER` | How \\<many\\>. (at least 1) | `4` |" in page.text
    assert "| `--kind [a|b]` | Which. |  |" in page.text
    assert "| `--deep / --flat` | How. | `deep` |" in page.text
    assert "| `--size INTEGER` | Size. (at least 2) | the \\*best\\* |" in page.text
    assert "## Examples\n\n```text\ntool new x --n 2\n```" in page.text
    assert page.text.endswith("## Exit codes\n\n| code | meaning |\n| --- | --- |\n| 0 | fine |\n| 3 | a \\| b |\n")


def test_exit_codes_that_the_help_no_longer_lists_are_missed(commands_module: ModuleType) -> None:
    with pytest.raises(ValueError, match="lists no exit codes"):
        commands_module.command_pages(click.Group("tool", help="All of them."), "tool")
