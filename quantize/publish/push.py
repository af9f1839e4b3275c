"""A push from end to end: refuse a failed checkpoint, write the card, upload missing files, and compare the result.

document = proof.prove(folder, source, None, progress)           # or document(report) of a verification at hand
result = push(PushRequest(folder, "me/model-NVFP4", document, say=print))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.hub.download import download
from ..checkpoint.hub.repository import find_model
from ..errors import CheckFailed, InputError
from ..report.document import at
from ..report.page import page_of
from ..verify.contents import checkpoint_identity
from .card import CardFacts, render_card
from .chart import layers_svg
from .files import CARD_NAME, CHART_NAME, VERIFY_NAME, LocalFile, checkpoint_files, hash_files
from .frontmatter import split_card
from .proof import failed_checks
from .provenance import Provenance, read_provenance
from .refusals import patiently, push_errors, quiet_hub
from .target import Changes, Target, changes_for, check_rights, hub_api, look_at
from .upload import check_card, confirm, send

MESSAGE = "Upload an NVFP4 checkpoint, its card and its proof"


def _tell_nobody(_words: str) -> None:
    pass


@dataclass(frozen=True)
class PushRequest:
    """A request to publish a checkpoint.

    Attributes:
        folder: of the checkpoint.
        repo: `org/name`.
        document: the results of verify, fit to publish, from `proof.prove` or `report.document.document(report)`.
        base_model: the source's id, where the manifest does not name it.
        source: the source's folder, whose README.md gives the card's data where the source is not on the Hub.
        is_public: whether a new repository is public. An existing one stays as it is.
        replace: delete files of other checkpoints, and replace a foreign README.md.
        unverified: publish although checks failed. The card then begins with that.
        message: of the commit.
        endpoint: address of the Hub, None for the usual one.
        say: called with the progress, in words.
    """

    folder: Path
    repo: str
    document: Mapping[str, Any]
    base_model: str | None = None
    source: Path | None = None
    is_public: bool = False
    replace: bool = False
    unverified: bool = False
    message: str | None = None
    endpoint: str | None = None
    say: Callable[[str], None] = _tell_nobody


@dataclass(frozen=True)
class Parcel:
    """A prepared push: the card, and the changes to the repository."""

    card: str
    target: Target
    changes: Changes

    def as_json(self) -> dict[str, Any]:
        """The document of `push --dry-run --json`."""
        return {
            "repo": self.target.repo,
            "exists": self.target.commit is not None,
            "card": self.card,
            "upload": [{"name": file.name, "bytes": file.size} for file in self.changes.upload],
            "unchanged": [{"name": file.name, "bytes": file.size} for file in self.changes.unchanged],
            "delete": list(self.changes.delete),
            "kept_card": self.changes.keeps_card,
        }


@dataclass(frozen=True)
class PushResult:
    """The result of a push, and the document of `push --json`.

    Attributes:
        commit: the compared commit with all files.
        passed: whether every check of the verification passed.
        uploaded: files that the commit changed. Empty where the repository already had all of them.
        kept_card: whether the repository's own README.md stayed.
    """

    repo: str
    url: str
    commit: str
    is_private: bool
    was_made: bool
    passed: bool
    files: int
    bytes: int
    uploaded: tuple[str, ...]
    uploaded_bytes: int
    deleted: tuple[str, ...]
    kept_card: bool

    def as_json(self) -> dict[str, Any]:
        """The document of `push --json`."""
        return asdict(self)


def push(request: PushRequest) -> PushResult:
    """Publish a checkpoint. After an interruption, the same request resumes.

    Raises:
        CheckFailed: the verification failed, or the Hub lacks an uploaded file.
        InputError: no token or right, foreign files in the way, no network.
    """
    refuse_failed(request)
    check_rights(request.repo, request.endpoint)
    parcel = prepare(request)
    api, target, changes = hub_api(request.endpoint), parcel.target, parcel.changes
    if not changes.keeps_card:
        check_card(api, target.repo, parcel.card)
    was_made = target.commit is None
    if was_made:
        target = _make(request)
        changes = changes_for(target, changes.files, replace=request.replace, needs_card=False)
    commit = target.commit
    assert commit is not None
    if changes.upload or changes.delete:
        request.say(f"uploading {len(changes.upload)} files to {target.repo}")
        commit = send(api, target, changes, request.message or MESSAGE, request.say)
        confirm(api, target.repo, commit, changes.files)
    return PushResult(
        repo=target.repo,
        url=f"{api.endpoint}/{target.repo}",
        commit=commit,
        is_private=target.is_private,
        was_made=was_made,
        passed=not failed_checks(request.document),
        files=len(changes.files),
        bytes=sum(file.size for file in changes.files),
        uploaded=tuple(file.name for file in changes.upload),
        uploaded_bytes=sum(file.size for file in changes.upload),
        deleted=changes.delete,
        kept_card=changes.keeps_card,
    )


def prepare(request: PushRequest) -> Parcel:
    """Write the card, hash the files and find those that the repository lacks. Nothing is changed anywhere.

    Raises:
        CheckFailed: the verification failed.
        InputError: see `push`.
    """
    refuse_failed(request)
    with quiet_hub():
        target = look_at(request.repo, request.endpoint)
        provenance = read_provenance(request.folder, request.base_model)
        source_data = _source_data(request, provenance)
    chart = layers_svg(page_of(request.document).layers)
    facts = CardFacts(target.repo, request.folder, request.document, provenance, source_data, chart is not None)
    card = render_card(facts)
    files = [*checkpoint_files(request.folder), LocalFile(VERIFY_NAME, _as_file(request.document))]
    files += [LocalFile(CHART_NAME, chart)] if chart else []
    files.append(LocalFile(CARD_NAME, card.encode("utf-8", errors="replace")))
    request.say(f"hashing {len(files)} files")
    hash_files(files)
    needs_card = bool(failed_checks(request.document)) or not request.document["checks"]
    return Parcel(card, target, changes_for(target, files, replace=request.replace, needs_card=needs_card))


def refuse_failed(request: PushRequest) -> None:
    """Refuse a checkpoint that failed, or whose document belongs to another one.

    Raises:
        CheckFailed: a check failed, or none was run, without `unverified`.
        InputError: the document belongs to another checkpoint.
    """
    stated = {key: at(request.document, "checkpoint", key) for key in checkpoint_identity(request.folder)}
    if stated != checkpoint_identity(request.folder):
        raise InputError(
            f"{request.folder} is not the verified checkpoint",
            where=request.folder,
            hint="Verify it again, then push it",
        )
    failed = failed_checks(request.document)
    if request.unverified:
        return
    if not request.document["checks"]:
        raise CheckFailed(
            f"{request.folder} was not verified",
            where=request.folder,
            hint="Verify it first, or publish it anyway with --unverified",
        )
    if failed:
        raise CheckFailed(
            f"{request.folder} fails {len(failed)} of {len(request.document['checks'])} checks ({', '.join(failed)})",
            where=request.folder,
            hint="Run `nvquant verify` for the causes, or publish it with --unverified and a note in the card",
        )


def _make(request: PushRequest) -> Target:
    """Create the repository. Returns its state on the Hub."""
    request.say(f"creating {request.repo} ({'public' if request.is_public else 'private'})")
    with quiet_hub(), push_errors(request.repo):
        api, is_private = hub_api(request.endpoint), not request.is_public
        patiently(lambda: api.create_repo(request.repo, private=is_private, exist_ok=True), f"creating {request.repo}")
    made = look_at(request.repo, request.endpoint)
    if made.commit is None:
        raise InputError(
            f"{request.repo} was created, but the Hub does not list it",
            where=request.repo,
            hint="Run the same command again",
        )
    return made


def _source_data(request: PushRequest, provenance: Provenance) -> Mapping[str, Any]:
    """The data of the source's card: from the Hub, or from the folder that it was converted from."""
    if provenance.base_model is None:
        request.say("The card names no source. To add its name on the Hub, use `nvquant push --base-model ID`.")
    else:
        try:
            model = find_model(provenance.base_model, provenance.commit, endpoint=request.endpoint)
            return _data_of(download(model, CARD_NAME)) if CARD_NAME in model.files else {}
        except InputError as error:
            request.say(
                f"Licence and language may be missing from the card, because the source's card cannot be read: {error}"
            )
    if request.source is not None and (request.source / CARD_NAME).is_file():
        return _data_of(request.source / CARD_NAME)
    return {}


def _data_of(card: Path) -> Mapping[str, Any]:
    return split_card(card.read_text(encoding="utf-8", errors="replace"))[0]


def _as_file(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="replace")
