"""Documents, made of the rows of any source, in an order drawn from the seed."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.json_text import parse_json, quoted
from ..errors import InputError
from .datasets import HubDataset
from .rows import TEXT_SUFFIX, Row, data_suffix, read_rows, read_text, seeded_order

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

MOST_COLUMNS = 12  # whose names a message repeats
DIALOGUE_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
_OWN_ROLES = ("system", "developer", "user", "assistant", "tool")

Turn = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A text, or a dialogue.

    Attributes:
        kind: documents of one kind may share a chat: `prose`, `code`, `dialogue`, …
        text: the text, empty for a dialogue.
        turns: the dialogue's turns, each with `role` and `content` (a string), empty for a text.
    """

    kind: str
    text: str = ""
    turns: tuple[Turn, ...] = ()

    @property
    def plain(self) -> str:
        """The words alone, for models without a chat template."""
        return self.text or "\n\n".join(turn["content"] for turn in self.turns if turn["content"])


@dataclass(frozen=True)
class Columns:
    """The columns of the dialogues or the text (both None: found by the usual names) and of the kind."""

    messages: str | None = None
    text: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Source:
    """One source of documents: a local file, a shipped one, or the files of a Hub data set. `weight` is its share."""

    origin: Path | Traversable | HubDataset
    columns: Columns = field(default_factory=Columns)
    weight: float = 1.0


def read_documents(sources: Sequence[Source], *, seed: int, piece_characters: int) -> Iterator[Document]:
    """Documents of all sources, mixed by weight. Files are downloaded and opened only when their turn comes.

    The next document is always of the source with the fewest characters for its weight so far. When one source is
    exhausted, the others continue.

    Args:
        sources: at least one.
        seed: of the order within each source.
        piece_characters: the longest piece of a text. Longer texts are cut, so that one book does not fill the set.

    Raises:
        InputError: a file has no usable columns or cannot be read.
    """
    streams = [_documents_of(source, seed, piece_characters) for source in sources]
    spent = [(0.0, index) for index in range(len(streams))]
    while spent:
        used, index = heapq.heappop(spent)
        document = next(streams[index], None)
        if document is not None:
            yield document
            # A dialogue longer than a piece is cut by whoever asked, so it counts as one piece.
            cost = min(len(document.plain), piece_characters) / sources[index].weight
            heapq.heappush(spent, (used + cost, index))


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters, cut at a blank line if possible, else a line's end, a space or anywhere."""
    pieces: list[str] = []
    text = text.strip()
    while len(text) > limit:
        for gap in (r"\n\s*\n", r"\n", r"\s"):
            cuts = [match.start() for match in re.finditer(gap, text[: limit + 1])]
            if cuts and cuts[-1] > limit // 2:
                cut = cuts[-1]
                break
        else:
            cut = limit
        pieces.append(text[:cut].rstrip())
        text = text[cut:].lstrip()
    return [piece for piece in (*pieces, text) if piece]


def document_of(row: Row, columns: Columns, where: str) -> Document | None:
    """The document in a row, None for one that is empty or not only text (an image, a tool call without words).

    Without named columns: `messages` or `conversations`, then `prompt` with `completion`, then `text`, then the only
    column of strings.

    Raises:
        InputError: none of these, or messages that are not a list of turns.
    """
    kind = str(row.get(columns.kind) or "") if columns.kind else ""
    for column in (columns.messages,) if columns.messages else () if columns.text else DIALOGUE_COLUMNS:
        if row.get(column) is not None:
            turns = _turns(row[column], f"{where}: {column}")
            return Document(kind or "dialogue", turns=turns) if turns else None
    if not columns.messages and not columns.text and "prompt" in row and "completion" in row:
        turns = _exchange(row["prompt"], row["completion"], where)
        return Document(kind or "dialogue", turns=turns) if turns else None
    text = _text(row, columns, where)
    return Document(kind or "prose", text.strip()) if text and text.strip() else None


def _documents_of(source: Source, seed: int, piece_characters: int) -> Iterator[Document]:
    origin = source.origin
    if not isinstance(origin, HubDataset):
        yield from _documents_in_file(origin, source.columns, seed, piece_characters)
        return
    for file in origin.files:
        yield from _documents_in_file(origin.download(file), source.columns, seed, piece_characters)


