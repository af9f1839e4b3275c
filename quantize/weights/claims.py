"""The claim of a checkpoint that it is quantized: in config.json, or in a file beside it.

Source: docs/formats.md, section "Quantized sources".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.regular import is_file
from ..errors import InputError

# Keys of config.json that claim quantization: transformers', llm-compressor's old one, and MLX's.
KEYS = ("quantization_config", "compression_config")
_MLX_KEY = "quantization"
# Files beside config.json that claim it: modelopt's, AutoGPTQ's, AutoAWQ's.
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")
"""The methods whose tensors nvquant decodes, as `quant_method` names them."""
# Keys around `quantization_config` that describe its tensors: DeepSeek V4's.
_BESIDE = ("expert_dtype", "scale_fmt")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_WORD = re.compile(r"[\w.+-]{1,60}")
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True)
class Claim:
    """A claim of quantization.

    Attributes:
        key: of config.json, dotted. Empty where a file beside it makes the claim.
        file: that contains it.
        method: as a message repeats it.
        settings: the claim itself. Empty for a file beside config.json.
    """

    key: str
    file: str
    method: str
    settings: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.key} of {self.file}" if self.key else self.file

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block of FP8."""
        found = [self.settings.get("weight_block_size")]
        found += [numbers.get("block_structure") for numbers in self._groups()]
        for sizes in found:
            if isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int and n > 0 for n in sizes):
                return sizes[0], sizes[1]
        return _DEFAULT_BLOCK

    @property
    def integer_bits(self) -> frozenset[int]:
        """Bits of the integers that it declares."""
        groups = [numbers for numbers in self._groups() if numbers.get("type", "int") == "int"]
        return frozenset(bits for numbers in groups if type(bits := numbers.get("num_bits")) is int)

    @property
    def groups_of_integers(self) -> frozenset[int]:
        """Columns under one scale that it declares for integers."""
        groups = [numbers for numbers in self._groups() if numbers.get("type", "int") == "int"]
        return frozenset(size for numbers in groups if type(size := numbers.get("group_size")) is int and size > 0)

    def refuse_other_forms(self, model: str) -> None:
        """Refuse settings under which a tensor is more than codes and scales.

        Args:
            model: its name in the message.
        Raises:
            InputError: weights are rotated or sparse, or integers have a zero point or an order of their own.
        """
        sparsity = self.settings.get("sparsity_config")
        is_sparse = isinstance(sparsity, Mapping) and sparsity.get("format") not in (None, "dense")
        transforms = self.settings.get("transform_config")
        is_turned = isinstance(transforms, Mapping) and bool(transforms.get("config_groups"))
        if is_sparse or is_turned:
            raise InputError(
                f"{self.where} {'stores weights sparse' if is_sparse else 'transforms weights'}, which nvquant does "
                "not decode",
                where=model,
                hint="convert from the original BF16 model",
            )

    def _groups(self) -> Iterator[Mapping[str, Any]]:
        """The numbers of weights in compressed-tensors' groups."""
        groups = self.settings.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            numbers = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(numbers, Mapping):
                yield numbers


def find_claim(folder: Path, config: Mapping[str, Any]) -> Claim | None:
    """The first claim of quantization, or None."""
    for place, part in _parts(config):
        for key in KEYS:
            found = part.get(key)
            if found is not None:
                settings = found if isinstance(found, Mapping) else {}
                named = settings.get("quant_method") or settings.get("quant_algo")
                return Claim(f"{place}{key}", "config.json", _word(named), settings)
    if isinstance(config.get(_MLX_KEY), Mapping):
        return Claim(_MLX_KEY, "config.json", "MLX", {})
    for name, method in _FILES.items():
        if is_file(folder / name):
            return Claim("", name, method, {})
    return None


def without_claim(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the decoded model: without the claim at any level, and with its dtype where it named another."""
    cleaned: dict[str, Any] = {}
    for key, value in config.items():
        if key in KEYS or key in _BESIDE:
            continue
        if key.endswith("_config") and isinstance(value, Mapping):
            cleaned[key] = without_claim(value)
        elif key in _DTYPE_KEYS and isinstance(value, str) and "float8" in value:
            cleaned[key] = "bfloat16"
        else:
            cleaned[key] = value
    return cleaned


def _word(method: object) -> str:
    """A method's name as a message repeats it."""
    return method if isinstance(method, str) and _WORD.fullmatch(method) else "an unknown method"


def _parts(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The config and its parts, each with the prefix of its keys in a message."""
    parts = [(f"{key}.", value) for key, value in config.items() if key.endswith("_config") and key not in KEYS]
    return [("", config), *((place, part) for place, part in parts if isinstance(part, Mapping))]
