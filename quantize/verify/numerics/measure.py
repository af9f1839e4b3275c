"""The two models side by side, one decoder layer of each in memory.

The source and the checkpoint go through their layers together, on the same tokens. Each way of computing is a lane with
hidden states of its own: the source, the source once more in the noise of BF16 (the floor), the checkpoint with rounded
inputs (W4A4), the checkpoint with quantized weights alone (weight-only). Rounding to four bits amplifies the last bits
of a product, which depend on the processor. W4A4 runs once more in the noise of BF16, and the difference shows how far
its numbers vary. Beside the lanes, each of the checkpoint's layers gets the input of the source's layer. Its own error
is then separate from the inherited one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...calibrate.record import LayerCall, finish_batch
from ...calibrate.skeleton import Skeleton, build_skeleton, loaded_layer
from ...calibrate.walk import Walk, make_batches, run_layer
from ...checkpoint.source import Checkpoint
from ...errors import InputError
from ...recipe.decoder import decoder_prefix, layer_index
from ...stream.hidden import HiddenBudget
from ...stream.memory import available_host_bytes, give_back_free_memory
from ...stream.reading import LayerReader, LoadedLayer
from ...stream.trace import Trace
from ..threads import Progress
from .errors import LayerError, StreamError, bfloat16_outputs, matrix_numbers
from .served import Arithmetic, InputNumbers, InputRounding, ServedModel

LaneName = Literal["source", "floor", "w4a4", "w4a4_again", "weight_only"]
EQUAL_INPUT_TOKENS = 2048  # are enough to measure a layer's own error
FLOOR_ROWS = 16
SHARE_OF_MEMORY = 0.5  # of what is free, for the hidden states of all lanes


@dataclass
class Lane:
    """One way of computing the model, on its way through the layers."""

    name: LaneName
    walk: Walk

    def finished(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """The head's inputs, [tokens, hidden size] for each sequence without its last token, on the device."""
        rows = []
        for at, batch in enumerate(batches):
            given = finish_batch(self.walk.skeleton, batch, self.walk.hidden.fetch(at))
            rows += [sequence[:-1] for sequence in given]
        return rows


@dataclass
class LayerNumbers:
    """The numbers of a layer, by arithmetic."""

    layer: int
    own: dict[Arithmetic, LayerError] = field(default_factory=dict)
    stream: dict[Arithmetic, StreamError] = field(default_factory=dict)


@dataclass
class Kept:
    """A batch before and after the source's layer, and how the layer was called."""

    before: Tensor
    after: Tensor
    call: LayerCall


