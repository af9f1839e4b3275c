"""Find out how a model calls each of its decoder layers, by running its own forward with every layer replaced by a
recorder.

Masks, rotary tables, per-layer inputs and shared key/value stores come out as the model makes them; nothing of any
model's loop is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .skeleton import Skeleton


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer's call, after the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class RecordedBatch:
    """A batch before its walk.

    Attributes:
        hidden: [sequences, tokens, hidden size], what enters the first layer; the walk replaces it layer by layer.
        calls: one for each layer.
    """

    hidden: Tensor
    calls: list[LayerCall]


class TensorPool:
    """One copy of equal tensors: masks and rotary tables are the same for all sequences of a length."""

    def __init__(self) -> None:
        self._known: dict[tuple[torch.Size, torch.dtype, float], list[Tensor]] = {}

    def share(self, calls: Sequence[LayerCall]) -> list[LayerCall]:
        """The calls of a batch with every tensor in them replaced by an equal one of an earlier layer or batch."""
        met: dict[int, Tensor] = {}  # by identity: a model hands the same objects to all layers of a kind
        return [
            LayerCall(self._share(call.args, met), {key: self._share(value, met) for key, value in call.kwargs.items()})
            for call in calls
        ]

    def _share(self, value: Any, met: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in met:
                met[id(value)] = self._equal_one(value)
            return met[id(value)]
        if type(value) in (tuple, list):
            return type(value)(self._share(item, met) for item in value)
        return value

    def _equal_one(self, value: Tensor) -> Tensor:
        # The sum tells apart what each batch has of its own (per-layer inputs), so that few tensors are compared whole.
        numbers = torch.view_as_real(value) if value.is_complex() else value
        known = self._known.setdefault((value.shape, value.dtype, float(numbers.sum(dtype=torch.float64))), [])
        for tensor in known:
            if torch.equal(tensor, value):
                return tensor
        known.append(value)
        return value


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes its arguments and hands the hidden state on untouched."""

    def __init__(self, layer: nn.Module, log: _Log) -> None:
        super().__init__()
        self._real = [layer]  # in a list, so that it is not registered as a child
        self._log = log

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self._log.note(hidden, LayerCall(args, kwargs))
        return (hidden,) if self._log.as_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._real[0], name)  # such as attention_type, which some loops ask of the layer


class _Log:
    def __init__(self, as_tuple: bool) -> None:
        self.as_tuple = as_tuple
        self.hidden: Tensor | None = None
        self.calls: list[LayerCall] = []
        self.is_chain = True
        self.error: Exception | None = None

    def note(self, hidden: Tensor, call: LayerCall) -> None:
        if self.hidden is None:
            self.hidden = hidden
        self.is_chain = self.is_chain and hidden is self.hidden
        self.calls.append(call)


@torch.no_grad()
def record_batches(skeleton: Skeleton, batches: Sequence[Tensor], hidden_device: torch.device) -> list[RecordedBatch]:
    """Record the layer calls of every batch.

    Args:
        batches: int64 [sequences, tokens] each, without padding. `load_outer` has been called with all of their ids.
        hidden_device: where hidden states wait for the walk.
    Raises:
        InputError: the model computes between its layers, so that one layer's output is not the next one's input.
    """
    pool = TensorPool()
    recorded = []
    as_tuple = False
    for batch in batches:
        log = _run(skeleton, batch, as_tuple)
        if not log.is_chain and not as_tuple:  # layers of this model may return tuples
            as_tuple = True
            log = _run(skeleton, batch, as_tuple)
        if not log.is_chain or log.hidden is None or len(log.calls) != len(skeleton.layers):
            name = type(skeleton.decoder).__name__
            raise InputError(
                f"{name} computes between its decoder layers, which the layer-by-layer walk cannot follow: use "
                f"a weight-only recipe."
            ) from log.error
        recorded.append(RecordedBatch(log.hidden.to(hidden_device), pool.share(log.calls)))
    return recorded


def _run(skeleton: Skeleton, batch: Tensor, as_tuple: bool) -> _Log:
    log = _Log(as_tuple)
    layers = list(skeleton.layers)
    try:
        for at, layer in enumerate(layers):
            skeleton.layers[at] = _Recorder(layer, log)
        skeleton.model(input_ids=batch.to(skeleton.device), use_cache=False)
    except (TypeError, IndexError, AttributeError) as error:
        if not log.calls:
            raise
        log.is_chain, log.error = False, error  # the loop takes the layers' output to be something else
    finally:
        for at, layer in enumerate(layers):
            skeleton.layers[at] = layer
    return log
