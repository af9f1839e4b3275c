"""What the manifest tells of how a checkpoint was made, for people: source, versions, calibration, command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..calibrate.specs import CalibrationSpec, load_spec, shipped_folder, shipped_names
from ..checkpoint.hub.repository import hub_name
from ..checkpoint.source import read_json
from ..convert.manifest import MANIFEST_NAME
from ..errors import InputError
from ..report.document import at, rows
from ..report.parts import Column, Table
from ..report.words import number

HUB = "https://huggingface.co"
FRAMINGS = {
    "chat": "conversations in the model's own chat template",
    "prose": "text packed to equal lengths",
    "ids": "token ids as given",
}


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from.

    Attributes:
        manifest: the JSON of nvquant_manifest.json; empty where there is none.
        base_model: the source's id on the Hub; None where it is not known.
        commit: of it; None for a source that was a local folder.
    """

    manifest: Mapping[str, Any]
    base_model: str | None
    commit: str | None

    @property
    def source(self) -> str:
        """The source as a command names it; a word in its place where it is not known."""
        if self.base_model is None:
            return "MODEL"
        return self.base_model if self.commit is None else f"{self.base_model}@{self.commit}"

    @property
    def source_file_bytes(self) -> int | None:
        """Size of the source's weights files; None where nothing tells."""
        shards = at(self.manifest, "source", "shards")
        sizes = [shard.get("bytes") for shard in shards.values()] if isinstance(shards, Mapping) else []
        return sum(sizes) if sizes and all(isinstance(size, int) for size in sizes) else None

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs were observed."""
        return at(self.manifest, "calibration") is not None


def read_provenance(folder: Path, base_model: str | None) -> Provenance:
    """What a checkpoint's manifest tells, and where it does not name the source, what the user says.

    Args:
        base_model: of `--base-model`.
    Raises:
        InputError: `base_model` is no id, or is not what the manifest says; the manifest is no JSON.
    """
    name = None if base_model is None else hub_name(base_model)
    if base_model is not None and (name is None or name[1] is not None):
        raise InputError(f"--base-model {base_model} is not a model's id: give it as org/name.")
    path = folder / MANIFEST_NAME
    manifest = read_json(path, "nvquant writes one") if path.is_file() else {}
    known, commit = at(manifest, "source", "hub", "id"), at(manifest, "source", "hub", "commit")
    if not isinstance(known, str) or hub_name(known) is None:
        return Provenance(manifest, base_model, None)
    if base_model is not None and base_model != known:
        raise InputError(
            f"--base-model {base_model}: {MANIFEST_NAME} says that this was made from {known}: leave the option out."
        )
    return Provenance(manifest, known, commit if isinstance(commit, str) else None)


def convert_command(provenance: Provenance) -> str | None:
    """The command that makes this checkpoint from its source, as far as the manifest tells; None without one."""
    manifest = provenance.manifest
    if not manifest:
        return None
    words = ["nvquant", "convert", provenance.source, "--recipe", str(at(manifest, "recipe", "name"))]
    words += ["--format", str(manifest.get("format"))]
    if manifest.get("quantizer") != at(manifest, "recipe", "quantizer"):
        words += ["--quantizer", str(manifest.get("quantizer"))]
    calibration = at(manifest, "calibration")
    if calibration is not None:
        words += ["--calibration", str(at(calibration, "name"))]
        for key, option in (("samples", "--samples"), ("sequence_length", "--sequence-length"), ("seed", "--seed")):
            if isinstance(at(calibration, key), int):
                words += [option, str(at(calibration, key))]
    if at(manifest, "run", "batch_size") not in (None, 1):
        words += ["--batch-size", str(at(manifest, "run", "batch_size"))]
    if at(manifest, "run", "device") in ("cpu", "cuda"):
        words += ["--device", str(at(manifest, "run", "device"))]
    return shlex.join(words)


def source_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """Name and value of what tells of the source."""
    if provenance.base_model is not None:
        is_recorded = provenance.commit is not None
        yield "Source" if is_recorded else "Source, as its publisher names it", provenance.base_model
    if provenance.commit is not None:
        yield "Source's commit", provenance.commit
    integrity = at(provenance.manifest, "source", "integrity")
    if isinstance(integrity, str):
        yield "Source's integrity", integrity


def source_shards(provenance: Provenance) -> Table | None:
    """What was recorded of the shards of a local folder; None for a source on the Hub, whose commit tells all."""
    shards = at(provenance.manifest, "source", "shards")
    if provenance.commit is not None or not isinstance(shards, Mapping):
        return None
    lines = [(str(name), number(at(shard, "bytes")), str(at(shard, "header_sha256"))) for name, shard in shards.items()]
    columns = (Column("shard", "code"), Column("bytes"), Column("sha256 of its header", "code"))
    return Table("Shards of the source", columns, tuple(lines))


def run_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """Name and value of what it was made with."""
    manifest = provenance.manifest
    if not manifest:
        return
    yield "nvquant", str(manifest.get("nvquant"))
    versions = at(manifest, "run", "versions")
    yield from ((str(name), str(version)) for name, version in (versions.items() if isinstance(versions, dict) else ()))
    run = [str(at(manifest, "run", key)) for key in ("device", "processor", "dtype") if at(manifest, "run", key)]
    yield "Computed on", ", ".join(run)


def calibration_facts(provenance: Provenance) -> Iterator[tuple[str, str]]:
    """Name and value of what the inputs' scales were calibrated with."""
    found = at(provenance.manifest, "calibration")
    if found is None:
        return
    yield "Set", str(at(found, "name"))
    framing = str(at(found, "framing"))
    tokens = f"{number(at(found, 'samples'))} with {number(at(found, 'tokens'))} tokens"
    yield "Samples", f"{tokens}, {FRAMINGS.get(framing, framing)}"
    yield "sha256 of the token ids", str(at(found, "sha256"))


