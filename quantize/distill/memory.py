"""The memory of a distillation, estimated before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from ..checkpoint.config_values import config_int
from ..checkpoint.source import Checkpoint
from ..errors import EnvironmentLack
from ..format.constants import BLOCK
from ..recipe.decoder import layer_index
from ..recipe.roles import text_config
from ..stream.memory import available_host_bytes
from ..verify.numerics.lanes import source_prefix
from ..weights.base import names_by_layer
from .divergence import LOGITS
from .options import BATCH_SEQUENCES, DistillOptions

_LOGITS_COPIES = 6  # of a part: the logits of both models, their logarithms and differences, a gradient
_TRAINED_BYTES = 4 * 5 / BLOCK + 1 / BLOCK + 0.5  # of an element: θ, its gradient, two moments, a copy, scale and code
_LAYER_COPIES = 3  # of a layer's decoded weights, and of the values that its matrices read and give
_SHARE_OF_FREE = 0.9


Sizes = Mapping[str, tuple[int, int, bool]]
"""Rows and columns of each quantized matrix, by its name in the source, and whether it has block scales."""


def check_memory(matrices: Sizes, source: Checkpoint, options: DistillOptions, dtype: torch.dtype) -> int:
    """Refuse a distillation that does not fit the memory of its device. Returns the bytes that it needs.

    Raises:
        EnvironmentLack: it does not fit.
    """
    needed = needed_bytes(matrices, source, options, dtype)
    free, where = _free_bytes(options.device), "GPU" if options.device != "cpu" else "host"
    given = options.memory_budget_bytes
    most = free if given is None else min(free, given)
    if needed > most:
        raise EnvironmentLack(
            f"distillation computes both models at once, which needs about {needed / 1e9:.2f} GB of {where} memory, "
            f"but {most / 1e9:.2f} GB may be used",
            where=source.where,
            hint="use a larger GPU, raise --memory-budget, or keep the checkpoint without distillation",
        )
    return needed


def needed_bytes(matrices: Sizes, source: Checkpoint, options: DistillOptions, dtype: torch.dtype) -> int:
    """The memory that both models, the training and one batch take together, roughly."""
    trained, layers = 0, dict[int, list[int]]()
    prefix = source_prefix(source)
    for module, (rows, cols, has_block_scales) in matrices.items():
        layer = layer_index(f"{module}.", prefix)
        if layer is not None:
            sizes = layers.setdefault(layer, [0, 0])
            sizes[0], sizes[1] = sizes[0] + rows * cols, sizes[1] + rows + cols
            trained += rows * cols if has_block_scales else 0
    largest, widest = (max((sizes[at] for sizes in layers.values()), default=0) for at in (0, 1))
    inside = [name for names in names_by_layer(source, prefix).values() for name in names]
    elements = sum(prod(source.info(name).shape) for name in inside)
    config, item = text_config(source.config), dtype.itemsize
    hidden, vocabulary = config_int(config, "hidden_size"), config_int(config, "vocab_size")
    tokens = min(BATCH_SEQUENCES, options.samples) * options.sequence_length
    logits = max(vocabulary, min(LOGITS[options.device.partition(":")[0]], tokens * vocabulary))
    return int(
        item * (2 * elements - trained)
        + _TRAINED_BYTES * trained
        + (2 * item + 8) * hidden * vocabulary  # both heads as stored, and in float32
        + _LAYER_COPIES * (item * largest + 4 * tokens * widest)
        + item * tokens * hidden * (len(layers) + 8)
        + 4 * _LOGITS_COPIES * logits
    )


def _free_bytes(device: str) -> int:
    free = available_host_bytes() or 8 << 30 if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    return int(_SHARE_OF_FREE * free)
