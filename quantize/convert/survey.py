"""The order of the residual stream's channels, chosen and proved before anything is quantized.

A few sequences go through the source, layer by layer. Each layer must follow a trial order. The sizes of its inputs
after folds decide the order.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibrate.record import finish_batch
from ..calibrate.samples import CalibrationSet
from ..calibrate.skeleton import build_skeleton, load_outer
from ..calibrate.walk import Walk, make_batches
from ..checkpoint.config_values import config_int
from ..checkpoint.hub.shards import RemoteShards
from ..checkpoint.reordered import Reordered, reordered
from ..checkpoint.source import Checkpoint, read_json
from ..checkpoint.writer import write_json
from ..format.constants import BLOCK
from ..plan.plan import Plan
from ..recipe.roles import text_config
from ..reshape.folding import fold_layer
from ..reshape.residual import TOLERANCE, dealt, layer_axes, outer_axes, share_of_energy
from ..stream.hidden import HiddenBudget
from ..stream.manifest import ResidualRecord, held_to
from ..stream.reading import LayerReader, LoadedLayer
from ..stream.trace import Trace
from ..weights.decoding import shards_below
from .journal import Journal
from .known_folds import KnownFolds
from .matrices import groups_of_layer, naming_damage
from .options import ConvertOptions
from .walking import SOURCE, CalibrationWalk, begin_reading, columns_of_groups, source_skeleton
from .watch import Watch

RECORD_NAME = "residual.json"
SEQUENCES = 8
HOST_BYTES = 4 << 30  # for the hidden states of these sequences


def with_order(
    plan: Plan,
    calibration: CalibrationSet,
    options: ConvertOptions,
    dtype: torch.dtype,
    journal: Journal,
    watch: Watch,
) -> tuple[Plan, ResidualRecord]:
    """The plan whose source has its channels in a good order, and the manifest's entry. Rank 0 chooses the order, and a
    resumed run takes that of the earlier run.

    Args:
        dtype: of the model's computation.
    Raises:
        InputError: a shard vanished, changed or cannot be read.
    """
    path, ranks = journal.folder / RECORD_NAME, options.ranks
    record = None
    with ranks.step(), options.trace.span("survey"):
        if ranks.rank == 0 and path.exists():
            record = held_to(ResidualRecord, read_json(path, ""), str(path))
        elif ranks.rank == 0:
            watch.phase("survey")
            record = Survey(plan, calibration, options, dtype, journal.folder, watch).record()
            write_json(path, record.as_json())
    record = ranks.exchange(record)[0]
    if record.order is None:
        return plan, record
    return replace(plan, source=in_order(plan.source, record)), record


def in_order(source: Checkpoint, record: ResidualRecord) -> Checkpoint:
    """A source with its channels in the recorded order.

    Raises:
        ValueError, KeyError: see `reordered`.
    """
    return source if record.order is None else reordered(source, record.places, record.axes)


class Survey:
    """A walk of a few sequences through the source.

    Args:
        dtype: of the model's computation.
        folder: for hidden states that fit no memory.
    """

    def __init__(
        self,
        plan: Plan,
        calibration: CalibrationSet,
        options: ConvertOptions,
        dtype: torch.dtype,
        folder: Path,
        watch: Watch,
    ) -> None:
        self._plan, self._dtype, self._watch = plan, dtype, watch
        self._device = torch.device(options.device)
        self._batches = make_batches(calibration.samples[:SEQUENCES], 1)
        self._budget = HiddenBudget(0, HOST_BYTES, folder)
        self._known = KnownFolds(plan)
        self._size = config_int(text_config(plan.source.config), "hidden_size")

    def record(self) -> ResidualRecord:
        """The order, or the reason why there is none."""
        try:
            axes = self._outer_axes()
            sizes = list[Tensor]()
            with self._walk() as (walk, reader):
                for loaded in reader:
                    layer = self._layer(walk, loaded)
                    axes.update(layer.axes)
                    sizes += layer.sizes
                    loaded.release()
                order = dealt(share_of_energy(sizes))
                self._prove_around_layers(reordered(self._plan.source, order, axes), walk.hidden[SOURCE].fetch(0))
        except _NoOrder as reason:
            return ResidualRecord(reason=str(reason))
        return ResidualRecord(order=encoded(order), axes=axes)

    def _outer_axes(self) -> dict[str, int]:
        plan = self._plan
        if isinstance(shards_below(plan.source), RemoteShards):
            raise _NoOrder("the source comes over the network, and is read once only")
        if self._size % BLOCK:
            raise _NoOrder(f"{self._size} channels are no complete blocks")
        outer = {name: info.shape for name, info in plan.source.infos().items() if plan.layer_of(name) is None}
        found = outer_axes(outer, plan.selection.roles, self._size)
        if found.reason:
            raise _NoOrder(found.reason)
        return dict(found.axes)

    @contextmanager
    def _walk(self) -> Iterator[tuple[CalibrationWalk, LayerReader]]:
        """The source's lane in front of the first layer, and the reader of the layers."""
        plan = self._plan
        by_layer, columns = begin_reading(plan), columns_of_groups(plan)
        skeleton = source_skeleton(plan, self._device, self._dtype)
        walk = Walk(skeleton, self._batches, before_batch=lambda _tokens: self._watch.before_batch(0), keeps_last=True)
        made = CalibrationWalk(walk, columns, sum(b.numel() for b in self._batches), walk.lane(SOURCE, self._budget))
        reader = LayerReader(
            plan.source,
            by_layer,
            plan.layers,
            self._device,
            lambda _layer: False,
            Trace(),
            lambda: self._watch.before_batch(0),
        )
        try:
            with reader:
                yield made, reader
        finally:
            made.close()

    def _layer(self, walk: CalibrationWalk, loaded: LoadedLayer) -> _Layer:
        """Prove that a layer follows an order, measure the inputs that read the stream, and send the lane on."""
        plan, prefix = self._plan, f"{walk.prefix}.{loaded.layer}."
        groups = groups_of_layer(plan.groups, plan.prefix, loaded.layer)
        sizes = walk.observe_sizes(loaded.layer, loaded.tensors, groups)
        with naming_damage(plan, loaded.layer, loaded.tensors):
            found = {name: ranges.result(name).mean_square for name, ranges in sizes.items()}
        squares = {name: square for name, square in found.items() if square is not None}
        trial = walk.trial(loaded.layer, loaded.tensors)
        axes = layer_axes(trial, loaded.tensors, self._size)
        if axes.reason:
            raise _NoOrder(f"{prefix.rstrip('.')}: {axes.reason}")
        known = self._known.find(loaded.layer)
        folded = fold_layer(trial, loaded.tensors, groups, plan.matrices, prefix, squares, known=known)
        self._known.note(loaded.layer, folded.reshaping.folds, folded.reasons)
        reshaping = folded.reshaping
        readers = [group for group in groups if axes.axes.get(plan.matrices[group.members[0]].tensor) == 1]
        shown = [_after(squares[group.name], reshaping.input_factor(group.name)) for group in readers]
        walk.advance(loaded.layer, loaded.tensors)
        return _Layer(axes.axes, shown)

    def _prove_around_layers(self, changed: Checkpoint, hidden: Tensor) -> None:
        """Compare embeddings and the final norm of the reordered source with the source's, on the first sequence.

        Args:
            hidden: of the last layer's output.
        """
        results = []
        order = torch.tensor(changed.order, device=self._device) if isinstance(changed, Reordered) else None
        for source, given in ((self._plan.source, hidden), (changed, hidden[..., order])):
            skeleton = build_skeleton(source, self._plan.prefix, self._device, torch.float32)
            batch = self._batches[0]
            load_outer(skeleton, batch)
            decoder: Any = skeleton.decoder
            with torch.no_grad():
                embedded = decoder.get_input_embeddings()(batch.to(self._device))
            results.append((embedded, finish_batch(skeleton, batch, given.float())))
        for before, after in zip(*results, strict=True):
            error = float((before[..., order] - after).abs().amax() / before.abs().amax())
            if not error <= TOLERANCE:
                raise _NoOrder("the tensors around the layers do not follow an order")


class _NoOrder(Exception):
    """There is no order for this model. The text gives the reason."""


@dataclass(frozen=True)
class _Layer:
    """A surveyed layer.

    Attributes:
        axes: see `Axes`.
        sizes: float64 [hidden size] each, mean squares after folds of the inputs that read the stream.
    """

    axes: Mapping[str, int]
    sizes: list[Tensor]


def _after(mean_square: Tensor, factor: Tensor | None) -> Tensor:
    return mean_square if factor is None else mean_square * factor.double().square()


def encoded(order: Sequence[int]) -> str:
    """An order in base64 of int32."""
    return base64.b64encode(torch.tensor(order, dtype=torch.int32).numpy().tobytes()).decode()
