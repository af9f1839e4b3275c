"""Layers that predict further tokens (MTP), and the names under which vLLM builds them.

A draft model is built with the quantization config of its target, so each of its linears counts as quantized unless the
config's patterns match the name under which vLLM builds it, which is not always the stored one.
Source: vLLM 0.32.0, vllm/model_executor/models/*_mtp.py and vllm/models/*/…/mtp.py (prefixes that they build with, and
their maps of weights); vllm/config/speculative.py (number of draft layers).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .decoder import layer_count, text_config

_NUMBERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
# MiMo's `model.mtp_layers.0.`, Ernie's `model.mtp_block.0.` and LongCat's `model.mtp.layers.0.` are built behind the
# decoder's layers. MiMo V2 and MiniMax M3 keep `model.mtp.layers.0.`.
_BEHIND = re.compile(r"^(?:model\.mtp_(?:layers|block|linear_proj)|model\.mtp\.layers)\.(?P<number>\d+)\.(?P<rest>.+)$")


def drafts_behind(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Numbers of the draft models' layers behind the decoder's own, or an empty range if config.json has none."""
    count = layer_count(config)
    if count is None:
        return ()
    text = text_config(config)
    stated = [part.get(key) for part in (text, config) for key in _NUMBERS]
    number = next((value for value in stated if isinstance(value, int) and 0 < value < 100), 1)
    first = {count, 2 * count} if _is_longcat(config) else {count}
    return tuple(start + at for start in sorted(first) for at in range(number))


def draft_names(layer: str, config: Mapping[str, Any]) -> list[str]:
    """The other names under which vLLM may build a layer of a draft model.

    Args:
        layer: the layer by its name in the checkpoint, fused where vLLM fuses.
    """
    match, behind = _BEHIND.match(layer), drafts_behind(config)
    if match is None or not behind or (layer.startswith("model.mtp.") and not _is_longcat(config)):
        return []
    rest = match["rest"].removeprefix("transformer_layer.")
    return [f"model.layers.{number}.{rest}" for number in behind]


def _is_longcat(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("longcat")
