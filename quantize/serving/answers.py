"""The forms of a server's answers. Each answer is checked where it enters, and is only data after that.

Source of the forms: vLLM 0.32.0 (`entrypoints/openai`), and llama.cpp's server for `meta`.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..checkpoint.json_text import parse_json

MOST_NAME_CHARACTERS, MOST_WORD_CHARACTERS = 4096, 100
MOST_COUNT = 1 << 48  # tokens of a context or a cache, bytes of a file


def _number_or_none(value: object) -> object:
    """A limit that is given as something else than a natural number is as good as none."""
    is_natural = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_COUNT
    return value if is_natural else None


def _short_text_or_none(value: object) -> object:
    return value if isinstance(value, str) and len(value) <= MOST_WORD_CHARACTERS else None


Name = Annotated[str, Field(min_length=1, max_length=MOST_NAME_CHARACTERS)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Limit = Annotated[int | None, BeforeValidator(_number_or_none)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class Version(_Form):
    """`/version`."""

    version: Annotated[str, Field(max_length=MOST_WORD_CHARACTERS)] | None = None


class Meta(_Form):
    """The description of its file by a llama.cpp server. `n_ctx` is the longest request."""

    size: Limit = None
    ftype: Annotated[str | None, BeforeValidator(_short_text_or_none)] = None
    n_ctx: Limit = None


class Model(_Form):
    """One of the models that are served."""

    id: Name
    root: Annotated[str, Field(max_length=MOST_NAME_CHARACTERS)] | None = None
    max_model_len: Limit = None
    meta: Meta | None = None


class Models(_Form):
    """`/v1/models`."""

    data: Annotated[list[Model], Field(max_length=10_000)]


class Tokens(_Form):
    """`/tokenize`."""

    tokens: list[Token]


class Message(_Form):
    """The message of a chat's answer. Reasoning counts as text."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class Likelihood(_Form):
    """The likelihood of a prompt's token, in nats. NaN and infinities are a fault of the model, not of the form."""

    logprob: float


class Choice(_Form):
    """One of the answers to a question."""

    index: Annotated[int, Field(ge=0, lt=1 << 20)] = 0
    text: str | None = None
    message: Message | None = None
    token_ids: list[Token] | None = None
    prompt_token_ids: list[Token] | None = None
    finish_reason: Annotated[str, Field(max_length=MOST_WORD_CHARACTERS)] | None = None
    prompt_logprobs: list[dict[str, Likelihood] | None] | None = None


class Choices(_Form):
    """`/v1/completions` and `/v1/chat/completions`."""

    choices: list[Choice]
    prompt_token_ids: list[Token] | None = None


Form = TypeVar("Form", bound=_Form)


class WrongForm(ValueError):
    """An answer that does not have its form. The message describes where."""


def parse(form: type[Form], content: bytes) -> Form:
    """Parse an answer in its form.

    Raises:
        WrongForm: it is no JSON, or JSON in another form.
    """
    try:
        parsed: Any = parse_json(content)
    except ValueError as error:
        raise WrongForm("did not answer with JSON") from error
    if not isinstance(parsed, dict):
        raise WrongForm("did not answer with JSON in vLLM's form")
    try:
        return form.model_validate(parsed)
    except (ValidationError, RecursionError) as error:
        where = (
            ".".join(str(part)[:40] for part in error.errors()[0]["loc"]) if isinstance(error, ValidationError) else ""
        )
        raise WrongForm(f"did not answer with JSON in vLLM's form{f' ({where})' if where else ''}") from error


def natural(text: str) -> int | None:
    """A natural number in decimal digits, as metrics contain it. None for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_COUNT))):
        return None
    number = int(text)
    return number if number <= MOST_COUNT else None
