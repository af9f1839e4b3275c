"""The engine takes layers from the reader, runs samples through them, quantizes them and passes them to the writer.

While it computes a layer, it reads the next one and writes the last one. Each stage has one layer at a time, whatever
the model's size. Layers that an earlier run finished are only walked through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..calibrate.samples import CalibrationSet
from ..checkpoint.headers import read_header
from ..checkpoint.hub.shards import RemoteShards
from ..checkpoint.shard_bytes import ReadingOrder
from ..errors import InputError, NvquantError
from ..plan.plan import Plan, PlannedShard
from ..quantizers.base import Quantizer
from ..recipe.roles import Role
from ..stream.manifest import LayerRecord, ShardRecord
from ..stream.memory import give_back_free_memory
from ..stream.reading import LayerReader, LoadedLayer
from ..stream.writing import ShardWriter
from ..weights.decoding import shards_below
from .copying import Copies
from .folding import Folding
from .head import HeadMaker, head_maker
from .journal import Journal
from .kv_cache import Bounds, cache_bounds
from .layer import LayerMaker
from .options import ConvertOptions
from .ranks import Ranks
from .site_by_site import path_from_shard
from .snapshot import Snapshots
from .walking import CalibrationWalk, open_walk
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
        self._shards = plan.layer_shards
        self._cache: Bounds | None = None

    def run(self, calibration: CalibrationSet | None) -> None:
        """Make every shard that is not done, this rank's share of them.

        Raises:
            NvquantError: see each stage. Finished shards stay.
        """
        options, watch, source = self._options, self._watch, self._plan.source
        trace, ranks, device = options.trace, options.ranks, torch.device(options.device)
        todo = [layer for layer, shard in self._shards.items() if shard.file not in self._done]
        snapshots, start = self._snapshots(calibration, todo)
        if calibration is None:  # whole layers are shared out, and no rank waits for another
            layers = [layer for layer in todo if self._is_own(layer)]
        else:  # the walk goes through every layer up to the last one to be made
            layers = [layer for layer in self._shards if todo and start <= layer <= todo[-1]]
        watch.begin(len(self._shards), len(self._shards) - len(todo))
        rest = self._to_copy()
        with ranks.step():
            head = head_maker(self._plan, rest, self._quantizer, device)
            self._cache = cache_bounds(self._plan) if todo else None
        source.begin(self._reading_order(layers, rest, head, calibration is not None))
        watch.follow_downloads(source.content.fetched)
        by_layer = self._plan.tensors_by_layer()
        with (
            Copies(self._plan, self._journal, trace) as copies,
            LayerReader(source, by_layer, layers, device, self._is_own, trace, lambda: watch.before_batch(0)) as reader,
            ShardWriter(self._journal.partial, device, trace) as writer,
        ):
            watch.follow(reader, writer, self._layers_on_disk if ranks.size > 1 else None)
            copies.begin(rest, reader, head)
            loaded = _layers_while_copying(reader, copies)
            try:
                if calibration is None or not todo:
                    source.content.recorded()
                if calibration is None:
                    with ranks.step():
                        self._all_layers(loaded, writer, None, snapshots)
                elif todo:
                    with self._walk(calibration, layers, snapshots) as walk:
                        self._all_layers(loaded, writer, walk, snapshots)
                watch.phase("finishing the files")
                with trace.span("wait for write"), ranks.step():
                    writer.finish()
                    copies.wait(lambda: watch.before_batch(0))
            except BaseException:
                copies.give_up()
                source.content.end()
                raise
        source.content.end()

    def _to_copy(self) -> list[PlannedShard]:
        """This rank's share of the shards around the layers that are not done. The head comes first, because what is
        read for it is also copied."""
        rest, ranks = [shard for shard in self._plan.shards if shard.layer is None], self._options.ranks
        mine = [shard for at, shard in enumerate(rest) if shard.file not in self._done and ranks.owns(at)]
        return sorted(mine, key=lambda shard: not shard.is_head)

    def _reading_order(
        self, layers: list[int], rest: list[PlannedShard], head: HeadMaker | None, is_calibrated: bool
    ) -> ReadingOrder:
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
        if head is not None:
            outer.add(head.matrix.tensor)  # is read for its amax too
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
        self, layers: Iterator[LoadedLayer], writer: ShardWriter, walk: CalibrationWalk | None, snapshots: Snapshots
    ) -> None:
        options = self._options
        lockstep = Ranks() if walk is None else options.ranks  # those that go through a layer together
        made = [record.layer for record in self._done.values() if record.layer is not None]
        folding = Folding(self._plan, lockstep, options.trace, made) if options.fold else None
        maker = LayerMaker(self._plan, self._quantizer, self._cache, lockstep, self._watch, options.trace, folding)
        behind: int | None = None
        while True:
            try:
                with lockstep.step():
                    loaded = next(layers, None)
            except NvquantError:
                if (
                    walk is not None
                    and behind is not None
                    and isinstance(shards_below(self._plan.source), RemoteShards)
                ):
                    writer.finish()  # only behind layers that are whole can a run go on
                    snapshots.take(behind, walk.hidden)
                raise
            if loaded is None:
                return
            record = self._done.get(self._shards[loaded.layer].file)
            if record is not None and record.layer is not None and walk is not None:
                self._replay(loaded, walk, record.layer)
            else:
                self._make(maker, loaded, walk, writer)
            loaded.release()
            behind = loaded.layer
            if walk is not None:
                snapshots.consider(loaded.layer, walk.hidden)
                if options.device == "cpu":
                    give_back_free_memory()

    def _snapshots(self, calibration: CalibrationSet | None, todo: list[int]) -> tuple[Snapshots, int]:
        """The snapshots of this run, and the first layer to be walked through."""
        is_used = calibration is not None and self._options.ranks.size == 1
        snapshots = Snapshots(self._journal, self._options.trace, is_used)
        first = next(iter(self._shards))
        found = snapshots.find(todo[0]) if todo else None
        return snapshots, first if found is None else found + 1

    def _is_own(self, layer: int) -> bool:
        """Whether this rank writes a layer, and hashes its source."""
        return self._options.ranks.owns(self._plan.layer_places[layer])

    @contextmanager
    def _walk(self, calibration: CalibrationSet, layers: list[int], snapshots: Snapshots) -> Iterator[CalibrationWalk]:
        """This rank's batches, ready to enter the first of `layers`."""
        folder = self._journal.folder
        walk = open_walk(self._plan, calibration, self._options, self._dtype, folder, self._watch, len(layers))
        try:
            if layers[0] != next(iter(self._shards)):
                snapshots.restore(walk.hidden)
            self._plan.source.content.recorded()
            snapshots.shares_state = walk.shares_state
            yield walk
        finally:
            walk.close()

    def _make(self, maker: LayerMaker, loaded: LoadedLayer, walk: CalibrationWalk | None, writer: ShardWriter) -> None:
        """Make a layer, and pass it to the writer if this rank writes it."""
        self._watch.phase("layers")
        shard = self._shards[loaded.layer]
        with maker.made(loaded, walk) as layer:
            if layer is not None:
                record = layer.record
                writer.submit(shard, layer.made, layer.kept, lambda digest: self._note(shard, digest, record))

    def _note(self, shard: PlannedShard, digest: str, layer: LayerRecord) -> None:
        self._journal.note(shard, digest, layer)
        self._watch.layer_done()

    def _replay(self, loaded: LoadedLayer, walk: CalibrationWalk, record: LayerRecord) -> None:
        """Run the hidden states through a layer that an earlier run finished."""
        self._watch.phase("replay")
        with self._options.trace.span("replay", f"layer {loaded.layer}"), self._options.ranks.step():
            if loaded.sha256 not in (None, record.source_sha256):
                raise InputError(
                    f"the weights of layer {loaded.layer} changed since the earlier run, although size and time "
                    "of their files did not",
                    where=self._plan.model,
                    hint="restore the files, or begin anew with --restart",
                )
            path = None
            if walk.has_quantized:
                shard = self._journal.partial / record.file
                path = path_from_shard(self._plan, self._quantizer, walk, loaded, record, shard)
            walk.advance(loaded.layer, loaded.tensors, path)

    def _layers_on_disk(self) -> int:
        return sum(self._journal.has(shard) for shard in self._shards.values())


def _layers_while_copying(reader: LayerReader, copies: Copies) -> Iterator[LoadedLayer]:
    """The reader's layers until a copy fails, so that no further layers are computed in vain."""
    for loaded in reader:
        copies.check()
        yield loaded
