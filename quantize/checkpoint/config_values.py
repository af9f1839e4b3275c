"""Numbers of a config.json, which anybody may have written. An error names the key of a value that has another type or
is beyond all reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .json_text import quoted

MOST = 10**12  # of any size: a model of that many elements in one axis cannot be stored
MOST_LAYERS = 10_000
TEXT_PARTS = ("text_config", "llm_config", "language_config")  # where a config describes its text decoder
_BOUNDS = {"num_hidden_layers": MOST_LAYERS, "num_kv_shared_layers": MOST_LAYERS}


def config_int(config: Mapping[str, Any], key: str, default: int = 0, *, minimum: int = 0) -> int:
    """A whole number of a config, or the default where it is absent, null or 0, as transformers' configs use 0.

    Args:
        config: config.json, or a part of it.
        minimum: the least that a given number may be.
    Raises:
        InputError: it is not a whole number, or outside the range from `minimum` to the sizes of the largest models.
    """
    return _checked(config.get(key), key, minimum) or default


def config_largest(config: Mapping[str, Any], key: str, default: int = 0) -> int:
    """`config_int` of a key that may have a list with a number for each layer: the largest of them."""
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    return max((_checked(entry, key, 0) for entry in values), default=0) or default


def config_kinds(config: Mapping[str, Any], key: str = "layer_types") -> list[str]:
    """A config's list of words, one for each layer, empty where there is none.

    Raises:
        InputError: it is not a list of words.
    """
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(kind, str) for kind in value):
        raise InputError(f"{key} is {quoted(value)}, not a list of words", where="config.json", hint=_WAY_OUT)
    return value


def config_part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A map inside a config, empty where the config has none or another type."""
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


_WAY_OUT = "repair the file, or download it again"


def _checked(value: object, key: str, minimum: int) -> int:
    if value is None:
        return 0
    most = _BOUNDS.get(key, MOST)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= most:
        raise InputError(
            f"{key} is {quoted(value)}, not a whole number from {minimum} to {most:,}",
            where="config.json",
            hint=_WAY_OUT,
        )
    return value
