"""Rows of a data file in an order drawn from the seed.

Tables are `.parquet`, `.jsonl`, `.json` and `.csv`; texts are `.txt`. All except Parquet may be packed, as `.jsonl.xz`
or `.csv.gz`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from ..checkpoint.json_text import parse_json
from ..checkpoint.regular import open_regular
from ..errors import EnvironmentLack, InputError
from .delimiters import delimiter_of

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Row = dict[str, Any]
TABLE_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
TEXT_SUFFIX = ".txt"
PACKED_SUFFIXES = (".xz", ".gz")
MOST_WHOLE_BYTES = 300_000_000  # of a file that is read whole: a text, a CSV, a JSON array, and what is unpacked
MOST_LINE_BYTES = 100_000_000
_UNREADABLE = (UnicodeDecodeError, lzma.LZMAError, EOFError, OSError, zlib.error, csv.Error)


def data_suffix(name: str) -> str:
    """The format of a file by its name: `.jsonl` for `a.jsonl` and `a.jsonl.xz`, empty for an unknown name."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (*TABLE_SUFFIXES, TEXT_SUFFIX) else ""


def seeded_order(count: int, seed: int) -> list[int]:
    """A permutation of range(count) that depends only on the seed: the order of sha256("seed:index")."""
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())


def read_rows(source: Path | Traversable, seed: int | None) -> Iterator[tuple[int, Row]]:
    """Rows of a table file with their numbers, counted from 1, read lazily: a caller who stops early reads little.

    Args:
        source: a file, or a packaged resource.
        seed: the order's seed, None for the order of the file. Parquet is shuffled by row groups, then within each.

    Raises:
        InputError: missing, empty or damaged file.
        EnvironmentLack: Parquet without pyarrow.
    """
    _check_is_file(source)
    reader = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json, ".csv": _csv}[data_suffix(source.name)]
    is_empty = True
    try:
        for number, row in reader(source, seed):
            is_empty = False
            yield number, row
    except _UNREADABLE as error:
        raise InputError(
            f"{source.name} cannot be read ({_in_words(error)})", where=source.name, hint="check the file"
        ) from error
    if is_empty:
        raise InputError(
            f"{source.name} has no rows", where=source.name, hint="give a file with text, messages or token ids"
        )


def read_text(source: Path | Traversable) -> str:
    """A complete text file, UTF-8 with or without a byte-order mark.

    Raises:
        InputError: missing, empty or not UTF-8.
    """
    _check_is_file(source)
    try:
        with _bytes_of(source) as stream:
            text = _whole(stream, source).decode("utf-8-sig")
    except _UNREADABLE as error:
        raise InputError(
            f"{source.name} cannot be read ({_in_words(error)})", where=source.name, hint="give a UTF-8 text"
        ) from error
    if not text.strip():
        raise InputError(f"{source.name} is empty", where=source.name, hint="give a file with some text")
    return text


def _bytes_of(source: Path | Traversable) -> IO[bytes]:
    """A seekable stream. Packed files are unpacked into memory, since seeking in them requires reading again."""
    suffix = PurePosixPath(source.name).suffix.lower()
    plain: IO[bytes] = open_regular(source) if isinstance(source, Path) else source.open("rb")
    if suffix not in PACKED_SUFFIXES:
        return plain
    with plain, lzma.open(plain) if suffix == ".xz" else gzip.open(plain) as packed:
        return io.BytesIO(_whole(packed, source))


def _check_is_file(source: Path | Traversable) -> None:
    try:
        is_there = source.is_file()
    except (OSError, ValueError):  # a name that the system refuses
        is_there = False
    if not is_there:
        raise InputError(f"{source} is not a file", where=source, hint="name an existing file with --calibration")


def _whole(stream: IO[bytes] | lzma.LZMAFile | gzip.GzipFile, source: Path | Traversable) -> bytes:
    """The rest of a stream, unpacked. A small file may unpack to more than any memory can hold."""
    data = stream.read(MOST_WHOLE_BYTES + 1)
    if len(data) > MOST_WHOLE_BYTES:
        raise InputError(
            f"{source.name} contains more than {MOST_WHOLE_BYTES:,} bytes",
            where=source.name,
            hint="split it, or give it as .jsonl or .parquet",
        )
    return data


