"""A push from plain values, for `nvquant.push` and the commands `push` and `convert --push-to`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..quoting import argument, shell
from .inputs import AnyPath, Say, open_model, resolve_device

if TYPE_CHECKING:
    from ..checkpoint.source import Checkpoint
    from ..publish.push import PushRequest, PushResult
    from ..verify.threads import Progress


@dataclass(frozen=True)
class PushOptions:
    """The options of a push, in plain values.

    Attributes:
        against: the source of the checkpoint, to measure the numbers for the card.
        verify_json: a file of an earlier `nvquant verify --json` of this checkpoint, whose results are reused.
        base_model: the source on the Hub, if a local folder was converted.
        is_public: whether a new repository is public.
        replace: delete files of other checkpoints in the repository, and replace its README.md.
        unverified: publish although checks failed.
        message: of the commit.
    """

    against: AnyPath | None = None
    verify_json: AnyPath | None = None
    base_model: str | None = None
    is_public: bool = False
    replace: bool = False
    unverified: bool = False
    message: str | None = None


def check_push(repo: str) -> None:
    """Refuse an impossible push before hours of work.

    Raises:
        InputError: see `publish.target.check_rights`.
    """
    from ..publish.target import check_rights

    check_rights(repo)


def verified_request(
    checkpoint: Path, repo: str, options: PushOptions, progress: Progress, say: Say, *, dry_run: bool = False
) -> PushRequest:
    """Verify a checkpoint, and return the request to publish it.

    Args:
        progress: called with (done, total, phase) by long steps of the verification.
        say: called with the progress of the push, in words.
        dry_run: whether nothing will be uploaded, so that no rights are necessary.
    Raises:
        InputError: no right to write there, no checkpoint, or see `publish.proof`.
    """
    from ..publish.proof import prove, read_earlier
    from ..publish.push import PushRequest
    from ..publish.target import check_repo_name

    if dry_run:
        check_repo_name(repo)
    else:
        check_push(repo)
    source = None if options.against is None else open_model(str(options.against))
    earlier = None if options.verify_json is None else read_earlier(Path(options.verify_json), checkpoint)
    return PushRequest(
        checkpoint,
        repo,
        prove(checkpoint, source, earlier, progress, resolve_device("auto")),
        base_model=options.base_model,
        source=None if source is None else source.folder,
        is_public=options.is_public,
        replace=options.replace,
        unverified=options.unverified,
        message=options.message,
        say=say,
    )


def push_converted(checkpoint: Path, source: Checkpoint, repo: str, progress: Progress, say: Say) -> PushResult:
    """Verify and publish a new checkpoint. The numbers require the source's weights. Without them, only the structure
    is verified.

    Raises:
        CheckFailed: a check failed. The checkpoint stays.
        InputError: the Hub or the network failed.
    """
    from ..checkpoint.hub.shards import RemoteShards
    from ..publish.proof import prove
    from ..publish.push import PushRequest, push
    from ..weights.decoding import shards_below

    is_kept = not isinstance(shards_below(source), RemoteShards)
    if not is_kept:
        command = shell(["nvquant", "push", argument(checkpoint), repo, "--against", argument(source.name)])
        say(f"Numbers are not measured, because --low-disk kept no weights. To add them to the card, run `{command}`.")
    document = prove(checkpoint, source if is_kept else None, None, progress, resolve_device("auto"))
    return push(PushRequest(checkpoint, repo, document, source=source.folder, say=say))
