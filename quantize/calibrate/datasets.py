"""Data sets on the Hub: the list of their files, and each file when it is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from ..checkpoint.hub.errors import hub_errors, network_error
from ..checkpoint.hub.forms import commit_of, file_name_of
from ..checkpoint.hub.guarded import guard_client
from ..errors import InputError
from .rows import TABLE_SUFFIXES, TEXT_SUFFIX, data_suffix

logger = logging.getLogger("nvquant.calibrate.datasets")

# Files that describe a data set and contain none of its data.
DESCRIPTIONS = ("readme", "dataset_infos", "dataset_dict", "licen", "state.json", "croissant")

OTHERWISE = "calibrate with the shipped set `offline` or a local file"


@dataclass(frozen=True)
class HubDataset:
    """A data set pinned to a commit.

    Attributes:
        repo: `org/name`.
        commit: 40 hexadecimal digits.
        files: the chosen files in the order in which they are read.
        revision: the name under which the commit was found, None for the default branch.
        endpoint: address of the Hub, None for the default.
        cache: folder of the Hub's cache, None for the default.
    """

    repo: str
    commit: str
    files: tuple[str, ...]
    revision: str | None = None
    endpoint: str | None = None
    cache: Path | None = None

    def download(self, file: str) -> Path:
        """Path of `file` in the local cache, downloaded if it is not there yet.

        Raises:
            InputError: the Hub refuses it or cannot be reached.
        """
        from huggingface_hub import hf_hub_download

        fetch = partial(
            hf_hub_download, self.repo, file, repo_type="dataset", endpoint=self.endpoint, cache_dir=self.cache
        )
        with hub_errors("data set", self.repo, self.revision, OTHERWISE):
            # By the name first: only this notes in the cache which commit the name means, for use without the Hub.
            path = Path(fetch(revision=self.revision))
            return path if self.commit in path.parts else Path(fetch(revision=self.commit))


def find_dataset(
    repo: str,
    revision: str | None = None,
    patterns: tuple[str, ...] = (),
    *,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> HubDataset:
    """Resolve a revision to its commit and choose the files to read, without downloading data.

    Without the Hub (HF_HUB_OFFLINE, no network) only the files of the local cache are available.

    Args:
        repo: `org/name`.
        revision: commit, branch or tag, None for the default branch.
        patterns: globs of the files to read, where `*` matches `/` too. The default is the training files of one
            kind.
        endpoint, cache: as of HubDataset.

    Raises:
        InputError: no such data set or revision, no access, no readable file, Hub unreachable and nothing cached.
    """
    commit, names = _listing(repo, revision, endpoint, cache)
    readable = sorted(name for name in names if data_suffix(name) and not _describes(name))
    chosen = _matching(readable, patterns) if patterns else _training_files(readable)
    if not chosen:
        wanted = ", ".join(patterns) or "*.parquet, *.jsonl, *.json, *.csv or *.txt"
        seen = ", ".join(sorted(names)[:5]) or "none"
        raise InputError(
            f"Hub data set {repo} has no file {wanted} (it has {seen})", hint="name its files in a YAML spec"
        )
    logger.info("Hub data set %s at %s: %d files, the first is %s", repo, commit, len(chosen), chosen[0])
    return HubDataset(repo, commit, tuple(chosen), revision, endpoint, cache)


def _listing(repo: str, revision: str | None, endpoint: str | None, cache: Path | None) -> tuple[str, list[str]]:
    """Commit and file names, from the Hub or, without it, from the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    guard_client(endpoint)
    api = HfApi(endpoint=endpoint)
    where = f"Hub data set {repo}"
    with hub_errors("data set", repo, revision, OTHERWISE):
        try:
            commit = commit_of(api.dataset_info(repo, revision=revision).sha, where)
            names = api.list_repo_files(repo, repo_type="dataset", revision=commit)
            return commit, [file_name_of(name, where) for name in names]
        except HfHubHTTPError:
            raise
        except (network_error(), OfflineModeIsEnabled):
            cached = _cached(repo, revision, cache)
            if cached is None:
                raise
    logger.warning("The Hub cannot be reached: using data set %s from the local cache", repo)
    return cached.name, [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]


def _cached(repo: str, revision: str | None, cache: Path | None) -> Path | None:
    """Folder of the cached snapshot, whose name is its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, repo_type="dataset", revision=revision, cache_dir=cache, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return Path(folder)


def _describes(name: str) -> bool:
    return PurePosixPath(name).name.lower().startswith(DESCRIPTIONS)


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _training_files(names: list[str]) -> list[str]:
    """The files of the first kind present, those with `train` in their name if there are any."""
    for suffix in (*TABLE_SUFFIXES, TEXT_SUFFIX):
        of_kind = [name for name in names if data_suffix(name) == suffix]
        if of_kind:
            return [name for name in of_kind if "train" in name.lower()] or of_kind
    return []
