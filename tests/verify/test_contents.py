"""The document of `verify` says of which bytes it speaks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from nvquant.verify.contents import checkpoint_identity, describe_checkpoint
from nvquant.verify.subject import open_subject
from verify.checkpoints import Copy


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_document_names_the_manifest_and_the_config_by_their_hashes(copy: Callable[[str], Copy]) -> None:
    folder = copy("llama-ct").folder
    described = describe_checkpoint(open_subject(folder), None)
    assert described["manifest_sha256"] == sha256(folder / "nvquant_manifest.json")
    assert described["config_sha256"] == sha256(folder / "config.json")


def test_without_a_manifest_no_bytes_are_named(copy: Callable[[str], Copy]) -> None:
    folder = copy("llama-foreign").folder
    assert checkpoint_identity(folder) == {"manifest_sha256": None, "config_sha256": sha256(folder / "config.json")}


def test_another_checkpoint_has_another_identity(good: Callable[[str], Path]) -> None:
    identities = [tuple(checkpoint_identity(good(name)).values()) for name in ("llama-ct", "llama-mo", "llama-a16-ct")]
    assert len(set(identities)) == 3
