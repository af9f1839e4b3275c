"""`quantization_config` of the output, in both layouts, and the proof that vLLM reads it as the plan does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import CheckFailed
from ..format.declared import ALGORITHMS, FORMATS, MIXED_ALGORITHM, MIXED_FORMAT, PRESETS, numbers_of
from ..format.layouts import Layout
from ..plan.plan import Plan
from ..recipe.coverage import Coverage, coverage_of
from ..recipe.drafts import draft_names
from ..recipe.groups import Fusions
from ..recipe.heads import OWN_NAME
from ..recipe.match import Selection, fusions_of
from ..recipe.roles import Role, module_of
from ..recipe.vllm_rules import UNQUANTIZED, compressed_tensors_verdict, modelopt_verdict

MODELOPT_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is; readers look at the name


@dataclass(frozen=True)
class QuantizedModel:
    """The subject of a quantization config: a plan's output, or a checkpoint that is quantized already.

    Attributes:
        selection: the quantized modules, and the role of every tensor of the unquantized model.
        shapes: of all tensors of the unquantized model, by name.
        config: its config.json, without `quantization_config`.
        kv_cache: the dtype of the served model's KV cache.
    """

    layout: Layout
    selection: Selection
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    kv_cache: Literal["bf16", "fp8"]

    @property
    def fusions(self) -> Fusions:
        """The matrices of the model that servers fuse."""
        return fusions_of(self.shapes, self.config)


def described(subject: Plan | QuantizedModel) -> QuantizedModel:
    """The model that the config of a plan's output describes. A described model is returned unchanged."""
    if isinstance(subject, QuantizedModel):
        return subject
    shapes = {name: info.shape for name, info in subject.source.infos().items()}
    if subject.head is not None:
        shapes[f"{subject.head.name}.weight"] = (subject.head.rows, subject.head.cols)
    return QuantizedModel(
        subject.layout, subject.selection, shapes, subject.output_config, subject.recipe.kv_cache.served
    )


def output_configs(subject: Plan | QuantizedModel) -> dict[str, dict[str, Any]]:
    """The JSON files that describe the output: config.json, and hf_quant_config.json for the modelopt layout.

    config.json is the source's JSON, key by key, plus `quantization_config`. A quantized head is not tied any more.
    Raises:
        CheckFailed: vLLM's rules would treat a layer in another way than the plan.
    """
    model = described(subject)
    quantization = quantization_config(model)
    files = {"config.json": {**model.config, "quantization_config": quantization}}
    if model.layout.name == "modelopt":
        files["hf_quant_config.json"] = _hf_quant_config(quantization)
    return files


def quantization_config(subject: Plan | QuantizedModel) -> dict[str, Any]:
    """The value of `quantization_config`. See `output_configs`."""
    model = described(subject)
    coverage = coverage_in_order(model)
    build = _modelopt if model.layout.name == "modelopt" else _compressed_tensors
    config = build(model, coverage)
    _refuse_disagreements(model, config)
    return config


def check_patterns(subject: Plan | QuantizedModel) -> None:
    """Prove the patterns of the future config without building it, which requires the compressed-tensors library.

    Raises:
        CheckFailed: as `output_configs`.
    """
    model = described(subject)
    coverage = coverage_in_order(model)
    if model.layout.name == "modelopt":
        _refuse_disagreements(model, _modelopt(model, coverage))
        return
    groups = {
        f"group_{at}": {"targets": [pattern.regex() for pattern in patterns]}
        for at, patterns in enumerate(coverage.targets.values())
    }
    config = {"config_groups": groups, "ignore": coverage.ignore_regexes()}
    _refuse_disagreements(model, config)


def _refuse_disagreements(model: QuantizedModel, config: Mapping[str, Any]) -> None:
    for layer, expected, found in disagreements(model, config):
        raise CheckFailed(
            f"vLLM would read {layer} from the config as {found}, but the plan has {expected}",
            hint="report this model's names as an issue",
        )


def coverage_in_order(subject: Plan | QuantizedModel) -> Coverage:
    """The patterns of a model, from its names in their natural order, so that they do not depend on its shards."""
    model = described(subject)
    shapes = {name: model.shapes[name] for name in sorted(model.shapes, key=_natural)}
    schemes = {
        module_of(name): model.selection.schemes[module_of(name)]
        for name in shapes
        if name.endswith(".weight") and module_of(name) in model.selection.schemes
    }
    return coverage_of(replace(model.selection, schemes=schemes), shapes, model.config)


