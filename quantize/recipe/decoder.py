"""The text decoder among a model's stacks of layers, and the layers that belong to it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..checkpoint.config_values import TEXT_PARTS

LAYER = re.compile(r"^(?P<prefix>(?:.+\.)?(?:layers|h|blocks|(?<=encoder\.)layer))\.(?P<index>\d+)\.(?P<rest>.+)$")
TOWER = re.compile(r"vision|visual|audio|image|speech|video|^vit$|^vq")
PROJECTOR = re.compile(r"^embed_(vision|audio)$|projector|^connector$|^aligner$|^merger$")
# Layers that predict further tokens: vLLM's *_mtp.py files read `mtp.`, `model.mtp.`, `model.mtp_layers.` and
# `model.mtp_block.`; other drafters lie under names of their own.
DRAFT = re.compile(r"^mtp(_|$)|^(nextn|eagle\d*|medusa|draft)(_|$)")
_TEXT = frozenset({"language_model", "text_model", "llm", "decoder"})
_NO_TEXT = frozenset({"encoder", "tower"})
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks")
# Parts of a draft layer that no other layer has, as DeepSeek V3 and GLM store them.
_DRAFT_PARTS = re.compile(r"^(eh_proj|enorm|hnorm|shared_head|mtp_block|transformer)\.")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the text decoder."""
    for key in TEXT_PARTS:
        if isinstance(config.get(key), Mapping):
            nested: Mapping[str, Any] = config[key]
            return nested
    return config


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of the text decoder's layers by config.json, or None if it has no number."""
    for part in (text_config(config), config):
        for key in _COUNTS:
            value = part.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def has_layer_count(config: Mapping[str, Any], number: int) -> bool:
    """Whether any key of config.json counts so many layers. Classes with two attentions a layer (LongCat) count both,
    and the layers in another key."""
    return any(part.get(key) == number for part in (text_config(config), config) for key in _COUNTS)


def decoder_prefix(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> str | None:
    """The prefix before a layer's number in the names of the text decoder's tensors, such as `model.layers`, or None
    without a decoder.

    Of several stacks outside of known towers, the decoder is the one with the layers and the width of the text model
    in the config, then the one with "text" in its name, then the one with the most tensors.

    Args:
        config: config.json.
    """
    stacks: dict[str, list[str]] = {}
    for name in shapes:
        match = LAYER.match(name)
        parts = name.split(".")
        if match and not any(TOWER.search(part) or PROJECTOR.search(part) or DRAFT.search(part) for part in parts):
            stacks.setdefault(match["prefix"], []).append(name)
    if len(stacks) < 2:
        return next(iter(stacks), None)
    count, width = layer_count(config or {}), text_config(config or {}).get("hidden_size")

    def rank(prefix: str) -> tuple[int, int, int]:
        names = stacks[prefix]
        layers = {layer_index(name, prefix) for name in names}
        fits = count is not None and layers.issuperset(range(min(count, len(layers) + 1)))
        is_wide = isinstance(width, int) and any(width in shapes[name] for name in names)
        parts = set(prefix.split("."))
        return fits + is_wide, bool(parts & _TEXT) - bool(parts & _NO_TEXT), len(names)

    return max(stacks, key=rank)


def layer_index(tensor: str, prefix: str | None) -> int | None:
    """The number of the layer that owns a tensor, in the stack under a prefix, or None outside of it."""
    if prefix is None or not tensor.startswith(prefix + "."):
        return None
    number = tensor[len(prefix) + 1 :].split(".", 1)[0]
    return int(number) if number.isdecimal() else None


def unexpected_layer(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], prefix: str) -> str | None:
    """A tensor of a layer beyond the number in config.json that nothing marks as a draft layer, or None without such a
    tensor."""
    count = layer_count(config)
    if count is None or any("nextn" in key or "mtp" in key for part in (text_config(config), config) for key in part):
        return None
    beyond = [name for name in shapes if (layer_index(name, prefix) or 0) >= count]
    rests = [name[len(prefix) + 1 :].partition(".")[2] for name in beyond]
    return None if any(_DRAFT_PARTS.match(rest) for rest in rests) else next(iter(beyond), None)
