"""Schemes as a `quantization_config` declares them: compressed-tensors' config groups, modelopt's algorithms.

Sources: vLLM 0.32.0, compressed_tensors.py (`_is_nvfp4_format`, `_is_fp8_w8a8`, `_get_scheme_from_parts`) and
modelopt.py; compressed-tensors 0.19.0, `preset_name_to_scheme` and `CompressionFormat`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .schemes import FP8, NVFP4, NVFP4_A16

UNKNOWN = "another scheme"
REFUSED = "refused"
FP8_CALIBRATED = "FP8 with calibrated inputs"
MIXED_FORMAT = "mixed-precision"
MIXED_ALGORITHM = "MIXED_PRECISION"
FORMATS: Mapping[str, str] = {
    NVFP4.name: "nvfp4-pack-quantized",
    NVFP4_A16.name: "nvfp4-pack-quantized",
    FP8.name: "float-quantized",
}
"""compressed-tensors' name of the stored form of each scheme."""
PRESETS: Mapping[str, str] = {NVFP4.name: "NVFP4", NVFP4_A16.name: "NVFP4A16", FP8.name: "FP8_DYNAMIC"}
"""compressed-tensors' preset of each scheme."""
ALGORITHMS: Mapping[str, str] = {NVFP4.name: "NVFP4", NVFP4_A16.name: "W4A16_NVFP4", FP8.name: "FP8"}
"""modelopt's name of each scheme."""
LINEAR_ALGORITHMS = frozenset({*ALGORITHMS.values(), "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"})
"""The algorithms that vLLM 0.32 knows for a linear layer in a list of modules. It serves others unquantized."""
_ROUNDING_FORMATS = frozenset({*FORMATS.values(), "naive-quantized", "int-quantized"})
"""The stored forms of compressed-tensors for which vLLM 0.32 rounds inputs to FP8."""
# The keys of compressed-tensors' QuantizationArgs, which refuses others; read from 0.17.0 and 0.19.0.
_NUMBER_KEYS = frozenset(
    {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
     "zp_dtype", "observer", "observer_kwargs"}
)  # fmt: skip


def scheme_of_group(group: Mapping[str, Any], top_format: object) -> str:
    """The name of the scheme that vLLM gives the layers of a config group of compressed-tensors.

    Args:
        top_format: of the config, which counts where the group has no format of its own.
    Returns:
        a scheme's name, `refused` where vLLM raises, or other words for a scheme that nvquant does not know. vLLM
        finds no scheme for FP8 under a form for which it rounds no inputs, such as the top form of a mixed config.
    """
    weights, inputs = group.get("weights"), group.get("input_activations")
    if _is_nvfp4(weights):
        if inputs is None:
            return NVFP4_A16.name
        return NVFP4.name if _is_nvfp4(inputs) else REFUSED
    if _is_fp8(weights, "channel", is_dynamic=False) and _is_fp8(inputs, "token", is_dynamic=True):
        stored = group.get("format")
        stored = top_format if stored is None else stored
        return FP8.name if stored in _ROUNDING_FORMATS else REFUSED
    if _is_fp8(weights, "channel", is_dynamic=False) and _is_fp8(inputs, "tensor", is_dynamic=False):
        return FP8_CALIBRATED
    return UNKNOWN


def format_of_group(group: Mapping[str, Any]) -> str:
    """The name of the stored form that the numbers of a config group require."""
    numbers = group.get("weights")
    is_fp8 = isinstance(numbers, Mapping) and numbers.get("num_bits") == FP8.bits
    return FORMATS[FP8.name if is_fp8 else NVFP4.name]


def is_of_attention(group: Mapping[str, Any]) -> bool:
    """Whether a config group quantizes attention itself, as llm-compressor's for a KV cache. vLLM 0.32 skips it."""
    targets = group.get("targets")
    return isinstance(targets, list) and len(targets) == 1 and str(targets[0]).endswith("Attention")


def format_of_config(groups: Iterable[Mapping[str, Any]]) -> str:
    """The name of the stored form that a config of these groups has."""
    formats = {format_of_group(group) for group in groups}
    return formats.pop() if len(formats) == 1 else MIXED_FORMAT


def scheme_of_algorithm(algorithm: object) -> str:
    """The name of the scheme of an algorithm of modelopt, or other words for one that nvquant does not know."""
    names = {value: name for name, value in ALGORITHMS.items()}
    return names.get(str(algorithm).upper(), str(algorithm))


def numbers_of(name: str) -> dict[str, Any]:
    """The weights and inputs of a scheme, as modelopt's config groups describe them."""
    if name == FP8.name:
        numbers: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    else:
        numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4.divides}
    inputs = {} if name == NVFP4_A16.name else {"input_activations": dict(numbers)}
    return inputs | {"weights": dict(numbers)}


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


def _is_fp8(numbers: object, strategy: str, is_dynamic: bool) -> bool:
    return (
        isinstance(numbers, Mapping)
        and set(numbers) <= _NUMBER_KEYS
        and numbers.get("num_bits") == 8
        and numbers.get("type") == "float"
        and numbers.get("strategy") == strategy
        and numbers.get("symmetric", True) is True
        and bool(numbers.get("dynamic", False)) is is_dynamic
    )
