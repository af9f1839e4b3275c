"""`quantization_config` of the output, in both layouts, and the proof that vLLM reads it as the plan means it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import CheckFailed
from ..plan.plan import Plan
from ..recipe.coverage import Coverage, coverage_of
from ..recipe.groups import fused_name
from ..recipe.roles import Role, module_of
from ..recipe.vllm_rules import UNQUANTIZED, compressed_tensors_verdict, modelopt_verdict

PACKED_FORMAT = "nvfp4-pack-quantized"
MODELOPT_PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # whose layout it is; readers look at the name
_ALGORITHM = {"nvfp4": "NVFP4", "nvfp4-a16": "W4A16_NVFP4"}
_CT_PRESET = {"nvfp4": "NVFP4", "nvfp4-a16": "NVFP4A16"}


def output_configs(plan: Plan) -> dict[str, dict[str, Any]]:
    """The JSON files that describe the output: config.json, and hf_quant_config.json for the modelopt layout.

    config.json is the source's JSON, key by key, plus `quantization_config`.
    Raises:
        CheckFailed: vLLM's rules would give some layer another treatment than the plan does.
    """
    quantization = quantization_config(plan)
    files = {"config.json": {**plan.source.config, "quantization_config": quantization}}
    if plan.layout.name == "modelopt":
        files["hf_quant_config.json"] = _hf_quant_config(quantization)
    return files


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The value of `quantization_config`; see `output_configs`."""
    coverage = coverage_of(plan.selection, {name: info.shape for name, info in plan.source.infos().items()})
    config = _modelopt(plan, coverage) if plan.layout.name == "modelopt" else _compressed_tensors(plan, coverage)
    for layer, expected, found in disagreements(plan, config):
        raise CheckFailed(
            f"the config would make vLLM treat {layer} as {found} where the plan has {expected}: please report "
            f"this model's names."
        )
    return config


def disagreements(plan: Plan, config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Layers that vLLM would treat otherwise than the plan: (layer, what the plan has, what vLLM's rules say)."""
    verdict = modelopt_verdict if config.get("quant_method") == "modelopt" else compressed_tensors_verdict
    schemes = {fused_name(module): scheme for module, scheme in plan.selection.schemes.items()}
    result = []
    for layer in served_linears(plan):
        found = verdict(layer, config)
        expected = _expected(schemes.get(layer), config)
        if found != expected:
            result.append((layer, expected, found))
    return result


def served_linears(plan: Plan) -> list[str]:
    """Every linear layer that a server builds, by its fused name, in the model's order; without embeddings."""
    skipped = (Role.EMBEDDING,)
    names = [
        fused_name(module_of(name))
        for name, info in plan.source.infos().items()
        if len(info.shape) == 2
        and name.endswith(".weight")
        and plan.selection.roles[name] not in skipped
        and name not in plan.selection.unused
    ]
    return list(dict.fromkeys([*names, "lm_head"]))


def _expected(scheme: str | None, config: Mapping[str, Any]) -> str:
    if scheme is None:
        return UNQUANTIZED
    if config.get("quant_method") == "modelopt":
        return _ALGORITHM[scheme]
    weight_only = scheme == "nvfp4-a16"
    return next(
        name for name, group in config["config_groups"].items() if (group["input_activations"] is None) == weight_only
    )


def _compressed_tensors(plan: Plan, coverage: Coverage) -> dict[str, Any]:
    """Built with compressed-tensors' own classes, so that what vLLM validates is what its library wrote."""
    import compressed_tensors
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    groups = {}
    for at, (scheme, patterns) in enumerate(coverage.targets.items()):
        groups[f"group_{at}"] = preset_name_to_scheme(_CT_PRESET[scheme], [pattern.regex() for pattern in patterns])
        groups[f"group_{at}"].format = PACKED_FORMAT
    kv_cache = None
    if plan.recipe.kv_cache.dtype == "fp8":
        kv_cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    config = QuantizationConfig(
        config_groups=groups,
        ignore=coverage.ignore_regexes(),
        format=PACKED_FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        kv_cache_scheme=kv_cache,
    )
    written = config.model_dump(mode="json")
    written.update(
        quant_method="compressed-tensors",
        version=compressed_tensors.__version__,
        sparsity_config={},
        transform_config={},
    )
    return dict(sorted(written.items()))


def _modelopt(plan: Plan, coverage: Coverage) -> dict[str, Any]:
    (scheme,) = coverage.targets
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group: dict[str, Any] = {"input_activations": dict(numbers)} if scheme == "nvfp4" else {}
    group.update(weights=dict(numbers), targets=["Linear"])
    config: dict[str, Any] = {
        "config_groups": {"group_0": group},
        "ignore": [*coverage.ignore_globs(), "*embed_tokens*"],
        "quant_algo": _ALGORITHM[scheme],
        "producer": MODELOPT_PRODUCER,
        "quant_method": "modelopt",
    }
    if plan.recipe.kv_cache.dtype == "fp8":
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config


def _hf_quant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same content in the older form that TensorRT-LLM prefers."""
    return {
        "producer": config["producer"],
        "quantization": {
            "quant_algo": config["quant_algo"],
            "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in config else None,
            "group_size": 16,
            "exclude_modules": config["ignore"],
        },
    }
