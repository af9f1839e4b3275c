"""`nvquant_manifest.json`: what a run was made from, what it observed, and the hash of every file. No time, host or
path: equal runs, equal files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from .. import __version__
from ..calibrate.samples import CalibrationSet
from ..checkpoint.source import Checkpoint
from ..plan.plan import Plan

MANIFEST_NAME = "nvquant_manifest.json"


def run_identity(
    plan: Plan, quantizer: str, calibration: CalibrationSet | None, run: Mapping[str, Any]
) -> dict[str, Any]:
    """What determines the output's bytes.

    Args:
        run: device kind, dtype, attention implementation, batch size.
    """
    identity: dict[str, Any] = {
        "nvquant": __version__,
        "source": source_identity(plan.source),
        "recipe": plan.recipe.model_dump(mode="json", exclude={"calibration"}),  # that of this run stands below
        "format": plan.layout.name,
        "quantizer": quantizer,
        "run": {
            **run,
            "versions": {
                name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "compressed-tensors")
            },
        },
        "calibration": None,
    }
    if calibration is not None:
        identity["calibration"] = {
            "name": calibration.name,
            "samples": len(calibration.samples),
            "tokens": calibration.tokens,
            "framing": calibration.framing,
            "sha256": calibration.sha256,
        }
    return identity


def source_identity(source: Checkpoint) -> dict[str, Any]:
    """Size, modification time and header hash of each shard, and the hash of config.json."""
    shards = {}
    for name, header in source.shards.items():
        with header.path.open("rb") as file:
            digest = hashlib.sha256(file.read(header.data_start)).hexdigest()
        shards[name] = {"bytes": header.file_bytes, "mtime_ns": header.path.stat().st_mtime_ns, "header_sha256": digest}
    return {"config_sha256": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest(), "shards": shards}
