"""The layers that a server builds from the checkpoint, and the scheme that vLLM's rules give to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..recipe.drafts import draft_names
from ..recipe.patterns import PatternError
from ..recipe.roles import Role, is_table, module_of
from ..recipe.vllm_rules import REFUSED, UNQUANTIZED, compressed_tensors_verdict, modelopt_verdict
from .subject import Subject

W4A4, WEIGHT_ONLY = "nvfp4", "nvfp4-a16"
SCHEMES = (W4A4, WEIGHT_ONLY)
_ALGORITHMS = {"NVFP4": W4A4, "W4A16_NVFP4": WEIGHT_ONLY}
# The keys of compressed-tensors' QuantizationArgs, which refuses others; read from 0.17.0 and 0.19.0.
_NUMBER_KEYS = frozenset(
    {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
     "zp_dtype", "observer", "observer_kwargs"}
)  # fmt: skip


@dataclass(frozen=True)
class ServedLayer:
    """A linear layer as a server builds it.

    Attributes:
        name: fused where servers fuse.
        quantized: the quantized modules in it. Empty for an unquantized layer.
        verdict: the scheme that the config gives it, `unquantized`, `refused`, or another word for no scheme.
    """

    name: str
    quantized: tuple[str, ...]
    verdict: str


def served_layers(subject: Subject) -> tuple[ServedLayer, ...]:
    """Every linear layer, embedding and head that a server builds from the checkpoint, with its verdict.

    A head is always among them, since servers build one for a tied model too.
    """
    modules = {
        module_of(name)
        for name, role in subject.roles.items()
        if name.endswith(".weight") and len(subject.infos[name].shape) == 2 and name not in subject.unused
        and not (is_table(module_of(name)) and (role is not Role.EMBEDDING or subject.method == "modelopt"))
    }  # fmt: skip
    fusions = subject.fusions
    layers: dict[str, list[str]] = {}
    members: dict[str, tuple[str, ...]] = {}
    for module in [*sorted(modules), *subject.matrices]:
        names = [fusions.name(module)]
        if subject.model_roles.get(f"{module}.weight") is Role.DRAFT:
            names += draft_names(names[0], subject.config)
        for name in names:
            quantized = layers.setdefault(name, [])
            quantized += [module] if module in subject.matrices else []
            members[name] = fusions.members(module)
    layers.setdefault("lm_head", [])
    return tuple(
        ServedLayer(layer, tuple(quantized), scheme_of(layer, subject.quantization, members.get(layer, ())))
        for layer, quantized in layers.items()
    )


def scheme_of(layer: str, quantization: Mapping[str, Any], members: Sequence[str] | None = None) -> str:
    """The scheme that vLLM gives a layer under a `quantization_config`. See `ServedLayer.verdict`, and
    `compressed_tensors_verdict` for `members`."""
    if quantization.get("quant_method") == "modelopt":
        verdict = modelopt_verdict(layer, {**quantization, "quant_algo": _algorithm(quantization)}, members)
        return _ALGORITHMS.get(verdict, verdict)
    groups = _groups(quantization)
    try:
        verdict = compressed_tensors_verdict(layer, {**quantization, "config_groups": groups}, members)
    except PatternError:
        return REFUSED
    return verdict if verdict in (UNQUANTIZED, REFUSED) else _group_scheme(groups[verdict])


def _algorithm(quantization: Mapping[str, Any]) -> str:
    """modelopt's algorithm as vLLM reads it: without input_activations in any group, NVFP4 is weight-only."""
    algorithm = str(quantization.get("quant_algo")).upper()
    groups = list(_groups(quantization).values())
    if algorithm == "NVFP4" and groups and all(group.get("input_activations") is None for group in groups):
        return "W4A16_NVFP4"
    return algorithm


def _groups(quantization: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    pairs = groups.items() if isinstance(groups, Mapping) else ()
    return {name: group for name, group in pairs if isinstance(group, Mapping)}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _group_scheme(group: Mapping[str, Any]) -> str:
    """The scheme of a config group of compressed-tensors, by vLLM's `_is_nvfp4_format`."""
    if not _is_nvfp4(group.get("weights")):
        return "not NVFP4"
    inputs = group.get("input_activations")
    if inputs is None:
        return WEIGHT_ONLY
    return W4A4 if _is_nvfp4(inputs) else REFUSED


def _is_nvfp4(numbers: object) -> bool:
    return (
        isinstance(numbers, Mapping)
        and set(numbers) <= _NUMBER_KEYS
        and numbers.get("num_bits") == 4
        and numbers.get("type") == "float"
        and numbers.get("strategy") == "tensor_group"
        and numbers.get("group_size") == 16
        and numbers.get("symmetric", True) is True
    )
