"""The layer-by-layer walk: one decoder layer in memory, all calibration sequences through it, statistics of every
quantized input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.config_values import config_int
from ..errors import CheckFailed, InputError
from ..recipe.groups import FusedGroup
from ..recipe.roles import text_config
from ..stream.hidden import HiddenBudget, HiddenStates
from .record import LayerCall, record_batches
from .skeleton import Skeleton, load_outer, loaded_layer
from .statistics.ranges import InputRanges
from .taps import LinearTap

Span = Callable[[str], AbstractContextManager[Any]]
Watch = Callable[[int, Tensor, Tensor, LayerCall], None]
"""Called after each batch of a layer, with its number, the hidden state before and after, and the call."""


def _no_span(_phase: str) -> AbstractContextManager[Any]:
    return nullcontext()


class Walk:
    """Calibration batches on their way through the model.

    Args:
        batches: int64 [sequences, tokens] each, as `make_batches` gives them.
        budget: of the hidden states between layers.
        span: called with the phases `record` and `forward`, returns a context for each.
        before_batch: called before each batch of each layer, with its number of tokens. It may raise to end the walk.
        keeps_last: whether to keep the output of the last layer, which calibration does not use.
    Raises:
        InputError: as of `record_batches`.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Tensor],
        budget: HiddenBudget,
        span: Span = _no_span,
        before_batch: Callable[[int], None] = lambda tokens: None,
        keeps_last: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self._span, self._before_batch, self._keeps_last = span, before_batch, keeps_last
        self._tokens = [batch.numel() for batch in batches]
        self._calls: list[list[LayerCall]] = []
        self.hidden = HiddenStates(skeleton.device, budget)
        shared = text_config(skeleton.source.config).get("num_kv_shared_layers")
        self.shares_state = bool(shared)
        try:
            with span("record"):
                self._record(batches)
        except BaseException:
            self.hidden.close()
            raise

    def _record(self, batches: Sequence[Tensor]) -> None:
        if not batches:  # a rank of several that has no sequences
            return
        load_outer(self.skeleton, torch.cat([batch.flatten() for batch in batches]))
        hidden_size = config_int(text_config(self.skeleton.source.config), "hidden_size")
        self.hidden.reserve(sum(self._tokens) * hidden_size * self.skeleton.dtype.itemsize)
        while (at := len(self._calls)) < len(batches):
            try:
                for recorded in record_batches(self.skeleton, batches[at:]):
                    self._before_batch(0)
                    self.hidden.append(recorded.hidden)
                    self._calls.append(recorded.calls)
                return
            except torch.OutOfMemoryError:
                pass  # see `_run_within_memory`
            if not self.hidden.spill():
                raise self._too_large(batches[len(self._calls)].shape)
            torch.cuda.empty_cache()

    @torch.no_grad()
    def step(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        groups: Sequence[FusedGroup] = (),
        wants_mean_square: bool = False,
        watch: Watch | None = None,
    ) -> dict[str, InputRanges]:
        """Send every batch through a layer.

        Args:
            layer: its number. Layers are walked in order.
            tensors: its tensors by their names in the checkpoint, on the device.
            groups: the fused groups of this layer whose inputs are observed. Without any, only hidden states advance.
            watch: see `Watch`.
        Returns:
            the observations by the group's name.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        observers = {group.name: InputRanges(wants_mean_square) for group in groups}
        is_last = layer == len(self.skeleton.layers) - 1 and not self._keeps_last
        if is_last and not groups:  # nobody asks for what it would give
            return observers
        with self._span("forward"), loaded_layer(self.skeleton, layer, tensors) as module:
            for at, calls in enumerate(self._calls):
                self._before_batch(self._tokens[at])
                prefix = f"{self.skeleton.layer_prefix}.{layer}."
                to_come = set(observers)

                def observe(site: str, inputs: Tensor) -> None:
                    observers[site].observe({"source": inputs})

                def end(site: str, to_come: set[str] = to_come) -> None:
                    to_come.discard(site)
                    if is_last and not to_come:
                        raise _SeenAll

                with suppress(_SeenAll), LinearTap.of_groups(groups, prefix).on(module, observe, end):
                    hidden = self._run_within_memory(module, at, calls[layer], observers)
                    if watch is not None:
                        watch(at, self.hidden.fetch(at), hidden, calls[layer])
                for observer in observers.values():
                    observer.commit()
                if not is_last:
                    self.hidden.store(at, hidden)
                self._drop_state(calls[layer])
        return observers

    def _run_within_memory(
        self, module: nn.Module, at: int, call: LayerCall, observers: Mapping[str, InputRanges]
    ) -> Tensor:
        """Run a batch. Where the GPU runs out of memory, hidden states leave it first, then the run ends."""
        try:
            return run_layer(module, self.hidden.fetch(at), call)
        except torch.OutOfMemoryError:
            pass  # outside of the handler, so that the failed call's tensors are not kept by its traceback
        for observer in observers.values():
            observer.discard()
        had_some = self.hidden.spill()
        torch.cuda.empty_cache()
        if had_some:
            try:
                return run_layer(module, self.hidden.fetch(at), call)
            except torch.OutOfMemoryError:
                pass
        raise self._too_large(self.hidden.shapes()[at][0])

    def _too_large(self, shape: Sequence[int]) -> InputError:
        sequences, tokens = shape[:2]
        free = torch.cuda.mem_get_info(self.skeleton.device)[0]
        return InputError(
            f"--batch-size {sequences}: the GPU's memory does not hold one decoder layer and a batch of {sequences} x "
            f"{tokens} tokens ({free:,} bytes are free): use a smaller --batch-size, a smaller --sequence-length, or "
            f"--device cpu."
        )

    def _drop_state(self, call: LayerCall) -> None:
        """Empty the store of shared keys and values that some layers fill although no later layer reads it."""
        if not self.shares_state:
            for value in call.kwargs.values():
                if isinstance(value, MutableMapping):
                    value.clear()


def run_layer(module: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Call a layer as the model would, and return the hidden state."""
    output: Any = module(hidden, *call.args, **call.kwargs)
    result = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(result, Tensor) or result.shape != hidden.shape:
        raise CheckFailed(
            f"{type(module).__name__} returned something that is not a hidden state: use a weight-only recipe."
        )
    return result


def make_batches(samples: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Batches of neighbouring sequences of equal length, int64 [sequences, tokens], without padding and in
    order."""
    batches: list[Tensor] = []
    start = 0
    for end in range(1, len(samples) + 1):
        if end == len(samples) or end - start == batch_size or len(samples[end]) != len(samples[start]):
            batches.append(torch.stack(list(samples[start:end])))
            start = end
    return batches


class _SeenAll(Exception):
    """Signals that the rest of a layer's forward is not needed."""
