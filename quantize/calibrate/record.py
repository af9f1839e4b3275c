"""Record how a model calls each of its decoder layers, by running its own forward with every layer replaced by a
recorder.

Masks, rotary tables, per-layer inputs and shared key/value stores are those that the model makes. This module contains
no part of any model's loop.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, NvquantError
from ..recipe.roles import text_config
from .skeleton import Skeleton, computing_on

MOST_OUTPUTS = 3  # of a decoder layer: the hidden state, attention weights, a state or a router's logits


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer's call, after the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class RecordedBatch:
    """A batch before its walk.

    Attributes:
        hidden: the input of the first layer, [sequences, tokens, hidden size] on the model's device.
        calls: one for each layer.
    """

    hidden: Tensor
    calls: list[LayerCall]


class Table(dict[Any, Any]):
    """A mapping that is not empty when a layer gets it, such as rotary tables by kind. A store of shared keys and
    values is empty then.

    Attributes:
        kept: its keys at that time.
    """

    def __init__(self, content: Mapping[Any, Any]) -> None:
        super().__init__(content)
        self.kept = frozenset(content)

    def __copy__(self) -> Table:
        return Table(self)

    def reset(self) -> None:
        """Drop the entries that layers have added."""
        for key in self.keys() - self.kept:
            del self[key]


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
        if type(value) is dict and value:
            return Table({key: self._share(item, met) for key, item in value.items()})
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


@dataclass(frozen=True)
class Handed:
    """A placeholder for a further output of a layer: usually attention weights that nothing uses, in some models a
    state that a later layer takes. A walk puts the output itself in its place.

    Attributes:
        layer: the number of the layer that returns it.
        at: its place among the layer's outputs after the hidden state.
    """

    layer: int
    at: int


class _Recorder(nn.Module):
    """A replacement of a decoder layer that notes its arguments and passes the hidden state on unchanged."""

    def __init__(self, layer: nn.Module, log: _Log) -> None:
        super().__init__()
        self._real = [layer]  # in a list, so that it is not registered as a child
        self._log = log

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        hidden = self._log.note(hidden, LayerCall(args, kwargs))
        form = self._log.form
        number = len(self._log.calls) - 1
        return (hidden, *(Handed(number, at) for at in range(form - 1))) if form else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._real[0], name)  # such as attention_type, which some loops ask of the layer


class _Log:
    """The observations of the recorders.

    Attributes:
        form: the number of values in a layer's output, 0 for the hidden state itself.
        given: replaces the input of the first layer.
        output: of the model.
    """

    def __init__(self, form: int, given: Tensor | None) -> None:
        self.form, self.given = form, given
        self.hidden: Tensor | None = None
        self.output: Any = None
        self.calls: list[LayerCall] = []
        self.is_chain = True
        self.error: Exception | None = None

    def note(self, hidden: Tensor, call: LayerCall) -> Tensor:
        """Note a layer's call, and return the output that the layer passes on."""
        if self.hidden is None:
            self.hidden = hidden = hidden if self.given is None else self.given
        self.is_chain = self.is_chain and _are_same(hidden, self.hidden)
        self.calls.append(call)
        return hidden


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or complete views of one.

    transformers 5.24 slices the hidden state of Gemma 4 by the tokens to keep, which are all tokens here.
    """
    if one is other:
        return True
    return (
        isinstance(one, Tensor)
        and (one.data_ptr(), one.dtype) == (other.data_ptr(), other.dtype)
        and (one.shape, one.stride()) == (other.shape, other.stride())
    )


def handed_in(value: Any) -> Iterator[Handed]:
    """The placeholders in an argument."""
    if isinstance(value, LayerCall):
        yield from handed_in([*value.args, *value.kwargs.values()])
    elif isinstance(value, tuple | list):
        for part in value:
            yield from handed_in(part)
    elif isinstance(value, Handed):
        yield value


def with_handed(call: LayerCall, outputs: Mapping[int, Sequence[Any]]) -> LayerCall:
    """A call with the outputs of earlier layers in the place of placeholders.

    Args:
        outputs: what each layer returned after the hidden state, by its number.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, Handed):
            return outputs[value.layer][value.at]
        return type(value)(map(fill, value)) if type(value) in (tuple, list) else value

    return LayerCall(fill(call.args), {key: fill(value) for key, value in call.kwargs.items()})


def record_batches(skeleton: Skeleton, batches: Sequence[Tensor]) -> Iterator[RecordedBatch]:
    """Record the layer calls of every batch.

    The complete model records two batches of a shape. Where both had equal calls and began with the embedding alone,
    the other batches of that shape only pass the embedding.

    Args:
        batches: int64 [sequences, tokens] each, without padding. `load_outer` has been called with all of their ids.
    Raises:
        InputError: the model computes between its layers, so that one layer's output is not the next one's input.
    """
    pool = TensorPool()
    shapes: dict[torch.Size, _Shape] = {}
    unusual = torch.tensor(sorted(_placeholder_ids(skeleton)), dtype=torch.int64)
    has_unusual = bool(torch.isin(torch.cat([batch.flatten() for batch in batches]), unusual).any())
    form = 0
    for batch in batches:
        shape = shapes.setdefault(batch.shape, _Shape())
        is_usual = not (has_unusual and bool(torch.isin(batch, unusual).any()))
        if is_usual and shape.is_settled:
            yield RecordedBatch(_embed(skeleton, batch), shape.fresh_calls())
            continue
        log = _run_chain(skeleton, batch, form)
        form = log.form
        assert log.hidden is not None
        recorded = RecordedBatch(log.hidden, pool.share(log.calls))
        if is_usual:
            shape.learn(skeleton, batch, recorded)
        yield recorded


