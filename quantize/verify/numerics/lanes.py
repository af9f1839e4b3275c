"""The lanes of the stage: ways of computing the source and the checkpoint, recorded once for each model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ...calibrate.lanes import Lane
from ...calibrate.skeleton import Skeleton, build_skeleton
from ...calibrate.walk import Walk
from ...checkpoint.source import Checkpoint
from ...errors import InputError
from ...format.schemes import Arithmetic
from ...recipe.decoder import decoder_prefix
from ...stream.hidden import HiddenBudget
from ...stream.memory import available_host_bytes
from ...weights.base import names_by_layer
from .served import ServedModel

LaneName = Literal["source", "floor", "w4a4", "w4a4_again", "w8a8", "weight_only"]
SHARE_OF_MEMORY = 0.5  # of what is free, for the hidden states of all lanes


class Lanes(Mapping[LaneName, Lane]):
    """All lanes in front of the same layer, by name.

    Attributes:
        quantized: the walk of the checkpoint.
        original: the walk of the source. None without a source.

    Args:
        served: the checkpoint.
        source: the model that it was made from. Without it, only the checkpoint's own lanes are opened.
        batches: int64 [sequences, tokens] each.
        arithmetics: the checkpoint's lanes.
        dtype: of the computation.
    Raises:
        InputError, EnvironmentLack: see `build_skeleton` and `Walk`, or the two models have different shapes.
    """

    def __init__(
        self,
        served: ServedModel,
        source: Checkpoint | None,
        batches: Sequence[Tensor],
        arithmetics: Sequence[Arithmetic],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        quantized = build_skeleton(served, served.prefix, device, dtype)
        self.quantized = Walk(quantized, batches, keeps_last=True)
        self.original: Walk | None = None
        if source is not None:
            self.original = Walk(_source_skeleton(source, served, quantized), batches, keeps_last=True)
        plan: list[tuple[LaneName, Walk]] = []
        if self.original is not None:
            plan += [("source", self.original), ("floor", self.original)]
        plan += [(name, self.quantized) for name in arithmetics]
        if self.original is not None and "w4a4" in arithmetics:
            plan.append(("w4a4_again", self.quantized))
        budget = hidden_budget(len(plan), served, source, device)
        with ExitStack() as opened:
            opened.callback(self.close)
            self._lanes: dict[LaneName, Lane] = {name: walk.lane(name, budget) for name, walk in plan}
            opened.pop_all()

    def __getitem__(self, name: LaneName) -> Lane:
        return self._lanes[name]

    def __iter__(self) -> Iterator[LaneName]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def close(self) -> None:
        """Free the memory of the hidden states."""
        for walk in (self.quantized, self.original):
            if walk is not None:
                walk.close()


def _source_skeleton(source: Checkpoint, served: ServedModel, quantized: Skeleton) -> Skeleton:
    skeleton = build_skeleton(source, source_prefix(source), quantized.device, quantized.dtype)
    if len(skeleton.layers) != len(quantized.layers):
        raise InputError(
            f"{source.folder} has {len(skeleton.layers)} decoder layers, {served.subject.folder} has "
            f"{len(quantized.layers)}",
            where=source.folder,
            hint="name the model that the checkpoint was made from",
        )
    return skeleton


def source_prefix(source: Checkpoint) -> str:
    """The prefix of a layer's number in the source's names, or an empty text."""
    return decoder_prefix({name: info.shape for name, info in source.infos().items()}, source.config) or ""


def hidden_budget(lanes: int, served: ServedModel, source: Checkpoint | None, device: torch.device) -> HiddenBudget:
    """The memory that the hidden states of each of so many lanes may use."""
    host = int(SHARE_OF_MEMORY * (available_host_bytes() or 8 << 30))
    gpu = 0
    if device.type == "cuda":
        # Two buffers of each model's layers, one decoded layer, and what the computation itself takes.
        needs = 2 * largest_layer_bytes(served.subject.checkpoint, served.prefix)
        if source is not None:
            needs += 3 * largest_layer_bytes(source, source_prefix(source))
        gpu = max(0, int(SHARE_OF_MEMORY * (torch.cuda.mem_get_info(device)[0] - needs)))
    return HiddenBudget(gpu // lanes, host // lanes, Path(tempfile.gettempdir()))


def largest_layer_bytes(checkpoint: Checkpoint, prefix: str) -> int:
    """The bytes that the largest decoder layer under a prefix takes in the file."""
    layers = names_by_layer(checkpoint, prefix).values()
    return max(sum(checkpoint.info(name).nbytes for name in names) for names in layers)
