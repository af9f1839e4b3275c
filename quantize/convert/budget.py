"""The share of each memory that hidden states may use: the free memory, or the given budget, less the needs of the
run itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..plan.forecast import fixed_memory
from ..plan.plan import Plan
from ..stream.hidden import HiddenBudget
from ..stream.memory import available_host_bytes
from .options import ConvertOptions

UNKNOWN_HOST_BYTES = 8_000_000_000  # taken to be available where the system does not say
SHARE_OF_FREE_GPU = 0.9
SHARE_OF_AVAILABLE_HOST = 0.5  # the rest is left to the page cache and to others


def hidden_budget(
    plan: Plan, batches: Sequence[Tensor], options: ConvertOptions, folder: Path, lanes: int
) -> HiddenBudget:
    """The memories in which the hidden states of each lane of this process may wait.

    Args:
        batches: int64 [sequences, tokens] each.
        folder: for a file with the hidden states that fit no memory.
        lanes: their number.
    """
    is_gpu = options.device != "cpu"
    largest = max((batch.numel() for batch in batches), default=0)
    fixed = fixed_memory(plan, largest, is_gpu)
    given = options.memory_budget_bytes
    available = available_host_bytes() or UNKNOWN_HOST_BYTES
    host = given if given is not None else int(SHARE_OF_AVAILABLE_HOST * available)
    host //= options.ranks.local_size  # ranks of one host share its memory
    gpu = 0
    if is_gpu:
        free = int(SHARE_OF_FREE_GPU * torch.cuda.mem_get_info(options.device)[0])
        gpu = min(given, free) if given is not None else free
    return HiddenBudget(max(0, gpu - fixed.gpu_bytes) // lanes, max(0, host - fixed.host_bytes) // lanes, folder)
