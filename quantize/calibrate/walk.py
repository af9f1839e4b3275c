"""The layer-by-layer walk: one decoder layer in memory, all batches through it, in one lane or several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.config_values import config_int
from ..errors import CheckFailed, InputError, NvquantError
from ..recipe.roles import text_config
from ..stream.hidden import HiddenBudget, HiddenStates
from .lanes import Lane, LayerPass, Observing
from .record import LayerCall, RecordedBatch, handed_in, own_stores, record_batches
from .skeleton import Skeleton, load_outer, loaded_layer
from .statistics.base import Observer
from .taps import Tap, Taps, ignore

Span = Callable[[str], AbstractContextManager[Any]]


def _no_span(_phase: str) -> AbstractContextManager[Any]:
    return nullcontext()


class Walk:
    """Batches on their way through the model. One recording serves all lanes.

    Open every lane before the first `forward`.

    Args:
        batches: int64 [sequences, tokens] each, as `make_batches` gives them.
        span: called with the phases `record` and `forward`, returns a context for each.
        before_batch: called before each batch of each layer and lane, with its number of tokens. It may raise to end
            the walk.
        keeps_last: whether to keep the output of the last layer, which calibration does not use.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Tensor],
        span: Span = _no_span,
        before_batch: Callable[[int], None] = lambda tokens: None,
        keeps_last: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self._batches = batches
        self._span, self._before_batch, self._keeps_last = span, before_batch, keeps_last
        self._lanes: list[Lane] = []
        self._has_begun = False
        self._shares_stores = bool(text_config(skeleton.source.config).get("num_kv_shared_layers"))

    @property
    def hands_outputs_on(self) -> bool:
        """Whether a layer takes more of an earlier one's output than the hidden state."""
        return any(True for lane in self._lanes[:1] for call in (lane.calls or [[]])[0] for _ in handed_in(call))

    @property
    def shares_state(self) -> bool:
        """Whether layers pass more to later layers than the hidden state."""
        return self._shares_stores or self.hands_outputs_on

    def lane(self, name: str, budget: HiddenBudget) -> Lane:
        """Open a lane. The first one records how the model calls its layers, and the others copy the recording.

        Args:
            budget: of this lane's hidden states between layers.
        Raises:
            InputError: as of `record_batches`, or not even one batch fits the device's memory.
            ValueError: the walk has begun, so that the recorded states are gone.
        """
        if self._has_begun:
            raise ValueError(f"the walk has begun without a lane {name}")
        first = self._lanes[0] if self._lanes else None
        lane = Lane(name, self.skeleton, HiddenStates(self.skeleton.device, budget), [])
        self._lanes.append(lane)
        try:
            with self._span("record"):
                if first is not None:
                    self._fill(lane, partial(_copied, first))
                elif self._batches:  # a rank of several may have no sequences
                    self._record(lane)
        except BaseException:
            self.close()
            raise
        return lane

    def branch(self, name: str, of: Lane, budget: HiddenBudget) -> Lane:
        """Open a lane in front of the layer that another lane is in front of, with copies of its hidden states and
        stores. The walk may have begun.

        Args:
            budget: of this lane's hidden states.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        outputs = {at: dict(more) for at, more in of.outputs.items()}
        lane = Lane(name, self.skeleton, HiddenStates(self.skeleton.device, budget), [], outputs)
        self._lanes.append(lane)
        self._fill(lane, partial(_copied, of))
        return lane

    def close(self) -> None:
        """Drop the hidden states of all lanes."""
        for lane in self._lanes:
            lane.hidden.close()

    def _record(self, lane: Lane) -> None:
        load_outer(self.skeleton, torch.cat([batch.flatten() for batch in self._batches]))
        hidden_size = config_int(text_config(self.skeleton.source.config), "hidden_size")
        tokens = sum(batch.numel() for batch in self._batches)
        lane.hidden.reserve(tokens * hidden_size * self.skeleton.dtype.itemsize)
        self._fill(lane, lambda begin: record_batches(self.skeleton, self._batches[begin:]))

    def _fill(self, lane: Lane, from_batch: Callable[[int], Iterator[RecordedBatch]]) -> None:
        """Take in the recorded batches from a number on, until the lane has all."""
        while (begin := len(lane.calls)) < len(self._batches):
            try:
                for recorded in from_batch(begin):
                    self._before_batch(0)
                    lane.hidden.append(recorded.hidden)
                    lane.calls.append(recorded.calls)
                return
            except torch.OutOfMemoryError:
                pass  # see `_within_memory`
            if not self._spill():
                raise self._too_large(len(lane.calls))
            torch.cuda.empty_cache()

    @torch.no_grad()
    def forward(
        self,
        layer: int,
        passes: Sequence[LayerPass],
        tap: Tap | None = None,
        statistics: Mapping[str, Sequence[Observer]] | None = None,
    ) -> None:
        """Send every batch through a layer, in several lanes side by side.

        The weights of all passes are on the device together, and the lanes take turns batch by batch. A pass without
        use ends early or does not begin: if nothing needs its output, and as soon as all statistics have observed it.

        Args:
            layer: its number. Layers are walked in order.
            tap: the sites at which statistics observe and passes round. Without it, neither happens.
            statistics: by site.
        Raises:
            InputError: not even one batch fits the device's memory.
        """
        self._has_begun = True
        observing = Observing(statistics or {})
        needs_output = self._keeps_last or layer < len(self.skeleton.layers) - 1
        passes = [one for one in passes if (needs_output and one.advances) or observing.sites(one.lane.name)]
        if not passes:
            return
        with self._span("forward"), self._loaded(layer, passes) as modules:
            runs = [
                _Run(layer, one, module, tap or Taps(), observing, needs_output)
                for one, module in zip(passes, modules, strict=True)
            ]
            for at in range(len(self._batches)):
                self._batch(at, runs, observing)

    @contextmanager
    def _loaded(self, layer: int, passes: Sequence[LayerPass]) -> Iterator[list[nn.Module]]:
        """The layer with the weights of each pass: the model's own module, then copies of it."""
        own = self.skeleton.layers[layer]
        modules = [own, *(copy.deepcopy(own) for _ in passes[1:])]
        with ExitStack() as opened:
            for one, module in zip(passes, modules, strict=True):
                opened.enter_context(loaded_layer(self.skeleton, layer, one.tensors, module))
            yield modules

    def _batch(self, at: int, runs: Sequence[_Run], observing: Observing) -> None:
        for _ in runs:
            self._before_batch(self._batches[at].numel())
        outputs = self._within_memory(at, runs, observing)
        observing.commit()
        for run, hidden in zip(runs, outputs, strict=True):
            run.end(at, hidden)
            if not self._shares_stores:
                run.lane.empty_stores(at, run.layer)

    def _within_memory(self, at: int, runs: Sequence[_Run], observing: Observing) -> list[Tensor | None]:
        """Run a batch. Where the GPU runs out of memory, hidden states leave it first, then the run ends."""
        try:
            return [run(at) for run in runs]
        except torch.OutOfMemoryError:
            pass  # outside of the handler, so that the failed call's tensors are not kept by its traceback
        observing.discard()
        had_some = self._spill()
        torch.cuda.empty_cache()
        if had_some:
            try:
                return [run(at) for run in runs]
            except torch.OutOfMemoryError:
                pass
        raise self._too_large(at)

    def _spill(self) -> bool:
        """Move the hidden states of all lanes off the GPU. Return False where none were on it."""
        return any([lane.hidden.spill() for lane in self._lanes])

    def _too_large(self, at: int) -> InputError:
        sequences, tokens = self._batches[at].shape
        free = torch.cuda.mem_get_info(self.skeleton.device)[0]
        return InputError(
            f"the GPU's memory does not hold one decoder layer and a batch of {sequences} x {tokens} tokens "
            f"({free:,} bytes are free)",
            where=f"--batch-size {sequences}",
            hint="use a smaller --batch-size, a smaller --sequence-length, or --device cpu",
        )


