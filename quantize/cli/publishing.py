"""The result of a push in words, for `push` and `convert --push-to`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import Output, gigabytes

if TYPE_CHECKING:
    from ..publish.push import PushResult


def report_push(result: PushResult, out: Output) -> None:
    """Report the result of a push."""
    if result.kept_card:
        out.say(
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
    out.result(f"{result.url}: {done}, {'private' if result.is_private else 'public'}, commit {result.commit}.")
    out.say(f"Next: nvquant verify {result.repo}")