class _Shape:
    """The common properties of the batches of a shape.

    Attributes:
        is_settled: their calls are known to be equal, and the input of the first layer is the embedding alone.
    """

    def __init__(self) -> None:
        self.is_settled = False
        self._first: tuple[Tensor, list[LayerCall]] | None = None
        self._is_hopeless = False

    def learn(self, skeleton: Skeleton, batch: Tensor, recorded: RecordedBatch) -> None:
        """Compare a batch with the first one of its shape."""
        if self._is_hopeless:
            return
        if self._first is None:
            self._first = batch, own_stores(recorded.calls)
            return
        if torch.equal(self._first[0], batch):  # proves nothing
            return
        self.is_settled = are_alike(self._first[1], recorded.calls) and torch.equal(
            _embed(skeleton, batch), recorded.hidden
        )
        self._is_hopeless = not self.is_settled

    def fresh_calls(self) -> list[LayerCall]:
        """The calls of another batch."""
        assert self._first is not None
        return own_stores(self._first[1])


def are_alike(calls: Sequence[LayerCall], others: Sequence[LayerCall]) -> bool:
    """Whether two batches' calls, from one pool, are the same: the same tensors, empty stores of the same type, equal
    constants. Any other value counts as different."""

    def alike(one: Any, other: Any) -> bool:
        if type(one) is not type(other):
            return False
        if isinstance(one, Tensor):
            return one is other
        if type(one) in (tuple, list):
            return len(one) == len(other) and all(map(alike, one, other))
        if isinstance(one, Table):
            return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
        if isinstance(one, MutableMapping):
            return not one and not other
        return isinstance(one, _CONSTANTS) and bool(one == other)

    return len(calls) == len(others) and all(
        alike(one.args, other.args)
        and list(one.kwargs) == list(other.kwargs)
        and all(alike(one.kwargs[key], other.kwargs[key]) for key in one.kwargs)
        for one, other in zip(calls, others, strict=True)
    )


def own_stores(calls: Sequence[LayerCall]) -> list[LayerCall]:
    """The same calls with copies of their stores of shared keys and values, still shared between these calls. Running a
    layer with them changes no other store."""
    made: dict[int, Any] = {}

    def renew(value: Any) -> Any:
        if isinstance(value, MutableMapping):
            if id(value) not in made:
                made[id(value)] = copy.copy(value)
            return made[id(value)]
        return type(value)(map(renew, value)) if type(value) in (tuple, list) else value

    return [LayerCall(renew(call.args), {key: renew(value) for key, value in call.kwargs.items()}) for call in calls]


_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device, Handed)


def finish_batch(skeleton: Skeleton, batch: Tensor, hidden: Tensor) -> Tensor:
    """The result of the model's own forward after the last decoder layer: usually the final norm.

    Args:
        batch: int64 [sequences, tokens]. `load_outer` has been called with its ids.
        hidden: [sequences, tokens, hidden size], on the model's device.
    Returns:
        [sequences, tokens, hidden size], the input of the head.
    Raises:
        InputError: the model computes between its layers.
    """
    finished: Tensor = output_after_layers(skeleton, batch, hidden).last_hidden_state
    return finished


def output_after_layers(skeleton: Skeleton, batch: Tensor, hidden: Tensor) -> Any:
    """The output of `skeleton.model` if its last decoder layer gives `hidden`. See `finish_batch`."""
    return _run_chain(skeleton, batch, given=hidden).output


def _placeholder_ids(skeleton: Skeleton) -> set[int]:
    """Ids that a model may treat specially, such as the place of an image."""
    ids = set()
    for config in (skeleton.source.config, text_config(skeleton.source.config)):
        for key, value in config.items():
            is_id = key.endswith(("_token_id", "_token_index")) and not key.startswith(("bos_", "eos_", "pad_"))
            if is_id and isinstance(value, int):
                ids.add(value)
    return ids


@torch.no_grad()
def _embed(skeleton: Skeleton, batch: Tensor) -> Tensor:
    decoder: Any = skeleton.decoder
    hidden: Tensor = decoder.get_input_embeddings()(batch.to(skeleton.device))
    return hidden


def _run_chain(skeleton: Skeleton, batch: Tensor, form: int = 0, given: Tensor | None = None) -> _Log:
    """Run the model with recorders for layers, with outputs in the form that its loop expects."""
    log = _run(skeleton, batch, form, given)
    for other in range(form + 1, MOST_OUTPUTS + 1):
        if log.is_chain:
            break
        log = _run(skeleton, batch, other, given)
    name = type(skeleton.decoder).__name__
    if not log.is_chain or log.hidden is None or len(log.calls) != len(skeleton.layers):
        raise InputError(
            f"{name} computes between its decoder layers, which the layer-by-layer walk does not support",
            where=name,
            hint="use a weight-only recipe",
        ) from log.error
    return log


@torch.no_grad()
def _run(skeleton: Skeleton, batch: Tensor, form: int, given: Tensor | None) -> _Log:
    log = _Log(form, given)
    layers = list(skeleton.layers)
    try:
        for at, layer in enumerate(layers):
            skeleton.layers[at] = _Recorder(layer, log)
        with computing_on(skeleton.device):
            log.output = skeleton.model(input_ids=batch.to(skeleton.device), use_cache=False)
    except (NvquantError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each model's loop raises what it likes
        if not log.calls:
            reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(" .:")
            raise InputError(
                f"{type(skeleton.model).__name__} does not run without the weights that surround its decoder "
                f"({type(error).__name__}: {reason}), as the layer-by-layer walk needs",
                hint="use a weight-only recipe",
            ) from error
        log.is_chain, log.error = False, error  # the loop takes the layers' output to be something else
    finally:
        for at, layer in enumerate(layers):
            skeleton.layers[at] = layer
    return log
