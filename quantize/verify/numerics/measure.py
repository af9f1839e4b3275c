"""The two models side by side, one decoder layer of each in memory.

The source and the checkpoint go through their layers together, on the same tokens. Each way of computing is a lane with
hidden states of its own: the source, the source once more in the noise of BF16 (the floor), the checkpoint with rounded
inputs (W4A4), the checkpoint with quantized weights alone (weight-only). Rounding to four bits amplifies the last bits
of a product, which depend on the processor. W4A4 runs once more in the noise of BF16, and the difference shows how far
its numbers vary. Beside the lanes, each of the checkpoint's layers gets the input of the source's layer. Its own error
is then separate from the inherited one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calibrate.lanes import LayerPass
from ...calibrate.record import LayerCall, own_stores
from ...calibrate.skeleton import loaded_layer
from ...calibrate.taps import Tap
from ...calibrate.walk import make_batches, run_layer
from ...checkpoint.source import Checkpoint
from ...format.schemes import Arithmetic
from ...reshape.reshaping import UNCHANGED
from ...stream.memory import give_back_free_memory
from ...stream.reading import LayerReader, LoadedLayer
from ...stream.trace import Trace
from ...weights.base import names_by_layer, stored_names
from ..folds import folds_of
from ..threads import Progress
from .document import MatrixLoss
from .errors import LayerError, StreamError, matrix_numbers
from .lanes import Lanes
from .noise import noise_on
from .served import InputRounding, ServedModel

EQUAL_INPUT_TOKENS = 2048  # are enough to measure a layer's own error


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

    Attributes:
        layers: the numbers of the layers so far.
        matrices: the numbers of the quantized matrices so far.
        rounding: the rounding of inputs, with the numbers of the inputs of W4A4 layers.

    Args:
        served: the checkpoint.
        source: the model that it was made from. Without it, only the checkpoint's own lanes run.
        samples: int64 [tokens] each.
        arithmetics: the checkpoint's lanes.
        progress: called with (layers done, layers, words).
    Raises:
        InputError, EnvironmentLack: see `Lanes`.
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
        self.matrices: list[MatrixLoss] = []
        self._reshaping = UNCHANGED if source is None else folds_of(served.subject, source)
        self._names: dict[int, list[str]] = {}
        self._progress = progress
        self.lanes = Lanes(served, source, self.batches, self.arithmetics, self.device, self.dtype)

    def close(self) -> None:
        """Free the memory of the hidden states."""
        self.lanes.close()

    def run(self) -> None:
        """Send every lane through all layers.

        Raises:
            InputError: a shard vanished or changed, or not even one sequence fits the device's memory.
        """
        count = len(self.lanes.quantized.skeleton.layers)
        self._names = names_by_layer(self.served, self.served.prefix)
        wanted = {layer: stored_names(self.served, names) for layer, names in self._names.items()}
        stored = self._reader(self.served.subject.checkpoint, wanted, count)
        original = nullcontext() if self.source is None else self._reader(
            self.source, names_by_layer(self.source, self._source_prefix), count
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
        assert self.lanes.original is not None
        return self.lanes.original.skeleton.layer_prefix

    def _reader(self, checkpoint: Checkpoint, names: dict[int, list[str]], count: int) -> LayerReader:
        return LayerReader(checkpoint, names, range(count), self.device, lambda layer: False, Trace())

    def _layer(self, loaded: LoadedLayer, beside: LoadedLayer | None) -> None:
        layer = loaded.layer
        numbers = LayerNumbers(layer)
        kept = [] if beside is None else self._source_layer(layer, beside)
        decoded = self.served.assemble(self._names[layer], loaded.tensors, self.dtype)
        self._matrix_numbers(layer, decoded, beside)
        for arithmetic in self.arithmetics:
            self.served.flush(layer, loaded.tensors, decoded, arithmetic)
            tap = self.rounding.tap(layer, arithmetic)
            self._quantized_layer(layer, arithmetic, decoded, tap)
            if beside is not None:
                numbers.own[arithmetic] = self._own_error(layer, decoded, kept, tap)
                numbers.stream[arithmetic] = self._stream_error(arithmetic)
        self.layers.append(numbers)

    def _source_layer(self, layer: int, beside: LoadedLayer) -> list[Kept]:
        walk, kept = self.lanes.original, list[Kept]()
        assert walk is not None

        def keep(_at: int, before: Tensor, after: Tensor, call: LayerCall) -> None:
            if sum(item.before.shape[1] for item in kept) < EQUAL_INPUT_TOKENS:
                kept.append(Kept(before.clone(), after, *own_stores([call])))

        walk.forward(layer, [LayerPass(self.lanes["source"], beside.tensors, watch=keep)])
        with noise_on(walk.skeleton.layers[layer], self.device):
            walk.forward(layer, [LayerPass(self.lanes["floor"], beside.tensors)])
        return kept

    def _quantized_layer(self, layer: int, arithmetic: Arithmetic, decoded: dict[str, Tensor], tap: Tap) -> None:
        walk = self.lanes.quantized
        walk.forward(layer, [LayerPass(self.lanes[arithmetic], decoded, self.rounding.handle(layer))], tap)
        if arithmetic == "w4a4" and "w4a4_again" in self.lanes:
            again = LayerPass(self.lanes["w4a4_again"], decoded, self.rounding.handle(layer, is_counted=False))
            with noise_on(walk.skeleton.layers[layer], self.device):
                walk.forward(layer, [again], tap)

    @torch.no_grad()
    def _own_error(self, layer: int, decoded: dict[str, Tensor], kept: Sequence[Kept], tap: Tap) -> LayerError:
        error, rounds = LayerError(), self.rounding.handle(layer, is_counted=False)
        with loaded_layer(self.lanes.quantized.skeleton, layer, decoded) as module:
            for batch in kept:
                (call,) = own_stores([batch.call])
                with tap.on(module, rounds):
                    got = run_layer(module, batch.before, call)
                error.add(batch.before, batch.after, got)
        return error

    def _stream_error(self, arithmetic: Arithmetic) -> StreamError:
        error = StreamError()
        source, lane = self.lanes["source"].hidden, self.lanes[arithmetic].hidden
        for at in range(len(self.batches)):
            error.add(source.fetch(at), lane.fetch(at))
        return error

    def _matrix_numbers(self, layer: int, decoded: dict[str, Tensor], beside: LoadedLayer | None) -> None:
        for module, served in self.served.matrices_of(layer).items():
            weight = decoded[f"{module}.weight"]
            source = None if beside is None else beside.tensors.get(self._source_name(module))
            source = None if source is None else self._reshaping.weight(module, source)
            histogram = self.served.subject.histograms.get(module)
            self.matrices.append(matrix_numbers(module, layer, served, source, weight, histogram))

    def _source_name(self, module: str) -> str:
        """A matrix of the checkpoint as the source calls it, whose prefix may differ."""
        return f"{self._source_prefix}{module.removeprefix(self.served.prefix)}.weight"