class EndOfForward(Exception):
    """Raised by a hook to end a layer's forward."""


def run_layer(module: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Call a layer as the model would, and return the hidden state. See `run_whole_layer`."""
    return run_whole_layer(module, hidden, call)[0]


def run_whole_layer(module: nn.Module, hidden: Tensor, call: LayerCall) -> tuple[Tensor, tuple[Any, ...]]:
    """Call a layer as the model would, and return the hidden state and its other outputs.

    Raises:
        CheckFailed: it does not return a hidden state.
        InputError: the layer's code raises an error.
    """
    name = type(module).__name__
    try:
        output: Any = module(hidden, *call.args, **call.kwargs)
    except (NvquantError, EndOfForward, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each model's code raises what it likes
        reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(" .:")
        raise InputError(
            f"{name} does not run by itself ({type(error).__name__}: {reason})",
            where=name,
            hint="use a weight-only recipe",
        ) from error
    result, *more = output if isinstance(output, tuple | list) else (output,)
    if not isinstance(result, Tensor) or result.shape != hidden.shape:
        raise CheckFailed(f"{name} returned something that is not a hidden state", hint="use a weight-only recipe")
    return result, tuple(more)


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


class _Run:
    """A pass through a layer, batch by batch.

    Args:
        module: the layer with the weights of the pass.
        is_read: whether anything may follow the layer. Without that, and if the lane stays and nothing watches, the
            forward ends once every statistic has observed the lane.
    """

    def __init__(
        self,
        layer: int,
        one: LayerPass,
        module: nn.Module,
        tap: Tap,
        observing: Observing,
        is_read: bool,
    ) -> None:
        self.layer, self.lane = layer, one.lane
        self._watch, self._module, self._tap, self._goes_on = one.watch, module, tap, is_read and one.advances
        self._needs_output = self._goes_on or (is_read and one.watch is not None)
        self._handle = observing.handle(one.lane.name, one.rounds)
        self._sites = observing.sites(one.lane.name)
        self._more: tuple[Any, ...] = ()

    def __call__(self, at: int) -> Tensor | None:
        """The layer's output, or None where the forward ended early."""
        to_come = set(self._sites)

        def end(site: str) -> None:
            to_come.discard(site)
            if not to_come:
                raise _SeenAll

        with suppress(_SeenAll), self._tap.on(self._module, self._handle, ignore if self._needs_output else end):
            call = self.lane.call(at, self.layer)
            hidden, self._more = run_whole_layer(self._module, self.lane.hidden.fetch(at), call)
            return hidden
        return None

    def end(self, at: int, hidden: Tensor | None) -> None:
        """Replace the batch's hidden state by the layer's output, if it is needed."""
        if hidden is not None and self._watch is not None:
            self._watch(at, self.lane.hidden.fetch(at), hidden, self.lane.call(at, self.layer))
        if hidden is not None and self._goes_on:
            self.lane.hidden.store(at, hidden)
            if self._more:
                self.lane.keep_outputs(at, self.layer, self._more)


def _copied(lane: Lane, begin: int) -> Iterator[RecordedBatch]:
    """A lane's batches from a number on, with tensors and stores of their own."""
    for at in range(begin, len(lane.calls)):
        yield RecordedBatch(lane.hidden.fetch(at).clone(), own_stores(lane.calls[at]))


class _SeenAll(EndOfForward):
    """Signals that the rest of a layer's forward is not needed."""
