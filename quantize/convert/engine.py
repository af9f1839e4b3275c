"""The engine takes layers from the reader, runs samples through them, quantizes them and passes them to the writer.

While it computes a layer, it reads the next one and writes the last one. Each stage has one layer at a time, whatever
the model's size. Layers that an earlier run finished are only walked through.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..calibrate.samples import CalibrationSet
from ..calibrate.skeleton import build_skeleton
from ..calibrate.statistics import InputStatistics
from ..calibrate.walk import Walk, make_batches
from ..checkpoint.headers import read_header
from ..checkpoint.hub.shards import RemoteShards
from ..checkpoint.shard_bytes import ReadingOrder
from ..errors import CheckFailed, InputError, NvquantError
from ..plan.plan import Plan, PlannedShard
from ..quantizers.base import Quantizer
from ..recipe.groups import FusedGroup
from ..recipe.roles import Role
from ..stream.manifest import GroupRecord, LayerRecord, ShardRecord
from ..stream.memory import give_back_free_memory, telling_of_full_gpu
from ..stream.reading import LayerReader, LoadedLayer
from ..stream.trace import Trace
from ..stream.writing import YIELD_SECONDS, ShardWriter, copy_shard
from .budget import hidden_budget
from .head import HeadMaker, head_maker
from .journal import Journal
from .matrices import (
    group_scalars,
    groups_of_layer,
    made_shapes,
    quantize_group,
    refuse_damaged,
    refuse_damaged_before,
)
from .options import ConvertOptions
from .ranks import Ranks
from .snapshot import Snapshots
from .watch import Watch

SPOOL_FOLDER = "source"  # in the run's own folder: what of a remote source is read twice


class Engine:
    """One run over the layers that are not done yet.

    Args:
        done: records of the shards that an earlier run finished, by file.
        dtype: of the model's computation.
    """

    def __init__(
        self,
        plan: Plan,
        options: ConvertOptions,
        quantizer: Quantizer,
        dtype: torch.dtype,
        journal: Journal,
        done: Mapping[str, ShardRecord],
        watch: Watch,
    ) -> None:
        self._plan, self._options, self._quantizer, self._dtype = plan, options, quantizer, dtype
        self._journal, self._done, self._watch = journal, done, watch
        self._trace, self._ranks = options.trace, options.ranks
        self._device = torch.device(options.device)
        self._shards = {shard.layer: shard for shard in plan.shards if shard.layer is not None}
        self._index = {layer: at for at, layer in enumerate(self._shards)}
        self._lockstep = options.ranks  # those that go through a layer together
        self._sequences = [0]
        self._head: HeadMaker | None = None
        self._given_up = threading.Event()

    def run(self, calibration: CalibrationSet | None) -> None:
        """Make every shard that is not done, this rank's share of them.

        Raises:
            NvquantError: see each stage. Finished shards stay.
        """
        todo = [layer for layer, shard in self._shards.items() if shard.file not in self._done]
        snapshots, start = self._snapshots(calibration, todo)
        if calibration is None:  # whole layers are shared out, and no rank waits for another
            self._lockstep = Ranks()
            layers = [layer for layer in todo if self._ranks.owns(self._index[layer])]
        else:  # the walk goes through every layer up to the last one to be made
            layers = [layer for layer in self._shards if todo and start <= layer <= todo[-1]]
        self._watch.begin(len(self._shards), len(self._shards) - len(todo))
        rest = self._to_copy()
        if self._plan.head is not None:
            with self._ranks.step():
                self._head = head_maker(self._plan, rest, self._quantizer, self._device)
        source = self._plan.source
        source.begin(self._reading_order(layers, rest, calibration is not None))
        self._watch.follow_downloads(source.content.fetched)
        with (
            ThreadPoolExecutor(1, "copy") as copier,
            LayerReader(
                source,
                self._plan.tensors_by_layer(),
                layers,
                self._device,
                self._is_hashed,
                self._trace,
                lambda: self._watch.before_batch(0),
            ) as reader,
            ShardWriter(self._journal.partial, self._device, self._trace) as writer,
        ):
            self._watch.follow(reader, writer, self._layers_on_disk if self._ranks.size > 1 else None)
            copies = [copier.submit(self._copy, shard, reader) for shard in rest]
            loaded = self._layers_while_copying(reader, copies)
            try:
                if calibration is None or not todo:
                    source.content.recorded()
                if calibration is None:
                    with self._ranks.step():
                        self._all_layers(loaded, writer, None, snapshots)
                elif todo:
                    with self._walk(calibration, layers, snapshots) as walk:
                        self._all_layers(loaded, writer, walk, snapshots)
                self._watch.phase("finishing the files")
                with self._trace.span("wait for write"), self._ranks.step():
                    writer.finish()
                    self._wait_for_copies(copies)
            except BaseException:
                self._given_up.set()
                source.content.end()
                for copy in copies:  # nobody waits for gigabytes of copies after an error
                    copy.cancel()
                raise
        source.content.end()

    def _to_copy(self) -> list[PlannedShard]:
        """This rank's share of the shards around the layers that are not done. The head comes first, because what is
        read for it is also copied."""
        rest = [shard for shard in self._plan.shards if shard.layer is None]
        mine = [shard for at, shard in enumerate(rest) if shard.file not in self._done and self._ranks.owns(at)]
        return sorted(mine, key=lambda shard: not shard.is_head)

    def _reading_order(self, layers: list[int], rest: list[PlannedShard], is_calibrated: bool) -> ReadingOrder:
        """The tensors that this run reads from the source, in the order of reading."""
        plan = self._plan
        by_layer = plan.tensors_by_layer()
        root = plan.prefix.removesuffix("layers")
        outer = {
            name
            for name in plan.source.files
            if name.startswith(root) and plan.layer_of(name) is None and plan.selection.roles[name] is not Role.DRAFT
        }
        if not (is_calibrated and layers):
            outer = set()
        if self._head is not None:
            outer.add(self._head.matrix.tensor)  # is read for its amax too
        written = {}
        for shard in plan.shards if is_calibrated or outer else ():
            if shard.layer is None and not shard.is_head and shard.file in self._done:
                path = self._journal.partial / shard.file
                copied = read_header(path).tensors
                written.update({plan.origins[name].source: (path, info) for name, info in copied.items()})
        return ReadingOrder(
            [by_layer[layer] for layer in layers],
            [plan.origins[entry.name].source for shard in rest for entry in shard.entries],
            frozenset(outer),
            written,
            self._journal.folder / SPOOL_FOLDER,
        )

    def _all_layers(
        self, layers: Iterator[LoadedLayer], writer: ShardWriter, walk: Walk | None, snapshots: Snapshots
    ) -> None:
        behind: int | None = None
        while True:
            try:
                with self._lockstep.step():
                    loaded = next(layers, None)
            except NvquantError:
                if walk is not None and behind is not None and isinstance(self._plan.source.content, RemoteShards):
                    writer.finish()  # only behind layers that are whole can a run go on
                    snapshots.take(behind, walk.hidden)
                raise
            if loaded is None:
                return
            record = self._done.get(self._shards[loaded.layer].file)
            if record is not None and record.layer is not None and walk is not None:
                self._replay(loaded, walk, record.layer)
            else:
                self._make(loaded, walk, writer)
            behind = loaded.layer
            if walk is not None:
                snapshots.consider(loaded.layer, walk.hidden)
                if self._device.type == "cpu":
                    give_back_free_memory()

    def _snapshots(self, calibration: CalibrationSet | None, todo: list[int]) -> tuple[Snapshots, int]:
        snapshots = Snapshots(self._journal, self._trace, is_used=calibration is not None and self._ranks.size == 1)
        first = next(iter(self._shards))
        found = snapshots.find(todo[0]) if todo else None
        return snapshots, first if found is None else found + 1

    def _is_hashed(self, layer: int) -> bool:
        return self._ranks.owns(self._index[layer])

    @contextmanager
    def _walk(self, calibration: CalibrationSet, layers: list[int], snapshots: Snapshots) -> Iterator[Walk]:
        """This rank's batches, ready to enter the first of `layers`."""
        self._watch.phase("record")
        plan, ranks = self._plan, self._ranks
        with ranks.step(), self._trace.span("build"):
            skeleton = build_skeleton(plan.source, plan.prefix, self._device, self._dtype)
            if len(skeleton.layers) != len(plan.layers):
                raise InputError(
                    f"{plan.model}: config.json describes {len(skeleton.layers)} decoder layers, but the shards "
                    f"contain {len(plan.layers)}: download the model again."
                )
        parts = ranks.split(make_batches(calibration.samples, self._options.batch_size))
        self._sequences = [sum(len(batch) for batch in part) for part in parts]
        mine = parts[ranks.rank]
        self._watch.expect_tokens(sum(batch.numel() for batch in mine) * len(layers))
        with ranks.step():
            budget = hidden_budget(plan, mine, self._options, self._journal.folder)
            walk = Walk(skeleton, mine, budget, lambda phase: timed(self._trace, phase), self._watch.before_batch)
        try:
            if layers[0] != next(iter(self._shards)):
                snapshots.restore(walk.hidden)
            plan.source.content.recorded()
            snapshots.shares_state = walk.shares_state
            yield walk
        finally:
            walk.hidden.close()

    def _make(self, loaded: LoadedLayer, walk: Walk | None, writer: ShardWriter) -> None:
        """Observe a layer's inputs, quantize its matrices, and pass it to the writer."""
        self._watch.phase("layers")
        shard = self._shards[loaded.layer]
        groups = groups_of_layer(self._plan.groups, self._plan.prefix, loaded.layer)
        ranks, squares = self._lockstep, "mean_square" in self._quantizer.needs
        inputs: dict[str, InputStatistics] = {}
        if walk is not None:
            calibrated = [
                group for group in groups if self._plan.matrices[group.members[0]].scheme.inputs == "calibrated"
            ]
            with ranks.step():
                observers = walk.step(loaded.layer, loaded.tensors, calibrated, squares)
            with self._trace.span("gather") if ranks.size > 1 else nullcontext():
                try:
                    inputs = ranks.merge(observers, self._sequences, squares)
                except CheckFailed:
                    refuse_damaged(loaded.tensors)  # a damaged weight is the cause, not the input that it spoiled
                    refuse_damaged_before(self._plan, loaded.layer)
                    raise
        output, records = self._quantize(groups, loaded, inputs)
        with ranks.step(), telling_of_full_gpu(f"the output of layer {loaded.layer}"):
            if self._ranks.owns(self._index[loaded.layer]):
                for group in groups:
                    output.update(group_scalars(self._plan, group, records[group.name], self._quantizer))
                rest = {entry.name: loaded.tensors[entry.name] for entry in shard.entries if entry.name not in output}
                note = LayerRecord(
                    layer=loaded.layer,
                    file=shard.file,
                    source_sha256=loaded.sha256,
                    groups={group.name: records[group.name] for group in groups},
                )
                writer.submit(shard, output, rest, lambda digest: self._note(shard, digest, note))
        loaded.release()

    def _replay(self, loaded: LoadedLayer, walk: Walk, record: LayerRecord) -> None:
        """Run the hidden states through a layer that an earlier run finished."""
        self._watch.phase("replay")
        with self._trace.span("replay", f"layer {loaded.layer}"), self._lockstep.step():
            if loaded.sha256 not in (None, record.source_sha256):
                raise InputError(
                    f"{self._plan.model}: the weights of layer {loaded.layer} changed since the earlier run, although "
                    f"size and time of their files did not: restore the files, or begin anew with --restart."
                )
            walk.step(loaded.layer, loaded.tensors, [], False)
        loaded.release()

    def _quantize(
        self, groups: list[FusedGroup], loaded: LoadedLayer, inputs: Mapping[str, InputStatistics]
    ) -> tuple[dict[str, Tensor], dict[str, GroupRecord]]:
        """Packed codes and block scales of a layer, by output name, and the record of each group.

        Every rank quantizes its share of the groups. The layer's owner gets all groups, and all ranks get the records.
        """
        plan, ranks = self._plan, self._lockstep
        sizes = {
            group.name: sum(plan.source_bytes(plan.matrices[module]) for module in group.members) for group in groups
        }
        makers = ranks.share_out(sizes)
        made: dict[str, Tensor] = {}
        own: dict[str, GroupRecord] = {}
        with (
            ranks.step(),
            timed(self._trace, "quantize", f"layer {loaded.layer}"),
            telling_of_full_gpu(f"the quantization of layer {loaded.layer}"),
        ):
            self._watch.before_batch(0)
            for group in groups:
                if makers[group.name] == ranks.rank:
                    done = quantize_group(plan, group, loaded.tensors, inputs.get(group.name), self._quantizer)
                    made.update(done.tensors)
                    own[group.name] = done.record
        if ranks.size == 1:
            return made, own
        with self._trace.span("gather"):
            records = {name: record for part in ranks.exchange(own) for name, record in part.items()}
            shapes = made_shapes(plan, groups)
            by_rank = {name: makers[group] for name, (group, _) in shapes.items()}
            owner = self._index[loaded.layer] % ranks.size
            flat = {name: shape for name, (_, shape) in shapes.items()}
            return ranks.hand_over(owner, by_rank, flat, made, self._device), records

    def _layers_on_disk(self) -> int:
        return sum(self._journal.has(shard) for shard in self._shards.values())

    def _note(self, shard: PlannedShard, digest: str, layer: LayerRecord | None) -> None:
        self._journal.note(shard, digest, layer)
        if layer is not None:
            self._watch.layer_done()

    def _copy(self, shard: PlannedShard, reader: LayerReader) -> None:
        def let_reading_go_first(seconds: float) -> None:
            reader.wait_until_idle(seconds)
            if self._given_up.is_set():
                raise InputError("the run has ended.")

        with self._trace.span("copy", shard.file):
            if self._head is not None and shard.is_head:
                head = self._head.write(self._journal.partial, lambda: let_reading_go_first(YIELD_SECONDS))
                self._journal.note(shard, head[0], None, head[1])
                return
            digest = copy_shard(self._plan.source, self._plan, self._journal.partial, shard, let_reading_go_first)
            self._note(shard, digest, None)
        for entry in shard.entries:
            self._plan.source.content.copied(self._plan.origins[entry.name].source)

    @staticmethod
    def _layers_while_copying(reader: LayerReader, copies: list[Future[None]]) -> Iterator[LoadedLayer]:
        """The reader's layers until a copy fails, so that no further layers are computed in vain."""
        for loaded in reader:
            for copy in copies:
                if copy.done():
                    copy.result()
            yield loaded

    def _wait_for_copies(self, copies: list[Future[None]]) -> None:
        for copy in copies:
            while True:
                self._watch.before_batch(0)
                try:
                    copy.result(timeout=0.5)
                    break
                except TimeoutError:
                    if copy.done():
                        raise


@contextmanager
def timed(trace: Trace, phase: str, name: str = "") -> Iterator[None]:
    """A span of the host and, in a profile, of the GPU's current stream."""
    with trace.span(phase, name), trace.gpu_span(phase, name):
        yield
