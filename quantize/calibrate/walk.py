"""The layer-by-layer walk: one decoder layer in memory, all calibration sequences through it, statistics of every
quantized input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckFailed
from ..recipe.groups import FusedGroup
from ..recipe.roles import text_config
from .record import LayerCall, RecordedBatch, record_batches
from .skeleton import Skeleton, load_outer, loaded_layer
from .statistics import InputObserver, InputStatistics


class Walk:
    """Calibration sequences on their way through the model.

    Args:
        samples: int64 [tokens] each, without padding, of any lengths.
        batch_size: sequences computed at once; only sequences of equal length share a batch.
        hidden_device: where hidden states wait between layers.
    """

    def __init__(
        self, skeleton: Skeleton, samples: Sequence[Tensor], batch_size: int, hidden_device: torch.device
    ) -> None:
        self.skeleton = skeleton
        self._hidden_device = hidden_device
        batches = make_batches(samples, batch_size)
        load_outer(skeleton, torch.cat([batch.flatten() for batch in batches]))
        self._batches: list[RecordedBatch] = record_batches(skeleton, batches, hidden_device)
        shared = text_config(skeleton.source.config).get("num_kv_shared_layers")
        self._layers_share_state = bool(shared)

    @torch.no_grad()
    def step(
        self, layer: int, tensors: Mapping[str, Tensor], groups: Sequence[FusedGroup], wants_mean_square: bool
    ) -> dict[str, InputStatistics]:
        """Send every sequence through a layer.

        Args:
            layer: its number; layers are walked in order.
            tensors: its tensors by their names in the checkpoint, on the device.
            groups: the fused groups of this layer whose inputs are wanted.
        Returns:
            statistics by the group's name.
        """
        observers = {group.name: InputObserver(group.name, wants_mean_square) for group in groups}
        is_last = layer == len(self.skeleton.layers) - 1
        with loaded_layer(self.skeleton, layer, tensors) as module:
            for batch in self._batches:
                with _observed(module, f"{self.skeleton.layer_prefix}.{layer}.", groups, observers):
                    hidden = run_layer(
                        module, batch.hidden.to(self.skeleton.device, non_blocking=True), batch.calls[layer]
                    )
                batch.hidden = batch.hidden if is_last else hidden.to(self._hidden_device)
                self._drop_state(batch.calls[layer])
        return {name: observer.result() for name, observer in observers.items()}

    def _drop_state(self, call: LayerCall) -> None:
        """Empty the store of shared keys and values that some layers fill although no later layer reads it."""
        if not self._layers_share_state:
            for value in call.kwargs.values():
                if isinstance(value, MutableMapping):
                    value.clear()


def run_layer(module: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Call a layer as the model would have; returns the hidden state."""
    output: Any = module(hidden, *call.args, **call.kwargs)
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor) or result.shape != hidden.shape:
        raise CheckFailed(f"{type(module).__name__} returned something that is not a hidden state.")
    return result


def make_batches(samples: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Batches of neighbouring sequences of equal length, int64 [sequences, tokens]; nothing is padded and the
    order is kept."""
    batches: list[Tensor] = []
    start = 0
    for end in range(1, len(samples) + 1):
        if end == len(samples) or end - start == batch_size or len(samples[end]) != len(samples[start]):
            batches.append(torch.stack(list(samples[start:end])))
            start = end
    return batches


@contextmanager
def _observed(
    module: nn.Module, prefix: str, groups: Sequence[FusedGroup], observers: Mapping[str, InputObserver]
) -> Iterator[None]:
    """Let observers see the inputs of a layer's quantized matrices; an input that members of a group share is
    seen once."""
    seen: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    handles = []

    def hook_for(group: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not any(tensor is args[0] for tensor in seen[group]):
                seen[group].append(args[0])
                observers[group].observe(args[0])

        return hook

    for group in groups:
        for member in group.members:
            linear = module.get_submodule(member.removeprefix(prefix))
            handles.append(linear.register_forward_pre_hook(hook_for(group.name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
