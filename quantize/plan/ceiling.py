"""The ceiling of decoding: the most tokens a second that a GPU's memory allows.

To decode one token, a server reads every weight of the decoder and the head once, and the keys and values of the tokens
before it:

    tokens/s <= bandwidth * users / (weights + users * KV cache at that context)

Source: the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009) at one operation or so a byte, where memory
is the roof. For a batch, its weights are read once for all users. With many users arithmetic becomes the roof, which is
not counted here. The ceiling is then far above reachable speeds. Reads once an answer, writes, and a server's own
buffers are not counted either, so that it is a ceiling and no forecast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..recipe.decoder import decoder_prefix, layer_count, layer_index, text_config
from ..recipe.roles import Role, role_of, share_of_experts, unused_tensors
from .forecast import BF16_BYTES, FP8_BYTES, kv_cache_bytes

_OTHER_STACK = re.compile(r"\.(?:layers|h|blocks)\.\d+\.")


class Stored(Protocol):
    """A tensor of a file, or one that a plan would write."""

    @property
    def name(self) -> str:
        """Its name in the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def nbytes(self) -> int:
        """Bytes of data."""


@dataclass(frozen=True)
class Ceiling:
    """The bytes that one decoded token reads.

    Attributes:
        config: config.json.
        weight_bytes: decoder, head and their scales.
        kv_bytes_per_value: 2 for 16 bits, 1 for FP8.
    """

    config: Mapping[str, Any]
    weight_bytes: int
    kv_bytes_per_value: int = BF16_BYTES

    def kv_bytes(self, context: int) -> int:
        """Keys and values of one user in the cache after `context` tokens. Sliding layers hold their window."""
        return kv_cache_bytes(self.config, context, self.kv_bytes_per_value)

    def bytes_per_step(self, context: int, users: int = 1) -> int:
        """Bytes read to decode one token for each of `users`, each after `context` tokens."""
        return self.weight_bytes + users * self.kv_bytes(context)

    def tokens_per_second(self, bandwidth: float, context: int, users: int = 1) -> float:
        """Tokens of all users together.

        Args:
            bandwidth: bytes a second, of all GPUs that share the weights.
            context: tokens before the decoded one, or for an answer, the mean over it.
        """
        return bandwidth * users / self.bytes_per_step(context, users)


def held_bytes(config: Mapping[str, Any], tensors: Iterable[Stored]) -> int:
    """Bytes of the weights that a server keeps in memory: all tensors but those that no layer reads.

    Vision and audio count. vLLM loads them unless it starts with --language-model-only.
    """
    found = {tensor.name: tensor.nbytes for tensor in tensors}
    unused = unused_tensors(config, found)
    return sum(size for name, size in found.items() if name not in unused)


def tower_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of the weights of vision and audio with their projectors, which no text needs."""
    towers = (Role.TOWER, Role.PROJECTOR)
    return sum(tensor.nbytes for tensor in tensors if _role(tensor.name, tensor.shape) in towers)


def read_bytes(config: Mapping[str, Any], tensors: Iterable[Stored]) -> int:
    """Bytes of the weights that decoding a token reads: all of the decoder, its scales, and the head.

    The embedding counts where it is the head too (a lookup reads one row of it), vision and audio never. Of experts,
    those that one token uses count, and none where the config does not contain their number. Several users may use
    different ones, but a ceiling must not rely on it. A second stack of layers, such as one that drafts tokens, does
    not count.
    """
    found = {tensor.name: tensor for tensor in tensors}
    prefix = decoder_prefix({name: tensor.shape for name, tensor in found.items()}, config)
    unused = unused_tensors(config, found)
    roles = {name: _role(name, tensor.shape) for name, tensor in found.items() if name not in unused}
    has_head = Role.HEAD in roles.values()
    share = share_of_experts(text_config(config))
    total = 0.0
    for name, role in roles.items():
        if _is_read(name, role, prefix, layer_count(config), has_head):
            total += found[name].nbytes * (share if role is Role.EXPERT else 1)
    return round(total)


def kv_bytes_per_value(config: Mapping[str, Any], kv_cache_dtype: str) -> int:
    """Bytes of one cached value under vLLM's `--kv-cache-dtype`. `auto` is FP8 where the checkpoint requires it."""
    if kv_cache_dtype.startswith("fp8"):
        return FP8_BYTES
    quantization = config.get("quantization_config")
    if kv_cache_dtype == "auto" and isinstance(quantization, Mapping) and quantization.get("kv_cache_scheme"):
        return FP8_BYTES
    return BF16_BYTES


def _role(name: str, shape: tuple[int, ...]) -> Role:
    """The role of a tensor of a quantized checkpoint too, where `role_of` expects a weight's name."""
    module, _, leaf = name.rpartition(".")
    is_part = leaf.startswith(("weight", "input_", "bias"))
    return role_of(f"{module}.weight" if module and is_part else name, shape)


def _is_read(name: str, role: Role, prefix: str | None, count: int | None, has_head: bool) -> bool:
    layer = layer_index(name, prefix)
    if layer is not None:
        return count is None or layer < count  # what lies behind drafts tokens
    if role in (Role.TOWER, Role.PROJECTOR, Role.DRAFT) or _OTHER_STACK.search(name):
        return False
    if role is Role.EMBEDDING:  # another table than the tokens' own is only looked up
        return not has_head and "per_layer" not in name
    return not (role is Role.PER_LAYER_INPUT and "embed" in name)