class SideBySide:
    """All lanes, from the embedding to the head's inputs.

    Args:
        served: the checkpoint.
        source: the model that it was made from. Without it, only the checkpoint's own lanes run.
        samples: int64 [tokens] each.
        arithmetics: the checkpoint's lanes.
        progress: called with (layers done, layers, words).
    Raises:
        InputError, EnvironmentLack: see `build_skeleton` and `Walk`, or the two models have different shapes.
    """

    def __init__(
        self,
        served: ServedModel,
        source: Checkpoint | None,
        samples: Sequence[Tensor],
        arithmetics: Sequence[Arithmetic],
        device: str,
        progress: Progress,
    ) -> None:
        self.served, self.source, self.arithmetics = served, source, tuple(arithmetics)
        self.device = torch.device(device)
        # A CPU computes BF16 products slowly, and a GPU is to compute as the server does.
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.batches = make_batches(samples, 1)
        self.rounding = InputRounding(served)
        self.layers: list[LayerNumbers] = []
        self.matrices: list[dict[str, Any]] = []
        self._progress = progress
        self._quantized = build_skeleton(served.checkpoint, served.prefix, self.device, self.dtype)
        self._original = self._build_source()
        self.lanes = self._open_lanes()

    @property
    def floor_words(self) -> str:
        """The description of the floor's noise."""
        if self.device.type == "cpu":
            return "the source with every module's output rounded to BF16, against float32"
        return f"the source in BF16, {FLOOR_ROWS} tokens at a time, against whole sequences"

    @property
    def inputs(self) -> dict[str, InputNumbers]:
        """The numbers of the inputs of W4A4 layers, by the fused layer's name."""
        return self.rounding.numbers

    def close(self) -> None:
        """Free the memory of the hidden states."""
        for lane in self.lanes.values():
            lane.walk.hidden.close()

    def _build_source(self) -> Skeleton | None:
        if self.source is None:
            return None
        prefix = (
            decoder_prefix({name: info.shape for name, info in self.source.infos().items()}, self.source.config) or ""
        )
        skeleton = build_skeleton(self.source, prefix, self.device, self.dtype)
        if len(skeleton.layers) != len(self._quantized.layers):
            raise InputError(
                f"{self.source.folder} has {len(skeleton.layers)} decoder layers, {self.served.subject.folder} has "
                f"{len(self._quantized.layers)}: name the model that the checkpoint was made from."
            )
        return skeleton

    def _open_lanes(self) -> dict[LaneName, Lane]:
        plan: list[tuple[LaneName, Skeleton, Sequence[Tensor]]] = []
        if self._original is not None:
            plan += [("source", self._original, self.batches), ("floor", self._original, self.batches)]
        plan += [(name, self._quantized, self.batches) for name in self.arithmetics]
        if self._original is not None and "w4a4" in self.arithmetics:
            plan.append(("w4a4_again", self._quantized, self.batches))
        budget = self._budget(len(plan))
        lanes: dict[LaneName, Lane] = {}
        with ExitStack() as opened:
            for name, skeleton, batches in plan:
                lanes[name] = Lane(name, Walk(skeleton, batches, budget, keeps_last=True))
                opened.callback(lanes[name].walk.hidden.close)
            opened.pop_all()
        return lanes

    def _budget(self, lanes: int) -> HiddenBudget:
        host = int(SHARE_OF_MEMORY * (available_host_bytes() or 8 << 30))
        gpu = 0
        if self.device.type == "cuda":
            # Two buffers of each model's layers, one decoded layer, and what the computation itself takes.
            needs = 2 * largest_layer_bytes(self.served.subject.checkpoint, self.served.prefix)
            if self.source is not None:
                needs += 3 * largest_layer_bytes(self.source, self._source_prefix)
            gpu = max(0, int(SHARE_OF_MEMORY * (torch.cuda.mem_get_info(self.device)[0] - needs)))
        return HiddenBudget(gpu // lanes, host // lanes, Path(tempfile.gettempdir()))

    def run(self) -> None:
        """Send every lane through all layers.

        Raises:
            InputError: a shard vanished or changed, or not even one sequence fits the device's memory.
        """
        count = len(self._quantized.layers)
        stored = self._reader(self.served.subject.checkpoint, self.served.stored_names(), count)
        original = nullcontext() if self.source is None else self._reader(
            self.source, _names_by_layer(self.source, self._source_prefix), count
        )  # fmt: skip
        with stored as reader, original as source_reader:
            originals: Iterator[LoadedLayer] | None = None if source_reader is None else iter(source_reader)
            for loaded in reader:
                self._progress(loaded.layer + 1, count, "comparing layers")
                beside = None if originals is None else next(originals)
                self._layer(loaded, beside)
                loaded.release()
                if beside is not None:
                    beside.release()
                if self.device.type == "cpu":
                    give_back_free_memory()

    @property
    def _source_prefix(self) -> str:
        assert self._original is not None
        return self._original.layer_prefix

    def _reader(self, checkpoint: Checkpoint, names: dict[int, list[str]], count: int) -> LayerReader:
        return LayerReader(checkpoint, names, range(count), self.device, lambda layer: False, Trace())

    def _layer(self, loaded: LoadedLayer, beside: LoadedLayer | None) -> None:
        layer = loaded.layer
        numbers = LayerNumbers(layer)
        kept = [] if beside is None else self._source_layer(layer, beside)
        decoded = self.served.decoded(layer, loaded.tensors, self.dtype)
        self._matrix_numbers(layer, decoded, beside)
        for arithmetic in self.arithmetics:
            self.served.flush(layer, loaded.tensors, decoded, arithmetic)
            rounding = self._rounding(layer, arithmetic)
            with rounding(True):
                self.lanes[arithmetic].walk.step(layer, decoded)
            if arithmetic == "w4a4" and "w4a4_again" in self.lanes:
                with rounding(False), self._disturbed(self._quantized.layers[layer]):
                    self.lanes["w4a4_again"].walk.step(layer, decoded)
            if beside is not None:
                with rounding(False):
                    numbers.own[arithmetic] = self._own_error(layer, decoded, kept)
                numbers.stream[arithmetic] = self._stream_error(arithmetic)
        self.layers.append(numbers)

    def _rounding(self, layer: int, arithmetic: Arithmetic) -> Callable[[bool], Any]:
        if arithmetic == "weight_only":
            return lambda is_counted: nullcontext()
        tap, module = self.rounding.tap(layer), self._quantized.layers[layer]
        return lambda is_counted: tap.on(module, self.rounding.handle(layer, is_counted))

    def _source_layer(self, layer: int, beside: LoadedLayer) -> list[Kept]:
        assert self._original is not None
        kept: list[Kept] = []

        def keep(_at: int, before: Tensor, after: Tensor, call: LayerCall) -> None:
            if sum(item.before.shape[1] for item in kept) < EQUAL_INPUT_TOKENS:
                kept.append(Kept(before, after, with_own_stores(call)))

        self.lanes["source"].walk.step(layer, beside.tensors, watch=keep)
        with self._disturbed(self._original.layers[layer]):
            self.lanes["floor"].walk.step(layer, beside.tensors)
        return kept

    def _disturbed(self, module: nn.Module) -> AbstractContextManager[None]:
        """Let a module compute in the noise of BF16 while the block runs."""
        return rounded_to_bfloat16(module) if self.device.type == "cpu" else in_small_products(module)

    @torch.no_grad()
    def _own_error(self, layer: int, decoded: dict[str, Tensor], kept: Sequence[Kept]) -> LayerError:
        error = LayerError()
        with loaded_layer(self._quantized, layer, decoded) as module:
            for batch in kept:
                got = run_layer(module, batch.before, with_own_stores(batch.call))
                error.add(batch.before, batch.after, got)
        return error

    def _stream_error(self, arithmetic: Arithmetic) -> StreamError:
        error = StreamError()
        source, lane = self.lanes["source"].walk.hidden, self.lanes[arithmetic].walk.hidden
        for at in range(len(self.batches)):
            error.add(source.fetch(at), lane.fetch(at))
        return error

    def _matrix_numbers(self, layer: int, decoded: dict[str, Tensor], beside: LoadedLayer | None) -> None:
        for module, served in self.served.matrices_of(layer).items():
            weight = decoded[f"{module}.weight"]
            source = None if beside is None else beside.tensors.get(self._source_name(module))
            histogram = self.served.subject.histograms[module]
            self.matrices.append(matrix_numbers(module, layer, served, source, weight, histogram))

    def _source_name(self, module: str) -> str:
        """A matrix of the checkpoint as the source calls it, whose prefix may differ."""
        return f"{self._source_prefix}{module.removeprefix(self.served.prefix)}.weight"


def with_own_stores(call: LayerCall) -> LayerCall:
    """The call with copies of its stores of shared keys and values, so that running it again changes no other's."""
    copied: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, MutableMapping):
            return value
        if id(value) not in copied:
            store: Any = type(value)
            copied[id(value)] = store(value)
        return copied[id(value)]

    return LayerCall(tuple(map(copy, call.args)), {key: copy(value) for key, value in call.kwargs.items()})


