"""What an FP8 KV cache stores: bounds from the norms of the model, observations where there is none, and scales."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..calibrate.key_value_bounds import KeyValueBounds, key_value_bounds
from ..errors import EnvironmentLack, InputError
from ..plan.plan import Plan
from ..recipe.kv_cache import HALVES, scale_names
from ..stream.manifest import AttentionRecord, CachedRecord
from ..stream.scalars import cache_scale, clipped

logger = logging.getLogger("nvquant.convert")

Bounds = Mapping[int, Mapping[str, KeyValueBounds]]
"""By layer and attention module."""


def cache_bounds(plan: Plan) -> Bounds | None:
    """The bounds on keys and values, or None without an FP8 KV cache. Call it from the main thread: it builds the
    model.

    Raises:
        EnvironmentLack, InputError: see `key_value_bounds`, for a plan that calibrates.
        InputError: a module that gets scales is not where the model's code attends.
    """
    if plan.recipe.kv_cache.served != "fp8":
        return None
    try:
        found = key_value_bounds(plan.source, plan.prefix)
    except (EnvironmentLack, InputError):
        if plan.needs_calibration:
            raise
        return {}
    for attention in plan.cached:
        if attention.module not in found[attention.layer]:
            raise InputError(
                f"the keys and values of {attention.module} cannot be observed, because the model's code does not use "
                f"transformers' attention",
                where=f"recipe {plan.recipe.name}",
                hint="use kv_cache: {dtype: fp8}",
            )
    return found


def unbounded_sites(bounds: Mapping[str, KeyValueBounds]) -> list[str]:
    """The sites of a layer without a bound."""
    return [f"{module}.{half}" for module, one in bounds.items() for half in HALVES if getattr(one, half) is None]


def attention_records(
    bounds: Mapping[str, KeyValueBounds], observed: Mapping[str, float]
) -> dict[str, AttentionRecord]:
    """The manifest's entries of a layer, by attention module.

    Args:
        observed: amaxes of the sites without a bound, or none without calibration.
    """
    records = {}
    for module, one in bounds.items():
        halves = {}
        for half in HALVES:
            bound, site = getattr(one, half), f"{module}.{half}"
            if bound is not None:
                halves[half] = CachedRecord(bound=bound)
            else:
                halves[half] = CachedRecord(observed=observed[site]) if site in observed else CachedRecord()
        records[module] = AttentionRecord(**halves)
    return records


def warn_of_clipping(plan: Plan, records: Mapping[str, AttentionRecord]) -> None:
    """Log keys and values that an FP8 cache with unit scales clips."""
    for module, record in records.items() if not plan.cached else ():
        for half, words in HALVES.items():
            one: CachedRecord = getattr(record, half)
            if clipped(one, 1.0):
                logger.warning(
                    "The %s of %s reach %g, but an FP8 cache stores at most 448: use kv_cache: {dtype: fp8-calibrated}",
                    *(words, module, one.largest),
                )


def cache_scales(plan: Plan, layer: int, records: Mapping[str, AttentionRecord]) -> dict[str, Tensor]:
    """The scales that a layer stores, float32 on the CPU, by output name."""
    scales = {}
    for attention in plan.cached:
        if attention.layer == layer:
            for half, name in scale_names(attention, plan.layout).items():
                value = cache_scale(getattr(records[attention.module], half))
                scales[name] = torch.tensor(value, dtype=torch.float32).reshape(plan.layout.scalar_shape)
    return scales
