"""Faults of folds: norms that are not the source's after their fold, and records that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verify.breaking import LAYER, MANIFEST, Fault, edit_json, edit_tensors, listing, source_bytes

FAULTS: list[Fault] = []
fault = listing(FAULTS)
NORM = f"{LAYER}.input_layernorm.weight"


def recorded(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    """The record of the layer's first fold with a norm, or with a maker."""
    folds = manifest["layers"][int(LAYER.rpartition(".")[2])]["folding"]["folds"]
    found: dict[str, Any] = next(fold for fold in folds if key in fold)
    return found


@fault("folds", on="llama-fold-ct")
def norm_of_the_source_beside_folded_weights(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[NORM].data[:] = source_bytes(folder, NORM)
    return f"{NORM} is not the source's norm after its fold"


@fault("folds", on="llama-fold-ct")
def folded_norm_off_by_a_bit(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[NORM].data[0] ^= 1
    return f"{NORM} is not the source's norm after its fold"


@fault("weights", on="llama-fold-ct")
def factors_of_other_rows(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        fold = recorded(manifest, "maker")
        text = fold["exponents"]
        fold["exponents"] = text[4:8] + text[:4] + text[8:]  # three factors each
    return f"{LAYER}.mlp."


@fault("folds", "untouched", "weights", on="llama-fold-ct")  # nothing is folded then
def fold_of_a_module_that_does_not_exist(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded(manifest, "maker")["maker"] = f"{LAYER}.mlp.nothing_proj"
    return f"the fold of {LAYER}.mlp.down_proj does not fit: {LAYER}.mlp.nothing_proj is not quantized"


@fault("untouched", "weights", on="llama-fold-ct")
def record_of_a_layer_without_its_folds(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["layers"][1]["folding"]
    return f"{NORM} differs from the source"
