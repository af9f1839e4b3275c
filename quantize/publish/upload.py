"""The upload of files to a repository: sent a few at a time, named by one commit at the end, and compared afterwards.

Content goes first and is named by its hash. Neither this run nor a later one sends it again. Only the commit at the end
changes the repository that users see, all of it at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub.errors import network_error, status_of
from ..checkpoint.hub.forms import commit_of
from ..checkpoint.hub.patience import Patience
from ..checkpoint.hub.repository import published_files
from ..errors import CheckFailed, InputError
from ..report.words import size
from .files import LocalFile
from .refusals import AGAIN, patiently, push_errors, quiet_hub
from .target import Changes, Target, shortened

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

FILES_AT_ONCE = 5
SAID_EVERY_SECONDS = 10.0
BAD_REQUEST = 400
MOVED = 412  # the commit's parent is no longer the newest one
Say = Callable[[str], None]


def send(api: HfApi, target: Target, changes: Changes, message: str, say: Say) -> str:
    """Upload, delete and commit. Returns the commit.

    Raises:
        InputError: the Hub refuses or cannot be reached for long, the repository was changed meanwhile, or a file
            cannot be read.
    """
    from huggingface_hub import CommitOperationDelete

    additions = [_addition(file) for file in changes.upload]
    with quiet_hub(), push_errors(target.repo):
        _upload(api, target.repo, additions, say)
        operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in changes.delete)]
        return _commit(api, target, changes, operations, message)


def check_card(api: HfApi, repo: str, card: str) -> None:
    """Let the Hub check a card's metadata before hours of work.

    Raises:
        InputError: the Hub does not accept it, or cannot be reached.
    """
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    def ask() -> None:
        answer = get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json={"content": card, "repoType": "model"},
            headers=build_hf_headers(),
        )
        if answer.status_code == BAD_REQUEST:
            said = ", ".join(str(error.get("message")) for error in answer.json().get("errors", ()))
            raise ValueError(
                f"it does not accept the card's metadata ({said}), which comes from the source's README.md"
            )
        hf_raise_for_status(answer)

    with quiet_hub(), push_errors(repo):
        patiently(ask, "checking the card")


def confirm(api: HfApi, repo: str, commit: str, files: Sequence[LocalFile]) -> None:
    """Compare the Hub's files at a commit with the expected ones: every file, its size and its hash.

    Raises:
        CheckFailed: a file is missing or differs.
    """
    with quiet_hub(), push_errors(repo):
        found = patiently(lambda: api.model_info(repo, revision=commit, files_metadata=True), f"reading back {repo}")
    published = published_files(found, f"Hub model {repo}")
    wrong = [
        file.name for file in files if file.name not in published or not file.is_published_as(published[file.name])
    ]
    if wrong:
        raise CheckFailed(
            f"{repo} at commit {commit[:12]} lacks {shortened(wrong)}, or has it with another size or hash",
            where=repo,
            hint="Push again, and if that does not help, delete the file on the repository's page first",
        )


def _addition(file: LocalFile) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    made = CommitOperationAdd(file.name, file.content)
    made.upload_info.sha256 = bytes.fromhex(file.sha256)  # read once already
    return made


def _upload(api: HfApi, repo: str, additions: Sequence[CommitOperationAdd], say: Say) -> None:
    """Send the content of large files. The small ones travel with the commit."""
    whole, done, said = sum(each.upload_info.size for each in additions), 0, time.monotonic()
    for begin in range(0, len(additions), FILES_AT_ONCE):
        group = additions[begin : begin + FILES_AT_ONCE]
        patiently(lambda group=group: _send_group(api, repo, group), f"uploading to {repo}")  # type: ignore[misc]
        done += sum(each.upload_info.size for each in group)
        if time.monotonic() - said >= SAID_EVERY_SECONDS:
            said = time.monotonic()
            say(f"uploaded {begin + len(group)} of {len(additions)} files, {size(done)} of {size(whole)}")


def _send_group(api: HfApi, repo: str, group: Sequence[CommitOperationAdd]) -> None:
    try:
        api.preupload_lfs_files(repo, group, num_threads=FILES_AT_ONCE, free_memory=False)
    except RuntimeError as error:  # what one of its threads met
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise


def _commit(api: HfApi, target: Target, changes: Changes, operations: list[Any], message: str) -> str:
    patience, doing = Patience(threading.Event()), f"committing to {target.repo}"
    while True:
        try:
            made = api.create_commit(target.repo, operations, commit_message=message, parent_commit=target.commit)
            return commit_of(made.oid, f"Hub model {target.repo}")
        except network_error() as error:
            landed = _landed(api, target.repo, changes) if _may_have_landed(error) else None
            if landed is not None:
                return landed
            if status_of(error) == MOVED:
                raise InputError(f"{target.repo} changed during the upload", where=target.repo, hint=AGAIN) from error
            patience.wait_after(error, doing)


def _may_have_landed(error: BaseException) -> bool:
    """Whether the commit may be there although its answer was lost, or an earlier attempt's was."""
    status = status_of(error)
    return status is None or status == MOVED or status >= 500


def _landed(api: HfApi, repo: str, changes: Changes) -> str | None:
    """The newest commit where it contains the intended files. None where it does not, or nobody answers."""
    try:
        found = api.model_info(repo, files_metadata=True)
    except network_error():
        return None
    published = published_files(found, f"Hub model {repo}")
    is_whole = all(file.name in published and file.is_published_as(published[file.name]) for file in changes.files)
    return commit_of(found.sha, f"Hub model {repo}") if is_whole and not set(changes.delete) & set(published) else None
