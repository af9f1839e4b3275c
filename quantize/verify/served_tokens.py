"""The comparison of a server's tokens with those of the checkpoint's own tokenizer, BOS included."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from ..calibrate.quiet import quiet_transformers
from ..calibrate.template import ChatTemplate, ChatTemplateError
from ..calibrate.tokenizer import encoded, load_tokenizer
from ..checkpoint.config_values import config_int
from ..errors import InputError
from ..recipe.roles import text_config
from ..serving.client import Client
from .report import Finding, not_applicable
from .subject import Subject

TEXT = "The lighthouse at the end of the pier was built in 1874, after a storm; it's 23 m high.\n"
QUESTION = "What is the capital of France? Answer in one sentence."
# A model that was trained with BOS before everything loses several nats a token without it; one that was not, nothing.
MOST_LOST_WITHOUT_BOS = 0.5
SHOWN_TOKENS = 8


class OwnTokenizer:
    """The tokenizer in a checkpoint's folder, as transformers reads it.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            return load_tokenizer(self._folder)
        except InputError:  # whatever is wrong with the files: the server needs none from us
            return None

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._folder)

    @property
    def is_there(self) -> bool:
        """Whether transformers can load it."""
        return self._tokenizer is not None

    @property
    def bos_id(self) -> int | None:
        """The token that begins a sequence. None for a tokenizer without one."""
        found = self._tokenizer.bos_token_id if self.is_there else None
        return None if found is None else int(found)

    @property
    def size(self) -> int:
        """The size of its vocabulary without added tokens, of which some fine-tuned models have more than rows."""
        return int(self._tokenizer.vocab_size)

    @property
    def has_chat_template(self) -> bool:
        """Whether it can frame a conversation."""
        return self.is_there and bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with the special tokens that the tokenizer itself adds."""
        return encoded(self._tokenizer, text, self._folder)

    def encode_question(self, question: str) -> list[int]:
        """Ids of one user's turn, up to where the answer begins.

        Raises:
            ChatTemplateError: the template cannot render it.
            InputError: the template takes more time or memory than any template needs.
        """
        messages = [{"role": "user", "content": question}]
        with quiet_transformers():
            rendered = self._template.render(messages, generation_prompt=True)
        return encoded(self._tokenizer, rendered, self._folder, add_special_tokens=False)


def needs_bos(subject: Subject) -> bool:
    """Whether the model is of a family that is known to collapse without BOS."""
    return str(text_config(subject.config).get("model_type") or "").startswith("gemma")


def framed(tokenizer: OwnTokenizer, subject: Subject, text: str) -> str | list[int]:
    """A text to continue, with BOS in front where the model needs one and the tokenizer adds none."""
    if not tokenizer.is_there or not needs_bos(subject) or tokenizer.bos_id is None:
        return text
    ids = tokenizer.encode(text)
    return text if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def check_tokens(
    subject: Subject, tokenizer: OwnTokenizer, client: Client, ids: Sequence[int] | None, hints: list[str]
) -> Finding:
    """Check that plain text, and a chat where there is a template, become the tokens of the checkpoint's own tokenizer,
    with BOS for a model that needs it.

    Args:
        ids: of the reference text, to measure the loss without BOS. None where there is none.
        hints: gets advice for the user that is no fault.
    """
    if not tokenizer.is_there:
        return not_applicable("the checkpoint has no tokenizer that transformers can load")
    rows = config_int(text_config(subject.config), "vocab_size")
    if rows and tokenizer.size > rows:  # a server may die of ids beyond its table
        fault = f"the tokenizer has {tokenizer.size:,} tokens, the model {rows:,}: it belongs to another model"
        return Finding("vocabulary sizes", [fault])
    served = list(client.complete(TEXT, 1).prompt_ids)
    looked_at = f"{len(served)} tokens of plain text"
    faults = _differences("plain text", served, tokenizer.encode(TEXT))
    if tokenizer.has_chat_template:
        asked = list(client.chat([{"role": "user", "content": QUESTION}], 1).prompt_ids)
        looked_at += f", {len(asked)} of a chat"
        try:
            faults += _differences("a chat", asked, tokenizer.encode_question(QUESTION))
        except ChatTemplateError as refusal:
            faults.append(f"the chat template cannot render a question ({refusal})")
    bos = tokenizer.bos_id
    if bos is not None:
        if served[:1] == [bos]:
            looked_at += f", BOS ({bos}) first"
        else:
            faults += _without_bos(subject, tokenizer, client, ids, hints)
    return Finding(looked_at, faults)


def _differences(what: str, served: list[int], own: list[int]) -> list[str]:
    if served == own:
        return []
    at = next((at for at, pair in enumerate(zip(served, own, strict=False)) if pair[0] != pair[1]), None)
    at = min(len(served), len(own)) if at is None else at
    shown = [f"{tokens[at : at + SHOWN_TOKENS]}" for tokens in (served, own)]
    return [
        f"{what} gets other tokens than from the checkpoint's tokenizer: from token {at} on {shown[0]}, not {shown[1]}"
    ]


def _without_bos(
    subject: Subject, tokenizer: OwnTokenizer, client: Client, ids: Sequence[int] | None, hints: list[str]
) -> list[str]:
    """The faults or hints of plain text that is served without the tokenizer's BOS."""
    lost = _loss_without_bos(tokenizer.bos_id, client, ids)
    matters = needs_bos(subject) or (lost is not None and lost > MOST_LOST_WITHOUT_BOS)
    if not matters:
        return []
    said = f"plain text is served without BOS ({tokenizer.bos_id}), which the model needs"
    said += "" if lost is None else f" ({lost:+.2f} nats a token without it)"
    if tokenizer.has_chat_template:  # chats get it from the template
        hints.append(f"{said}: begin prompts for /v1/completions with it (chats contain it)")
        return []
    return [f"{said}: its tokenizer must add it (add_bos_token, or the post-processor in tokenizer.json)"]


def _loss_without_bos(bos: int | None, client: Client, ids: Sequence[int] | None) -> float | None:
    """The nats a token of the reference text that are lost without its BOS."""
    if ids is None or bos is None or len(ids) < 2 * SHOWN_TOKENS or ids[0] != bos:
        return None
    with_bos, without = client.prompt_logprobs(ids), client.prompt_logprobs(ids[1:])
    return mean(with_bos[1:]) - mean(without)
