"""`nvquant push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..api.publication import PushOptions, verified_request
from .options import debug_option, output_options
from .output import Output
from .publishing import report_push

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
    "--against",
    "model",
    metavar="MODEL",
    help="Measure the numbers for the card against this source of the checkpoint.",
)
@click.option(
    "--verify-json",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE",
    help="Take the results of an earlier `nvquant verify --json` of this checkpoint, and do not repeat them.",
)
@click.option("--base-model", metavar="ID", help="Name the source on the Hub, if you converted a local folder.")
@click.option("--public", "is_public", is_flag=True, help="Make a new repository public. Otherwise it is private.")
@click.option(
    "--replace",
    is_flag=True,
    help="Delete weights and settings of other checkpoints that the repository holds, and replace its README.md.",
)
@click.option(
    "--unverified", is_flag=True, help="Publish although checks failed. The card then begins with the failed checks."
)
@click.option("--message", metavar="TEXT", help="Set the message of the commit.")
@click.option("--dry-run", is_flag=True, help="Show the card and the files, and upload nothing.")
@output_options
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
    out: Output,
) -> int:
    """Publish CHECKPOINT in REPO (org/name) on the Hugging Face Hub, with a model card and its proof.

    The stage structure of `nvquant verify` runs first, and numerics with --against. A checkpoint that fails is refused.
    To resume an unfinished push, run the same command again.
    """
    from ..publish.push import prepare, push

    options = PushOptions(model, verify_json, base_model, is_public, replace, unverified, message)
    request = verified_request(checkpoint, repo, options, out.stages(), out.say, dry_run=dry_run)
    if dry_run:
        parcel = prepare(request)
        out.report(parcel.as_json, lambda: _show(parcel, out))
    else:
        result = push(request)
        out.report(result.as_json, lambda: report_push(result, out))
    return 0


def _show(parcel: Parcel, out: Output) -> None:
    changes = parcel.changes
    out.tell(parcel.card)
    uploaded = {file.name for file in changes.upload}
    rows = [[file.name, f"{file.size:,}", "upload" if file.name in uploaded else "there"] for file in changes.files]
    out.table(["file", "bytes", ""], [*rows, *([name, "", "delete"] for name in changes.delete)])
    out.say(f"Nothing was uploaded to {parcel.target.repo}. To upload, drop --dry-run.")
