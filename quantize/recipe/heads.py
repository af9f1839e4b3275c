"""The head of a model and its embedding: their tensors, and whether both are the same tensor.

A class ties its head where its own config says so, and each class has its own default: without an entry, Gemma 3 is
tied and Llama is not. `tie_word_embeddings` belongs to the config of the class that has the head, which for a composite
model is the top of config.json. A few classes also look into the text config. If the file alone does not decide,
transformers does. vLLM reads the flag from the same place.
Source: transformers 5.17, `PreTrainedModel.get_expanded_tied_weights_keys`; vLLM 0.32, `VllmConfig.with_hf_config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .roles import Role, decoder_prefix, layer_index, role_of, text_config

KEY = "tie_word_embeddings"
_MOST_DEPTH = 4  # of configs in configs


def tie_of(config: Mapping[str, Any]) -> bool | None:
    """Whether the head is the embedding for the model's class, or None if this is unknown.

    Args:
        config: the complete JSON of config.json.
    """
    text = text_config(config)
    top, inner = config.get(KEY), text.get(KEY)
    if top is True or (text is config and top is not None):
        return bool(top)
    of_class = _tie_of_class(config)
    if of_class is not None:
        return of_class
    stated = next((value for value in (top, inner) if value is not None), None)
    return None if stated is None else bool(stated)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the model's head is its embedding. See `tie_of`."""
    return tie_of(config) is True


def _tie_of_class(config: Mapping[str, Any]) -> bool | None:
    """The tie by the model's config class from the flags alone, or None for a class that transformers does not know."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    from transformers import CONFIG_MAPPING

    try:
        # Nothing but the flags: a class builds lists as long as the numbers of a config ask for.
        made: Any = CONFIG_MAPPING[kind](**_flags(config, _MOST_DEPTH))
    except Exception:  # each class raises what it likes
        return None
    return bool(getattr(made, KEY, False))


def _flags(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The flags of a config and of the configs in it, with the types of the latter."""
    kept: dict[str, Any] = {KEY: bool(config[KEY])} if config.get(KEY) is not None else {}
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping) and depth:
            inner = _flags(value, depth - 1)
            if isinstance(value.get("model_type"), str):
                inner["model_type"] = value["model_type"]
            if inner:
                kept[key] = inner
    return kept


def token_embedding(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
    """The table that token ids are looked up in, of several tables the one beside the decoder's layers whose width is
    the hidden size and which has the most rows, or None without any."""
    prefix = decoder_prefix(shapes)
    width = text_config(config).get("hidden_size")
    tables = _outside(shapes, Role.EMBEDDING, prefix)
    root = (prefix or "").removesuffix("layers").removesuffix("h").removesuffix("blocks")

    def rank(name: str) -> tuple[bool, bool, int]:
        return shapes[name][1] == width, name.startswith(root), shapes[name][0]

    return max(tables, key=rank, default=None)


def stored_head(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The weight of the head under whatever name it is stored, the one nearest to the top, or None without any. The
    head of a classifier (`score`) predicts no tokens, so it does not count."""
    heads = [name for name in _outside(shapes, Role.HEAD, decoder_prefix(shapes)) if not name.endswith("score.weight")]
    return min(heads, key=lambda name: name.count("."), default=None)


def _outside(shapes: Mapping[str, tuple[int, ...]], role: Role, prefix: str | None) -> list[str]:
    """Matrices of a role that lie in no decoder layer."""
    names: Iterable[str] = (name for name in shapes if name.endswith(".weight") and len(shapes[name]) == 2)
    return [name for name in names if layer_index(name, prefix) is None and role_of(name, shapes[name]) is role]
