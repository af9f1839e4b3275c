"""Errors of the Hub as one sentence with a way out. It contains no address and no token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import InputError

# A request that fails this way may succeed when it is retried.
PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class HubError(InputError):
    """The Hub refused, or could not be reached."""


@contextmanager
def hub_errors(what: str, repo: str, revision: str | None = None, otherwise: str = "try again later") -> Iterator[None]:
    """Turn every error of huggingface_hub and of the network into one sentence.

    Args:
        what: `model` or `data set`.
        otherwise: the way out where the Hub refuses for an unknown reason, or cannot be reached.
    Raises:
        HubError: in place of each.
    """
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"Hub {what} {repo} is gated",
            hint="accept its terms on its page, and run `hf auth login` (or set HF_TOKEN)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"Hub {what} {repo} has no revision {revision}", hint="give a commit, branch or tag of it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(_unreachable(what, where, otherwise)) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"Hub {what} {where} lacks a file that it listed", hint=otherwise) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"Hub {what} {repo} does not exist or is private", hint="check the name, or run `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refused(f"Hub {what} {where}", f"{what} {where}", status_of(error), otherwise)) from error
    except (network_error(), errors.OfflineModeIsEnabled) as error:
        raise HubError(_unreachable(what, where, otherwise)) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo} is not a valid name on the Hub", where=repo, hint="give it as org/name") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HubError(
            f"Hub {what} {where}: the server's answer does not have the Hub's form",
            hint="check HF_ENDPOINT and the network",
        ) from error


def network_error() -> type[Exception]:
    """The base class of the errors of huggingface_hub's HTTP library, which differs between its releases."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def status_of(error: Any) -> int | None:
    """The HTTP status that an error carries, None where it carries none."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _unreachable(what: str, where: str, otherwise: str) -> str:
    return f"The Hub cannot be reached for {what} {where}, and the cache lacks it: check the network, or {otherwise}."


def _refused(where: str, what: str, status: int | None, otherwise: str) -> str:
    if status == 401:
        return f"{where}: the Hub does not accept this token (HTTP 401): run `hf auth login` again, or unset HF_TOKEN."
    if status == 403:
        return f"{where}: the token does not permit this (HTTP 403): create one that does, and run `hf auth login`."
    if status == 429:
        return (
            f"{where}: the Hub limits the request rate (HTTP 429): wait some minutes, and run the same command again."
        )
    return f"The Hub refused {what} (HTTP {status or 'without status'}): try again, or {otherwise}."
