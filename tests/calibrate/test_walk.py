"""The walk is the model: hidden states and inputs of linears are bit for bit those of transformers' own forward."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from nvquant.calibrate.record import LayerCall
from nvquant.calibrate.skeleton import Skeleton
from nvquant.calibrate.statistics.ranges import InputStatistics
from nvquant.calibrate.walk import make_batches, run_layer
from nvquant.errors import CheckFailed
from nvquant.recipe.groups import Fusions
from nvquant.stream.hidden import HiddenBudget
from support.conversions import TinyModels, experts_in_bf16, layer_weights, planned, random_samples, skeleton_of
from support.tiny_models import WRITERS
from support.walking import OneLane
from torch import Tensor, nn

IN_MEMORY = HiddenBudget(0, 1 << 30, Path("no file is made"))
LENGTHS = (40, 40, 7, 24, 16, 17)  # the sliding window is 16
BATCHES = ([0, 1], [2], [3], [4], [5])  # at most two of equal length


@dataclass
class Observed:
    """What hooks saw: outputs of layers in the order of batches, inputs of linears by their names in the checkpoint."""

    outputs: dict[int, list[Tensor]] = field(default_factory=dict)
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def watch(self, layers: nn.ModuleList, prefix: str) -> None:
        for number, layer in enumerate(layers):
            layer.register_forward_hook(self._output_of(number))
            for name, part in layer.named_modules():
                if type(part) is nn.Linear:
                    part.register_forward_pre_hook(self._input_of(f"{prefix}.{number}.{name}"))

    def _output_of(self, number: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            self.outputs.setdefault(number, []).append(hidden.clone())

        return hook

    def _input_of(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, []).append(args[0].clone())

        return hook


def walk_of(skeleton: Skeleton, samples: list[Tensor], batch_size: int = 1) -> OneLane:
    return OneLane(skeleton, make_batches(samples, batch_size), IN_MEMORY)


def full_recipe(name: str) -> Any:
    return experts_in_bf16("nvfp4-full") if name == "gemma4_moe" else "nvfp4-full"


def walked(
    tiny: TinyModels, name: str, dtype: torch.dtype, samples: list[Tensor], batch_size: int
) -> tuple[Observed, dict[str, InputStatistics]]:
    """Walk all layers, statistics of every text linear taken."""
    skeleton = skeleton_of(tiny(name), dtype)
    groups = planned(tiny(name), full_recipe(name)).groups
    seen = Observed()
    seen.watch(skeleton.layers, skeleton.layer_prefix)
    walk = walk_of(skeleton, samples, batch_size)
    statistics: dict[str, InputStatistics] = {}
    for number in range(len(skeleton.layers)):
        mine = [group for group in groups if group.name.startswith(f"{skeleton.layer_prefix}.{number}.")]
        observers = walk.step(number, layer_weights(skeleton, number), mine, True)
        statistics |= {group: ranges.result(group) for group, ranges in observers.items()}
    return seen, statistics


def whole_model(tiny: TinyModels, name: str, dtype: torch.dtype, batches: list[Tensor]) -> Observed:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=dtype).eval()
    seen = Observed()
    seen.watch(model.get_decoder().layers, planned(tiny(name), full_recipe(name)).prefix)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return seen


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest BF16, ties to even, as float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def assert_statistics(found: InputStatistics, inputs: list[Tensor]) -> None:
    """The statistics of inputs, written out in numpy."""
    rows = np.concatenate([tensor.float().numpy().reshape(-1, tensor.shape[-1]) for tensor in inputs])
    blocks = np.abs(rows.reshape(-1, 16)).max(1)
    nonzero = np.sort(to_bf16(blocks[blocks > 0]))
    assert found.tokens == len(rows)
    assert found.amax == np.abs(rows).max()
    assert found.low == nonzero[max(1, -(-len(nonzero) // 100)) - 1]
    assert found.mean_square is not None
    assert found.mean_square.dtype == torch.float64
    expected = (rows.astype(np.float64) ** 2).mean(0)
    np.testing.assert_allclose(found.mean_square.numpy(), expected, rtol=2e-6)  # a sequence is summed in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRITERS)
def test_hidden_states_and_statistics_are_those_of_the_whole_model(
    tiny: TinyModels, name: str, dtype: torch.dtype
) -> None:
    samples = random_samples(LENGTHS)
    seen, statistics = walked(tiny, name, dtype, samples, batch_size=2)
    whole = whole_model(tiny, name, dtype, [torch.stack([samples[at] for at in batch]) for batch in BATCHES])
    whole.outputs.popitem()  # of the last layer, which nobody asks for: the walk leaves it as soon as all is observed
    assert set(seen.outputs) == set(whole.outputs)
    for number, outputs in whole.outputs.items():
        assert len(outputs) == len(BATCHES)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen.outputs[number], outputs, strict=True))
    groups = planned(tiny(name), full_recipe(name)).groups
    assert set(statistics) == {group.name for group in groups}
    for group in groups:
        for member in group.members:
            assert_statistics(statistics[group.name], whole.inputs[member])


def test_models_with_learned_positions_are_walked_too(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    transformers.OPTForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    samples = random_samples((20, 24))
    seen, whole = Observed(), Observed()
    seen.watch(skeleton.layers, skeleton.layer_prefix)
    walk = walk_of(skeleton, samples)
    for number in range(2):
        walk.step(number, layer_weights(skeleton, number), (), False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    whole.watch(model.get_decoder().layers, skeleton.layer_prefix)
    with torch.no_grad():
        for ids in samples:
            model(input_ids=ids.unsqueeze(0), use_cache=False)
    assert set(seen.outputs) == {0}  # nobody asks for what the last layer would give
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen.outputs[0], whole.outputs[0], strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_e2b"])
def test_order_of_the_samples_changes_no_amax_and_no_percentile(tiny: TinyModels, name: str) -> None:
    samples = random_samples(LENGTHS)
    _, forward = walked(tiny, name, torch.float32, samples, batch_size=1)
    _, backward = walked(tiny, name, torch.float32, samples[::-1], batch_size=1)
    for group, found in forward.items():
        other = backward[group]
        assert (found.amax, found.low, found.tokens) == (other.amax, other.low, other.tokens)
        torch.testing.assert_close(found.mean_square, other.mean_square, rtol=1e-12, atol=0)


def test_statistics_leave_the_walk_as_it_is(tiny: TinyModels) -> None:
    skeletons = [skeleton_of(tiny("llama")) for _ in range(2)]
    seen = [Observed(), Observed()]
    for skeleton, record, groups in zip(skeletons, seen, (planned(tiny("llama")).groups, ()), strict=True):
        record.watch(skeleton.layers, "model.layers")
        walk = walk_of(skeleton, random_samples((24,)))
        for number in range(3):
            mine = [group for group in groups if group.name.startswith(f"model.layers.{number}.")]
            walk.step(number, layer_weights(skeleton, number), mine, True)
    assert all(torch.equal(seen[0].outputs[number][0], seen[1].outputs[number][0]) for number in range(2))


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_a_layer_without_groups_is_walked_through_and_not_observed(tiny: TinyModels, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    seen = Observed()
    seen.watch(skeleton.layers, skeleton.layer_prefix)
    walk = walk_of(skeleton, random_samples((24, 7)))
    assert walk.step(0, layer_weights(skeleton, 0), (), True) == {}
    assert all(torch.equal(walk.hidden.fetch(at), seen.outputs[0][at]) for at in range(2))


def test_every_batch_is_announced_and_what_is_raised_then_ends_the_walk(tiny: TinyModels) -> None:
    announced: list[int] = []

    def note(tokens: int) -> None:
        announced.append(tokens)
        if len(announced) == 7:
            raise InterruptedError

    skeleton = skeleton_of(tiny("llama"))
    walk = OneLane(skeleton, make_batches(random_samples((20, 20, 24)), 2), IN_MEMORY, before_batch=note)
    walk.step(0, layer_weights(skeleton, 0), (), False)
    walk.step(1, layer_weights(skeleton, 1), (), False)
    with pytest.raises(InterruptedError):
        walk.step(2, layer_weights(skeleton, 2), planned(tiny("llama")).groups[-1:], False)
    assert announced == [0, 0, 40, 24, 40, 24, 40]  # nothing is counted while calls are recorded
    assert all(value.is_meta for value in skeleton.layers[2].state_dict().values())


def test_a_rank_without_batches_walks_without_recording(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    groups = planned(tiny("llama")).groups[:2]
    observers = OneLane(skeleton, [], IN_MEMORY).step(0, layer_weights(skeleton, 0), groups, True)
    assert [ranges.state()["amax"].tolist() for ranges in observers.values()] == [[], []]
    with pytest.raises(CheckFailed, match=r"calibration never reached model\.layers\.0\."):
        observers[groups[0].name].result(groups[0].name)


def shared_stores(walk: OneLane) -> Iterator[UserDict[str, Any]]:
    for calls in walk.lane.calls:
        yield calls[0].kwargs["shared_kv_states"]


@pytest.mark.parametrize(
    ("name", "kept"), [("gemma4", []), ("gemma4_unified", []), ("gemma4_e2b", ["full_attention", "sliding_attention"])]
)
def test_shared_keys_and_values_are_kept_only_where_a_later_layer_reads_them(
    tiny: TinyModels, name: str, kept: list[str]
) -> None:
    skeleton = skeleton_of(tiny(name))
    walk = walk_of(skeleton, random_samples((20, 24)))
    filled = []
    skeleton.layers[-2].register_forward_hook(
        lambda _module, _args, kwargs, _output: filled.append(sorted(kwargs["shared_kv_states"])), with_kwargs=True
    )
    for number in range(len(skeleton.layers)):
        walk.step(number, layer_weights(skeleton, number), (), False)
    assert all(filled)  # the model did store something, of which nothing may stay where nobody reads it
    assert [sorted(store) for store in shared_stores(walk)] == [kept, kept]


def test_every_batch_has_its_own_store(tiny: TinyModels) -> None:
    walk = walk_of(skeleton_of(tiny("gemma4_e2b")), random_samples((20, 20, 24)))
    assert len({id(store) for store in shared_stores(walk)}) == 3


def test_members_of_a_group_count_their_common_input_once(tiny: TinyModels) -> None:
    _, statistics = walked(tiny, "llama", torch.float32, random_samples((20, 24)), batch_size=1)
    assert {found.tokens for found in statistics.values()} == {44}


def test_an_input_that_is_not_finite_ends_the_walk_with_the_matrix_named(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    walk = walk_of(skeleton, random_samples((8,)))
    weights = layer_weights(skeleton, 0)
    weights["model.layers.0.input_layernorm.weight"][3] = torch.nan
    modules = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv"]
    groups = Fusions(modules, {}).groups(modules)
    with pytest.raises(CheckFailed, match=r"NaN or an infinity at the input of model\.layers\.0\.self_attn\.qkv_proj"):
        walk.step(0, weights, groups, False)[groups[0].name].result(groups[0].name)


def test_a_layer_that_returns_no_hidden_state_is_refused() -> None:
    with pytest.raises(CheckFailed, match="Flatten returned something"):
        run_layer(nn.Flatten(), torch.zeros(1, 4, 16), LayerCall((), {}))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_batches_hold_neighbours_of_equal_length_in_order(lengths: list[int], batch_size: int) -> None:
    samples = [torch.full((length,), number) for number, length in enumerate(lengths)]
    batches = make_batches(samples, batch_size)
    flat = [row for batch in batches for row in batch]
    assert all(torch.equal(row, sample) for row, sample in zip(flat, samples, strict=True))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    for left, right in pairwise(batches):  # no batch could have taken in its successor's first sequence
        assert len(left) == batch_size or left.shape[1] != right.shape[1]
