"""The servers and the loads of a benchmark."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..serving.address import base_url
from .load import RANDOM
from .subject import Subject, need_tokenizer, open_subject

LEAST_REQUESTS = 8
ROUNDS = 2
# For the tokens that a tokenizer puts around a text, and for texts that become some tokens longer when read again.
MARGIN_TOKENS = 16
_NAMED = re.compile(r"(?P<name>[^=/:]+)=(?P<rest>.+)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A server to measure.

    Attributes:
        name: in all tables.
        subject: the served checkpoint. None for a running server that serves something else.
        url: of a running server.
    """

    name: str
    subject: Subject | None
    url: str | None = None


@dataclass(frozen=True)
class Point:
    """A load: prompts of `context` tokens (None: a data set's own), sent by `users` at a time."""

    context: int | None
    users: int


@dataclass(frozen=True)
class Grid:
    """All loads for one server.

    Attributes:
        requests: for each point. None for a number that suits the users.
    """

    contexts: tuple[int, ...]
    users: tuple[int, ...]
    output_tokens: int
    requests: int | None = None
    dataset: str = RANDOM
    dataset_path: str | None = None

    @property
    def points(self) -> tuple[Point, ...]:
        """Every context with every number of users."""
        contexts: Sequence[int | None] = self.contexts if self.dataset == RANDOM else [None]
        return tuple(Point(context, users) for context in contexts for users in self.users)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest request. None where a data set decides."""
        return max(self.contexts) + self.output_tokens if self.dataset == RANDOM else None

    def requests_for(self, users: int) -> int:
        """A number of requests that makes complete rounds of all users. In an incomplete round, tokens come faster."""
        wanted = self.requests or max(LEAST_REQUESTS, ROUNDS * users)
        return -(-wanted // users) * users

    def refuse_longer_than(self, limit: int | None, whose: str) -> None:
        """Refuse points that cannot be measured, before anything is started.

        Raises:
            InputError: a request is longer than the limit.
        """
        if limit is None or self.dataset != RANDOM:
            return
        too_long = [context for context in self.contexts if context + self.output_tokens > limit]
        if too_long:
            raise InputError(
                f"A context of {too_long[0]} and {self.output_tokens} output tokens exceed {whose} of {limit} tokens",
                hint=f"remove {too_long[0]} from --contexts",
            )

    def model_len(self, subject: Subject) -> int:
        """The longest request that a server is started with."""
        limit = subject.longest_context
        wanted = (self.longest or limit or 4096) + MARGIN_TOKENS
        return min(wanted, limit) if limit else wanted


def find_targets(checkpoint: Path, url: str | None, against: Sequence[str]) -> tuple[Target, ...]:
    """List the servers: the checkpoint first, then those that it is compared with.

    Args:
        url: of a running server of the checkpoint.
        against: folders or addresses, each perhaps as NAME=….
    Raises:
        InputError: one is neither, or two have one name.
    """
    subject = open_subject(checkpoint)
    need_tokenizer(subject)
    targets = [Target(_folder_name(checkpoint), subject, None if url is None else base_url(url))]
    targets += [_target(given) for given in against]
    names = [target.name for target in targets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"two models have the name {twice}",
            where="--against",
            hint=f"rename one, as in --against OTHER={against[-1]}",
        )
    return tuple(targets)


def _target(given: str) -> Target:
    name, where = None, given
    if not _is_folder(given) and (match := _NAMED.fullmatch(given)):
        name, where = match["name"].strip(), match["rest"]
    if re.match(r"https?://", where):
        return Target(name or where.split("://")[1].rstrip("/").removesuffix("/v1"), None, base_url(where))
    if not _is_folder(where):
        raise InputError(
            f"--against {given}: {where} is neither a folder nor the address of a server (http://HOST:PORT)."
        )
    subject = open_subject(Path(where))
    need_tokenizer(subject)
    return Target(name or _folder_name(Path(where)), subject)


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def _folder_name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name  # noqa: PTH100  # `.` has a name then, and a link keeps its own
