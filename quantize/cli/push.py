"""`nvquant push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import debug_option, json_option, open_model
from .output import emit_json, print_table, say, tell
from .publishing import proved, report_push

if TYPE_CHECKING:
    from ..publish.push import Parcel

EXAMPLES = """
\b
Examples:
  nvquant push ./gemma-4-31b-nvfp4 me/gemma-4-31b-NVFP4
  nvquant push ./gemma-4-31b-nvfp4 me/gemma-4-31b-NVFP4 --against google/gemma-4-31b --public
  nvquant verify ./out --against ./model --stage structure --stage numerics --stage serve --json > proof.json
  nvquant push ./out me/model-NVFP4 --verify-json proof.json --base-model org/model
  nvquant push ./out me/model-NVFP4 --dry-run
"""


@click.command("push", epilog=EXAMPLES)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option(
    "--against", "model", metavar="MODEL", help="What it was converted from: measure the numbers for the card."
)
@click.option(
    "--verify-json",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="What `nvquant verify --json` found of this checkpoint: its numbers and its server are not run again.",
)
@click.option("--base-model", metavar="ID", help="The source's name on the Hub, where a local folder was converted.")
@click.option("--public", "is_public", is_flag=True, help="Make a new repository public; private by default.")
@click.option(
    "--replace",
    is_flag=True,
    help="Delete weights and settings of other checkpoints that the repository holds, and replace its README.md.",
)
@click.option("--unverified", is_flag=True, help="Publish although checks failed; the card begins with what failed.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Show the card and the files; make and upload nothing.")
@json_option
@debug_option
def command(
    checkpoint: Path,
    repo: str,
    model: str | None,
    verify_json: Path | None,
    base_model: str | None,
    is_public: bool,
    replace: bool,
    unverified: bool,
    message: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Publish CHECKPOINT in REPO (org/name) on the Hugging Face Hub: the checkpoint's own files, a model card, and what
    proves it.

    The stage structure of `nvquant verify` runs first, and numerics with --against; a checkpoint that fails is refused.
    A push that ended early goes on when the same command is run again.
    """
    from ..publish.proof import read_earlier
    from ..publish.push import PushRequest, prepare, push
    from ..publish.target import check_repo_name, check_rights

    check_repo_name(repo) if dry_run else check_rights(repo)
    source = None if model is None else open_model(model)
    earlier = None if verify_json is None else read_earlier(verify_json, checkpoint)
    document = proved(checkpoint, source, earlier)
    request = PushRequest(
        checkpoint,
        repo,
        document,
        base_model=base_model,
        source=None if source is None else source.folder,
        is_public=is_public,
        replace=replace,
        unverified=unverified,
        message=message,
        say=say,
    )
    if dry_run:
        _show(prepare(request), as_json)
    else:
        result = push(request)
        emit_json(result.as_json()) if as_json else report_push(result)
    return 0


def _show(parcel: Parcel, as_json: bool) -> None:
    changes = parcel.changes
    if as_json:
        emit_json(parcel.as_json())
        return
    tell(parcel.card)
    uploaded = {file.name for file in changes.upload}
    rows = [[file.name, f"{file.size:,}", "upload" if file.name in uploaded else "there"] for file in changes.files]
    print_table(["file", "bytes", ""], [*rows, *([name, "", "delete"] for name in changes.delete)])
    say(f"Nothing was uploaded to {parcel.target.repo}: leave --dry-run out for that.")
