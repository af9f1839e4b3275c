"""The YAML at the top of a model card: the entries of the source's card that are still true go into the new one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..quoting import visible

# Of the source alone: what was measured on it, what it was made from, and how one gets at its own repository.
DROPPED = frozenset(
    {
        *("model-index", "model_name", "eval_results", "metrics", "train-eval-index", "co2_eq_emissions", "carbon"),
        *("base_model", "base_model_relation", "new_version", "quantized_by", "thumbnail"),
    }
)
DROPPED_PREFIX = "extra_gated_"
# Tags that name a kind of file or number that the checkpoint is not.
STALE_TAGS = frozenset(
    {
        *("bf16", "bfloat16", "fp16", "float16", "16-bit", "fp8", "int8", "8-bit", "int4", "awq", "gptq"),
        *("gguf", "onnx", "openvino", "mlx", "coreml", "tflite", "jax", "flax", "tf", "pytorch"),
    }
)
MOST_VALUES, MOST_DEPTH = 20_000, 20  # long cards have some hundred languages and data sets
_KEY = re.compile(r"[A-Za-z][\w-]{0,99}", re.ASCII)
_ARGUMENTS = frozenset({"self", "ignore_metadata_errors"})
_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its metadata and its body. The metadata is empty where none can be read."""
    import yaml

    match = _BLOCK.match(text)
    if match is None:
        return {}, text
    try:
        data = yaml.safe_load(match[1])
        plain = _plain(data, [MOST_VALUES]) if isinstance(data, dict) else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none is a ValueError
        plain = {}
    return plain, text[match.end() :]


def _plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """A value of YAML with only visible characters in its texts.

    Args:
        left: the number of values still allowed. An alias counts each time, because it is written out each time.
    Raises:
        ValueError: there are more, or they are nested too deeply.
    """
    left[0] -= 1
    if left[0] < 0 or depth > MOST_DEPTH:
        raise ValueError("more data than a card allows")
    if isinstance(value, dict):
        return {visible(key): _plain(item, left, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, left, depth + 1) for item in value]
    return visible(value) if isinstance(value, str) else value


def card_data(source: Mapping[str, Any], base_model: str | None, layout: str) -> str:
    """Write the YAML of the new card, without its fences: the source's entries that are still true, and new ones.

    Args:
        source: the metadata of the source's card. Empty where there is none.
        base_model: the source's id. None where it is unknown.
        layout: `compressed-tensors` or `modelopt`.
    """
    from huggingface_hub import ModelCardData

    kept = {
        key: value
        for key, value in source.items()
        if key not in DROPPED and not key.startswith(DROPPED_PREFIX) and _is_name_of_data(key)
    }
    kept["language"] = _languages(kept.get("language"))
    # transformers reads compressed-tensors, but not the other layout.
    library = kept.get("library_name") if layout == "compressed-tensors" else None
    kept["library_name"] = library if isinstance(library, str) else "vllm"
    kept["tags"] = _tags(kept.get("tags"), layout)
    if base_model is not None:
        kept |= {"base_model": base_model, "base_model_relation": "quantized"}
    text: str = ModelCardData(**kept).to_yaml()
    return text


def _is_name_of_data(key: str) -> bool:
    """Whether a key can be one of ModelCardData: not an argument or a method of it, which the key would replace."""
    from huggingface_hub import ModelCardData

    return _KEY.fullmatch(key) is not None and not hasattr(ModelCardData, key) and key not in _ARGUMENTS


def _tags(source: Any, layout: str) -> list[str]:
    given = [source] if isinstance(source, str) else source if isinstance(source, list) else []
    kept = [tag for tag in given if isinstance(tag, str) and tag.lower() not in STALE_TAGS]
    return list(dict.fromkeys([*kept, "nvfp4", layout, "vllm", "nvquant"]))


def _languages(source: Any) -> Any:
    """YAML 1.1 takes Norwegian's code for false."""
    if isinstance(source, list):
        return ["no" if each is False else each for each in source]
    return "no" if source is False else source
