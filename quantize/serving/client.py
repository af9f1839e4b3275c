"""Asking a server: vLLM's HTTP interface, as far as a proof needs it."""

from __future__ import annotations

import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckFailed, InputError

Prompt = str | Sequence[int]
Message = Mapping[str, str]

ATTEMPTS = 3
PAUSE_SECONDS = 0.5
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_BUSY = (429, 502, 503, 504)


class ServerError(CheckFailed):
    """A server that does not answer, or answers with an error."""


class ServerGone(ServerError):
    """A server that cannot be reached any more."""


@dataclass(frozen=True)
class Answer:
    """What a server generated.

    Attributes:
        text: as clients get it; empty for a server without a tokenizer.
        ids: generated token ids, and those of the prompt.
        finish_reason: `stop` for an end of its own, `length` for the limit.
        seconds: from the question to the whole answer.
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
        model: the name under which it serves; may be set later.
        seconds: for one answer.
    Raises:
        InputError: no URL of a server.
    """

    def __init__(self, url: str, model: str, seconds: float = 600.0) -> None:
        self.url, self.model, self.seconds = base_url(url), model, seconds
        host = urllib.parse.urlsplit(self.url).hostname
        # A proxy cannot reach this machine's own ports.
        handlers = [urllib.request.ProxyHandler({})] if host in LOCAL_HOSTS else []
        self._opener = urllib.request.build_opener(*handlers)

    def is_healthy(self) -> bool:
        """Whether the server takes requests now; False too where nobody answers."""
        try:
            with self._opener.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def version(self) -> str | None:
        """vLLM's version; None for a server that has no such thing."""
        try:
            version = self._get("/version").get("version")
        except ServerGone:
            raise
        except ServerError:
            return None
        return str(version) if version else None

    def models(self) -> list[dict[str, Any]]:
        """What is served: `id`, `root` and `max_model_len` of each."""
        data = self._get("/v1/models").get("data")
        return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []

    def metrics(self) -> str:
        """Counters and settings in the text form of Prometheus; empty for a server that has none."""
        try:
            return self._ask("/metrics", None).decode(errors="replace")
        except ServerGone:
            raise
        except ServerError:
            return ""

    def kv_cache_tokens(self) -> int | None:
        """Tokens that fit into the KV cache, as the server's metrics say; None where they do not."""
        match = re.search(r"^vllm:cache_config_info\{(.*)\}", self.metrics(), re.MULTILINE)
        values = dict(re.findall(r'(\w+)="([^"]*)"', match[1])) if match else {}
        if values.get("kv_cache_size_tokens", "").isdigit():
            return int(values["kv_cache_size_tokens"])
        blocks, size = values.get("num_gpu_blocks", ""), values.get("block_size", "")
        return int(blocks) * int(size) if blocks.isdigit() and size.isdigit() else None

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids that the server's tokenizer gives."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": add_special_tokens}
        return _ids(self._post("/tokenize", body).get("tokens"))

    def complete(self, prompt: Prompt, max_tokens: int, **sampling: Any) -> Answer:
        """Continue a text or token ids; greedily, unless `sampling` (temperature, top_p, seed, …) says otherwise."""
        return self.complete_all([prompt], max_tokens, **sampling)[0]

    def complete_all(self, prompts: Sequence[Prompt], max_tokens: int, **sampling: Any) -> list[Answer]:
        """Continue several prompts, all texts or all ids, at the same time; see `complete`."""
        asked = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        body = {"prompt": asked if len(asked) > 1 else asked[0], "max_tokens": max_tokens, "temperature": 0, **sampling}
        answer, seconds = self._timed("/v1/completions", {**body, "return_token_ids": True})
        choices = sorted(self._choices(answer, len(asked)), key=lambda choice: int(choice.get("index", 0)))
        return [
            Answer(
                str(choice.get("text") or ""),
                tuple(_ids(choice.get("token_ids"))),
                tuple(_ids(choice.get("prompt_token_ids"))),
                choice.get("finish_reason"),
                seconds,
            )
            for choice in choices
        ]

    def chat(self, messages: Sequence[Message], max_tokens: int, **sampling: Any) -> Answer:
        """Answer a conversation through the checkpoint's chat template; reasoning counts as text."""
        body = {"messages": [dict(message) for message in messages], "max_tokens": max_tokens, "temperature": 0}
        answer, seconds = self._timed("/v1/chat/completions", {**body, **sampling, "return_token_ids": True})
        choice = self._choices(answer, 1)[0]
        message = choice.get("message") or {}
        parts = (message.get("reasoning") or message.get("reasoning_content"), message.get("content"))
        return Answer(
            "\n".join(part for part in parts if part),
            tuple(_ids(choice.get("token_ids"))),
            tuple(_ids(answer.get("prompt_token_ids"))),
            choice.get("finish_reason"),
            seconds,
        )

    def prompt_logprobs(self, ids: Sequence[int]) -> list[float]:
        """Natural-log likelihood of each id but the first, given all ids before it."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = self._choices(self._post("/v1/completions", body), 1)[0].get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(ids):
            raise ServerError(f"{self.url} gave no prompt_logprobs: this stage needs a vLLM server.")
        try:
            return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[1:], ids[1:], strict=True)]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.url} gave prompt_logprobs of other tokens than asked for.") from error

    def _choices(self, answer: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != number:
            raise ServerError(f"{self.url} gave an answer without choices: it is no server for text.")
        return choices

    def _timed(self, path: str, body: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        started = time.monotonic()
        answer = self._post(path, body)
        return answer, time.monotonic() - started

    def _get(self, path: str) -> dict[str, Any]:
        return self._parsed(path, self._ask(path, None))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._parsed(path, self._ask(path, json.dumps({"model": self.model, **body}).encode()))

    def _parsed(self, path: str, content: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(content)
        except ValueError as error:
            raise ServerError(f"{self.url}{path} answered with something that is not JSON.") from error
        if not isinstance(parsed, dict):
            raise ServerError(f"{self.url}{path} answered with JSON of another form than vLLM's.")
        return parsed

    def _ask(self, path: str, body: bytes | None) -> bytes:
        """One request; asked again where the server was too busy to take it, or a read was cut.

        A request that may have been started is not repeated: it would be counted, and paid for, twice.
        """
        request = urllib.request.Request(f"{self.url}{path}", body, {"Content-Type": "application/json"})
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._opener.open(request, timeout=self.seconds) as answer:
                    content: bytes = answer.read()
                    return content
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY or attempt == ATTEMPTS:
                    raise ServerError(f"{self.url}{path} answered {error.code}: {_said(error)}") from error
            except TimeoutError as error:
                raise ServerError(f"{self.url}{path} gave no answer in {self.seconds:.0f} s.") from error
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                if isinstance(reason, TimeoutError):
                    raise ServerError(f"{self.url}{path} gave no answer in {self.seconds:.0f} s.") from error
                if attempt == ATTEMPTS or not (body is None or isinstance(reason, ConnectionRefusedError)):
                    raise ServerGone(f"{self.url} cannot be reached ({_reason(reason)}).") from error
            time.sleep(PAUSE_SECONDS * attempt)
        raise AssertionError


def base_url(url: str) -> str:
    """A server's address without a path.

    Raises:
        InputError: it is none.
    """
    full = url if "://" in url else f"http://{url}"
    parts = urllib.parse.urlsplit(full)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--url {url} is not the address of a server: write http://127.0.0.1:8000.")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _ids(value: Any) -> list[int]:
    return [int(token) for token in value] if isinstance(value, list) else []


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words for an error."""
    if error.code == 401:
        return "the server wants an API key, which nvquant does not send"
    content = error.read()
    try:
        parsed = json.loads(content)
        message = parsed.get("error", parsed)
        message = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, AttributeError):
        message = content.decode(errors="replace") or error.reason
    return " ".join(str(message).split())[:400]


def _reason(reason: object) -> str:
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
