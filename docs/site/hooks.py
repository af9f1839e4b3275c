"""What MkDocs runs while it builds: pages from click and from the repository's top, and links that lead out of docs/.

In the sources a link leads to a file of the repository (`../benchmarks/judged.py`), as GitHub wants it. On the site a
link to a page stays a link to a page, and any other file is shown by the repository. A link to a file that does not
exist is left as it is, for MkDocs to refuse.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from commands import command_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# Files of the repository's top that are pages of the site: no second copy is kept.
TOP_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# The entry of the menu that becomes all commands.
COMMANDS = "Commands"
LINK = re.compile(r"(\]\(|^\[[^\]]+\]:\s*)(?![a-z][a-z+.-]*:|#|/)([^)\s#]+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each command into the menu."""
    pages = [{page.title: page.path} for page in _command_pages()]
    config.nav = [{COMMANDS: pages} if COMMANDS in entry else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    top = _top(config)
    for name, path in TOP_PAGES.items():
        files.append(File.generated(config, path, content=(top / name).read_text(encoding="utf-8")))
    for page in _command_pages():
        files.append(File.generated(config, page.path, content=page.text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of one page."""
    path = page.file.src_uri
    source = {made: name for name, made in TOP_PAGES.items()}.get(path, f"docs/{path}")
    return LINK.sub(lambda link: link[1] + _target(link[2], source, path, config), markdown)


def _target(link: str, source: str, path: str, config: MkDocsConfig) -> str:
    """Where a link of the file `source`, which is the page `path`, leads on the site."""
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    page = TOP_PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    if page is not None:
        return posixpath.relpath(page, posixpath.dirname(path) or ".")
    there = _top(config) / file
    if file.startswith("..") or not there.exists():
        return link
    return f"{config.repo_url.rstrip('/')}/{'tree' if there.is_dir() else 'blob'}/main/{file}"


def _top(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def _command_pages() -> list[Any]:
    from nvquant.cli.main import cli

    return command_pages(cli, "nvquant")
