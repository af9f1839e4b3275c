"""Checks of the files themselves: headers, index, hashes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from ..checkpoint.digest import file_sha256
from ..checkpoint.source import INDEX_NAME, SINGLE_NAME, read_json
from ..errors import InputError
from ..stream.manifest import Manifest
from .report import Finding, counted, not_applicable
from .subject import Subject
from .threads import map_in_threads

# Readers that know no index take what lies there under these names.
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "adapter_config.json", "*.gguf")


def check_headers(subject: Subject) -> Finding:
    """Check that every shard's header parses, fits its dtypes, shapes and the file's size, and leaves no hole between
    tensors."""
    tensors = sum(len(header.tensors) for header in subject.headers.values())
    size = sum(header.file_bytes for header in subject.headers.values())
    files = counted(len(subject.headers) + len(subject.damaged), "file")
    looked_at = f"{files}, {counted(tensors, 'tensor')}, {size:,} bytes"
    if subject.damaged:
        looked_at += " (all other checks require every header, so they were skipped)"
    return Finding(looked_at, subject.damaged)


def check_index(subject: Subject) -> Finding:
    """Check that the index lists every tensor, in the one file that contains it, and nothing else, with the right total
    size. Other weights beside them, which a reader might load instead, are faults too."""
    beside = sorted(name for name in subject.file_names if any(fnmatch(name, other) for other in OTHER_WEIGHTS))
    strangers = [f"{name} lies beside the shards: some readers would load it instead" for name in beside]
    path = subject.folder / INDEX_NAME
    if not path.exists():
        others = [name for name in subject.headers if name != SINGLE_NAME]
        looked_at = f"no index, {counted(len(subject.headers), 'file')}"
        return Finding(looked_at, [*(f"{name} needs {INDEX_NAME} beside it" for name in others), *strangers])
    try:
        index = read_json(path, "")
    except InputError as error:
        return Finding(INDEX_NAME, [str(error)])
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        return Finding(INDEX_NAME, ["the index has no weight_map"])
    faults = [*_misplaced(subject, weight_map), *_unlisted(subject, weight_map)]
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    total = sum(info.nbytes for header in subject.headers.values() for info in header.tensors.values())
    if stated != total:
        faults.append(f"total_size is {stated}, but the tensors have {total} bytes")
    return Finding(f"{len(weight_map):,} entries, {total:,} bytes", [*faults, *strangers])


def _misplaced(subject: Subject, weight_map: Mapping[str, Any]) -> Iterator[str]:
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or file not in subject.headers:
            yield f"{tensor} is listed in {file!r}, which is not a shard of this folder"
        elif tensor not in subject.headers[file].tensors:
            actual = subject.checkpoint.files.get(tensor)
            yield f"{tensor} is listed in {file}, but is stored in {actual or 'no file'}"


def _unlisted(subject: Subject, weight_map: Mapping[str, Any]) -> Iterator[str]:
    first: dict[str, str] = {}
    for file, header in subject.headers.items():
        if not any(name in weight_map for name in header.tensors):
            yield f"{file} is not in the index"
            continue
        for tensor in header.tensors:
            if tensor not in weight_map:
                yield f"{tensor} ({file}) is not in the index"
            if tensor in first:
                yield f"{tensor} is stored in {first[tensor]} and in {file}"
            first[tensor] = file


def check_hashes(subject: Subject) -> Finding:
    """Check that every file has the sha256 that the manifest lists, and that the manifest lists every shard."""
    manifest = subject.manifest
    if not isinstance(manifest, Manifest):
        return not_applicable("no manifest to compare with")
    published = _published(subject)
    present = [name for name in manifest.files if name in published or (subject.folder / name).is_file()]
    faults = [f"{name} is in the manifest but missing" for name in manifest.files if name not in present]
    faults += [f"{name} is not in the manifest" for name in subject.headers if name not in manifest.files]
    hashed = [name for name in present if name not in published]
    paths = [subject.folder / name for name in hashed]
    found = map_in_threads(file_sha256, paths, subject.progress, "hashing files")
    digests = {**published, **dict(zip(hashed, found, strict=True))}
    for name in present:
        if digests[name] != manifest.files[name]:
            faults.append(f"{name} has sha256 {digests[name][:12]}…, but the manifest has {manifest.files[name][:12]}…")
    count = sum(name in published for name in present)
    by_whom = f", {count:,} by the sha256 that the Hub publishes" if count else ""
    return Finding(f"{counted(len(present), 'file')}{by_whom}", faults)


def _published(subject: Subject) -> dict[str, str]:
    """The sha256 that the Hub publishes of the files that were not downloaded."""
    if subject.hub is None or not subject.is_remote:
        return {}
    return {name: file.sha256 for name, file in subject.hub.files.items() if file.sha256 is not None}
