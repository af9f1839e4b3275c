"""Lanes over one recording: each is what a walk alone would be, and statistics may observe several of them together."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from nvquant.calibrate import walk as walking
from nvquant.calibrate.lanes import Lane, LayerPass
from nvquant.calibrate.record import LayerCall, own_stores
from nvquant.calibrate.skeleton import Skeleton
from nvquant.calibrate.statistics.key_value import KeyValueAmax
from nvquant.calibrate.statistics.ranges import InputRanges
from nvquant.calibrate.taps import KeyValueTap, LinearTap, Taps
from nvquant.calibrate.walk import Walk, make_batches
from nvquant.stream.hidden import HiddenBudget, HiddenStates
from support.conversions import TinyModels, layer_weights, planned, random_samples, raw, skeleton_of
from support.walking import OneLane
from torch import Tensor, nn

IN_MEMORY = HiddenBudget(0, 1 << 30, Path("no file is made"))
DOWN = "model.layers.0.mlp.down_proj"


class Pairs:
    """Keeps what two lanes have at a site, together."""

    name: ClassVar[str] = "pairs"
    lanes = ("source", "quantized")

    def __init__(self) -> None:
        self.recent: list[tuple[Tensor, ...]] = []
        self.counted: list[tuple[Tensor, ...]] = []
        self.discarded = 0

    def observe(self, seen: Mapping[str, Tensor]) -> None:
        assert tuple(seen) == self.lanes
        self.recent.append(tuple(tensor.clone() for tensor in seen.values()))

    def commit(self) -> None:
        self.counted += self.recent
        self.recent = []

    def discard(self) -> None:
        self.discarded += 1
        self.recent = []

    def state(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def merged(cls, states: Sequence[Mapping[str, Tensor]]) -> Pairs:
        return cls()


def batches(size: int = 2) -> list[Tensor]:
    return make_batches(random_samples(), size)


def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Other weights of a layer."""
    return {name: tensor * 0.75 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


def states(lane: Lane | OneLane) -> list[bytes]:
    return [raw(hidden) for hidden in lane.hidden.on_host()]


def two_lanes(skeleton: Skeleton, **options: Any) -> tuple[Walk, Lane, Lane]:
    walk = Walk(skeleton, batches(), **options)
    return walk, walk.lane("source", IN_MEMORY), walk.lane("quantized", IN_MEMORY)


def tap_of(tiny: TinyModels, name: str, layer: int = 0) -> tuple[LinearTap, list[str]]:
    plan = planned(tiny(name))
    prefix = f"{plan.prefix}.{layer}."
    groups = [group for group in plan.groups if group.name.startswith(prefix)]
    return LinearTap.of_groups(groups, prefix), [group.name for group in groups]


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_each_lane_is_bit_for_bit_what_a_walk_alone_is(tiny: TinyModels, name: str, side_by_side: bool) -> None:
    """Also where layers share keys and values: each lane has stores of its own."""
    skeleton = skeleton_of(tiny(name))
    walk, source, quantized = two_lanes(skeleton, keeps_last=True)
    alone = [OneLane(skeleton_of(tiny(name)), batches(), IN_MEMORY, keeps_last=True) for _ in range(2)]
    assert states(source) == states(quantized) == states(alone[0])
    for layer in range(len(skeleton.layers)):
        weights = layer_weights(skeleton, layer)
        passes = [LayerPass(source, weights), LayerPass(quantized, changed(weights))]
        for some in [passes] if side_by_side else [[one] for one in passes]:
            walk.forward(layer, some)
        alone[0].step(layer, weights)
        alone[1].step(layer, changed(weights))
    assert [states(source), states(quantized)] == [states(one) for one in alone]
    assert states(source) != states(quantized)


@pytest.mark.parametrize("name", ["llama", "gemma4_e2b"])
def test_a_branch_goes_on_from_where_its_lane_stands(tiny: TinyModels, name: str) -> None:
    """Whatever the other one does: hidden states and stores of shared keys and values are its own."""
    skeleton, begin = skeleton_of(tiny(name)), 2
    walk = Walk(skeleton, batches(), keeps_last=True)
    source = walk.lane("source", IN_MEMORY)
    alone = OneLane(skeleton_of(tiny(name)), batches(), IN_MEMORY, keeps_last=True)
    branch = source
    for layer in range(len(skeleton.layers)):
        if layer == begin:
            branch = walk.branch("branch", source, IN_MEMORY)
            assert states(branch) == states(source)
        weights = layer_weights(skeleton, layer)
        walk.forward(layer, [LayerPass(source, changed(weights) if layer >= begin else weights)])
        if branch is not source:
            walk.forward(layer, [LayerPass(branch, weights)])
        alone.step(layer, weights)
    assert states(branch) == states(alone)
    assert states(branch) != states(source)


def test_the_model_is_recorded_once_for_all_lanes(tiny: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[int] = []
    record_batches = walking.record_batches

    def count(skeleton: Skeleton, some: Sequence[Tensor]) -> Any:
        recorded.append(len(some))
        return record_batches(skeleton, some)

    monkeypatch.setattr(walking, "record_batches", count)
    walk, _, _ = two_lanes(skeleton_of(tiny("gemma4_e2b")))
    walk.lane("third", IN_MEMORY)
    assert recorded == [len(batches())]


def test_lanes_share_no_hidden_state_and_no_store(tiny: TinyModels) -> None:
    _, one, other = two_lanes(skeleton_of(tiny("gemma4_e2b")))
    assert one.hidden.fetch(0).data_ptr() != other.hidden.fetch(0).data_ptr()
    stores = [calls[0].kwargs["shared_kv_states"] for lane in (one, other) for calls in lane.calls]
    assert len({id(store) for store in stores}) == 2 * len(batches())
    for calls in other.calls:
        assert len({id(call.kwargs["shared_kv_states"]) for call in calls}) == 1  # its layers do share one


def test_a_lane_may_wait_on_disk_beside_one_in_memory(tiny: TinyModels, tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny("llama"))
    walk = Walk(skeleton, batches())
    lanes = [walk.lane("source", IN_MEMORY), walk.lane("quantized", HiddenBudget(0, 0, tmp_path))]
    walk.forward(0, [LayerPass(lane, layer_weights(skeleton, 0)) for lane in lanes])
    assert states(lanes[0]) == states(lanes[1])
    walk.close()
    assert [len(lane.hidden) for lane in lanes] == [0, 0]


def test_a_lane_cannot_be_opened_when_the_recorded_states_are_gone(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    walk, source, _ = two_lanes(skeleton)
    walk.forward(0, [LayerPass(source, layer_weights(skeleton, 0))])
    with pytest.raises(ValueError, match="the walk has begun without a lane third"):
        walk.lane("third", IN_MEMORY)


def test_statistics_of_several_lanes_observe_the_same_input_in_each(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    tap, sites = tap_of(tiny, "llama")
    walk, source, quantized = two_lanes(skeleton)
    weights = layer_weights(skeleton, 0)
    pairs = {site: Pairs() for site in sites}
    ranges = {site: [InputRanges(True, lane) for lane in ("source", "quantized")] for site in sites}
    statistics = {site: [pairs[site], *ranges[site]] for site in sites}
    walk.forward(0, [LayerPass(source, weights), LayerPass(quantized, changed(weights))], tap, statistics)
    for of_lane, tensors in enumerate((weights, changed(weights))):
        alone = OneLane(skeleton_of(tiny("llama")), batches(), IN_MEMORY)
        wanted = alone.step(0, tensors, planned(tiny("llama")).groups[: len(sites)], True)
        assert list(wanted) == sites
        for site in sites:
            found = InputRanges(True)
            for pair in pairs[site].counted:
                found.observe({"source": pair[of_lane]})
                found.commit()
            for one in (found, ranges[site][of_lane]):
                state = wanted[site].state()
                assert all(torch.equal(tensor, state[key]) for key, tensor in one.state().items())
    assert not torch.equal(*pairs[DOWN].counted[0])


@pytest.mark.parametrize("name", ["llama", "gemma4_e2b"])
def test_keys_and_values_and_inputs_are_observed_in_one_forward(tiny: TinyModels, name: str) -> None:
    skeleton, plan = skeleton_of(tiny(name)), planned(tiny(name))
    walk = Walk(skeleton, batches())
    source = walk.lane("source", IN_MEMORY)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).eval()
    for layer, whole in enumerate(model.get_decoder().layers):
        prefix = f"{plan.prefix}.{layer}."
        groups = [group for group in plan.groups if group.name.startswith(prefix)]
        ranges = {group.name: InputRanges() for group in groups}
        amaxes = {f"{prefix}self_attn.{part}": KeyValueAmax() for part in "kv"}
        statistics = {site: [statistic] for site, statistic in [*ranges.items(), *amaxes.items()]}
        tap = Taps(LinearTap.of_groups(groups, prefix), KeyValueTap(prefix))
        walk.forward(layer, [LayerPass(source, layer_weights(skeleton, layer))], tap, statistics)
        wanted: dict[str, list[float]] = {}

        def note(site: str, tensor: Tensor, wanted: dict[str, list[float]] = wanted) -> None:
            wanted.setdefault(site, []).append(float(tensor.abs().max()))

        with torch.no_grad(), KeyValueTap(prefix).on(whole, note):
            for batch in batches():
                model(input_ids=batch, use_cache=False)
        assert {site: statistic.result(site) for site, statistic in amaxes.items()} == {
            site: max(found) for site, found in wanted.items()
        }
        tokens = {statistic.result(site).tokens for site, statistic in ranges.items()}
        assert tokens == {sum(batch.numel() for batch in batches())}


def test_a_pass_rounds_its_own_lane_and_statistics_see_the_input_before_it(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    tap, sites = tap_of(tiny, "llama")
    walk, source, quantized = two_lanes(skeleton)
    weights = layer_weights(skeleton, 0)
    pairs = Pairs()
    rounded: list[str] = []

    def halve(site: str, inputs: Tensor) -> Tensor | None:
        rounded.append(site)
        return inputs / 2 if site == DOWN else None

    passes = [LayerPass(source, weights), LayerPass(quantized, weights, halve)]
    walk.forward(0, passes, tap, {DOWN: [pairs]})
    assert sorted(rounded) == sorted(sites * len(batches()))
    assert all(torch.equal(*pair) for pair in pairs.counted)
    half = {name: tensor / 2 if name == f"{DOWN}.weight" else tensor for name, tensor in weights.items()}
    alone = OneLane(skeleton_of(tiny("llama")), batches(), IN_MEMORY)
    alone.step(0, half)
    assert states(quantized) == states(alone)
    assert states(source) != states(quantized)


def test_without_advance_lanes_stay_and_the_forward_ends_behind_the_last_statistic(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    tap, sites = tap_of(tiny, "llama")
    walk, source, quantized = two_lanes(skeleton)
    before = states(source)
    reached: list[str] = []
    for name, part in skeleton.layers[0].named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda _, args, output, name=name: reached.append(name))
    weights, ranges = layer_weights(skeleton, 0), InputRanges()
    (site,) = (site for site in sites if site.endswith("o_proj"))
    passes = [LayerPass(lane, weights, advances=False) for lane in (source, quantized)]
    walk.forward(0, passes, tap, {site: [ranges]})
    assert set(reached) == {f"self_attn.{leaf}_proj" for leaf in "qkv"}
    assert len(reached) == 3 * len(batches())  # in the lane that is observed
    assert ranges.result(site).tokens == sum(batch.numel() for batch in batches())
    assert states(source) == states(quantized) == before


def test_one_lane_goes_on_while_another_stays(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    tap, sites = tap_of(tiny, "llama")
    walk, source, quantized = two_lanes(skeleton)
    before, weights = states(quantized), layer_weights(skeleton, 0)
    pairs = Pairs()
    passes = [LayerPass(source, weights), LayerPass(quantized, weights, advances=False)]
    walk.forward(0, passes, tap, {sites[-1]: [pairs]})
    assert states(quantized) == before != states(source)
    walk.forward(0, [LayerPass(quantized, weights)])
    assert states(quantized) == states(source)


def test_a_pass_that_serves_nothing_does_not_begin(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    announced: list[int] = []
    walk, source, quantized = two_lanes(skeleton, before_batch=announced.append)
    announced.clear()
    last = len(skeleton.layers) - 1
    weights = layer_weights(skeleton, last)
    walk.forward(last, [LayerPass(source, weights), LayerPass(quantized, weights)])
    walk.forward(0, [LayerPass(source, layer_weights(skeleton, 0), advances=False)])
    assert announced == []


def test_every_batch_of_every_lane_is_announced(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    announced: list[int] = []
    walk, source, quantized = two_lanes(skeleton, before_batch=announced.append)
    assert announced == [0] * 2 * len(batches())
    announced.clear()
    weights = layer_weights(skeleton, 0)
    walk.forward(0, [LayerPass(source, weights), LayerPass(quantized, weights)])
    assert announced == [tokens for batch in batches() for tokens in [batch.numel()] * 2]


def test_a_batch_that_ran_out_of_memory_is_retried_in_all_lanes_and_observed_once(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = skeleton_of(tiny("gemma4_e2b"))
    tap, sites = tap_of(tiny, "gemma4_e2b")
    walk, source, quantized = two_lanes(skeleton)
    weights, pairs, failed = layer_weights(skeleton, 0), Pairs(), list[str]()
    spilled: list[HiddenStates] = []

    def spill(hidden: HiddenStates) -> bool:
        spilled.append(hidden)
        return True

    def fail_once(site: str, inputs: Tensor) -> None:
        if len(pairs.counted) == 2 and not failed and site == sites[-1]:
            failed.append(site)
            raise torch.OutOfMemoryError("as if")

    monkeypatch.setattr(HiddenStates, "spill", spill)
    walk.forward(0, [LayerPass(source, weights), LayerPass(quantized, weights, fail_once)], tap, {sites[-1]: [pairs]})
    assert failed and spilled == [source.hidden, quantized.hidden]
    assert pairs.discarded == 1
    assert len(pairs.counted) == len(batches())
    alone = OneLane(skeleton_of(tiny("gemma4_e2b")), batches(), IN_MEMORY)
    alone.step(0, weights)
    assert states(source) == states(quantized) == states(alone)


def test_calls_with_own_stores_still_share_them_and_leave_the_others_alone() -> None:
    store: UserDict[str, int] = UserDict({"kept": 1})
    calls = [LayerCall((), {"store": store, "deep": [{"same": store}, store]}), LayerCall((store,), {})]
    first, second = own_stores(calls)
    assert first.kwargs["store"] is second.args[0] is first.kwargs["deep"][1]
    assert first.kwargs["store"] is not store and first.kwargs["store"] == store
    first.kwargs["store"]["new"] = 2
    assert store == {"kept": 1}
