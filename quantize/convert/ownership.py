"""Which entries of a folder nvquant wrote itself. Only these are ever removed. A message names any other entry.

A run lists the files that it is going to write in its journal. A finished output lists its shards in its manifest, and
its side files have known names. A folder of an earlier release has no list in its journal: there the form of a name
decides.
"""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from ..checkpoint.custom_code import code_files
from ..checkpoint.sidefiles import SIDE_FILE_PATTERNS, TEMPLATE_FOLDER
from ..checkpoint.source import INDEX_NAME, SINGLE_NAME, read_json
from ..errors import InputError
from ..stream.manifest import MANIFEST_NAME, FileNames, held_to
from .journal import CLEARED_FOLDER, STATE_FOLDER, Journal

_RECORDS = (CLEARED_FOLDER, MANIFEST_NAME, STATE_FOLDER)  # one of them is in every folder of ours that is not empty
_RECORDS_AND_INDEX = frozenset({*_RECORDS, "config.json", "hf_quant_config.json", INDEX_NAME})
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
TEMPORARY = ".tmp"


def is_ours(folder: Path) -> bool:
    """Whether nvquant made the folder: it is empty, or holds records of ours."""
    return not any(folder.iterdir()) or any(
        (folder / name).is_dir() if name in (STATE_FOLDER, CLEARED_FOLDER) else (folder / name).is_file()
        for name in _RECORDS
        if not (folder / name).is_symlink()
    )


def foreign_entries(folder: Path) -> list[str]:
    """Names of what lies in a folder and is not nvquant's."""
    listed = _listed(folder)
    return sorted(path.name for path in folder.iterdir() if not _is_own(path, listed))


def refuse_foreign(folder: Path, doing: str) -> None:
    """Refuse to empty or replace a folder in which something is not nvquant's.

    Args:
        doing: what would remove it, as `--restart`.
    Raises:
        InputError: there is something; it is named.
    """
    foreign = foreign_entries(folder)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise InputError(
            f"{folder} holds {foreign[0]}{more}, which nvquant did not write, so {doing} does not remove the folder",
            where=folder,
            hint="move it away, or choose another folder with -o",
        )


def remove_own(folder: Path) -> None:
    """Remove what nvquant wrote into a folder, its records last: what is left of it is still known to be nvquant's."""
    listed = _listed(folder)
    own = [path for path in folder.iterdir() if _is_own(path, listed)]
    for path in sorted(own, key=lambda path: _RECORDS.index(path.name) if path.name in _RECORDS else -1):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _listed(folder: Path) -> frozenset[str] | None:
    """The names of the files that nvquant wrote or was about to write there. None: no run and no manifest lists any."""
    listed = Journal(folder).listed()
    if listed is not None:
        return listed | _RECORDS_AND_INDEX
    try:
        path = folder / MANIFEST_NAME
        if path.is_file() and not path.is_symlink():
            shards = held_to(FileNames, read_json(path, ""), str(path)).files
            return frozenset(shards) | _RECORDS_AND_INDEX | _side_files(folder)
    except InputError:
        pass
    return None


def _side_files(folder: Path) -> frozenset[str]:
    """The names that side files of a finished checkpoint can have. Its manifest lists none of them."""
    names = (path.name.removesuffix(TEMPORARY) for path in folder.iterdir())
    return frozenset({*filter(_is_side_file, names), *code_files(folder)})


def _is_side_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SIDE_FILE_PATTERNS)


def _is_own(path: Path, listed: frozenset[str] | None) -> bool:
    name = path.name.removesuffix(TEMPORARY)
    if path.name in (STATE_FOLDER, CLEARED_FOLDER):
        return True
    if path.name == TEMPLATE_FOLDER:
        return path.is_symlink() or (
            path.is_dir() and all(inner.name.removesuffix(TEMPORARY).endswith(".jinja") for inner in path.iterdir())
        )
    if path.is_dir() and not path.is_symlink():
        return False
    if listed is not None:
        return name in listed
    return name in (*_RECORDS_AND_INDEX, SINGLE_NAME) or _is_side_file(name) or _SHARD.fullmatch(name) is not None
