"""One decoder layer of a conversion: observe its inputs, quantize its fused groups, and gather its output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from ..calibrate.key_value_bounds import KeyValueBounds
from ..calibrate.statistics.ranges import InputStatistics
from ..plan.plan import Plan
from ..quantizers import quantizer_for
from ..quantizers.base import GroupInputs, Quantizer
from ..recipe.groups import FusedGroup
from ..reshape.folding import FoldedLayer
from ..reshape.records import folding_record
from ..reshape.reshaping import UNCHANGED, Reshaping
from ..stream.manifest import AttentionRecord, GroupRecord, LayerRecord
from ..stream.memory import telling_of_full_gpu
from ..stream.reading import LoadedLayer
from ..stream.trace import Trace
from .folding import Folding
from .kv_cache import Bounds, attention_records, cache_scales, unbounded_sites, warn_of_clipping
from .matrices import (
    group_scalars,
    groups_of_layer,
    made_shapes,
    naming_damage,
    quantize_group,
)
from .ranks import Ranks
from .site_by_site import SiteBySite
from .walking import CalibrationWalk
from .watch import Watch


@dataclass(frozen=True)
class MadeLayer:
    """The output of a layer, by output name.

    Attributes:
        made: codes and block scales, uint8, global scales, float32, and norms after folds. They belong to the layer
            alone.
        kept: the other tensors, unchanged, in the buffer of the loaded layer.
        record: the manifest's entry.
    """

    made: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    record: LayerRecord


@dataclass(frozen=True)
class _Amaxes:
    """The observations of a layer.

    Attributes:
        inputs: of fused groups, by their names.
        cached: of keys and values, by site.
        order: names of the groups in the order in which the layer reaches them.
    """

    inputs: Mapping[str, InputStatistics]
    cached: Mapping[str, float]
    order: Sequence[str] = ()


class LayerMaker:
    """Makes the output of one layer after another.

    Args:
        cache: bounds on keys and values, or None without an FP8 KV cache.
        ranks: those that go through each layer together.
        folding: None without folds.
    """

    def __init__(
        self,
        plan: Plan,
        quantizer: Quantizer,
        cache: Bounds | None,
        ranks: Ranks,
        watch: Watch,
        trace: Trace,
        folding: Folding | None = None,
    ) -> None:
        self._plan, self._quantizer, self._cache, self._ranks = plan, quantizer, cache, ranks
        self._watch, self._trace, self._folding = watch, trace, folding

    @contextmanager
    def made(self, loaded: LoadedLayer, walk: CalibrationWalk | None) -> Iterator[MadeLayer | None]:
        """The output of a layer on the rank that writes it, None on the others. All ranks continue after the block.

        Args:
            walk: in front of this layer, or None without calibration. It advances to the next one.
        Raises:
            NonFiniteError, InputError: see `quantize_group`.
            CheckFailed: an input is not finite, or never reached.
        """
        groups = groups_of_layer(self._plan.groups, self._plan.prefix, loaded.layer)
        bounds = None if self._cache is None else self._cache.get(loaded.layer, {})
        folded = None if walk is None or self._folding is None else self._folding.fold(groups, loaded, walk)
        reshaping = UNCHANGED if folded is None else folded.reshaping
        observed = _Amaxes({}, {}) if walk is None else self._observe(groups, loaded, walk, bounds or {}, reshaping)
        attention = None if bounds is None else attention_records(bounds, observed.cached)
        if walk is not None and walk.has_quantized:
            made = SiteBySite(self._plan, self._quantizer, self._ranks, self._trace).quantize(
                groups, loaded, walk, observed.inputs, observed.order, reshaping
            )
            quantized, records = made.tensors, made.records
        else:
            quantized, records = self._quantize(groups, loaded, observed.inputs, reshaping)
        with self._ranks.step(), telling_of_full_gpu(f"the output of layer {loaded.layer}"):
            is_owner = self._ranks.owns(self._plan.layer_places[loaded.layer])
            if is_owner:
                yield self._gather(groups, loaded, {**quantized, **reshaping.norms}, records, attention, folded)
            else:
                yield None

    def _observe(
        self,
        groups: Sequence[FusedGroup],
        loaded: LoadedLayer,
        walk: CalibrationWalk,
        bounds: Mapping[str, KeyValueBounds],
        reshaping: Reshaping,
    ) -> _Amaxes:
        """Statistics of the inputs of the groups that are calibrated, and of keys and values without a bound, over the
        samples of all ranks."""
        ranks = self._ranks
        calibrated = [group for group in groups if self._is_observed(group)]
        with ranks.step():
            found = walk.observe(
                loaded.layer,
                loaded.tensors,
                calibrated,
                "mean_square" in self._quantizer.needs,
                unbounded_sites(bounds),
                reshaping,
            )
        with (
            self._trace.span("gather") if ranks.size > 1 else nullcontext(),
            naming_damage(self._plan, loaded.layer, loaded.tensors),
        ):
            return _Amaxes(
                {name: ranks.merged(ranges).result(name) for name, ranges in found.inputs.items()},
                {site: ranks.merged(amax).result(site) for site, amax in found.cached.items()},
                next((order for order in ranks.exchange(found.order) if order), []),
            )

    def _is_observed(self, group: FusedGroup) -> bool:
        scheme = self._plan.matrices[group.members[0]].scheme
        return scheme.inputs == "calibrated" or quantizer_for(scheme.name, self._quantizer).by_site

    def _quantize(
        self,
        groups: Sequence[FusedGroup],
        loaded: LoadedLayer,
        inputs: Mapping[str, InputStatistics],
        reshaping: Reshaping,
    ) -> tuple[dict[str, Tensor], dict[str, GroupRecord]]:
        """Packed codes and block scales of a layer, by output name, and the record of each group.

        Every rank quantizes its share of the groups. The layer's owner gets all groups, and all ranks get the records.
        """
        plan, ranks = self._plan, self._ranks
        sizes = {
            group.name: sum(plan.source_bytes(plan.matrices[module]) for module in group.members) for group in groups
        }
        makers = ranks.share_out(sizes)
        made: dict[str, Tensor] = {}
        own: dict[str, GroupRecord] = {}
        with (
            ranks.step(),
            self._trace.timed("quantize", f"layer {loaded.layer}"),
            telling_of_full_gpu(f"the quantization of layer {loaded.layer}"),
        ):
            self._watch.before_batch(0)
            for group in groups:
                if makers[group.name] == ranks.rank:
                    seen = inputs.get(group.name)
                    statistics = None if seen is None else GroupInputs(seen)
                    done = quantize_group(plan, group, loaded.tensors, statistics, self._quantizer, reshaping)
                    made.update(done.tensors)
                    own[group.name] = done.record
        if ranks.size == 1:
            return made, own
        with self._trace.span("gather"):
            records = {name: record for part in ranks.exchange(own) for name, record in part.items()}
            shapes = made_shapes(plan, groups)
            by_rank = {name: makers[group] for name, (group, _) in shapes.items()}
            owner = ranks.owner_of(plan.layer_places[loaded.layer])
            flat = {name: shape for name, (_, shape) in shapes.items()}
            device = next(iter(loaded.tensors.values())).device
            return ranks.hand_over(owner, by_rank, flat, made, device), records

    def _gather(
        self,
        groups: Sequence[FusedGroup],
        loaded: LoadedLayer,
        quantized: dict[str, Tensor],
        records: Mapping[str, GroupRecord],
        attention: dict[str, AttentionRecord] | None,
        folded: FoldedLayer | None,
    ) -> MadeLayer:
        """Add the global scales, those of the KV cache, and the tensors that are not quantized."""
        shard = self._plan.layer_shards[loaded.layer]
        made = dict(quantized)
        for group in groups:
            made.update(group_scalars(self._plan, group, records[group.name], self._quantizer))
        if attention is not None:
            made.update(cache_scales(self._plan, loaded.layer, attention))
            warn_of_clipping(self._plan, attention)
        kept = {entry.name: loaded.tensors[entry.name] for entry in shard.entries if entry.name not in made}
        record = LayerRecord(
            layer=loaded.layer,
            file=shard.file,
            source_sha256=loaded.sha256,
            groups={group.name: records[group.name] for group in groups},
        )
        if attention is not None:
            record = record.model_copy(update={"kv_cache": attention})
        if folded is not None:
            record = record.model_copy(update={"folding": folding_record(folded)})
        return MadeLayer(made, kept, record)
