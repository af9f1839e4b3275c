"""Check of an FP8 KV cache: its scheme, its scales, and that it clips no keys or values that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..calibrate.key_value_bounds import KeyValueBounds, key_value_bounds
from ..errors import EnvironmentLack, InputError
from ..format.constants import E4M3_MAX
from ..recipe.decoder import decoder_prefix
from ..recipe.kv_cache import HALVES, Attention, Half, attention_modules, scale_spellings
from ..recipe.roles import unused_tensors
from ..stream.manifest import AttentionRecord, CachedRecord, Manifest
from ..stream.scalars import cache_scale, clipped
from ..weights.stored import KV_SCALES, split_name
from .numerics.served import ServedModel
from .report import Finding, counted
from .subject import Subject


def check_kv_cache(subject: Subject) -> Finding:
    """Check that servers accept the KV cache's scheme, that the recipe requires it, that its scales are positive
    scalars and follow from the manifest, and that an FP8 cache clips no keys or values that are proved or recorded."""
    scheme = subject.quantization.get("kv_cache_scheme")
    scales = {name: subject.checkpoint.read(name) for name in subject.infos if split_name(name)[1] in KV_SCALES}
    manifest = subject.manifest if isinstance(subject.manifest, Manifest) else None
    faults = []
    if scheme is not None and not _is_fp8_kv(scheme, subject.quantization):
        faults.append(f"kv_cache_scheme is {scheme}, not 8-bit float with one static scale")
    if manifest is not None and (scheme is not None) != (manifest.recipe.kv_cache.served == "fp8"):
        faults.append(f"kv_cache_scheme is {scheme}, but the recipe requires {manifest.recipe.kv_cache.dtype}")
    if scales and scheme is None:
        faults.append(f"{next(iter(scales))} is stored although the config has no kv_cache_scheme")
    for name, stored in scales.items():
        values = stored.float()
        if values.numel() != 1 or not bool(torch.isfinite(values).all() and (values > 0).all()):
            faults.append(f"{name} is not a positive scalar")
        # vLLM takes a lone k_scale for both, but asserts that there is one.
        if (
            split_name(name)[1] == "v_scale"
            and name.replace("v_proj", "k_proj").replace("v_scale", "k_scale") not in scales
        ):
            faults.append(f"{name} has no k_scale beside it")
    words = f"{'FP8' if scheme is not None else 'no'} scheme, {counted(len(scales), 'scale')}"
    if faults or scheme is None:
        return Finding(words, faults)
    values_of = {name: float(stored.float()) for name, stored in scales.items()}
    known = _known(subject, manifest, values_of)
    return Finding(f"{words}; {_summary(known)}", [fault for one in known for fault in one.faults(manifest)])


@dataclass(frozen=True)
class _Known:
    """The facts about the keys or values of an attention module.

    Attributes:
        scale: of the cache, 1 where none is stored.
        is_stored: whether the checkpoint stores the scale.
        recorded: in nvquant's manifest.
        proved: the bound that the norms in front of them give here.
    """

    module: str
    half: Half
    scale: float
    is_stored: bool
    recorded: CachedRecord | None
    proved: float | None

    @property
    def best(self) -> CachedRecord:
        """What is known of their magnitude."""
        if self.proved is not None:
            return CachedRecord(bound=self.proved)
        return self.recorded or CachedRecord()

    def faults(self, manifest: Manifest | None) -> Iterator[str]:
        """A phrase for each fault."""
        what, best = f"the {HALVES[self.half]} of {self.module}", self.best
        recorded = None if self.recorded is None else self.recorded.bound
        if recorded is not None and self.proved is not None and recorded != self.proved:
            yield f"{what}: the recorded bound is {recorded!r}, the norm in front of them gives {self.proved!r}"
        if clipped(best, self.scale):
            limit = E4M3_MAX * self.scale
            yield (
                f"{what} reach {best.largest:g}, but the cache stores at most {limit:g}: convert again with kv_cache: "
                f"{{dtype: fp8-calibrated}}"
            )
        if manifest is None:
            return
        if manifest.recipe.kv_cache.has_scales != self.is_stored:
            yield f"{what}: a scale is {'' if self.is_stored else 'not '}stored, unlike the recipe requires"
        elif self.is_stored and self.recorded is not None and self.scale != cache_scale(self.recorded):
            yield f"{what}: their scale is {self.scale!r}, follows as {cache_scale(self.recorded)!r}"


def _known(subject: Subject, manifest: Manifest | None, scales: Mapping[str, float]) -> list[_Known]:
    """The facts about all attention modules that servers cache, in the order of the layers."""
    recorded = {} if manifest is None else manifest.attention
    proved = _proved(subject)
    modules = {attention.module: attention for attention in _attention(subject)}
    found = []
    for module in dict.fromkeys([*modules, *proved, *recorded]):
        for half in HALVES:
            names = scale_spellings(modules[module], half) if module in modules else (f"{module}.{half}_scale",)
            stored = next((name for name in names if name in scales), None)
            record: AttentionRecord | None = recorded.get(module)
            found.append(
                _Known(
                    module,
                    half,
                    1.0 if stored is None else scales[stored],
                    stored is not None,
                    None if record is None else getattr(record, half),
                    getattr(proved[module], half) if module in proved else None,
                )
            )
    return found


def _attention(subject: Subject) -> list[Attention]:
    prefix = decoder_prefix(subject.shapes, subject.config)
    unused = unused_tensors(subject.config, subject.shapes)
    return [] if prefix is None else attention_modules(subject.model_roles, unused, subject.config, prefix)


def _proved(subject: Subject) -> dict[str, KeyValueBounds]:
    """The bounds of the stored norms, where the shards are here and transformers knows the model's class."""
    if subject.is_remote:
        return {}
    try:
        model = ServedModel(subject)
        bounds = key_value_bounds(model, model.prefix)
    except (InputError, EnvironmentLack):
        return {}
    return {module: one for found in bounds.values() for module, one in found.items()}


def _summary(known: list[_Known]) -> str:
    """How many keys and values are proved, seen and unknown, and the largest of each."""
    best = [one.best for one in known]
    bounds = [record.bound for record in best if record.bound is not None]
    seen = [record.observed for record in best if record.bound is None and record.observed is not None]
    unknown = len(best) - len(bounds) - len(seen)
    parts = [f"{len(bounds)} proved to be at most {max(bounds):g}"] if bounds else []
    parts += [f"{len(seen)} observed to be at most {max(seen):g}"] if seen else []
    parts += [f"{unknown} neither proved nor observed"] if unknown or not parts else []
    return f"keys and values: {', '.join(parts)}"


def _is_fp8_kv(scheme: object, quantization: Mapping[str, Any]) -> bool:
    if not isinstance(scheme, Mapping) or scheme.get("num_bits") != 8 or scheme.get("type") != "float":
        return False
    if scheme.get("dynamic", False) is not False:
        return False
    is_modelopt = quantization.get("quant_method") == "modelopt"
    return is_modelopt or (scheme.get("strategy") == "tensor" and scheme.get("symmetric", True) is True)
