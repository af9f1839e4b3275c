"""The head of a model and its embedding: their tensors, and whether both are the same tensor.

A class ties its head where its own config says so, and each class has its own default: without an entry, Gemma 3 is
tied and Llama is not. `tie_word_embeddings` belongs to the config of the class that has the head, which for a composite
model is the top of config.json. A few classes also look into the text config. If the file alone does not decide,
transformers does. vLLM reads the flag from the same place.
Source: transformers 5.17, `PreTrainedModel.get_expanded_tied_weights_keys`; vLLM 0.32, `VllmConfig.with_hf_config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .roles import Role, decoder_prefix, layer_index, module_of, role_of, text_config

KEY = "tie_word_embeddings"
_MOST_DEPTH = 4  # of configs in configs
OWN_NAME = "lm_head"  # of a head that no source stores, for every server
_OLD_ROOT = "language_model."  # before a head where the decoder has it too, as older checkpoints of vision models


@dataclass(frozen=True)
class HeadSource:
    """The head to quantize.

    Attributes:
        module: its name for servers, which the names of its stored tensors begin with.
        tensor: the source tensor with its rows: its own, or the embedding.
        is_embedding: whether it is the embedding, which stays as it is.
    """

    module: str
    tensor: str
    is_embedding: bool


def head_source(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> HeadSource | None:
    """The head of a model, or None where it neither stores one nor ties it to the embedding.

    Args:
        shapes: all tensors of the source.
        config: its config.json.
    """
    stored = stored_head(shapes)
    if stored is not None:
        return HeadSource(module_of(stored), stored, is_embedding=False)
    embedding = token_embedding(shapes, config) if is_tied(config) else None
    if embedding is None:
        return None
    prefix = decoder_prefix(shapes, config) or ""
    return HeadSource((_OLD_ROOT if prefix.startswith(_OLD_ROOT) else "") + OWN_NAME, embedding, is_embedding=True)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with a head of its own: the flag is false at the top, in the text config, and in
    every config on the way to it, because servers and some classes read each of them."""
    text = text_config(config)
    changed: dict[str, Any] = dict(config)
    for key, value in config.items():
        if isinstance(value, Mapping) and _contains(value, text, _MOST_DEPTH):
            changed[key] = untied(value)
    changed[KEY] = False
    return changed


def _contains(config: Mapping[str, Any], inner: Mapping[str, Any], depth: int) -> bool:
    """Whether a config is another one or has it inside."""
    if config is inner:
        return True
    values = config.values() if depth else ()
    return any(isinstance(value, Mapping) and _contains(value, inner, depth - 1) for value in values)


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


def class_ties_head(config: Mapping[str, Any]) -> bool | None:
    """Whether the model's class ties any weights where the flag asks for it, or None for a class that transformers does
    not know. Some classes ignore the flag. The import of the class takes seconds."""
    import transformers

    named = config.get("architectures")
    first = named[0] if isinstance(named, (list, tuple)) and named else None
    model_class: Any = getattr(transformers, first, None) if isinstance(first, str) and first.isidentifier() else None
    if model_class is None or not hasattr(model_class, "_tied_weights_keys"):
        return None
    return bool(model_class._tied_weights_keys)


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
    """The table that token ids are looked up in, or None without any.

    Of several tables it is the one with a row for each token, beside the decoder's layers, as wide as the hidden state,
    and with the most rows. A table of positions is the last choice.
    """
    prefix = decoder_prefix(shapes)
    width = text_config(config).get("hidden_size")
    tables = _outside(shapes, Role.EMBEDDING, prefix)
    root = (prefix or "").removesuffix("layers").removesuffix("h").removesuffix("blocks")

    tokens = text_config(config).get("vocab_size")

    def rank(name: str) -> tuple[bool, bool, bool, bool, int]:
        rows, columns = shapes[name]
        has_all = isinstance(tokens, int) and rows >= tokens
        return "position" not in name, has_all, columns == width, name.startswith(root), rows

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
