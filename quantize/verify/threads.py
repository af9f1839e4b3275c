"""Work on many tensors at once, each on one core, because they are too small for torch's own threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int, str], None]


def tell_nobody(done: int, total: int, phase: str) -> None:
    """Progress for nobody."""


def map_in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], progress: Progress, phase: str
) -> list[Result]:
    """Results of `work` for each item, in their order.

    As many threads as torch would use, while torch itself uses one: two layers of threads on the same cores wait for
    each other.

    Args:
        progress: called with (items done, items in all, phase).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        with ThreadPoolExecutor(threads, "verify") as pool:
            for result in pool.map(work, items):
                results.append(result)
                progress(len(results), len(items), phase)
    finally:
        torch.set_num_threads(threads)
    return results
