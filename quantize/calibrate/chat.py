"""Documents as conversations in the model's own chat template, one sample each.

The last answer is framed as a server frames it: the template's generation prompt, then the answer. Templates may write
earlier answers differently: with thinking off, the larger Gemma 4 models put an empty thought channel before the
generated answer, and before no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .text import Document, Turn
from .tokenizer import ChatTemplateError, ModelTokenizer

# Names under which templates know "think before you answer"; the first that changes anything is used.
THINKING_SWITCHES = ("enable_thinking", "thinking")
SYSTEM_ROLES = ("system", "developer")
OPENING_CHARACTERS = 1000  # a longer first paragraph is not a request; then a sentence or two are
REQUEST_CHARACTERS = 200

PROBE: tuple[Turn, ...] = (
    {"role": "user", "content": "Good morning."},
    {"role": "assistant", "content": "Hello there."},
)


def thinking_switch(tokenizer: ModelTokenizer) -> str | None:
    """The template's variable that turns thinking on and off, found by rendering with both values, or None.

    Raises:
        ChatTemplateError: the template cannot render a plain exchange.
    """
    for name in THINKING_SWITCHES:
        for turns, prompt in ((PROBE, False), (PROBE[:1], True)):
            on, off = (tokenizer.render(turns, generation_prompt=prompt, **{name: value}) for value in (True, False))
            if on != off:
                return name
    return None


def as_turns(text: str) -> tuple[Turn, ...]:
    """A text as a request and its answer: the opening paragraph, or a first sentence or two, then the rest.

    No word is added, so that calibration sees only words of the data. A text too short to be cut gives no turns.
    """
    text = text.strip()
    if len(text) < 2:
        return ()
    blank = re.search(r"\n\s*\n", text)
    if blank and blank.start() <= min(OPENING_CHARACTERS, len(text) // 2):
        cut = blank.start()
    else:
        limit = max(1, min(REQUEST_CHARACTERS, len(text) // 2))
        ends = [match.end() for match in re.finditer(r"[.!?。！？]\s|\n", text[:limit])]  # noqa: RUF001
        spaces = [match.end() for match in re.finditer(r"\s", text[:limit])]
        cut = (ends or spaces or [limit])[-1]
    request, answer = text[:cut].strip(), text[cut:].strip()
    return ({"role": "user", "content": request}, {"role": "assistant", "content": answer}) if answer else ()


def join_turns(turns: Sequence[Turn], more: Sequence[Turn]) -> list[Turn]:
    """Two conversations as one that every template accepts: no second system turn, and no user turn after another."""
    if not turns:
        return list(more)
    head, tail = list(turns), list(more)
    while head and head[-1]["role"] == "user":  # a question that was left unanswered
        head.pop()
    while tail and tail[0]["role"] != "user":
        tail.pop(0)
    return [*head, *tail]


def with_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """`ids` with exactly one BOS at the front, for models that have one."""
    if bos_id is None:
        return ids
    first = next((index for index, token in enumerate(ids) if token != bos_id), len(ids))
    return [bos_id, *ids[first:]]


@dataclass
class _OpenChat:
    """A chat shorter than a sequence, with an estimate of its `tokens` and the number of its `documents`."""

    turns: list[Turn] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0


class Chats(Iterator[list[int]]):
    """Chats of `sequence_length` tokens, cut there. The last ones are shorter when the documents run out.

    Short documents of one kind follow each other as further turns of one chat. Every second chat has thinking turned on
    if the template supports it. A sample never joins rendered chats. As an iterator, it reads documents only as far as
    the next chat needs.

    Attributes:
        refused: documents so far that the template would not render.
        reason: the template's error for the last of them.

    Args:
        tokenizer: of a model with a chat template.
        sequence_length: in tokens, BOS included.
        switch: of `thinking_switch`.
        thinks_first: whether the first chat has thinking turned on, not the second.
    """

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        documents: Iterable[Document],
        *,
        sequence_length: int,
        switch: str | None,
        thinks_first: bool = False,
    ) -> None:
        self.refused, self.reason = 0, ""
        self._tokenizer, self._switch, self._length = tokenizer, switch, sequence_length
        self._thinks = thinks_first
        self._open: dict[str, _OpenChat] = {}
        self._made = self._make(documents)

    def __next__(self) -> list[int]:
        return next(self._made)

    def _make(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """Chats that fill a sequence, then the remaining documents as shorter chats."""
        for document in documents:
            yield from self._add(document)
        for kind in list(self._open):
            yield from self._write(kind, is_last=True)

    def _add(self, document: Document) -> Iterator[list[int]]:
        """Add a document to the chat of its kind, and write that chat when it fills a sequence."""
        turns = [self._harmless(turn) for turn in document.turns or as_turns(document.text)]
        if not turns:
            return
        chat = self._open.setdefault(document.kind, _OpenChat())
        chat.turns = join_turns(chat.turns, turns)
        chat.tokens += sum(len(self._tokenizer.encode_text(turn["content"])) for turn in turns)
        chat.documents += 1
        if chat.tokens >= self._length:
            yield from self._write(document.kind, is_last=False)

    def _write(self, kind: str, *, is_last: bool) -> Iterator[list[int]]:
        chat = self._open[kind]
        try:
            ids = self._encode(chat.turns)
        except ChatTemplateError as refusal:
            self.refused += chat.documents
            self.reason = str(refusal)
            del self._open[kind]
            return
        chat.tokens = len(ids)
        if len(ids) >= self._length or (is_last and len(ids) >= 2):
            del self._open[kind]
            self._thinks = not self._thinks
            yield ids[: self._length]

    def _encode(self, turns: Sequence[Turn]) -> list[int]:
        switches = {self._switch: self._thinks} if self._switch else {}
        try:
            text = render_answered(self._tokenizer, turns, **switches)
        except ChatTemplateError:
            if not turns or turns[0]["role"] not in SYSTEM_ROLES:
                raise
            text = render_answered(self._tokenizer, _without_system(turns), **switches)
        return with_bos(self._tokenizer.encode_rendered(text), self._tokenizer.bos_id)

    def _harmless(self, value: Any) -> Any:
        """All strings of a turn, at any depth, without special tokens' names."""
        if isinstance(value, str):
            return self._tokenizer.harmless(value)
        if isinstance(value, dict):
            return {key: part if key == "role" else self._harmless(part) for key, part in value.items()}
        return [self._harmless(part) for part in value] if isinstance(value, list) else value


def render_answered(tokenizer: ModelTokenizer, turns: Sequence[Turn], **switches: bool) -> str:
    """A conversation whose last answer follows the template's generation prompt, as it does when the model writes it.

    Raises:
        ChatTemplateError: the template cannot render these turns.
    """
    whole = tokenizer.render(turns, **switches)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        return whole
    asked = tokenizer.render(turns[:-1], **switches)
    prompt = tokenizer.render(turns[:-1], generation_prompt=True, **switches)
    answer = turns[-1]["content"].strip()
    place = whole.rfind(answer) if answer else -1
    # Nothing to do where the prompt is how the whole goes on, nor where the template knows no prompt.
    if whole.startswith(prompt) or prompt == asked or place < 0:
        return whole
    return prompt + whole[place:]


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """The system turn's words at the head of the first user turn, for templates without a system role."""
    system, *others = turns
    for index, turn in enumerate(others):
        if turn["role"] == "user":
            others[index] = {**turn, "content": f"{system['content']}\n\n{turn['content']}"}
            break
    return others
