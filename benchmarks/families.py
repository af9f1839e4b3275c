"""Convert a tiny model of every causal and image-text class that transformers knows, and write docs/families.md.

usage: python benchmarks/families.py [--only CLASS ...] [--again OUTCOME ...] [--limit SECONDS] [--page]

Each class runs in a process of its own with a time limit. The rows go to benchmarks/families.json after each class, so
that a sweep can be stopped and resumed: classes with a row are skipped. --again repeats those of an outcome, --only
those that it names. --page writes the page from the rows alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "families.json", HERE.parent / "docs" / "families.md"
POLL_SECONDS = 0.05
LIMIT_SECONDS = 120


def main() -> None:
    """Sweep, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--again", nargs="+", default=[])
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    rows = read_rows(options.rows)
    if not options.page:
        names = class_names()
        wanted = options.only or [name for name in names if name not in rows or rows[name]["outcome"] in options.again]
        for name in wanted:
            begun = time.monotonic()
            rows[name] = row = isolated(name, options.limit)
            print(
                f"{time.monotonic() - begun:5.1f} s  {name}: {row['outcome']} {row['stage']} {row['reason']}",
                flush=True,
            )
            write_rows(options.rows, {name: rows[name] for name in names if name in rows})
    if options.rows == ROWS:
        from families_page import page

        PAGE.write_text(page(list(rows.values()), json.loads(ROWS.read_text())["transformers"]), encoding="utf-8")


def class_names() -> list[str]:
    """The causal and image-text classes of the installed transformers, each once."""
    from transformers.models.auto import modeling_auto

    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    found = [name for table in tables for entry in table.values() for name in _each(entry)]
    return list(dict.fromkeys(found))


def _each(entry: Any) -> Iterable[str]:
    return [entry] if isinstance(entry, str) else entry


def isolated(name: str, limit: float) -> dict[str, Any]:
    """The row of a class, from a process of its own. Its end by a signal or the limit is a row too."""
    import family  # here, so that each class's process has it already

    ended = {**family.Row(name, outcome="ended").as_json()}
    folder = Path(tempfile.mkdtemp(prefix="families-"))
    child = os.fork()
    if child == 0:
        _child(name, folder)
    try:
        status = _wait(child, limit)
        path = folder / "row.json"
        if path.is_file():
            made: dict[str, Any] = json.loads(path.read_text())
            return made
        return {**ended, "reason": "the time limit" if status is None else f"the process ended with status {status}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(name: str, folder: Path) -> None:
    """Run a class and leave the process, whatever happens."""
    try:
        import family

        with (folder / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            row = family.sweep_class(name, folder)
        whole = folder / "row.tmp"
        whole.write_text(json.dumps(row.as_json()))
        whole.rename(folder / "row.json")
        os._exit(0)
    except BaseException:
        os._exit(1)


def _wait(child: int, limit: float) -> int | None:
    """The exit status of a process, or None where it had to be ended."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_SECONDS)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of earlier runs, by class."""
    if not path.is_file():
        return {}
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


def write_rows(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the file of rows."""
    import transformers

    document = {"transformers": transformers.__version__, "rows": list(rows.values())}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.rename(path)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