def _natural(name: str) -> list[tuple[str, int]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def disagreements(subject: Plan | QuantizedModel, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Layers that vLLM would treat in another way than the plan: (layer, the plan's scheme, vLLM's scheme).

    Schemes are named as in the config: by its groups, or by modelopt's algorithms.
    """
    model = described(subject)
    verdict = modelopt_verdict if config.get("quant_method") == "modelopt" else compressed_tensors_verdict
    fusions = model.fusions
    named = _names_in(model, config)
    schemes = {fusions.name(module): named[scheme] for module, scheme in model.selection.schemes.items()}
    members = {fusions.name(module): fusions.members(module) for module in _linears(model)}
    result = []
    for layer in served_linears(model):
        found, expected = verdict(layer, config, members.get(layer, ())), schemes.get(layer, UNQUANTIZED)
        if found != expected:
            result.append((layer, expected, found))
    return result


def _names_in(model: QuantizedModel, config: Mapping[str, Any]) -> Mapping[str, str]:
    """The names of the model's schemes in a config: its groups are in the order of the patterns."""
    if config.get("quant_method") == "modelopt":
        return ALGORITHMS
    return dict(zip(coverage_in_order(model).targets, config["config_groups"], strict=False))


def served_linears(subject: Plan | QuantizedModel) -> list[str]:
    """Every linear layer that a server builds, by its fused name, in the model's order, without embeddings."""
    model = described(subject)
    fusions = model.fusions
    drafts = [
        name
        for module in _linears(model)
        if model.selection.roles[f"{module}.weight"] is Role.DRAFT
        for name in draft_names(fusions.name(module), model.config)
    ]
    head = OWN_NAME if model.selection.head is None else model.selection.head.module
    return list(dict.fromkeys([*map(fusions.name, _linears(model)), *drafts, head]))


def _linears(model: QuantizedModel) -> list[str]:
    return [
        module_of(name)
        for name, shape in model.shapes.items()
        if len(shape) == 2
        and name.endswith(".weight")
        and model.selection.roles[name] is not Role.EMBEDDING
        and name not in model.selection.unused
    ]


def _compressed_tensors(model: QuantizedModel, coverage: Coverage) -> dict[str, Any]:
    """A config from compressed-tensors' own classes, so that vLLM validates the output of its own library."""
    import compressed_tensors
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    groups = {}
    for at, (scheme, patterns) in enumerate(coverage.targets.items()):
        groups[f"group_{at}"] = preset_name_to_scheme(PRESETS[scheme], [pattern.regex() for pattern in patterns])
        groups[f"group_{at}"].format = FORMATS[scheme]
    kv_cache_scheme = None
    if model.kv_cache == "fp8":
        kv_cache_scheme = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    formats = {FORMATS[scheme] for scheme in coverage.targets}
    config = QuantizationConfig(
        config_groups=groups,
        ignore=coverage.ignore_regexes(),
        format=formats.pop() if len(formats) == 1 else MIXED_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=kv_cache_scheme,
    )
    written = config.model_dump(mode="json")
    written.update(
        quant_method="compressed-tensors",
        version=compressed_tensors.__version__,
        sparsity_config={},
        transform_config={},
    )
    return dict(sorted(written.items()))


def _modelopt(model: QuantizedModel, coverage: Coverage) -> dict[str, Any]:
    if len(coverage.targets) > 1:
        return _modelopt_mixed(model, coverage)
    (scheme,) = coverage.targets
    config: dict[str, Any] = {
        "config_groups": {"group_0": {**numbers_of(scheme), "targets": ["Linear"]}},
        "ignore": [*coverage.ignore_globs(), "*embed_tokens*"],
        "quant_algo": ALGORITHMS[scheme],
        "producer": MODELOPT_PRODUCER,
        "quant_method": "modelopt",
    }
    return config | _modelopt_kv_cache(model)


def _modelopt_mixed(model: QuantizedModel, coverage: Coverage) -> dict[str, Any]:
    """A config that lists every quantized module, as Model Optimizer writes it for several schemes.

    Modules that it does not list are unquantized. Readers check that every listed module exists.
    """
    modules: dict[str, list[str]] = {scheme: [] for scheme in coverage.targets}
    for module in sorted(model.selection.schemes, key=_natural):
        modules[model.selection.schemes[module]].append(module)
    groups = {
        f"group_{at}": {**numbers_of(scheme), "targets": listed} for at, (scheme, listed) in enumerate(modules.items())
    }
    config: dict[str, Any] = {
        "config_groups": groups,
        "ignore": [*coverage.ignore_globs(), "*embed_tokens*"],
        "quant_algo": MIXED_ALGORITHM,
        "quantized_layers": {
            module: {"quant_algo": ALGORITHMS[scheme], **_group_size(scheme)}
            for scheme, listed in modules.items()
            for module in listed
        },
        "producer": MODELOPT_PRODUCER,
        "quant_method": "modelopt",
    }
    return config | _modelopt_kv_cache(model)


def _group_size(scheme: str) -> dict[str, int]:
    size = numbers_of(scheme)["weights"].get("group_size")
    return {} if size is None else {"group_size": size}


def _modelopt_kv_cache(model: QuantizedModel) -> dict[str, Any]:
    if model.kv_cache != "fp8":
        return {}
    return {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}


def _hf_quant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same content in the older form that TensorRT-LLM prefers."""
    quantization: dict[str, Any] = {
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in config else None,
    }
    sizes = {group["weights"].get("group_size") for group in config["config_groups"].values()} - {None}
    if sizes:
        quantization["group_size"] = sizes.pop()
    quantization["exclude_modules"] = config["ignore"]
    if "quantized_layers" in config:
        quantization["quantized_layers"] = config["quantized_layers"]
    return {"producer": config["producer"], "quantization": quantization}
