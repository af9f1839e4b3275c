"""A model on the Hub: its true name, the commit that a revision means now, and the published sizes and hashes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from .errors import hub_errors, network_error
from .forms import commit_of, file_name_of, hash_of, repo_of, siblings_of, size_of
from .guarded import guard_client
from .quiet import hide_signatures

logger = logging.getLogger("nvquant.checkpoint.hub")

OTHERWISE = "give a local folder"
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub publishes it.

    Attributes:
        size: in bytes, None where only the cache lists the file.
        etag: sha256 of a large file's content, or git's blob id (sha1) of a small one's.
    """

    name: str
    size: int | None
    etag: str | None

    @property
    def sha256(self) -> str | None:
        """The published sha256 of the content, None for a small file."""
        return self.etag if self.etag and _SHA256.fullmatch(self.etag) else None


@dataclass(frozen=True)
class HubModel:
    """A model pinned to a commit.

    Attributes:
        repo: `org/name` as the Hub spells it.
        commit: 40 hexadecimal digits.
        files: by name.
        revision: the name under which the commit was found, None for the default branch.
        endpoint: address of the Hub.
        cache: folder of the Hub's cache, None for the usual one.
        is_offline: the Hub could not be reached, so that only the files of the cache are available.
    """

    repo: str
    commit: str
    files: Mapping[str, HubFile]
    revision: str | None
    endpoint: str
    cache: Path | None = None
    is_offline: bool = False

    def file(self, name: str) -> HubFile:
        """The published facts of a file.

        Raises:
            InputError: the model has no file of that name.
        """
        if name not in self.files:
            raise InputError(
                f"Hub model {self.repo} has no file {name} at commit {self.commit[:12]}", hint="choose another revision"
            )
        return self.files[name]


def hub_name(text: str) -> tuple[str, str | None] | None:
    """The two parts of `org/name[@revision]`, None for a text of another form."""
    match = _NAME.fullmatch(text)
    return None if match is None else (match["repo"], match["revision"])


def find_model(
    repo: str, revision: str | None = None, *, endpoint: str | None = None, cache: Path | None = None
) -> HubModel:
    """Resolve a model's name, whatever its case, and pin its revision to the commit that it means now.

    Without the Hub (HF_HUB_OFFLINE, no network) the model comes from the cache, if it is there.

    Args:
        repo: `org/name`. A former name leads to the new one.
        revision: commit, branch or tag, None for the default branch.
        endpoint, cache: None for the usual ones.
    Raises:
        InputError: no such model or revision, no access, Hub unreachable and nothing cached.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    hide_signatures()
    endpoint = endpoint or constants.ENDPOINT
    guard_client(endpoint)
    with hub_errors("model", repo, revision, OTHERWISE):
        try:
            found = _ask(repo, revision, endpoint)
        except HfHubHTTPError:
            raise
        except (network_error(), OfflineModeIsEnabled):
            cached = _cached(repo, revision, endpoint, cache)
            if cached is None:
                raise
            logger.warning("The Hub cannot be reached: using %s at %s from the local cache", repo, cached.commit[:12])
            return cached
    where = f"Hub model {repo}"
    name = repo_of(found.id, where)
    if name != repo:
        logger.warning("The Hub has %s under the name %s", repo, name)
    return HubModel(name, commit_of(found.sha, where), published_files(found, where), revision, endpoint, cache)


def published_files(found: Any, where: str) -> dict[str, HubFile]:
    """The files in the answer to `model_info` with `files_metadata`, by name.

    Args:
        where: the sender, as `Hub model org/name`.
    Raises:
        InputError: a name, a size or a hash has another form.
    """
    files = (_published(sibling, where) for sibling in siblings_of(found, where))
    return {file.name: file for file in files}


def _ask(repo: str, revision: str | None, endpoint: str) -> Any:
    """The Hub's answer for a model, requested again in the right spelling where the Hub has another case."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi(endpoint=endpoint)
    try:
        return api.model_info(repo, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        author, _, name = repo.partition("/")
        alike = [model.id for model in api.list_models(search=name, limit=100) if model.id.lower() == repo.lower()]
        if not author or not alike or alike[0] == repo:
            raise
        return api.model_info(alike[0], revision=revision, files_metadata=True)


def _published(sibling: Any, where: str) -> HubFile:
    lfs = sibling.lfs
    published = sibling.blob_id if lfs is None else lfs.sha256
    return HubFile(file_name_of(sibling.rfilename, where), size_of(sibling.size, where), hash_of(published, where))


def _cached(repo: str, revision: str | None, endpoint: str, cache: Path | None) -> HubModel | None:
    """The files of the model that the cache contains. It names each file's content by its published hash."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    commit_of(folder.name, "The cache")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {
        name: HubFile(name, path.stat().st_size, path.readlink().name if path.is_symlink() else None)
        for name, path in ((path.relative_to(folder).as_posix(), path) for path in paths)
    }
    return HubModel(repo, folder.name, files, revision, endpoint, cache, is_offline=True)
