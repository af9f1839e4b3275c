"""Checks of the configs against the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..checkpoint.source import read_json
from ..errors import InputError
from ..format.declared import MIXED_ALGORITHM, format_of_config, format_of_group, is_of_attention
from ..format.layouts import LAYOUTS
from ..format.schemes import SCHEMES
from ..recipe.vllm_rules import UNQUANTIZED, serving_names
from ..weights.stored import input_leaf, layouts_present, split_name
from .report import Finding
from .served import ServedLayer, served_layers
from .subject import HF_QUANT_CONFIG, Subject


def check_layout(subject: Subject) -> Finding:
    """Check that the tensor names, formats and files are those of the quantization method that config.json names.

    Older exports of modelopt have hf_quant_config.json alone, by which vLLM finds them too.
    """
    method = subject.method
    counts = layouts_present(subject.infos)
    looked_at = ", ".join(
        [f"quant_method {method}", *(f"{n:,} tensors with the names of {name}" for name, n in counts.items())]
    )
    faults = []
    is_legacy = "quantization_config" not in subject.config and method == "modelopt"
    if "quantization_config" not in subject.config and not is_legacy:
        faults.append("config.json has no quantization_config")
    elif method not in LAYOUTS:
        faults.append(f"quant_method is {method}, not one of {', '.join(LAYOUTS)}")
    faults += [f"{n:,} tensors have the names of {name}" for name, n in counts.items() if name != method]
    if not subject.matrices:
        faults.append("no tensor is packed")
    if method == "modelopt" and not is_legacy:
        faults += _unequal_hf_quant_config(subject)
    elif method == "compressed-tensors":
        if (subject.folder / HF_QUANT_CONFIG).exists():
            faults.append(f"{HF_QUANT_CONFIG} lies beside a config.json that is not modelopt's")
        faults += _wrong_formats(subject.quantization)
    return Finding(looked_at, faults)


def _wrong_formats(quantization: Mapping[str, Any]) -> list[str]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        return ["config_groups is not a map of groups"]
    faults = []
    groups = {name: group for name, group in groups.items() if not is_of_attention(group)}
    for name, group in groups.items():
        found, wanted = group.get("format") or quantization.get("format"), format_of_group(group)
        if found != wanted:
            faults.append(f"{name} has format {found}, not {wanted}")
    top, expected = quantization.get("format"), format_of_config(groups.values())
    if groups and top not in (None, expected):
        faults.append(f"the config has format {top}, not {expected}")
    return faults


def _unequal_hf_quant_config(subject: Subject) -> list[str]:
    """Differences between the two files of modelopt, of which some readers take one and some the other."""
    try:
        nested = read_json(subject.folder / HF_QUANT_CONFIG, "modelopt checkpoints have one").get("quantization")
    except InputError as error:
        return [str(error)]
    if not isinstance(nested, Mapping):
        return [f"{HF_QUANT_CONFIG} has no key quantization"]
    stated: dict[str, object] = {
        "quant_algo": subject.quantization.get("quant_algo"),
        "kv_cache_quant_algo": "FP8" if subject.quantization.get("kv_cache_scheme") else None,
        "group_size": _group_size(subject.quantization),
        "exclude_modules": _sorted(subject.quantization.get("ignore")),
    }
    found = {key: nested.get(key) for key in stated}
    found["exclude_modules"] = _sorted(found["exclude_modules"])
    faults = [
        f"{key} is {found[key]} in {HF_QUANT_CONFIG}, but {stated[key]} by config.json"
        for key in stated
        if stated[key] != found[key] and not (key == "group_size" and stated[key] is None)
    ]
    return [*faults, *_unequal_lists(subject.quantization.get("quantized_layers"), nested.get("quantized_layers"))]


def _unequal_lists(stated: object, found: object) -> list[str]:
    """Modules that the two files list differently."""
    one, other = (layers if isinstance(layers, Mapping) else {} for layers in (stated, found))
    return [
        f"quantized_layers has {other.get(name)} for {name} in {HF_QUANT_CONFIG}, but {one.get(name)} by config.json"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def _group_size(quantization: Mapping[str, Any]) -> object:
    groups = quantization.get("config_groups")
    numbers = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    sizes = [weights.get("group_size") for weights in numbers if isinstance(weights, Mapping)]
    sizes = [size for size in sizes if size is not None]
    return sizes[0] if sizes else quantization.get("group_size")


def _sorted(entries: object) -> list[str]:
    return sorted(map(str, entries)) if isinstance(entries, Sequence) and not isinstance(entries, str) else []


def check_config(subject: Subject) -> Finding:
    """Check that vLLM's own matching rules give every quantized layer a scheme that fits it, and no other layer any.

    A single matrix without its input scale is a fault of that matrix. This check finds schemes that fit no matrix.
    """
    layers = served_layers(subject)
    faults = []
    for layer in layers:
        if layer.quantized and layer.verdict not in SCHEMES:
            faults.append(f"{layer.name} is quantized, but config.json makes it {layer.verdict}")
        elif not layer.quantized and layer.verdict != UNQUANTIZED:
            faults.append(f"{layer.name} is not quantized, but config.json makes it {layer.verdict}")
    for layer in layers:
        for module in layer.quantized if layer.verdict in SCHEMES else ():
            stored = subject.matrices[module].scheme
            if stored.bits != SCHEMES[layer.verdict].bits:
                faults.append(f"{module} is stored in {stored.words}, but config.json makes it {layer.verdict}")
    faults += [*_unlike_inputs(subject, layers), *_unlike_list(subject, layers)]
    quantized = sum(bool(layer.quantized) for layer in layers)
    return Finding(f"{quantized} quantized and {len(layers) - quantized} other layers under vLLM's rules", faults)


def _unlike_inputs(subject: Subject, layers: Sequence[ServedLayer]) -> Iterator[str]:
    """Schemes of the config whose matrices have no input scales, or all have some, against what the scheme requires."""
    for name, scheme in SCHEMES.items():
        modules = [module for layer in layers if layer.verdict == name for module in layer.quantized]
        matrices = [
            subject.matrices[module] for module in modules if subject.matrices[module].scheme.bits == scheme.bits
        ]
        form = subject.layout.schemes.get(name)
        if not matrices or form is None:
            continue
        with_input = sum(matrix.has_input_scale for matrix in matrices)
        if with_input == (0 if form.inputs == "calibrated" else len(matrices)):
            yield (
                f"config.json assigns {name} to {len(matrices)} matrices, but {with_input} of them have an input scale"
            )


def _unlike_list(subject: Subject, layers: Sequence[ServedLayer]) -> Iterator[str]:
    """Modules that modelopt's list lacks, although vLLM quantizes them as members of a fused layer, and listed modules
    that are not stored. Readers other than vLLM look up each module, and refuse those that do not exist."""
    listed = subject.quantization.get("quantized_layers")
    if subject.quantization.get("quant_algo") != MIXED_ALGORITHM or not isinstance(listed, Mapping):
        return
    for layer in layers:
        for module in layer.quantized if layer.verdict in SCHEMES else ():
            if listed.keys().isdisjoint([*serving_names(module), *serving_names(layer.name)]):
                yield f"{module} is quantized, but quantized_layers does not list it"
    known: set[str] = set()
    for module in {split_name(name)[0] for name in subject.infos}:
        for name in (*serving_names(module), *serving_names(subject.fusions.name(module))):
            while name and name not in known:
                known.add(name)
                name = name.rpartition(".")[0]
    yield from (f"quantized_layers lists {name}, which is not stored" for name in listed if name not in known)


def check_matrices(subject: Subject) -> Finding:
    """Check that each quantized matrix has exactly the tensors of its layout and scheme, with their dtypes and
    shapes."""
    faults = [fault for matrix in subject.matrices.values() for fault in matrix.faults]
    for name, form in subject.layout.schemes.items():
        modules = [m for layer in served_layers(subject) if layer.verdict == name for m in layer.quantized]
        modules = [m for m in modules if subject.matrices[m].scheme.bits == form.bits]
        without = [module for module in modules if not subject.matrices[module].has_input_scale]
        if 0 < len(without) < len(modules):
            needs = form.inputs == "calibrated"
            odd = without if needs else [module for module in modules if module not in without]
            leaf = input_leaf(subject.layout, subject.matrices[modules[0]].scheme)
            found = [f"{module} {'lacks' if needs else 'also has'} {leaf}" for module in odd]
            faults += [fault for fault in found if fault not in faults]
    tensors = sum(len(matrix.parts) for matrix in subject.matrices.values())
    return Finding(
        f"{len(subject.matrices)} matrices of {tensors:,} tensors, {len(subject.infos) - tensors:,} other tensors",
        faults,
    )
