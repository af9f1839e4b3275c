"""The sizes in a config.json, compared with the tensors before nvquant builds a model: a config of a few bytes must not
make a model of a billion layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import InputError
from .config_values import MOST, TEXT_PARTS
from .headers import TensorInfo
from .json_text import quoted

SPARE_LAYERS = 64  # drafting layers and the like, which a checkpoint may leave out
LEAST_LAYERS = 1024  # of a tower or an encoder whose tensors may lie elsewhere
LEAST_SIZE = 1 << 20  # below it nothing that is built takes long, whatever the tensors are
_COUNTS_LAYERS = re.compile(r"(^|_)(layers?|blocks|depths?)$|^num_(hidden|layer|block)\w*$|^num_kv_shared_layers$")
_COUNTS_PARTS = re.compile(r"(^|_)(experts|heads?|groups)$|^n(um)?_\w*(experts|heads)$|^num_labels$")
_IS_SIZE = re.compile(
    r"(^|_)(hidden|intermediate|vocab|embed|embedding|ffn|ff|head|state|kernel|conv|projection|patch|codebook|inner|"
    r"per_layer_input|expert)_(size|dim|dims)$|(^|_)(dim|rank|channels|embd|inner|width)$|^d_\w+$|^hidden_sizes$|"
    r"^vocab_size\w*$|^num_(embeddings|channels|mel_bins)$"
)
_IS_POSITIONS = re.compile(r"^(max_position_embeddings|n_positions|n_ctx|max_\w*positions|max_seq_len)$")
_POSITION_TABLE = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)\.weight$")
_OUTSIDE_OF_TEXT = re.compile(r"(^|\.)[^.]*(vision|visual|vit|image|audio|speech|video)[^.]*\.")
_TEXT = ("", *TEXT_PARTS)
_NUMBERED = re.compile(r"\.(\d{1,6})\.")
_NOT_BUILT = frozenset({"quantization_config", "id2label", "label2id", "task_specific_params"})


def check_sizes(config: Mapping[str, Any], infos: Iterable[TensorInfo]) -> None:
    """Compare every size and count of a config, also of its parts, with the sizes of the tensors.

    Args:
        config: config.json.
        infos: all tensors of the checkpoint.
    Raises:
        InputError: one is far beyond all tensors. The message names its key.
    """
    tensors = [info for info in infos if info.nbytes]
    longest = max((axis for info in tensors for axis in info.shape), default=0)
    layers = 1 + max((int(number) for info in tensors for number in _NUMBERED.findall(info.name)), default=0)
    layers = min(layers, len(tensors))
    positions = [
        info.shape[0]
        for info in tensors
        if info.shape and _POSITION_TABLE.search(info.name) and not _OUTSIDE_OF_TEXT.search(info.name)
    ]
    for part, key, value in _numbers(config):
        if key == "num_hidden_layers" and part in _TEXT:
            _refuse_beyond(layers + SPARE_LAYERS, part, key, value, f"the weights have {layers} layers")
        elif _COUNTS_LAYERS.search(key):
            _refuse_beyond(max(layers, LEAST_LAYERS), part, key, value, f"the weights have {layers} layers")
        elif _IS_SIZE.search(key) or _COUNTS_PARTS.search(key):
            words = f"no tensor has an axis of more than {longest:,}"
            _refuse_beyond(max(longest, LEAST_SIZE), part, key, value, words)
        elif _IS_POSITIONS.search(key) and part in _TEXT:
            words = f"the position tables have {max(positions, default=0):,} rows"
            _refuse_beyond(max(positions) + SPARE_LAYERS if positions else MOST, part, key, value, words)


def _refuse_beyond(most: int, part: str, key: str, value: int, words: str) -> None:
    if value > most:
        where = f"{part}.{key}" if part else key
        raise InputError(
            f"{where} is {quoted(value)}, but {words}",
            where="config.json",
            hint="use the config and weights of one model",
        )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Each whole number of a config, or of a list in it, that describes something to build, with its part and key."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        part, values = waiting.pop()
        for key, value in values.items():
            if key in _NOT_BUILT:
                continue
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, Mapping):
                    waiting.append((key, entry))
                elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
                    yield part, key, int(entry)
