"""The contents of a checkpoint, for reports: its name, layout, recipe, and its bytes by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.digest import file_sha256
from ..checkpoint.headers import TensorInfo
from ..checkpoint.source import Checkpoint
from ..recipe.decoder import decoder_prefix
from ..recipe.kept import kept_shares
from ..recipe.roles import Role
from ..stream.manifest import MANIFEST_NAME, Manifest
from ..weights.decoding import decoded_form, stored_bytes
from .subject import Subject


def describe_checkpoint(subject: Subject, source: Checkpoint | None) -> dict[str, Any]:
    """The part `checkpoint` of a report's document.

    Returns:
        Names without folders. `recipe`, `quantizer` and `made_by` are None without a manifest. `groups` are roles, with
        the bytes that they take here and took in the source's
        files. `source_form` names the forms of a quantized source. The hashes are those of `checkpoint_identity`.
    """
    manifest = subject.manifest if isinstance(subject.manifest, Manifest) else None
    groups: dict[str, dict[str, Any]] = {}
    before = {} if source is None else source.infos()
    counted: set[str] = set()
    for name, label, info in _tensors(subject):
        group = groups.setdefault(label, {"name": label, "tensors": 0, "bytes": 0, "source_bytes": None})
        group["tensors"] += 1
        group["bytes"] += info.nbytes
        if source is not None and name in before and name not in counted:
            group["source_bytes"] = (group["source_bytes"] or 0) + stored_bytes(source, name)
            counted.add(name)
    return {
        "name": subject.name,
        "commit": None if subject.hub is None else subject.hub.commit,
        "layout": subject.layout.name,
        "recipe": None if manifest is None else manifest.recipe.name,
        "quantizer": None if manifest is None else manifest.quantizer,
        **_distillation(manifest),
        "made_by": None if manifest is None else f"nvquant {manifest.nvquant}",
        "tensors": len(subject.infos),
        "bytes": sum(info.nbytes for info in subject.infos.values()),
        "matrices": len(subject.matrices),
        "source": None if source is None else source.name,
        "source_form": None if source is None else decoded_form(source),
        "source_bytes": None if source is None else sum(stored_bytes(source, name) for name in before),
        "kept_shares": kept_shares(
            subject.shapes,
            subject.model_roles,
            {f"{module}.weight" for module in subject.matrices} | subject.unused,
            decoder_prefix(subject.shapes, subject.config),
        ),
        "groups": sorted(groups.values(), key=lambda group: -group["bytes"]),
        **checkpoint_identity(subject.folder),
    }


def _distillation(manifest: Manifest | None) -> dict[str, Any]:
    """The recorded distillation without its tensors. Empty where there is none."""
    if manifest is None or manifest.distillation is None:
        return {}
    keys = ("tokens", "steps", "is_kept", "reason", "total", "heldout")
    return {"distillation": {key: value for key, value in manifest.distillation.as_json().items() if key in keys}}


def checkpoint_identity(folder: Path) -> dict[str, str | None]:
    """The hashes that tie a report to this checkpoint: sha256 of the manifest, which lists the hash of every shard, and
    of config.json, which describes how to read them. None for a file that is not there."""
    names = {"manifest_sha256": MANIFEST_NAME, "config_sha256": "config.json"}
    paths = {key: folder / name for key, name in names.items()}
    return {key: file_sha256(path) if path.is_file() else None for key, path in paths.items()}


def _tensors(subject: Subject) -> Iterator[tuple[str, str, TensorInfo]]:
    """Each tensor with the name that it has in the source, and the group that it is counted to."""
    for module, matrix in subject.matrices.items():
        label = f"{_words(subject.model_roles[f'{module}.weight'])}, {matrix.scheme.words}"
        for info in matrix.parts.values():
            yield f"{module}.weight", label, info
    for name, role in subject.roles.items():
        yield name, f"{_words(role)}, {_dtype(subject.infos[name], role)}", subject.infos[name]


def _words(role: Role) -> str:
    return {"text MLP": "MLP", "text attention": "attention", "other text": "norms and scalars"}.get(
        role.value, role.value
    )


def _dtype(info: TensorInfo, role: Role) -> str:
    names: Mapping[str, str] = {"BF16": "BF16", "F16": "FP16", "F32": "FP32"}
    return "unquantized" if role is Role.OTHER else names.get(info.dtype, info.dtype)