def _documents_in_file(
    path: Path | Traversable, columns: Columns, seed: int, piece_characters: int
) -> Iterator[Document]:
    """First one piece of every document, then the rest of the long ones."""
    if data_suffix(path.name) == TEXT_SUFFIX:
        pieces = split_text(read_text(path), piece_characters)
        yield from (Document("prose", pieces[index]) for index in seeded_order(len(pieces), seed))
        return
    rest: list[Document] = []
    for number, row in read_rows(path, seed):
        document = document_of(row, columns, f"{path.name}, row {number}")
        if document is None:
            continue
        if len(document.text) <= piece_characters:
            yield document
            continue
        pieces = split_text(document.text, piece_characters)
        # Any piece may come first: beginnings of books are all alike.
        first = int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big") % len(pieces)
        yield Document(document.kind, pieces[first])
        rest += [Document(document.kind, piece) for piece in pieces[first + 1 :] + pieces[:first]]
    yield from rest


def _text(row: Row, columns: Columns, where: str) -> str | None:
    """The text column's value, None where this row has none."""
    seen = columns_of(row)
    if columns.messages or columns.text:
        column = columns.messages or columns.text
        if column not in row:
            raise InputError(
                f"{where} has no column {column} (columns: {seen})",
                where=where,
                hint="name the right one in the YAML spec",
            )
        text = None if columns.messages else row[column]
    elif "text" in row or any(column in row for column in DIALOGUE_COLUMNS):
        text = row.get("text")
    else:
        # A column that is empty here may be of strings elsewhere, and then there is a choice.
        strings = [column for column, value in row.items() if isinstance(value, str | None)]
        if len(strings) != 1:
            raise InputError(
                f"{where} has neither text nor messages nor input_ids (columns: {seen})",
                where=where,
                hint="rename a column, or name it in a YAML spec",
            )
        text = row[strings[0]]
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"the text is {_kind_of(text)}, not a string", where=where, hint="name another column in a YAML spec"
        )
    return text


def _exchange(prompt: object, completion: object, where: str) -> tuple[Turn, ...]:
    """A question and its answer, each a string or already a list of turns."""
    turns: list[Turn] = []
    for role, value in (("user", prompt), ("assistant", completion)):
        if isinstance(value, str) or value is None:
            turns += [{"role": role, "content": value.strip()}] if value and value.strip() else []
        else:
            turns += _turns(value, f"{where}: {'prompt' if role == 'user' else 'completion'}")
    return tuple(turns)


def _turns(value: object, where: str) -> tuple[Turn, ...]:
    """Turns in the form of templates, empty when a turn contains anything but text."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # the only way that CSV has
        try:
            value = parse_json(value.encode())
        except ValueError:
            pass
    if not isinstance(value, list):
        raise InputError(
            f"{where} is {_kind_of(value)}, not a list of turns", where=where, hint="each turn is {role, content}"
        )
    turns = [_turn(item, where) for item in value]
    return tuple(turn for turn in turns if turn is not None) if None not in turns else ()


def _turn(item: object, where: str) -> Turn | None:
    """One turn with ShareGPT's `from` and `value` renamed and other keys kept, or None for more than text."""
    if not isinstance(item, dict):
        raise InputError(f"{where} contains {_kind_of(item)}, not a turn", where=where, hint="write {role, content}")
    turn = dict(item)
    for theirs, ours in (("from", "role"), ("value", "content")):
        if ours not in turn and theirs in turn:
            turn[ours] = turn.pop(theirs)
    if not isinstance(turn.get("role"), str) or "content" not in turn:
        raise InputError(f"{where} contains a turn with {columns_of(item)}", where=where, hint="write role and content")
    lowered = turn["role"].strip().lower()
    turn["role"] = ROLES.get(lowered, lowered if lowered in _OWN_ROLES else turn["role"])
    content = turn["content"]
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        return None
    # Columns of a table exist for every turn; those without a value would be mistaken for something by templates.
    return {key: part for key, part in turn.items() if part is not None} | {"content": content}


def _joined(parts: Iterable[object]) -> str | None:
    """Text of a content given in parts, None when one of them is an image or a sound."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def columns_of(row: Row) -> str:
    """The names of a row's columns, as a message can repeat them, `none` without any."""
    names = sorted(row)
    shown = [name if name.isprintable() and 0 < len(name) <= 60 else quoted(name, 60) for name in names[:MOST_COLUMNS]]
    more = [f"{len(names) - MOST_COLUMNS} more"] if len(names) > MOST_COLUMNS else []
    return ", ".join([*shown, *more]) or "none"


def _kind_of(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}.get(
        type(value), f"a {type(value).__name__}"
    )
