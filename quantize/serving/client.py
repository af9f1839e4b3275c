"""The client of vLLM's HTTP interface, as far as verification needs it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .address import base_url
from .answers import Choice, Choices, Form, Model, Models, Tokens, Version, WrongForm, natural, parse
from .http import (
    FACT_SECONDS,
    MOST_ANSWER_BYTES,
    MOST_FACT_BYTES,
    Http,
    ServerError,
    ServerGone,
)

Prompt = str | Sequence[int]
Message = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: as clients get it. Empty for a server without a tokenizer.
        ids: generated token ids, and those of the prompt.
        finish_reason: `stop` for an end of its own, `length` for the limit.
        seconds: from the request to the complete answer.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: str | None
    seconds: float


class Client:
    """A server that speaks vLLM's form of the OpenAI interface.

    Args:
        url: such as `http://127.0.0.1:8000`, with or without `/v1`.
        model: the name under which it serves, which may be set later.
        seconds: for one answer, from the request to its last byte.
    Raises:
        InputError: no URL of a server, or one with a password.
    """

    def __init__(self, url: str, model: str, seconds: float = 600.0) -> None:
        self.url, self.model, self.seconds = base_url(url), model, seconds
        self._http = Http(self.url)

    def is_healthy(self) -> bool:
        """Whether the server accepts requests now. False too where nobody answers."""
        return self._http.is_healthy()

    def version(self) -> str | None:
        """vLLM's version. None for a server that reports none."""
        try:
            return self._get("/version", Version).version
        except ServerGone:
            raise
        except ServerError:
            return None

    def models(self) -> list[Model]:
        """The served models."""
        return self._get("/v1/models", Models).data

    def metrics(self) -> str:
        """Counters and settings in the text form of Prometheus. Empty for a server that has none."""
        try:
            return self._fact("/metrics").decode(errors="replace")
        except ServerGone:
            raise
        except ServerError:
            return ""

    def kv_cache_tokens(self) -> int | None:
        """Tokens that fit into the KV cache, by the server's metrics. None where they do not report it."""
        match = re.search(r"^vllm:cache_config_info\{([^\n]{0,65536})\}", self.metrics(), re.MULTILINE)
        values = {name: natural(value) for name, value in re.findall(r'\b(\w+)="([^"]*)"', match[1])} if match else {}
        tokens, blocks, size = (values.get(name) for name in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
        if tokens is not None:
            return tokens
        return None if blocks is None or size is None else blocks * size

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text from the server's tokenizer."""
        return self._post("/tokenize", {"prompt": text, "add_special_tokens": add_special_tokens}, Tokens).tokens

    def complete(self, prompt: Prompt, max_tokens: int, **sampling: Any) -> Answer:
        """Continue a text or token ids. `sampling` (temperature, top_p, seed, …) replaces greedy decoding."""
        return self.complete_all([prompt], max_tokens, **sampling)[0]

    def complete_all(self, prompts: Sequence[Prompt], max_tokens: int, **sampling: Any) -> list[Answer]:
        """Continue several prompts, all texts or all ids, at the same time. See `complete`."""
        asked = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        body = {"prompt": asked if len(asked) > 1 else asked[0], "max_tokens": max_tokens, "temperature": 0, **sampling}
        answer, seconds = self._timed("/v1/completions", {**body, "return_token_ids": True}, len(asked))
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        return [self._answer(choice, choice.text or "", choice.prompt_token_ids, seconds) for choice in choices]

    def chat(self, messages: Sequence[Message], max_tokens: int, **sampling: Any) -> Answer:
        """Answer a conversation through the checkpoint's chat template. Reasoning counts as text."""
        body = {"messages": [dict(message) for message in messages], "max_tokens": max_tokens, "temperature": 0}
        answer, seconds = self._timed("/v1/chat/completions", {**body, **sampling, "return_token_ids": True}, 1)
        choice = answer.choices[0]
        message = choice.message
        parts = (message.reasoning or message.reasoning_content, message.content) if message else ()
        return self._answer(choice, "\n".join(part for part in parts if part), answer.prompt_token_ids, seconds)

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Natural-log likelihood of each id but the first, given all ids before it."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = self._choices("/v1/completions", body, 1).choices[0].prompt_logprobs
        if entries is None or len(entries) != len(ids):
            raise ServerError(
                f"{self.url} returned no prompt_logprobs", where=self.url, hint="this stage requires a vLLM server"
            )
        found = [
            None if entry is None else entry.get(str(token)) for entry, token in zip(entries[1:], ids[1:], strict=True)
        ]
        if None in found:
            raise ServerError(f"{self.url} returned prompt_logprobs for other tokens than requested.")
        return [entry.logprob for entry in found if entry is not None]

    @staticmethod
    def _answer(choice: Choice, text: str, prompt_ids: Sequence[int] | None, seconds: float) -> Answer:
        return Answer(text, tuple(choice.token_ids or ()), tuple(prompt_ids or ()), choice.finish_reason, seconds)

    def _timed(self, path: str, body: Mapping[str, Any], number: int) -> tuple[Choices, float]:
        started = time.monotonic()
        answer = self._choices(path, body, number)
        return answer, time.monotonic() - started

    def _choices(self, path: str, body: Mapping[str, Any], number: int) -> Choices:
        answer = self._post(path, body, Choices)
        if len(answer.choices) != number:
            raise ServerError(
                f"{self.url} returned an answer without choices",
                where=self.url,
                hint="name a server that generates text",
            )
        return answer

    def _fact(self, path: str) -> bytes:
        return self._http.ask(path, None, min(FACT_SECONDS, self.seconds), MOST_FACT_BYTES)

    def _get(self, path: str, form: type[Form]) -> Form:
        return self._parsed(path, self._fact(path), form)

    def _post(self, path: str, body: Mapping[str, Any], form: type[Form]) -> Form:
        question = json.dumps({"model": self.model, **body}).encode()
        return self._parsed(path, self._http.ask(path, question, self.seconds, MOST_ANSWER_BYTES), form)

    def _parsed(self, path: str, content: bytes, form: type[Form]) -> Form:
        try:
            return parse(form, content)
        except WrongForm as error:
            raise ServerError(f"{self.url}{path} {error}.") from error
