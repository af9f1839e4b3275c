"""The layers that a server builds from the checkpoint, and the scheme that vLLM's rules give to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..format.declared import ALGORITHMS, scheme_of_algorithm, scheme_of_group
from ..format.schemes import NVFP4, NVFP4_A16
from ..recipe.drafts import draft_names
from ..recipe.heads import OWN_NAME
from ..recipe.patterns import PatternError
from ..recipe.roles import Role, is_table, module_of
from ..recipe.vllm_rules import REFUSED, UNQUANTIZED, compressed_tensors_verdict, modelopt_verdict
from .subject import Subject


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
    if subject.head is None:
        layers.setdefault(OWN_NAME, [])
    return tuple(
        ServedLayer(layer, tuple(quantized), scheme_of(layer, subject.quantization, members.get(layer, ())))
        for layer, quantized in layers.items()
    )


def scheme_of(layer: str, quantization: Mapping[str, Any], members: Sequence[str] | None = None) -> str:
    """The scheme that vLLM gives a layer under a `quantization_config`. See `ServedLayer.verdict`, and
    `compressed_tensors_verdict` for `members`."""
    if quantization.get("quant_method") == "modelopt":
        return _modelopt_scheme(layer, quantization, members)
    groups = _groups(quantization)
    try:
        verdict = compressed_tensors_verdict(layer, {**quantization, "config_groups": groups}, members)
    except PatternError:
        return REFUSED
    if verdict in (UNQUANTIZED, REFUSED):
        return verdict
    return scheme_of_group(groups[verdict], quantization.get("format"))


def _modelopt_scheme(layer: str, quantization: Mapping[str, Any], members: Sequence[str] | None) -> str:
    verdict = modelopt_verdict(layer, {**quantization, "quant_algo": _algorithm(quantization)}, members)
    return verdict if verdict in (UNQUANTIZED, REFUSED) else scheme_of_algorithm(verdict)


def _algorithm(quantization: Mapping[str, Any]) -> str:
    """modelopt's algorithm as vLLM reads it: without input_activations in any group, NVFP4 is weight-only."""
    algorithm = str(quantization.get("quant_algo")).upper()
    groups = list(_groups(quantization).values())
    is_nvfp4 = algorithm == ALGORITHMS[NVFP4.name]
    if is_nvfp4 and groups and all(group.get("input_activations") is None for group in groups):
        return ALGORITHMS[NVFP4_A16.name]
    return algorithm


def _groups(quantization: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    pairs = groups.items() if isinstance(groups, Mapping) else ()
    return {name: group for name, group in pairs if isinstance(group, Mapping)}
