"""The identity of a run: all facts that determine its output's bytes. It begins the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from .. import __version__
from ..calibrate.samples import CalibrationSet
from ..checkpoint.regular import read_regular
from ..checkpoint.shard_bytes import read_range
from ..checkpoint.source import Checkpoint
from ..plan.plan import Plan
from ..stream.forms import CalibrationRecord
from ..stream.manifest import HubSource, Identity, Run, Source, SourceShard
from ..weights.decoding import decoded_form


def run_identity(
    plan: Plan, quantizer: str, calibration: CalibrationSet | None, run: Run, fold: bool = False
) -> Identity:
    """All facts that determine the output's bytes.

    Args:
        run: without the versions of packages, which this function adds.
    """
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "compressed-tensors")}
    folds: dict[str, Any] = {"fold": "auto"} if fold else {}
    return Identity(
        nvquant=__version__,
        source=source_identity(plan.source),
        recipe=plan.recipe,
        format=plan.layout.name,
        quantizer=quantizer,
        **folds,
        run=Run(**run.as_json(), versions=versions),
        calibration=None if calibration is None else calibration_record(calibration),
    )


def calibration_record(calibration: CalibrationSet) -> CalibrationRecord:
    """The entry of a manifest for a set of samples."""
    return CalibrationRecord(
        name=calibration.name,
        samples=len(calibration.samples),
        sequence_length=calibration.sequence_length,
        seed=calibration.seed,
        tokens=calibration.tokens,
        framing=calibration.framing,
        sha256=calibration.sha256,
    )


def source_identity(source: Checkpoint) -> Source:
    """The identity of the source. A model on the Hub has its name, its commit, its published hashes and the kind of
    integrity that was proved. A folder has each shard's size, modification time and header hash. Both have the hash of
    config.json, and a quantized source has the forms that it is decoded from.
    """
    form = decoded_form(source)
    known: dict[str, Any] = {} if form is None else {"decoded": form}
    config = hashlib.sha256(read_regular(source.folder / "config.json", source.folder)).hexdigest()
    if source.hub is not None:
        files = {name: source.hub.files[name] for name in source.shards}
        return Source(
            hub=HubSource(id=source.hub.repo, commit=source.hub.commit),
            **known,
            integrity=source.content.integrity,
            config_sha256=config,
            shards={name: SourceShard(bytes=file.size, etag=file.etag) for name, file in files.items()},
        )
    shards = {}
    for name, header in source.shards.items():
        head = bytearray(header.data_start)
        read_range(header.path, 0, memoryview(head), header)
        digest = hashlib.sha256(head).hexdigest()
        shards[name] = SourceShard(bytes=header.file_bytes, mtime_ns=header.mtime_ns, header_sha256=digest)
    return Source(**known, config_sha256=config, shards=shards)


def difference(found: Mapping[str, Any], identity: Mapping[str, Any], path: str = "") -> str | None:
    """The first difference of another run's identity from this one's, as `calibration.sha256 is 4be1… there, 90ac…
    here`, or None. A fact that only one of them has differs too. Other keys of a manifest are not compared."""
    if not path:
        identity = {**dict.fromkeys(Identity.model_fields, "missing"), **identity}
    for key, value in identity.items():
        name = f"{path}{key}"
        there = found.get(key, "missing")
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            deeper = difference(
                {**dict.fromkeys(value, "missing"), **there}, {**dict.fromkeys(there, "missing"), **value}, f"{name}."
            )
            if deeper is not None:
                return deeper
        elif there != value:
            return f"{name} is {_short(there)} there, {_short(value)} here"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 40 else f"{text[:36]}…"
