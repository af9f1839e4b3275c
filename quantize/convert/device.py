"""Preparation of a GPU: its context, libraries and nvquant's kernels are loaded once, before the first byte is read.

Without it, the first layer takes half a second longer or more. The preparation runs while Python packages are imported.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from ..calibrate.statistics.moments import Moments
from ..calibrate.statistics.ranges import InputRanges, InputStatistics
from ..format.schemes import Scheme
from ..quantizers import quantizer_for
from ..quantizers.base import GroupInputs, Quantizer
from ..recipe.matrices import Matrix
from ..stream.memory import let_gpu_memory_grow

TOKENS, COLS = 256, 1024  # divisible by 16, as Triton compiles for such sizes apart; large enough for the usual kernels


class DeviceStart(AbstractContextManager[None]):
    """Prepares a GPU in a thread while the block runs, and waits for it at the end. A CPU requires no preparation."""

    def __init__(self, device: str, quantizer: Quantizer, schemes: Collection[Scheme], is_calibrated: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "start")
        self._start: Future[None] | None = None
        if device != "cpu":
            let_gpu_memory_grow()
            self._start = self._pool.submit(start_gpu, torch.device(device), quantizer, schemes, is_calibrated)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if self._start is not None and kind is None:
            self._start.result()


@torch.no_grad()
def start_gpu(device: torch.device, quantizer: Quantizer, schemes: Collection[Scheme], is_calibrated: bool) -> None:
    """Run the operations of a conversion once, on little data.

    Args:
        schemes: of the matrices to be quantized.
    """
    weight = torch.ones((TOKENS, COLS), dtype=torch.bfloat16, device=device)
    for scheme in schemes:
        matrix = Matrix("start", "start", scheme, TOKENS, COLS, "start", "start", "start")
        own = quantizer_for(scheme.name, quantizer)
        inputs = InputStatistics(1.0, 1.0, torch.ones(COLS, dtype=torch.float64), TOKENS)
        moments = Moments(torch.eye(COLS, device=device), None, False) if "moments" in own.needs else None
        own.quantize([matrix], [weight], GroupInputs(inputs, moments))
    if is_calibrated:
        ranges = InputRanges("mean_square" in quantizer.needs)
        ranges.observe({"source": weight.unsqueeze(0) @ weight.t() @ weight})
        ranges.commit()
        ranges.result("start")
        heads = weight.view(1, TOKENS, -1, 64).transpose(1, 2)
        for is_causal in (True, False):
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=is_causal)
    torch.cuda.synchronize(device)
