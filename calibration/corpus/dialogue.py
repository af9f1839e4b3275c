"""Readers that make conversations: questions and answers of FAQ pages, compiler errors and chat lines."""

from __future__ import annotations

import random
import re
from typing import Any

import yaml

from .markup import markdown_of, plain_markdown
from .readers import Document, Messages, Reader, Unit
from .text import MAX_BYTES, MIN_BYTES, clean, has_address, unwrap

# A conversation ends after the first answer that brings it over one of these sizes.
TARGET_BYTES = (1_500, 3_000, 5_000, 8_000)
CHAT_BYTES = (1_200, 1_800, 2_500)


def _conversations(pairs: list[tuple[str, str]], rng: random.Random) -> list[Document]:
    conversations: list[Document] = []
    messages: Messages = []
    size = 0
    target = rng.choice(TARGET_BYTES)
    for question, answer in pairs:
        pair_bytes = len(question.encode()) + len(answer.encode())
        if pair_bytes > MAX_BYTES // 2 or len(answer) < 40 or has_address(answer):
            continue
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        size += pair_bytes
        if size >= target:
            conversations.append(messages)
            messages, size, target = [], 0, rng.choice(TARGET_BYTES)
    if size >= MIN_BYTES:
        conversations.append(messages)
    return conversations


def faq_pages(
    root: tuple[str, str, str] = ("div", "role", "main"),
    question: str = r"#{2,4} (.+)",
    encoding: str = "utf-8",
) -> Reader:
    """FAQ pages in HTML, each a unit; a line that matches ``question`` starts a question."""

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        units = []
        for name, data in files.items():
            text = clean(markdown_of(data.decode(encoding), root))
            units.append(Unit(name, _conversations(_pairs_of(text, question), rng)))
        return [unit for unit in units if unit.documents]

    return read


def faq_text(question: str, begin: str = r"\A") -> Reader:
    """A plain-text FAQ as one unit."""

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        ((name, data),) = files.items()
        text = clean(re.split(begin, data.decode(), maxsplit=1)[-1])
        text = unwrap(re.sub(r"(?m)^ {2}", "", text))
        return [Unit(name, _conversations(_pairs_of(text, question), rng))]

    return read


def _pairs_of(text: str, question: str) -> list[tuple[str, str]]:
    parts = re.split(rf"(?m)^{question}$", text)
    pairs = []
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        head = re.sub(r"^[\d.]+\s+", "", head.strip().replace("*", ""))
        body = re.sub(r"(?m)^#+ .*\Z", "", body.strip()).strip()
        if body and not re.search(r"FAQ|Frequently Asked|Table of Contents", head):
            pairs.append((head, body))
    return pairs


_EXPLAIN = (
    "What does “{term}” mean in {topic}?",
    "What is {term} in {topic}?",
    "Explain {term} to me, as {topic} uses the word.",
    "In {topic}, what is meant by {term}?",
)


def glossary(topic: str, root: tuple[str, str, str] = ("div", "role", "main")) -> Reader:
    """A glossary in HTML as one unit: the user asks for a term of ``topic``, the answer is its entry."""

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        ((name, data),) = files.items()
        entries = _pairs_of(clean(markdown_of(data.decode(), root)), r"[*`]{1,2}([^*`]{2,60})[*`]{1,2}")
        pairs = [(rng.choice(_EXPLAIN).format(term=term, topic=topic), entry) for term, entry in entries]
        return [Unit(name, _conversations(pairs, rng))]

    return read


_ASKED = (
    "rustc stops with error {code} on this code. What is wrong?",
    "I get `error[{code}]` from the Rust compiler here:",
    "Why does this not compile? The compiler reports {code}.",
    "Can you explain {code} to me? Here is my code:",
)


def compiler_errors(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
    """Explanations of the Rust compiler's error codes: the user shows the faulty code, the answer explains it."""
    pairs = []
    for name, data in files.items():
        code = name.rpartition("/")[2].removesuffix(".md")
        text = re.sub(r"(?m)^```\S*\n((?:.*\n)*?)```$", r"```rust\n\1```", data.decode())
        text = unwrap(clean(plain_markdown(text, {})))
        found = re.search(r"(?s)\s*(?:Erroneous|Example of erroneous|Some erroneous)[^\n]*:\n\n(```rust.*?\n```)", text)
        if found is None or "no longer emitted" in text:
            continue
        asked = rng.choice(_ASKED).format(code=code) + "\n\n" + found[1]
        pairs.append((asked, f"{text[: found.start()]}\n\n{text[found.end() :].lstrip()}".strip()))
    rng.shuffle(pairs)
    return [Unit(f"{n:03d}", [document]) for n, document in enumerate(_conversations(pairs, rng))]


def chats(*languages: str, without: frozenset[str] = frozenset()) -> Reader:
    """Chat lines of the ChatterBot corpus, joined to conversations; each topic of a language is a unit."""

    def read(files: dict[str, bytes], rng: random.Random) -> list[Unit]:
        units = []
        for name, data in files.items():
            language, _, topic = name.rpartition("data/")[2].removesuffix(".yml").partition("/")
            if language in languages and topic not in without:
                units.append(Unit(f"{language}/{topic}", _chat_documents(yaml.safe_load(data), rng)))
        return [unit for unit in units if unit.documents]

    return read


def _chat_documents(content: dict[str, Any], rng: random.Random) -> list[Document]:
    asked: set[str] = set()
    exchanges: list[list[str]] = []
    for lines in content["conversations"]:
        lines = [clean(str(line)).strip() for line in lines if isinstance(line, str)]
        lines = lines[: len(lines) // 2 * 2]
        if lines and lines[0].casefold() not in asked and all(lines):
            asked.add(lines[0].casefold())
            exchanges.append(lines)
    rng.shuffle(exchanges)
    documents: list[Document] = []
    turns: list[str] = []
    target = rng.choice(CHAT_BYTES)
    for lines in exchanges:
        turns += lines
        if len("".join(turns).encode()) >= target:
            documents.append(_messages_of(turns))
            turns, target = [], rng.choice(CHAT_BYTES)
    if len("".join(turns).encode()) >= MIN_BYTES:
        documents.append(_messages_of(turns))
    return documents


def _messages_of(turns: list[str]) -> Messages:
    return [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
