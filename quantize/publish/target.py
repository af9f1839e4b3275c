"""The repository of a push: its present files, and the changes to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..checkpoint.hub.forms import commit_of, repo_of
from ..checkpoint.hub.guarded import guard_client
from ..checkpoint.hub.patience import may_pass
from ..checkpoint.hub.repository import HubFile, hub_name, published_files
from ..checkpoint.sidefiles import SIDE_FILE_PATTERNS
from ..errors import InputError
from ..stream.manifest import MANIFEST_NAME
from ..verify.files import OTHER_WEIGHTS
from .files import CARD_NAME, GENERATED, LocalFile
from .frontmatter import split_card
from .refusals import TOKENS, patiently, push_errors, quiet_hub

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MARKER = "<!-- Written by nvquant push, which replaces this page at the next push unless this line is removed. -->"
LEGAL = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What loaders read: of these a repository must hold the checkpoint's own alone.
READ_BY_LOADERS = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.msgpack", "*.h5"),
    *OTHER_WEIGHTS,
    *("config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json", MANIFEST_NAME),
    *(pattern for pattern in SIDE_FILE_PATTERNS if pattern not in LEGAL),
)


@dataclass(frozen=True)
class Target:
    """A repository as the Hub has it now.

    Attributes:
        repo: `org/name`, as the Hub spells it where it is there.
        commit: of its branch main. None where there is no repository.
        files: its files, by name.
        is_card_ours: whether nvquant wrote its README.md, or it is empty.
    """

    repo: str
    commit: str | None = None
    is_private: bool = True
    files: Mapping[str, HubFile] = field(default_factory=dict)
    is_card_ours: bool = True


@dataclass(frozen=True)
class Changes:
    """The changes that a repository needs."""

    upload: tuple[LocalFile, ...]
    unchanged: tuple[LocalFile, ...]
    delete: tuple[str, ...]
    keeps_card: bool = False

    @property
    def files(self) -> tuple[LocalFile, ...]:
        """All files that the repository must have afterwards."""
        return (*self.unchanged, *self.upload)


def hub_api(endpoint: str | None) -> HfApi:
    """The Hub's client, which finds the token by itself. nvquant never reads it."""
    from huggingface_hub import HfApi

    guard_client(endpoint)
    return HfApi(endpoint=endpoint)


def check_repo_name(repo: str) -> None:
    """Refuse a name that is not `org/name`.

    Raises:
        InputError: it is something else.
    """
    name = hub_name(repo)
    if name is None or name[1] is not None:
        raise InputError(
            f"{repo} is not a repository's name", where=repo, hint="give it as org/name, such as me/gemma-4-31b-NVFP4"
        )


def check_rights(repo: str, endpoint: str | None = None) -> None:
    """Refuse, before hours of work, a push without a token, or with a read-only one.

    Raises:
        InputError: no token, an unknown one, one without the right to write, or no network.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_repo_name(repo)
    if get_token() is None:
        raise InputError(
            f"Pushing to {repo} requires a token with write access", hint="Run `hf auth login`, or set HF_TOKEN"
        )
    with quiet_hub(), push_errors(repo):
        try:
            user = hub_api(endpoint).whoami()
        except HfHubHTTPError as error:
            if may_pass(error):  # a busy Hub says nothing of the token
                return
            raise
    if _role(user) == "read":
        raise InputError(
            f"The token ({_token_name(user)}) is read-only",
            hint=f"Create one with write access to {repo.partition('/')[0]} at {TOKENS}, and run `hf auth login`",
        )


def look_at(repo: str, endpoint: str | None = None) -> Target:
    """Read the present state of the repository.

    Raises:
        InputError: no network, or the Hub refuses.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    check_repo_name(repo)
    api = hub_api(endpoint)
    with quiet_hub(), push_errors(repo):
        try:
            found = patiently(lambda: api.model_info(repo, files_metadata=True), f"reading {repo}")
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Target(repo)
        where = f"Hub model {repo}"
        name, commit = repo_of(found.id, where), commit_of(found.sha, where)
        files = published_files(found, where)
        is_ours = CARD_NAME not in files or patiently(
            lambda: _is_card_ours(api, name, commit), f"reading the card of {repo}"
        )
    return Target(name, commit, bool(found.private), files, is_ours)


def changes_for(target: Target, files: Sequence[LocalFile], *, replace: bool, needs_card: bool) -> Changes:
    """Find the files to upload and to delete.

    Args:
        replace: delete files that loaders would read with the checkpoint, and replace a foreign README.md.
        needs_card: whether the card must be nvquant's, because it reports a failed verification.
    Raises:
        InputError: there are such files, and they may not be replaced.
    """
    foreign = foreign_files(target, files)
    if foreign and not replace:
        raise InputError(
            f"{target.repo} contains files that do not belong to this checkpoint but that loaders would read with "
            f"it ({shortened(foreign)})",
            where=target.repo,
            hint="Choose another repository, or delete them with --replace",
        )
    keeps_card = not (target.is_card_ours or replace)
    if keeps_card and needs_card:
        raise InputError(
            f"{target.repo} has a README.md that nvquant did not write, but the card must report that this "
            "checkpoint did not pass",
            where=target.repo,
            hint="replace it with --replace, or choose another repository",
        )
    wanted = [file for file in files if not (keeps_card and file.name == CARD_NAME)]
    unchanged = [file for file in wanted if file.name in target.files and _is_there(file, target)]
    upload = [file for file in wanted if file not in unchanged]
    stale = [name for name in GENERATED if name in target.files and name not in {file.name for file in files}]
    return Changes(tuple(upload), tuple(unchanged), (*foreign, *stale), keeps_card)


def foreign_files(target: Target, files: Iterable[LocalFile]) -> list[str]:
    """Files of the repository's top folder that a loader would read, and that are not of the checkpoint."""
    own = {file.name for file in files}
    return sorted(
        name
        for name in target.files
        if name not in own and "/" not in name and any(fnmatch(name, pattern) for pattern in READ_BY_LOADERS)
    )


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _is_there(file: LocalFile, target: Target) -> bool:
    return file.is_published_as(target.files[file.name])


def _is_card_ours(api: HfApi, repo: str, commit: str) -> bool:
    with TemporaryDirectory(prefix="nvquant-push-") as folder:  # nobody needs it in the cache
        path = Path(api.hf_hub_download(repo, CARD_NAME, revision=commit, local_dir=folder))
        text = path.read_text(encoding="utf-8", errors="replace")
    return MARKER in text or not split_card(text)[1].strip()


def _role(user: Mapping[str, Any]) -> str | None:
    token = user.get("auth", {}).get("accessToken") or {}
    return token.get("role")


def _token_name(user: Mapping[str, Any]) -> str:
    token = user.get("auth", {}).get("accessToken") or {}
    return str(token.get("displayName") or "without a name")