def _lines(stream: IO[bytes], source: Path | Traversable) -> Iterator[bytes]:
    while line := stream.readline(MOST_LINE_BYTES + 1):
        if len(line) > MOST_LINE_BYTES:
            raise InputError(
                f"{source.name} has a line of more than {MOST_LINE_BYTES:,} bytes",
                where=source.name,
                hint="check the file",
            )
        yield line


def _in_words(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start:,} is not UTF-8"
    reason = error.strerror if isinstance(error, OSError) else None
    return " ".join((reason or str(error) or type(error).__name__).split())[:200]


def _order(count: int, seed: int | None) -> list[int]:
    return list(range(count)) if seed is None else seeded_order(count, seed)


def _json_lines(source: Path | Traversable, seed: int | None) -> Iterator[tuple[int, Row]]:
    """Parse only the requested lines. A first pass notes where each begins."""
    with _bytes_of(source) as stream:
        if seed is None:
            for number, line in enumerate(_lines(stream, source), 1):
                if line.strip():
                    yield number, _parsed(line, f"{source.name}, line {number}")
            return
        starts: list[tuple[int, int]] = []
        position = 0
        for number, line in enumerate(_lines(stream, source), 1):
            if line.strip():
                starts.append((number, position))
            position += len(line)
        for index in _order(len(starts), seed):
            number, start = starts[index]
            stream.seek(start)
            yield number, _parsed(stream.readline(), f"{source.name}, line {number}")


def _json(source: Path | Traversable, seed: int | None) -> Iterator[tuple[int, Row]]:
    """A JSON array of objects, or JSON lines under another name, as some data sets have it."""
    with _bytes_of(source) as stream:
        begins_array = stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        if begins_array:
            stream.seek(0)
            rows = _parsed(_whole(stream, source), source.name, list)
    if not begins_array:
        yield from _json_lines(source, seed)
        return
    for index in _order(len(rows), seed):
        if not isinstance(rows[index], dict):
            raise InputError(
                f"{source.name}, row {index + 1} is not a JSON object", where=source.name, hint="write one object a row"
            )
        yield index + 1, rows[index]


def _parsed(data: bytes, where: str, kind: type = dict) -> Any:
    try:
        value = parse_json(data, with_mark=True)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error})", where=where, hint="write one object a line") from error
    if not isinstance(value, kind):
        raise InputError(f"{where} is not a JSON object", where=where, hint="write one object a line")
    return value


def _csv(source: Path | Traversable, seed: int | None) -> Iterator[tuple[int, Row]]:
    with _bytes_of(source) as plain:
        delimiter, text = delimiter_of(_whole(plain, source).decode("utf-8-sig"))
    with io.StringIO(text, newline="") as stream:
        limit = csv.field_size_limit(sys.maxsize)  # the default of 128 kB is less than a document
        try:
            rows = list(csv.DictReader(stream, delimiter=delimiter))
        finally:
            csv.field_size_limit(limit)
    for index in _order(len(rows), seed):
        yield index + 1, {str(key): value for key, value in rows[index].items() if key is not None}


def _parquet(source: Path | Traversable, seed: int | None) -> Iterator[tuple[int, Row]]:
    """Read one row group at a time: files of data sets have gigabytes."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise EnvironmentLack(
            f"{source.name} is a Parquet file, which needs pyarrow",
            where=source.name,
            hint="pip install 'nvquant[data]'",
        ) from error
    with source.open("rb") as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            for group in _order(len(sizes), seed):
                rows, first = table.read_row_group(group), sum(sizes[:group]) + 1
                for index in _order(sizes[group], seed):
                    yield first + index, rows.slice(index, 1).to_pylist()[0]
        except pyarrow.ArrowInvalid as error:
            raise InputError(
                f"{source.name} is not a complete Parquet file ({error})",
                where=source.name,
                hint="download or write it again",
            ) from error
