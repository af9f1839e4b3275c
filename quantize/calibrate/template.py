"""A model's chat template, rendered by `template_worker` in a process of its own, which can be ended."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EnvironmentLack, InputError
from .template_worker import MOST_SECONDS

Message = Mapping[str, Any]

START_SECONDS = 120.0  # of imports, from a slow disk
ALL_SECONDS = 1800.0  # of all conversations of a run
MOST_MADE_OF_NOTHING = 1_000_000  # characters that a template may add to a conversation
MOST_GROWTH = 4
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from nvquant.calibrate.template_worker import main; main()"
)


class ChatTemplateError(Exception):
    """The chat template raised on a conversation: an unknown role, turns that do not alternate."""


class ChatTemplate:
    """The chat template of a loaded tokenizer.

    Args:
        tokenizer: of transformers.
        folder: of the model, for messages.
    """

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer, self._folder = tokenizer, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._seconds = 0.0

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, **switches: Any) -> str:
        """A conversation in the template, as text.

        Args:
            messages: turns, each with `role` and `content`.
            generation_prompt: end with the opening of the assistant's answer.
            switches: the template's own variables, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the template cannot render these turns.
            InputError: it exceeds the bounds of time, memory or output.
            EnvironmentLack: the process for it cannot be started.
        """
        if not self._is_jinja():
            return self._by_library(messages, generation_prompt)
        try:
            template = self._tokenizer.get_chat_template()
            variables = {**self._tokenizer.special_tokens_map, **switches}
        except Exception as error:  # none of several templates is the default one
            raise ChatTemplateError(str(error)[:300] or type(error).__name__) from error
        if not isinstance(template, str):
            raise ChatTemplateError("it is not a text")
        given = len(json.dumps(list(messages), default=str))
        request = {
            "template": template,
            "messages": list(messages),
            "generation_prompt": generation_prompt,
            "variables": variables,
            "given": given,
            "most": MOST_MADE_OF_NOTHING + MOST_GROWTH * given,
        }
        answer = self._ask(json.dumps(request, default=str).encode() + b"\n")
        if "refused" in answer:
            raise ChatTemplateError(answer["refused"])
        if "beyond" in answer:
            raise self._beyond(answer["beyond"])
        return str(answer["text"])

    def _is_jinja(self) -> bool:
        from transformers import PreTrainedTokenizerBase

        own: Any = type(self._tokenizer).apply_chat_template
        return own is PreTrainedTokenizerBase.apply_chat_template

    def _by_library(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """Render with a tokenizer whose library frames chats in its own trusted code, as Mistral's does."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except Exception as error:
            raise ChatTemplateError(str(error)[:300] or type(error).__name__) from error

    def _beyond(self, words: str) -> InputError:
        return InputError(
            f"the model's chat template {words}",
            where=self._folder,
            hint="repair it, or give token ids, which need none",
        )

    def _ask(self, request: bytes) -> dict[str, Any]:
        began = time.monotonic()
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(request)
            process.stdin.flush()
            answer = self._answer(process, MOST_SECONDS)
        except (OSError, TimeoutError, EOFError) as error:
            self._end()
            if isinstance(error, TimeoutError):
                raise self._beyond(f"takes more than {MOST_SECONDS} s for one conversation") from error
            raise self._beyond("ended the process that rendered it") from error
        self._seconds += time.monotonic() - began
        if self._seconds > ALL_SECONDS:
            self._end()
            raise self._beyond(f"took more than {ALL_SECONDS:.0f} s for all conversations")
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept | one_thread | {"HF_HUB_OFFLINE": "1"},
            )
            weakref.finalize(self, _kill, self._process)
            self._answer(self._process, START_SECONDS)
        except (OSError, TimeoutError, EOFError) as error:
            self._end()
            raise EnvironmentLack(
                f"The process that renders chat templates cannot be started ({error or type(error).__name__})",
                hint="free memory, or give token ids with --calibration",
            ) from error
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        """The next line of the process. Raises TimeoutError or EOFError where none comes."""
        assert process.stdout is not None
        until = time.monotonic() + seconds
        pieces = [self._pending]
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in pieces[-1]:
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimeoutError
                piece = os.read(process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise EOFError
                pieces.append(piece)
        line, _, self._pending = b"".join(pieces).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        if self._process is not None:
            _kill(self._process)
        self._process, self._pending = None, b""


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # of what was not written any more
                pass
