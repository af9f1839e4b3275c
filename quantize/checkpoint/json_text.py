"""Untrusted JSON, parsed strictly and within bounds of size, depth and memory.

Python's parser accepts more than JSON and has no bounds: NaN and Infinity, 1e999 as infinity, halves of surrogate
pairs that no file can hold, numbers of any length, a million values in a few kilobytes each.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from pathlib import Path
from typing import Any

from ..errors import InputError
from .regular import MOST_SMALL_BYTES, MissingFile, read_regular

MOST_DEPTH = 100
MOST_VALUES = (
    8_000_000  # lists, maps and what stands in them: some 600 MB at most. Half a million tensors are 4 million.
)
MOST_DIGITS = 40  # of a whole number: transformers writes 10^30 for "no limit"
MOST_CHARACTERS_OF_A_FLOAT = 400
MOST_QUOTED = 100  # characters of a name or a value that a message repeats
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, *, unique: bool = False, with_mark: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        unique: refuse a map with two equal names. Without it the last one counts, as in every other reader.
        with_mark: accept a byte order mark at the start of the text.
    Raises:
        ValueError: it is not JSON in UTF-8, or beyond the bounds. The message is half a sentence for the user.
    """
    text = _decoded(data, with_mark)
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise ValueError(f"it contains more than {MOST_VALUES:,} values")
    try:
        value = json.loads(
            text,
            parse_int=_whole_number,
            parse_float=_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates if unique else None,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    if _HALF_OF_A_PAIR.search(text):
        _refuse_halves(value)
    return value


def quoted(value: object, most: int = MOST_QUOTED) -> str:
    """An untrusted name or value in a form that a message can repeat: in quotes where it is text, on one line,
    without control characters, at most some `most` characters long."""
    whole = repr(value[: most + 1]) if isinstance(value, str) else reprlib.repr(value)
    return whole if len(whole) <= most + 2 else f"{whole[:most]}…"


def read_json(
    path: Path,
    hint: str = "",
    *,
    folder: Path | None = None,
    is_named: bool = False,
    unique: bool = False,
    most: int = MOST_SMALL_BYTES,
    way_out: str = "download it again",
) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint's folder.

    Args:
        hint: the purpose of a missing file, as the end of a sentence.
        folder: where the file must lie after all links are followed. The default is the folder of its name.
        is_named: the user named this very file, so that its links are followed.
        unique: as for `parse_json`.
        most: the largest size of the file in bytes.
        way_out: the remedy for a damaged file, as the end of a sentence.
    Raises:
        MissingFile: the file does not exist.
        InputError: it is not a regular file of the folder, not a JSON object, or beyond the bounds.
    """
    try:
        data = read_regular(path, None if is_named else folder or path.parent, way_out, most)
    except MissingFile as error:
        raise MissingFile(f"{path} is missing", where=path, hint=hint or way_out) from error
    try:
        value = parse_json(data, unique=unique)
    except ValueError as error:
        raise InputError(f"{path} is not readable JSON ({error})", where=path, hint=way_out) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", where=path, hint=way_out)
    return value


_TOO_DEEP = f"it nests more than {MOST_DEPTH} lists and maps"


def _decoded(data: bytes, with_mark: bool) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8") from error
    if text.startswith("\ufeff"):
        if not with_mark:
            raise ValueError("it begins with a byte order mark")
        text = text[1:]
    return text


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it contains a number of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits) if len(digits) <= MOST_CHARACTERS_OF_A_FLOAT else math.inf
    if not math.isfinite(value):
        raise ValueError("it contains a number beyond the range of a float")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}, which JSON does not allow")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one map")
    return result


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _check_depth(value: Any) -> None:
    """Refuse a value that is nested too deep for a recursive function."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in _inner(outer) if isinstance(inner, (dict, list)) and inner]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _refuse_halves(value: Any) -> None:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        texts = [found] if isinstance(found, str) else list(found) if isinstance(found, dict) else []
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError("it contains half of a surrogate pair, which is not a character") from error
        if isinstance(found, (dict, list)):
            waiting += _inner(found)
