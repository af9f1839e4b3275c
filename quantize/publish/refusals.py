"""The messages of huggingface_hub and the Hub during a push: hidden where they help nobody, and one sentence where they
end the push. They contain no address and no token."""

from __future__ import annotations

import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ..checkpoint.hub.errors import hub_errors, network_error, status_of
from ..checkpoint.hub.patience import Patience
from ..errors import InputError
from ..quoting import one_line

AGAIN = "run the same command again to resume"
TOKENS = "https://huggingface.co/settings/tokens"
MOST_WORDS = 300
Result = TypeVar("Result")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from speaking: its warnings name addresses that are signed, and its bars are for terminals
    (where they stay)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    verbosity = get_verbosity()
    hides_bars = (
        not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    )
    set_verbosity(logging.ERROR)
    if hides_bars:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own and of its HTTP library's
            yield
    finally:
        set_verbosity(verbosity)
        if hides_bars:
            enable_progress_bars()


@contextmanager
def push_errors(repo: str) -> Iterator[None]:
    """Turn the errors of a push into one sentence: refusals with the Hub's own reason, a lost network, and the errors
    of the Xet client, which `hub_errors` does not know.

    Raises:
        InputError: in place of each.
    """
    from huggingface_hub import errors

    with hub_errors("model", repo, otherwise=AGAIN):
        try:
            yield
        except (errors.HFValidationError, errors.OfflineModeIsEnabled):
            raise
        except errors.HfHubHTTPError as error:
            raise InputError(_refused(repo, error)) from error
        except network_error() as error:
            raise InputError(f"The Hub cannot be reached for {repo} ({type(error).__name__})", hint=AGAIN) from error
        except ValueError as error:
            raise InputError(f"The Hub refused the upload to {repo}: {_without_addresses(error)}.") from error
        except (RuntimeError, OSError) as error:
            raise InputError(f"The upload to {repo} was interrupted ({type(error).__name__})", hint=AGAIN) from error


def patiently(work: Callable[[], Result], doing: str) -> Result:
    """Do something that may fail for a moment, and retry it after a while. huggingface_hub itself retries uploads for
    half a minute, and most other requests not at all."""
    patience = Patience(threading.Event())
    while True:
        try:
            return work()
        except network_error() as error:
            patience.wait_after(error, doing)


def _refused(repo: str, error: Any) -> str:
    status = status_of(error)
    said = _without_addresses(error.server_message or "")
    reason = f"HTTP {status}{f': {said}' if said else ''}"
    if status in (401, 404):
        return (
            f"The Hub does not know this token, or hides {repo} from it ({reason}). Check the name, run "
            f"`hf auth login` again, or set HF_TOKEN."
        )
    if status in (402, 403):
        return (
            f"The Hub does not let this token write to {repo} ({reason}). Use a token with write access "
            f"({TOKENS}), or free storage."
        )
    if status == 429:
        return f"The Hub limits the rate of requests ({reason}). Wait a few minutes, and {AGAIN}."
    if status is not None and status < 500:
        return f"The Hub refused the upload to {repo} ({reason}). Check the repository's page, and {AGAIN}."
    return f"The Hub failed ({reason}) during the upload to {repo}: {AGAIN}."


def _without_addresses(words: object) -> str:
    """The Hub's own words, on one line."""
    text = re.sub(r"https?://\S+", "…", one_line(words)).rstrip(".")
    return text if len(text) <= MOST_WORDS else f"{text[:MOST_WORDS]}…"
