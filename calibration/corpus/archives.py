"""Reading files out of Debian packages and source archives without unpacking them to disk."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: io.BufferedReader) -> str:
    # hashlib.file_digest came with Python 3.11.
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def read_members(archive: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the regular files of ``archive`` whose path matches one of ``patterns``, sorted by path.

    Paths of a Debian package start at the root without "./"; the single top folder of a source archive is left out.
    Members that end in ".gz" or ".dz" are returned decompressed, under their stored name.
    """
    found: dict[str, bytes] = {}
    with _open_tar(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if archive.suffix != ".deb":
                name = name.partition("/")[2]
            if not member.isfile() or not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                continue
            stream = tar.extractfile(member)
            assert stream is not None
            data = stream.read()
            found[name] = gzip.decompress(data) if name.endswith((".gz", ".dz")) else data
    return dict(sorted(found.items()))


def _open_tar(archive: Path) -> tarfile.TarFile:
    if archive.suffix != ".deb":
        return tarfile.open(archive)
    for name, data in _ar_members(archive.read_bytes()):
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(data))
    raise ValueError(f"{archive.name} holds no data.tar: download the package again.")


def _ar_members(data: bytes) -> Iterator[tuple[str, bytes]]:
    if not data.startswith(AR_MAGIC):
        raise ValueError("Not a Debian package: the ar signature is missing.")
    offset = len(AR_MAGIC)
    while offset + AR_HEADER_BYTES <= len(data):
        header = data[offset : offset + AR_HEADER_BYTES]
        size = int(header[48:58])
        offset += AR_HEADER_BYTES
        yield header[:16].decode().strip().rstrip("/"), data[offset : offset + size]
        offset += size + size % 2
