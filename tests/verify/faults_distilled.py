"""Faults of distilled checkpoints: block scales and norms beyond the recorded changes, and records that lie."""

from __future__ import annotations

from pathlib import Path

import torch
from verify.breaking import LAYER, MANIFEST, Fault, bytes_of, edit_json, edit_tensors, listing

FAULTS: list[Fault] = []
fault = listing(FAULTS)
ON, FED_BACK, GEMMA = "llama-distilled-ct", "llama-fold-distilled-mo", "gemma4-fp8-distilled-ct"
DOWN = f"{LAYER}.mlp.down_proj"
NORM = f"{LAYER}.input_layernorm.weight"


@fault("weights", on=ON)
def one_distilled_scale_beyond_the_recorded_change(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{DOWN}.weight_scale"].data[5] -= 8  # half as large
    return f"{DOWN}: 1 of 512 blocks are not the quantizer's with a block scale within the recorded change (first at " \
        "row 0, block 5)"  # fmt: skip


@fault("weights", on=ON)
def one_code_under_a_distilled_scale_off_by_one(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{DOWN}.weight_packed"].data
        at = next(at for at, byte in enumerate(data) if byte & 7 in (2, 3))
        data[at] -= 1
    return f"{DOWN}: 1 of 512 blocks are not the quantizer's"


@fault("weights", on=ON)
def scales_distilled_without_a_record(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["distillation"]["scales"][DOWN]
    return f"{DOWN}: "


@fault("manifest", "untouched", "weights", on=ON)  # without a manifest, nothing explains the changes
def a_recorded_change_beyond_the_limit(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["distillation"]["scales"][DOWN] = 1.0
    return f"distillation.scales.{DOWN}"


@fault("distilled", on=ON)
def a_distilled_norm_beyond_the_recorded_change(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[NORM]
        norm = torch.frombuffer(stored.data, dtype=torch.bfloat16).float()
        norm[3] *= 1.25
        stored.data[:] = bytes_of(norm.bfloat16())
    return f"{NORM} differs from the source's by 2"


@fault("distilled", on=FED_BACK)
def a_distilled_norm_that_is_not_that_of_its_fold(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[NORM].data
        data[:] = data[2:] + data[:2]
    return f"{NORM} differs from the source's by "


@fault("untouched", on=ON)
def a_norm_distilled_without_a_record(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["distillation"]["norms"][NORM]
    return f"{NORM} differs from the source"


@fault("folds", on=FED_BACK)
def a_folded_norm_distilled_without_a_record(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["distillation"]["norms"][NORM]
    return f"{NORM} is not the source's norm after its fold"


@fault("distilled", on=ON)
def an_embedding_recorded_as_a_norm(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["distillation"]["norms"]["model.embed_tokens.weight"] = {"largest": 0.1}
    return "model.embed_tokens.weight is recorded as a distilled norm, but is none"


@fault("distilled", on=GEMMA)
def an_fp8_matrix_recorded_as_distilled(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["distillation"]["scales"]["model.language_model.layers.0.self_attn.q_proj"] = 0.1
    return "layers.0.self_attn.q_proj is recorded as distilled, but has no block scales that distillation changes"


@fault("distilled", on=ON)
def changes_of_a_distillation_that_was_not_kept(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["distillation"]["is_kept"] = False
    return "changes are recorded of a distillation that was not kept"


@fault("weights", on=FED_BACK)
def distilled_scales_of_fed_back_rows_twice_as_large(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{DOWN}.weight_scale"].data
        for at in (0, 8, 16):
            data[at] += 8
    return f"{DOWN}: 3 of 512 blocks exceed the limit of error 0.5, more than 0.1 %"
