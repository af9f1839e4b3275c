"""Faults of an FP8 KV cache: scales that do not follow, bounds that the norms do not give, and caches that clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from verify.breaking import GEMMA, LAYER, MANIFEST, Fault, bytes_of, edit_json, edit_tensors, listing

FAULTS: list[Fault] = []
fault = listing(FAULTS)


def recorded(manifest: dict[str, Any], layer: int, half: str) -> dict[str, Any]:
    """The manifest's entry of a layer's keys or values."""
    (attention,) = manifest["layers"][layer]["kv_cache"].values()
    found: dict[str, Any] = attention[half]
    return found


@fault("kv_cache", on="llama-kv-ct")
def cache_scale_that_does_not_follow(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.self_attn.v_scale"].set_scalar(2.0)
    return f"the values of {LAYER}.self_attn: their scale is 2.0, follows as 1.0"


@fault("kv_cache", on="llama-kv-mo")
def cache_scale_that_clips(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.self_attn.k_proj.k_scale"].set_scalar(2.0**-12)
    return f"the keys of {LAYER}.self_attn reach "


@fault("kv_cache", on="llama-kv-ct")
def cache_scales_of_one_layer_missing(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        del tensors[f"{LAYER}.self_attn.k_scale"], tensors[f"{LAYER}.self_attn.v_scale"]
    return f"the keys of {LAYER}.self_attn: a scale is not stored, unlike the recipe requires"


@fault("kv_cache", on="gemma4-kv-ct")
def cache_scale_beside_unit_scales(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        norm = tensors[f"{GEMMA}.1.self_attn.k_norm.weight"]
        for half in "kv":
            stored = type(norm)(norm.file, "F32", [1], bytes_of(torch.ones(1)))
            tensors[f"{GEMMA}.1.self_attn.{half}_scale"] = stored
    return f"the keys of {GEMMA}.1.self_attn: a scale is stored, unlike the recipe requires"


@fault("kv_cache", on="gemma4-kv-ct")
def bound_of_another_norm(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded(manifest, 2, "k")["bound"] = 3.0
    return f"the keys of {GEMMA}.2.self_attn: the recorded bound is 3.0, the norm in front of them gives "


@fault("kv_cache", on="llama-kv-unit")
def observation_beyond_the_cache(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        recorded(manifest, 1, "v")["observed"] = 512.0
    return f"the values of {LAYER}.self_attn reach 512, but the cache stores at most 448"


@fault("kv_cache", "untouched", on="gemma4-kv-foreign")
def norm_under_which_keys_exceed_the_cache(folder: Path) -> str:
    """Without a manifest, the norms alone tell."""
    with edit_tensors(folder) as tensors:
        norm = tensors[f"{GEMMA}.1.self_attn.k_norm.weight"]
        norm.data[:] = bytes_of(torch.full((len(norm.data) // 2,), 100.0, dtype=torch.bfloat16))
    return f"the keys of {GEMMA}.1.self_attn reach 572, but the cache stores at most 448"
