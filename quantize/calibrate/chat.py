"""Documents as conversations in the model's own chat template, one sample each.

The last answer is framed as a server frames it: the template's generation prompt, then the answer. Templates may write
earlier answers differently: with thinking off, the larger Gemma 4 models put an empty thought channel before the
generated answer, and before no other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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


@dataclass
class ChatSamples:
    """Rendered chats.

    Attributes:
        samples: token ids, each at most a sequence long.
        refused: documents that the template would not render.
        reason: the template's error for the last of them.
    """

    samples: list[list[int]] = field(default_factory=list)
    refused: int = 0
    reason: str = ""


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


def chat_samples(
    tokenizer: ModelTokenizer, documents: Iterable[Document], *, samples: int, sequence_length: int
) -> ChatSamples:
    """Chats of `sequence_length` tokens, cut there. The last ones are shorter when the documents run out.

    Short documents of one kind follow each other as further turns of one chat. Every second chat has thinking turned on
    if the template supports it. A sample never joins rendered chats.

    Args:
        tokenizer: of a model with a chat template.
        documents: read only as far as needed.
        samples: the number of chats. Fewer are returned when the documents do not suffice.
        sequence_length: in tokens, BOS included.

    Raises:
        ChatTemplateError: the template cannot render a plain exchange.
    """
    writer = _ChatWriter(tokenizer, thinking_switch(tokenizer), samples, sequence_length)
    for document in documents:
        writer.add(document)
        if writer.is_done:
            break
    writer.finish()
    return writer.result


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


class _ChatWriter:
    """Collects documents, a chat for each kind, and renders a chat once it is long enough."""

    def __init__(self, tokenizer: ModelTokenizer, switch: str | None, samples: int, sequence_length: int) -> None:
        self.result = ChatSamples()
        self._tokenizer, self._switch = tokenizer, switch
        self._samples, self._length = samples, sequence_length
        self._open: dict[str, _OpenChat] = {}

    @property
    def is_done(self) -> bool:
        return len(self.result.samples) >= self._samples

    def add(self, document: Document) -> None:
        """Add a document to the chat of its kind, and write that chat when it fills a sequence."""
        turns = [self._harmless(turn) for turn in document.turns or as_turns(document.text)]
        if not turns:
            return
        chat = self._open.setdefault(document.kind, _OpenChat())
        chat.turns = join_turns(chat.turns, turns)
        chat.tokens += sum(len(self._tokenizer.encode_text(turn["content"])) for turn in turns)
        chat.documents += 1
        if chat.tokens >= self._length:
            self._write(document.kind, is_last=False)

    def finish(self) -> None:
        """Write the remaining documents as shorter chats, up to the number of samples."""
        for kind in list(self._open):
            if not self.is_done:
                self._write(kind, is_last=True)

    def _write(self, kind: str, *, is_last: bool) -> None:
        chat = self._open[kind]
        try:
            ids = self._encode(chat.turns)
        except ChatTemplateError as refusal:
            self.result.refused += chat.documents
            self.result.reason = str(refusal)
            del self._open[kind]
            return
        chat.tokens = len(ids)
        if len(ids) >= self._length or (is_last and len(ids) >= 2):
            self.result.samples.append(ids[: self._length])
            del self._open[kind]

    def _encode(self, turns: Sequence[Turn]) -> list[int]:
        is_thinking = len(self.result.samples) % 2 == 1
        switches = {self._switch: is_thinking} if self._switch else {}
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
