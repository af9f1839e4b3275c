"""Shared code of `convert --push-to` and `push`: the check before work, the proof with its progress, the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..quoting import argument, shell
from .options import resolve_device
from .output import gigabytes, say, stage_reporter, tell

if TYPE_CHECKING:
    from ..checkpoint.source import Checkpoint
    from ..publish.push import PushResult


def check_push(repo: str) -> None:
    """Refuse an impossible push before hours of work.

    Raises:
        InputError: see `publish.target.check_rights`.
    """
    from ..publish.target import check_rights

    check_rights(repo)


def proved(checkpoint: Path, source: Checkpoint | None, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """The results of verify for a checkpoint that is to be published, shown as they come. See `publish.proof.prove`."""
    from ..publish.proof import prove

    return prove(checkpoint, source, earlier, stage_reporter(), resolve_device("auto"))


def push_made(checkpoint: Path, source: Checkpoint, repo: str) -> PushResult:
    """Prove and publish a new checkpoint. The numbers require the source's weights. Without them, only the structure is
    proved.

    Raises:
        CheckFailed: the proof failed. The checkpoint stays.
        InputError: the Hub or the network failed.
    """
    from ..checkpoint.hub.shards import RemoteShards
    from ..publish.push import PushRequest, push

    is_kept = not isinstance(source.content, RemoteShards)
    if not is_kept:
        command = shell(["nvquant", "push", argument(checkpoint), repo, "--against", argument(source.name)])
        say(f"Numbers are not measured, because --low-disk kept no weights. To add them to the card, run `{command}`.")
    document = proved(checkpoint, source if is_kept else None, None)
    return push(PushRequest(checkpoint, repo, document, source=source.folder, say=say))


def report_push(result: PushResult) -> None:
    """Report the result of a push."""
    if result.kept_card:
        say(
            f"README.md of {result.repo} stays, because nvquant did not write it. To replace it, use "
            f"`nvquant push --replace`."
        )
    done = f"{result.files} files, {gigabytes(result.bytes)}"
    if result.uploaded or result.deleted:
        sent = f"{len(result.uploaded)} uploaded ({gigabytes(result.uploaded_bytes)})"
        gone = f", {len(result.deleted)} deleted" if result.deleted else ""
        done = f"{done}, {sent}{gone}"
    else:
        done = f"{done}, nothing to upload"
    tell(f"{result.url}: {done}, {'private' if result.is_private else 'public'}, commit {result.commit}.")
    say(f"Next: nvquant verify {result.repo}")
