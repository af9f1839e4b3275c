"""Files of a Hub model in the local cache: downloaded once and compared with their published hash before use."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import InputError
from .errors import hub_errors, network_error
from .patience import Patience
from .repository import OTHERWISE, HubFile, HubModel

logger = logging.getLogger("nvquant.checkpoint.hub")

_HASH_CHUNK_BYTES = 16 << 20
MOST_UNSIZED_BYTES = 100_000_000  # of a file whose size is unknown
_MARKS = ".nvquant"  # beside the cache's own blobs, refs and snapshots


@dataclass
class Counter:
    """Counts the bytes of a download as they come, for other threads.

    Attributes:
        most: the largest number of bytes that may come, None for no limit.
    """

    bytes: int = 0
    most: int | None = None

    def bar(self) -> type[Any]:
        """A class of progress bars for huggingface_hub that shows nothing and counts here."""
        counter = self
        base: Any = import_module("huggingface_hub.utils.tqdm").tqdm

        class Bar(base):  # type: ignore[misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **{**options, "disable": True})
                counter.bytes = int(options.get("initial") or 0)

            def update(self, n: float | None = 1) -> bool | None:
                counter.bytes += int(n or 0)
                if counter.most is not None and counter.bytes > counter.most:
                    raise InputError(
                        f"The Hub sent more than the {counter.most:,} bytes that it published for a file",
                        hint="check HF_ENDPOINT and the network",
                    )
                return None

        return Bar


def cached_path(model: HubModel, name: str) -> Path | None:
    """The path of a complete file of this commit in the cache, None where the cache lacks it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repo, name, cache_dir=model.cache, revision=model.commit)
    return Path(found) if isinstance(found, str) else None


def download(model: HubModel, name: str, closed: threading.Event | None = None, counter: Counter | None = None) -> Path:
    """Path of a file in the cache, downloaded if it is not there yet, with the content that the Hub published.

    After a passing failure the download is retried and resumes where it stopped. A file is hashed when it arrives.
    A note beside it avoids another hash until the file changes.

    Args:
        closed: an event that ends the waiting, for callers that no longer need the file.
        counter: follows the bytes.
    Raises:
        InputError: no such file, no access, no network, no room on the disk, or twice a content other than the
            published one.
    """
    file = model.file(name)
    closed, counter = closed or threading.Event(), counter or Counter()
    counter.most = MOST_UNSIZED_BYTES if file.size is None else file.size
    for attempt in range(2):
        path = _fetch(model, name, closed, counter)
        fault = _fault(file, path)
        if fault is None:
            return path
        logger.warning("%s of %s %s: removed from the cache", name, model.repo, fault)
        _remove(path)
        if model.is_offline or attempt:
            break
    raise InputError(
        f"{name} {fault}: the download is damaged", where=f"Hub model {model.repo}", hint="try again later"
    )


def _fetch(model: HubModel, name: str, closed: threading.Event, counter: Counter) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patience = Patience(closed)
    while True:
        with hub_errors("model", model.repo, model.commit[:12], OTHERWISE):
            try:
                return Path(
                    hf_hub_download(
                        model.repo,
                        name,
                        revision=model.commit,
                        endpoint=model.endpoint,
                        cache_dir=model.cache,
                        local_files_only=model.is_offline,
                        tqdm_class=counter.bar(),
                    )
                )
            except (network_error(), LocalEntryNotFoundError) as error:
                if model.is_offline:
                    raise
                # Every refusal is raised as "not in the cache". The refusal itself is its cause.
                behind = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
                patience.wait_after(behind or error, f"{name} of {model.repo}")
            except (OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise InputError(
                        f"{name} of {model.repo} cannot be stored in the cache ({error.strerror})",
                        where=name,
                        hint="free space there, or set HF_HOME to a larger disk",
                    ) from error
                patience.wait_after(_as_network(error), f"{name} of {model.repo}")


def _as_network(error: Exception) -> Exception:
    """A network error in place of huggingface_hub's plain OSError (a download of the wrong size) or RuntimeError (of
    the Xet client), since both may pass like a lost connection."""
    lost = network_error()(type(error).__name__)
    lost.__cause__ = error
    return lost


def _fault(file: HubFile, path: Path) -> str | None:
    """The fault of a cached file, or None where its content has the published hash."""
    status = path.stat()
    if file.size is not None and status.st_size != file.size:
        return f"has {status.st_size:,} bytes, but the Hub published {file.size:,}"
    if file.etag is None:
        return None
    mark = _mark(path, file.etag)
    stamp = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    with suppress(OSError, ValueError):
        if json.loads(mark.read_text(encoding="utf-8")) == stamp:
            return None
    digest = content_hash(path, file)
    if digest != file.etag:
        return f"has the hash {digest[:12]}…, but the Hub published {file.etag[:12]}…"
    with suppress(OSError):  # a cache that cannot be written to is read once more next time
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(json.dumps(stamp), encoding="utf-8")
    return None


def note_revision(model: HubModel) -> None:
    """Note in the cache which commit the revision's name means, for use without the Hub. A failure is ignored."""
    from huggingface_hub import hf_hub_download

    if model.is_offline or model.revision == model.commit:
        return
    with suppress(Exception):
        hf_hub_download(
            model.repo, "config.json", revision=model.revision, endpoint=model.endpoint, cache_dir=model.cache
        )


def content_hash(path: Path, file: HubFile) -> str:
    """The hash of a file in the form in which the Hub publishes it: sha256, or git's blob id for a small file."""
    digest = hashlib.sha256()
    if file.sha256 is None:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb", buffering=0) as stream:
        while piece := stream.read(_HASH_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _mark(path: Path, etag: str) -> Path:
    """The note that a blob has its published hash, in the model's cache folder, which contains `snapshots/COMMIT/…`."""
    snapshots = next((parent for parent in path.parents if parent.name == "snapshots"), path.parent)
    return snapshots.parent / _MARKS / etag


def _remove(path: Path) -> None:
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
