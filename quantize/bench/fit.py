"""The forecast of whether a checkpoint and a context fit into a GPU's memory, and of the longest context that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.config_values import config_int
from ..plan.forecast import BF16_BYTES, FP8_BYTES, SERVING_OVERHEAD_BYTES, VLLM_SHARE, kv_cache_bytes
from ..recipe.roles import text_config
from .subject import Subject

DEFAULT_CONTEXT = 8192
LEAST_CONTEXT = 256
KV_CACHES = {"16 bits": BF16_BYTES, "fp8": FP8_BYTES}
_RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Fit:
    """Memory of serving one sequence, on each of `ranks` GPUs.

    Attributes:
        weights_bytes, kv_bytes, other_bytes: of weights, KV cache for `context` tokens, and all else.
        memory_bytes: of the GPU, or the free memory of a CPU.
        longest: the longest context that fits with a 16-bit and with an FP8 KV cache, or 0.
    """

    context: int
    ranks: int
    weights_bytes: int
    kv_bytes: int
    other_bytes: int
    memory_bytes: int
    longest: dict[str, int]

    @property
    def needed_bytes(self) -> int:
        """All together."""
        return self.weights_bytes + self.kv_bytes + self.other_bytes

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.needed_bytes <= self.memory_bytes

    @property
    def fits_by_default(self) -> bool:
        """Whether it suffices for the share that vLLM takes by default."""
        return self.needed_bytes <= VLLM_SHARE * self.memory_bytes

    def as_json(self) -> dict[str, Any]:
        """For a JSON document."""
        return {**asdict(self), "needed_bytes": self.needed_bytes, "fits": self.fits}


def fit(
    subject: Subject, context: int, memory_bytes: int, kv_value_bytes: int, ranks: int = 1, is_cpu: bool = False
) -> Fit:
    """Forecast the memory. Weights and KV heads are split over the ranks, the rest is on each.

    Args:
        kv_value_bytes: bytes of a cached value.
        is_cpu: whether weights are in memory decoded.
    """
    weights = -(-(subject.decoded_bytes if is_cpu else subject.weights_bytes) // ranks)
    room = memory_bytes - weights - SERVING_OVERHEAD_BYTES
    longest = {name: longest_context(subject, room * ranks, size) for name, size in KV_CACHES.items()}
    kv = -(-kv_cache_bytes(subject.config, context, kv_value_bytes) // ranks)
    return Fit(context, ranks, weights, kv, SERVING_OVERHEAD_BYTES, memory_bytes, longest)


def longest_context(subject: Subject, room_bytes: int, kv_value_bytes: int) -> int:
    """The longest context, up to the model's own limit, whose KV cache fits, or 0 where not even 256 tokens fit."""
    most = subject.longest_context or DEFAULT_CONTEXT
    if kv_cache_bytes(subject.config, most, kv_value_bytes) <= room_bytes:
        return most
    low, high = 0, most  # what has room, and what has not
    while high - low > 1:
        middle = (low + high) // 2
        has_room = kv_cache_bytes(subject.config, middle, kv_value_bytes) <= room_bytes
        low, high = (middle, high) if has_room else (low, middle)
    return low if low >= LEAST_CONTEXT else 0


def ranks_that_fit(subject: Subject, context: int, memory_bytes: int, kv_value_bytes: int) -> int | None:
    """The least number of such GPUs that serve it together, with vLLM's defaults. None where not even eight do."""
    heads = config_int(text_config(subject.config), "num_attention_heads", 1)
    possible = (fit(subject, context, memory_bytes, kv_value_bytes, n) for n in _RANKS if heads % n == 0)
    return next((found.ranks for found in possible if found.fits_by_default), None)
