"""The YAML at the top of a model card: the source's is taken apart, what is still true of it goes into the new one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A card's data and its body; without data where there is none that can be read."""
    import yaml

    match = _BLOCK.match(text)
    if match is None:
        return {}, text
    try:
        data = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError):  # a date that is none is a ValueError
        data = None
    return ({str(key): value for key, value in data.items()} if isinstance(data, dict) else {}), text[match.end() :]


def card_data(source: Mapping[str, Any], base_model: str | None, layout: str) -> str:
    """The YAML of the new card, without its fences: the source's data as far as it is still true, and what is new.

    Args:
        source: the data of the source's card; empty where there is none.
        base_model: the source's id; None where it is not known.
        layout: `compressed-tensors` or `modelopt`.
    """
    from huggingface_hub import ModelCardData

    kept = {key: value for key, value in source.items() if key not in DROPPED and not key.startswith(DROPPED_PREFIX)}
    kept.pop("ignore_metadata_errors", None)  # an argument of ModelCardData, and no data
    kept["language"] = _languages(kept.get("language"))
    # transformers reads compressed-tensors, but not the other layout.
    library = kept.get("library_name") if layout == "compressed-tensors" else None
    kept["library_name"] = library if isinstance(library, str) else "vllm"
    kept["tags"] = _tags(kept.get("tags"), layout)
    if base_model is not None:
        kept |= {"base_model": base_model, "base_model_relation": "quantized"}
    text: str = ModelCardData(**kept).to_yaml()
    return text


def _tags(source: Any, layout: str) -> list[str]:
    given = [source] if isinstance(source, str) else source if isinstance(source, list) else []
    kept = [tag for tag in given if isinstance(tag, str) and tag.lower() not in STALE_TAGS]
    return list(dict.fromkeys([*kept, "nvfp4", layout, "vllm", "nvquant"]))


def _languages(source: Any) -> Any:
    """YAML 1.1 takes Norwegian's code for false."""
    if isinstance(source, list):
        return ["no" if each is False else each for each in source]
    return "no" if source is False else source
