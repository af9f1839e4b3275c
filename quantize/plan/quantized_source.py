"""Sources that are quantized already, and those whose config only claims it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint.headers import TensorInfo
from ..checkpoint.regular import is_file
from ..checkpoint.source import Checkpoint
from ..errors import InputError

# Keys of config.json that claim quantization: transformers', llm-compressor's old one, and MLX's.
_KEYS = ("quantization_config", "compression_config")
_MLX_KEY = "quantization"
# Files beside config.json that claim it: modelopt's, AutoGPTQ's, AutoAWQ's.
_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
# Ends of names that only tensors of a quantized matrix have, and the formats that use them.
_MARKS = (
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "FP8 with block scales"),
    (
        re.compile(r"\.quant_state\.bitsandbytes__\w+$|\.(SCB|weight_format|absmax|nested_absmax|quant_map)$"),
        "bitsandbytes",
    ),
    (re.compile(r"(\.|_)blocks$"), "MXFP4"),
)
_WORD = re.compile(r"[\w.+-]{1,60}")
_FLOATS = ("BF16", "F16", "F32", "F64")


def refuse_quantized(source: Checkpoint, model: str) -> None:
    """Refuse a checkpoint that is quantized already: by its config, the files beside it, or its tensors.

    Args:
        model: its name in the message.
    Raises:
        InputError: it is quantized, or its config claims it although every matrix is a plain float. In the second case,
            the message names the claim to remove.
    """
    claim = _claim(source)
    infos = source.infos().values()
    proof = next((found for find in (_odd_dtype, _odd_name) for info in infos if (found := find(info))), None)
    way_out = "convert from the original BF16 model"
    if claim is None:
        if proof is not None:
            raise InputError(f"{model} is quantized already ({proof})", where=model, hint=way_out)
        return
    key, file, method = claim
    where = f"{key} of {file}" if key else file
    if proof is not None:
        raise InputError(f"{model} is quantized already ({where} names {method})", where=model, hint=way_out)
    dtype = next((info.dtype for info in infos if len(info.shape) > 1), "absent")
    raise InputError(
        f"{where} names {method}, but no tensor is quantized, and the matrices are {dtype}",
        where=model,
        hint=f"remove {f'{key} from {file}' if key else file} if these are the model's original weights",
    )


def _claim(source: Checkpoint) -> tuple[str, str, str] | None:
    """The key and the file that claim quantization, and the method. None: nothing claims it."""
    for place, config in _configs(source.config):
        for key in _KEYS:
            found = config.get(key)
            if found is not None:
                named = found.get("quant_method") or found.get("quant_algo") if isinstance(found, Mapping) else None
                return f"{place}{key}", "config.json", _word(named)
    if isinstance(source.config.get(_MLX_KEY), Mapping):
        return _MLX_KEY, "config.json", "MLX"
    for name, method in _FILES.items():
        if is_file(source.folder / name):
            return "", name, method
    return None


def _word(method: object) -> str:
    """A method's name as a message repeats it."""
    return method if isinstance(method, str) and _WORD.fullmatch(method) else "an unknown method"


def _configs(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The config and its parts, each with the prefix of its keys in a message."""
    parts = [(f"{key}.", value) for key, value in config.items() if key.endswith("_config") and key not in _KEYS]
    return [("", config), *((place, part) for place, part in parts if isinstance(part, Mapping))]


def _odd_dtype(info: TensorInfo) -> str | None:
    """Why a tensor's dtype can only be that of a quantized matrix; None if it need not be."""
    if len(info.shape) < 2 or info.dtype in _FLOATS:
        return None
    is_quantized = info.dtype.startswith("F8_") or info.name.endswith(".weight")
    return f"{info.name} is stored as {info.dtype}" if is_quantized else None


def _odd_name(info: TensorInfo) -> str | None:
    """Why a tensor's name can only be that of a part of a quantized matrix; None if it need not be."""
    for mark, method in _MARKS:
        if mark.search(info.name) and not (method == "MXFP4" and info.dtype != "U8"):
            return f"{info.name} is a tensor of {method}"
    return None
