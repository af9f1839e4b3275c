"""The work on one layer: which inputs it observes, what it returns, and the steps in which all ranks take part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from nvquant.calibrate.statistics.key_value import KeyValueAmax
from nvquant.calibrate.statistics.ranges import InputRanges, calibrated_amax
from nvquant.convert.kv_cache import cache_bounds
from nvquant.convert.layer import LayerMaker, MadeLayer
from nvquant.convert.matrices import quantize_group
from nvquant.convert.options import ConvertOptions
from nvquant.convert.ranks import Ranks
from nvquant.convert.walking import Observed
from nvquant.convert.watch import Watch
from nvquant.errors import CheckFailed, NvquantError
from nvquant.format.blocks import NonFiniteError
from nvquant.plan.plan import Plan
from nvquant.quantizers import get_quantizer
from nvquant.quantizers.base import GroupInputs
from nvquant.recipe.groups import FusedGroup
from nvquant.recipe.load import load_recipe
from nvquant.recipe.schema import KvCache
from nvquant.reshape.reshaping import UNCHANGED, Reshaping
from nvquant.stream.reading import LoadedLayer
from nvquant.stream.trace import Trace
from support.conversions import TinyModels, planned
from torch import Tensor

LAYER = 1
SHA256 = "5" * 64


class Walked:
    """In the place of a walk in one lane: ones enter every group that is to be observed, or `value`."""

    has_quantized = False

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.asked: list[tuple[int, list[str], bool]] = []

    def observe(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        groups: Sequence[FusedGroup],
        wants_mean_square: bool,
        cached: Sequence[str] = (),
        reshaping: Reshaping = UNCHANGED,
    ) -> Observed:
        assert not reshaping.folds
        self.asked.append((layer, [group.name for group in groups], wants_mean_square))
        found = {group.name: InputRanges(wants_mean_square) for group in groups}
        for group in groups:
            cols = tensors[f"{group.members[0]}.weight"].shape[1]
            found[group.name].observe({"source": torch.full((1, 5, cols), self.value)})
            found[group.name].commit()
        seen = Observed(found, {site: KeyValueAmax() for site in cached}, list(found))
        for amax in seen.cached.values():
            amax.observe({"source": torch.full((1, 2, 5, 16), -self.value)})
            amax.commit()
        return seen


class Steps(Ranks):
    """One of several ranks, which notes how each step ends."""

    def __init__(self, is_owner: bool = True) -> None:
        super().__init__()
        self.is_owner, self.steps = is_owner, list[str]()

    def owns(self, index: int) -> bool:
        return self.is_owner

    @contextmanager
    def step(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.steps.append(type(error).__name__)
            raise
        self.steps.append("done")


def maker_of(plan: Plan, quantizer: str = "rtn", ranks: Ranks | None = None) -> LayerMaker:
    options = ConvertOptions(Path("out"), quantizer)
    return LayerMaker(plan, get_quantizer(quantizer), cache_bounds(plan), ranks or Steps(), Watch(options), Trace())


def loaded(plan: Plan) -> LoadedLayer:
    tensors = {name: plan.source.read(name) for name in plan.tensors_by_layer()[LAYER]}
    return LoadedLayer(LAYER, tensors, SHA256, lambda: None)


def made_of(plan: Plan, walk: Walked | None, quantizer: str = "rtn") -> tuple[MadeLayer, LoadedLayer]:
    layer = loaded(plan)
    with maker_of(plan, quantizer).made(layer, walk) as made:  # type: ignore[arg-type]
        assert made is not None
        return made, layer


def groups_of(plan: Plan) -> list[FusedGroup]:
    return [group for group in plan.groups if group.name.startswith(f"{plan.prefix}.{LAYER}.")]


@pytest.mark.parametrize("name", ["llama", "gemma4"])
@pytest.mark.parametrize("recipe", ["nvfp4-full", "nvfp4-a16"])
def test_the_value_has_every_tensor_of_the_shard_once(tiny: TinyModels, name: str, recipe: str) -> None:
    plan = planned(tiny(name), recipe)
    made, layer = made_of(plan, Walked() if recipe == "nvfp4-full" else None)
    (shard,) = (shard for shard in plan.shards if shard.layer == LAYER)
    assert made.made.keys().isdisjoint(made.kept)
    assert {*made.made, *made.kept} == {entry.name for entry in shard.entries}
    for entry in shard.entries:
        tensor = {**made.made, **made.kept}[entry.name]
        assert tuple(tensor.shape) == entry.shape
    assert all(tensor is layer.tensors[name] for name, tensor in made.kept.items())  # copied as they are
    assert (made.record.layer, made.record.file, made.record.source_sha256) == (LAYER, shard.file, SHA256)
    assert list(made.record.groups) == [group.name for group in groups_of(plan)]


@pytest.mark.parametrize("quantizer", ["rtn", "mse"])
def test_every_group_is_quantized_with_its_statistics(tiny: TinyModels, quantizer: str) -> None:
    plan = planned(tiny("llama"))
    walk = Walked(0.5)
    made, layer = made_of(plan, walk, quantizer)
    chosen = get_quantizer(quantizer)
    assert walk.asked == [(LAYER, [group.name for group in groups_of(plan)], "mean_square" in chosen.needs)]
    ranges = walk.observe(LAYER, layer.tensors, groups_of(plan), "mean_square" in chosen.needs).inputs
    for group in groups_of(plan):
        inputs = GroupInputs(ranges[group.name].result(group.name))
        wanted = quantize_group(plan, group, layer.tensors, inputs, chosen)
        assert all(torch.equal(made.made[name], tensor) for name, tensor in wanted.tensors.items())
        found = made.record.groups[group.name]
        assert found == wanted.record
        assert found.input is not None
        assert (found.input.observed_amax, found.input.tokens) == (0.5, 5)
        assert found.input.calibrated_amax == calibrated_amax(0.5, 0.5)


def test_keys_and_values_without_a_bound_are_observed_and_get_scales(tiny: TinyModels) -> None:
    recipe = load_recipe("nvfp4-full").model_copy(update={"kv_cache": KvCache(dtype="fp8-calibrated")})
    made, _ = made_of(planned(tiny("qwen3"), recipe), Walked(448.0))
    module = f"model.layers.{LAYER}.self_attn"
    assert made.record.kv_cache is not None
    record = made.record.kv_cache[module]
    assert (record.k.observed, record.v.bound, record.v.observed) == (None, None, 448.0)
    assert record.k.bound is not None
    assert {
        name: float(tensor) for name, tensor in made.made.items() if module in name and name.endswith("v_scale")
    } == {f"{module}.v_scale": 2.0}
    assert float(made.made[f"{module}.k_scale"]) == 1


def test_only_inputs_of_w4a4_matrices_are_observed(tiny: TinyModels) -> None:
    walk = Walked()
    made, _ = made_of(planned(tiny("llama"), "nvfp4-a16"), walk)
    assert walk.asked == [(LAYER, [], False)]
    assert {group.input for group in made.record.groups.values()} == {None}


@pytest.mark.parametrize("is_owner", [True, False])
def test_all_ranks_take_part_in_every_step_and_one_gets_the_layer(tiny: TinyModels, is_owner: bool) -> None:
    ranks, plan = Steps(is_owner), planned(tiny("llama"))
    with maker_of(plan, ranks=ranks).made(loaded(plan), Walked()) as made:  # type: ignore[arg-type]
        assert (made is not None) == is_owner
        assert ranks.steps == ["done", "done"]  # observed, quantized
    assert ranks.steps == ["done", "done", "done"]


def test_an_error_of_the_block_ends_the_last_step(tiny: TinyModels) -> None:
    ranks, plan = Steps(), planned(tiny("llama"), "nvfp4-a16")
    maker = maker_of(plan, ranks=ranks)
    with pytest.raises(NvquantError, match="disk"), maker.made(loaded(plan), None):
        raise NvquantError("the disk is full.")
    assert ranks.steps == ["done", "NvquantError"]


def test_a_damaged_weight_is_named_before_the_input_that_it_spoils(tiny: TinyModels) -> None:
    plan = planned(tiny("llama"))
    layer = loaded(plan)
    layer.tensors[f"{plan.prefix}.{LAYER}.input_layernorm.weight"][3] = torch.nan
    with (
        pytest.raises(NonFiniteError, match=r"layers\.1\.input_layernorm\.weight holds a NaN"),
        maker_of(plan).made(layer, Walked(torch.nan)),  # type: ignore[arg-type]
    ):
        pass
    with (
        pytest.raises(CheckFailed, match="NaN or an infinity at the input of"),
        maker_of(plan).made(loaded(plan), Walked(torch.nan)),  # type: ignore[arg-type]
    ):
        pass