@contextmanager
def rounded_to_bfloat16(module: nn.Module) -> Iterator[None]:
    """See `bfloat16_outputs`, while the block runs."""
    handles = bfloat16_outputs(module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def in_small_products(module: nn.Module) -> Iterator[None]:
    """Let every linear of the module take a few tokens at a time, as a server that decodes does, while the block runs:
    its products then get other kernels, which add in another order."""
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]

    def small(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat(
            [nn.functional.linear(rows, linear.weight, linear.bias) for rows in x.split(FLOOR_ROWS, dim=-2)], dim=-2
        )

    for linear in linears:
        linear.__dict__["forward"] = small(linear)
    try:
        yield
    finally:
        for linear in linears:
            del linear.__dict__["forward"]


def largest_layer_bytes(checkpoint: Checkpoint, prefix: str) -> int:
    """The bytes that the largest decoder layer under a prefix takes in the file."""
    layers = _names_by_layer(checkpoint, prefix).values()
    return max(sum(checkpoint.info(name).nbytes for name in names) for names in layers)


def _names_by_layer(checkpoint: Checkpoint, prefix: str) -> dict[int, list[str]]:
    layers: dict[int, list[str]] = {}
    for name in checkpoint.files:
        layer = layer_index(name, prefix)
        if layer is not None:
            layers.setdefault(layer, []).append(name)
    return layers
