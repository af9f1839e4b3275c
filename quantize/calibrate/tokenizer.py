"""The model's own tokenizer, under two rules: no raw text becomes a special token, and no token is added by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.sidefiles import side_files
from ..errors import InputError
from .quiet import quiet_descriptors, quiet_transformers
from .template import ChatTemplate, ChatTemplateError, Message
from .template_worker import TODAY
from .tokenizer_files import lack_of_packages, refuse_large_ids

__all__ = ["TODAY", "ChatTemplateError", "Message", "ModelTokenizer", "load_tokenizer"]

MOST_REASON = 300  # characters of an error of transformers that a message repeats


class ModelTokenizer:
    """The tokenizer of a model folder.

    Attributes:
        bos_id: the token that begins every sequence, None for models that have none.
        has_chat_template: whether the model is one for chats.
    """

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer of `folder`, without a download and without code of the model.

        Raises:
            InputError: the folder has no tokenizer that transformers can load.
        """
        self._folder = folder
        self._tokenizer = load_tokenizer(folder)
        self._template = ChatTemplate(self._tokenizer, folder)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.has_chat_template = bool(self._tokenizer.chat_template)
        added = self._tokenizer.added_tokens_decoder.items()
        special = {token.content: index for index, token in added if token.special}
        # An unknown character is part of a text, and some tokenizers have a token for it that counts as special.
        self._never_in_text = frozenset(special.values()) - {self._tokenizer.unk_token_id} | {self.bos_id}
        self._special = frozenset(filter(None, special))
        self._lengths = sorted({len(name) for name in self._special}, reverse=True)
        # One alternation of all names takes minutes on HTML: Gemma has thousands that begin with "<".
        firsts = "".join(sorted({re.escape(name[0]) for name in self._special}))
        self._firsts = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def harmless(self, text: str) -> str:
        """`text` with a space put into every special token's name, so that `<bos>` becomes the letters `< bos>`."""
        pieces, done = [], 0
        for match in self._firsts.finditer(text):
            start = match.start()
            if start < done:
                continue
            name = next(
                (text[start : start + n] for n in self._lengths if text[start : start + n] in self._special), ""
            )
            if name:
                pieces += [text[done:start], name[:1] if len(name) > 1 else "", " ", name[1:]]
                done = start + len(name)
        return "".join((*pieces, text[done:]))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of raw text, none of them special, without BOS."""
        return [index for index in self.encode_rendered(self.harmless(text)) if index not in self._never_in_text]

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered chat with its special tokens. None is added, since the template wrote BOS."""
        # `verbose` is about lengths beyond model_max_length: every sequence is cut later on.
        return encoded(self._tokenizer, text, self._folder, add_special_tokens=False)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = False, **switches: bool) -> str:
        """A conversation in the model's chat template, as text.

        Args:
            messages: turns, each with `role` and `content`.
            generation_prompt: end with the opening of the assistant's answer.
            switches: the template's own variables, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the template cannot render these turns.
            InputError: it exceeds the bounds of time, memory or output.
        """
        return self._template.render(messages, generation_prompt=generation_prompt, **switches)


def encoded(tokenizer: Any, text: str, folder: Path, **options: bool) -> list[int]:
    """Token ids of a text by a tokenizer of transformers.

    Args:
        folder: of the model, for messages.
    Raises:
        InputError: the tokenizer cannot encode it. A loaded tokenizer may have settings that fail on every text.
    """
    try:
        return [int(token) for token in tokenizer(text, verbose=False, **options)["input_ids"]]
    except Exception as error:
        reason = (str(error)[:MOST_REASON].strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"the tokenizer cannot encode a text ({type(error).__name__}: {reason})",
            where=folder,
            hint="repair its files, or give token ids, which need none",
        ) from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer object of transformers, imported only now because it takes seconds.

    Raises:
        InputError: there is none that transformers can load, a package for it is missing, or its ids are too large.
    """
    from transformers import AutoTokenizer

    side_files(folder)  # transformers would follow every link, and wait for a pipe
    lack = lack_of_packages(folder)
    if lack is not None:
        raise InputError(
            f"{folder}", where=folder, hint=f"{lack}, or give token ids with --calibration, which need no tokenizer"
        )
    refuse_large_ids(folder)
    try:
        with quiet_transformers(), quiet_descriptors():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError and bare Exception are all in use there
        reason = (str(error)[:MOST_REASON].strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{folder} has no tokenizer that transformers can load ({reason})",
            where=folder,
            hint="put the model's tokenizer files there, or give token ids with --calibration, which need none",
        ) from error