def calibration_licence(provenance: Provenance) -> str:
    """A sentence in Markdown on what the calibration set is and under which licence."""
    name = str(at(provenance.manifest, "calibration", "name"))
    if name in shipped_names():
        spec = load_spec(shipped_folder() / f"{name}.yaml")
        return f"{spec.description} Licence: {spec.licence}.{_origins(spec)}"
    known = hub_name(name)
    if known is not None:
        revision = f"/tree/{known[1]}" if known[1] else ""
        where = f"[{known[0]}]({HUB}/datasets/{known[0]}{revision})"
        return f"The Hub data set {where}; its licence is told there, and not recorded here."
    return "A file of whoever made this checkpoint; its origin and licence are not recorded."


def nvquant_page() -> str:
    """Address of nvquant's repository, from the package's own metadata."""
    urls = dict(line.split(", ", 1) for line in metadata.metadata("nvquant").get_all("Project-URL") or ())
    return str(urls.get("Repository", ""))


def source_bytes(document: Mapping[str, Any], provenance: Provenance) -> int | None:
    """How large the source was: its tensors, where they were seen, else its weights files."""
    found = at(document, "checkpoint", "source_bytes")
    return found if isinstance(found, int) else provenance.source_file_bytes


def group_names(document: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Groups of tensors that are in NVFP4, and those that are not, largest first, as `MLP, NVFP4 W4A4`."""
    names = [str(group.get("name")) for group in rows(at(document, "checkpoint", "groups"))]
    return [name for name in names if "NVFP4" in name], [name for name in names if "NVFP4" not in name]


def _origins(spec: CalibrationSpec) -> str:
    links = [
        f"[{part.hub}]({HUB}/datasets/{part.hub}{f'/tree/{part.revision}' if part.revision else ''})"
        for part in spec.parts
        if part.hub is not None
    ]
    if any(part.bundled for part in spec.parts):
        links.append(f"[ORIGINS.md]({nvquant_page()}/blob/main/calibration/ORIGINS.md)")
    return f" Origins: {', '.join(dict.fromkeys(links))}."
