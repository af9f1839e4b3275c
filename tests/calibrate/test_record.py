"""The recording pass: every layer is called as the model calls it, and equal tensors are kept once."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.lanes import Lane
from nvquant.calibrate.record import Handed, LayerCall, RecordedBatch, TensorPool, record_batches
from nvquant.calibrate.skeleton import Skeleton, load_outer
from nvquant.checkpoint.source import Checkpoint
from nvquant.errors import InputError
from nvquant.stream.hidden import HiddenBudget, HiddenStates
from support.conversions import TinyModels, random_samples, skeleton_of
from support.tiny_models import WRITERS
from torch import Tensor, nn

CPU = torch.device("cpu")


def record(skeleton: Skeleton, *batches: Tensor) -> list[RecordedBatch]:
    load_outer(skeleton, torch.cat([batch.flatten() for batch in batches]))
    return list(record_batches(skeleton, batches))


def one(length: int, seed: int = 0) -> Tensor:
    return random_samples((length,), seed)[0].unsqueeze(0)


def calls_of_the_whole_model(folder: Path, batch: Tensor) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True)
    with torch.no_grad():
        model.base_model(input_ids=batch, use_cache=False)
    return calls


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, tuple):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(theirs, UserDict):
        assert type(ours) is type(theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("name", WRITERS)
def test_layers_are_called_as_the_whole_model_calls_them(tiny: TinyModels, name: str) -> None:
    (recorded,) = record(skeleton_of(tiny(name)), one(40))
    theirs = calls_of_the_whole_model(tiny(name), one(40))
    assert len(recorded.calls) == len(theirs)
    assert torch.equal(recorded.hidden, theirs[0][0][0])
    for call, (args, kwargs) in zip(recorded.calls, theirs, strict=True):
        assert_same(call.args, args[1:])
        assert set(call.kwargs) == set(kwargs)
        for key, value in kwargs.items():
            assert_same(call.kwargs[key], value)


@pytest.mark.parametrize("name", WRITERS)
def test_no_cache_is_made(tiny: TinyModels, name: str) -> None:
    (recorded,) = record(skeleton_of(tiny(name)), one(20))
    for call in recorded.calls:
        assert call.kwargs.get("past_key_values") is None
        assert not call.kwargs.get("use_cache")


@pytest.mark.parametrize("name", ["llama", "gemma4"])
def test_the_real_layers_are_back_in_place(tiny: TinyModels, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    before = list(skeleton.layers)
    record(skeleton, one(20))
    assert all(now is then for now, then in zip(skeleton.layers, before, strict=True))


def test_masks_are_those_of_each_length_and_at_most_two(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("gemma4"))
    batches = record(skeleton, *(one(length) for length in (16, 17, 40)))
    kinds = skeleton.decoder.config.layer_types
    for length, batch in zip((16, 17, 40), batches, strict=True):
        masks = [call.kwargs["attention_mask"] for call in batch.calls]
        assert len({id(mask) for mask in masks}) <= 2
        for kind, mask in zip(kinds, masks, strict=True):
            if mask is None:  # means causal; the window is 16
                assert kind == "full_attention" or length <= 16
            else:
                assert kind == "sliding_attention"
                rows, columns = torch.arange(length)[:, None], torch.arange(length)
                assert torch.equal(mask[0, 0], (columns <= rows) & (rows - columns < 16))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma4"])
def test_sequences_of_equal_length_share_masks_and_tables(tiny: TinyModels, name: str) -> None:
    first, second, other = record(skeleton_of(tiny(name)), one(40, 1), one(40, 2), one(24, 3))
    assert not torch.equal(first.hidden, second.hidden)

    def tensors(batch: RecordedBatch) -> list[Tensor]:
        values = chain.from_iterable((*call.args, *call.kwargs.values()) for call in batch.calls)
        flat = chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in values)
        return [value for value in flat if isinstance(value, Tensor)]

    assert all(mine is theirs for mine, theirs in zip(tensors(first), tensors(second), strict=True))
    assert not {id(value) for value in tensors(first)} & {id(value) for value in tensors(other)}


def test_per_layer_inputs_are_each_sequences_own(tiny: TinyModels) -> None:
    first, second = record(skeleton_of(tiny("gemma4_e2b")), one(40, 1), one(40, 2))
    for mine, theirs in zip(first.calls, second.calls, strict=True):
        assert not torch.equal(mine.args[0], theirs.args[0])
    assert len({id(call.args[0]) for call in first.calls}) == len(first.calls)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b", "gemma4_moe", "gemma4_unified"])
def test_a_batch_has_one_store_of_shared_keys_and_values(tiny: TinyModels, name: str) -> None:
    batches = record(skeleton_of(tiny(name)), one(20, 1), one(20, 2))
    stores = [{id(call.kwargs["shared_kv_states"]) for call in batch.calls} for batch in batches]
    assert [len(of_batch) for of_batch in stores] == [1, 1]
    assert stores[0] != stores[1]


def test_media_placeholders_are_embedded_as_padding(tiny: TinyModels) -> None:
    batch = one(20)
    config = transformers.AutoConfig.from_pretrained(tiny("gemma4_e2b"))
    batch[0, 3:6] = config.image_token_id
    (recorded,) = record(skeleton_of(tiny("gemma4_e2b")), batch)
    theirs = calls_of_the_whole_model(tiny("gemma4_e2b"), batch)
    assert torch.equal(recorded.hidden, theirs[0][0][0])
    for call, (args, _) in zip(recorded.calls, theirs, strict=True):
        assert torch.equal(call.args[0], args[1])


class Decoder(nn.Module):
    """A small decoder whose loop is given: real layers' place is taken by the recorders anyway."""

    def __init__(self, loop: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 16)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self._loop = loop

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        return self._loop(self.layers, self.embed_tokens(input_ids))


class Noting(nn.Module):
    """A layer that notes what enters it."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self._seen = seen

    def forward(self, hidden: Tensor, *_args: Any) -> Tensor:
        self._seen.append(hidden)
        return hidden


def skeleton_with(loop: Callable[[nn.ModuleList, Tensor], Tensor]) -> Skeleton:
    decoder = Decoder(loop)
    source = Checkpoint(Path(), {}, {}, {})
    return Skeleton(source, decoder, decoder, decoder, decoder.layers, "", "layers", CPU, torch.float32)


def takes_tuples(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, "argument")[0]
    return hidden


def calls_by_keyword(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden_states=hidden, flag=True)
    return hidden


def adds_between(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden) + 1
    return hidden


def skips_the_last(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in list(layers)[:-1]:
        hidden = layer(hidden)
    return hidden


def asks_for_more(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden).last_hidden_state
    return hidden


def test_layers_that_return_tuples_are_recorded() -> None:
    recorded = record_batches(skeleton_with(takes_tuples), [torch.arange(4).reshape(2, 2)] * 2)
    assert [call for batch in recorded for call in batch.calls] == [LayerCall(("argument",), {})] * 6


def test_hidden_states_given_by_keyword_are_not_an_argument() -> None:
    (recorded,) = record_batches(skeleton_with(calls_by_keyword), [torch.arange(4).reshape(2, 2)])
    assert recorded.hidden.shape == (2, 2, 16)
    assert recorded.calls == [LayerCall((), {"flag": True})] * 3


@pytest.mark.parametrize("loop", [adds_between, skips_the_last, asks_for_more])
def test_a_model_that_does_more_than_chain_its_layers_is_refused(
    loop: Callable[[nn.ModuleList, Tensor], Tensor],
) -> None:
    skeleton = skeleton_with(loop)
    layers = list(skeleton.layers)
    with pytest.raises(InputError, match="Decoder computes between its decoder layers"):
        next(record_batches(skeleton, [torch.arange(4).reshape(2, 2)]))
    assert list(skeleton.layers) == layers


def whole_runs(skeleton: Skeleton) -> list[int]:
    """Grows by the number of sequences whenever the whole model runs."""
    runs: list[int] = []
    skeleton.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: runs.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return runs


def assert_recorded(recorded: RecordedBatch, folder: Path, batch: Tensor) -> None:
    theirs = calls_of_the_whole_model(folder, batch)
    assert torch.equal(recorded.hidden, theirs[0][0][0])
    for call, (args, kwargs) in zip(recorded.calls, theirs, strict=True):
        assert_same(call.args, args[1:])
        assert list(call.kwargs) == list(kwargs)
        assert_same(tuple(call.kwargs.values()), tuple(kwargs.values()))


@pytest.mark.parametrize("name", WRITERS)
def test_later_batches_of_a_shape_are_recorded_as_the_whole_model_calls_its_layers(tiny: TinyModels, name: str) -> None:
    pairs = [torch.stack(random_samples((17, 17), seed)) for seed in range(2)]
    batches = [one(40, 1), one(24, 1), one(40, 2), one(40, 3), pairs[0], one(24, 2), pairs[1], one(24, 3), one(40, 4)]
    skeleton = skeleton_of(tiny(name))
    runs = whole_runs(skeleton)
    for recorded, batch in zip(record(skeleton, *batches), batches, strict=True):
        assert_recorded(recorded, tiny(name), batch)
    # Per-layer inputs are each sequence's own, so that every batch needs the whole model.
    assert len(runs) == (len(batches) if name == "gemma4_e2b" else 6)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_later_batches_have_stores_of_their_own_that_their_layers_share(tiny: TinyModels, name: str) -> None:
    batches = record(skeleton_of(tiny(name)), *(one(20, seed) for seed in range(5)))
    stores = [[call.kwargs["shared_kv_states"] for call in batch.calls] for batch in batches]
    assert all(store is of_batch[0] for of_batch in stores for store in of_batch)
    assert len({id(of_batch[0]) for of_batch in stores}) == 5
    stores[0][0]["layer"] = 1
    assert [len(of_batch[0]) for of_batch in stores] == [1, 0, 0, 0, 0]


def test_equal_batches_prove_nothing(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    runs = whole_runs(skeleton)
    record(skeleton, *(one(20, seed) for seed in (1, 1, 1, 2, 3, 1)))
    assert len(runs) == 4


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_a_later_batch_with_a_placeholder_is_the_whole_models(tiny: TinyModels, name: str) -> None:
    placeholder = transformers.AutoConfig.from_pretrained(tiny(name)).image_token_id
    batches = [one(20, seed) for seed in range(5)]
    batches[3][0, 3:6] = placeholder
    skeleton = skeleton_of(tiny(name))
    runs = whole_runs(skeleton)
    for recorded, batch in zip(record(skeleton, *batches), batches, strict=True):
        assert_recorded(recorded, tiny(name), batch)
    assert len(runs) == 3


def tells_layers_the_sum(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    total = float(hidden.detach().sum())
    for layer in layers:
        hidden = layer(hidden, total)
    return hidden


def tells_layers_what_cannot_be_compared(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    note = object()
    for layer in layers:
        hidden = layer(hidden, note)
    return hidden


def fills_a_store_first(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    store = {"begun": float(hidden.detach().sum())}
    for layer in layers:
        hidden = layer(hidden, store)
    return hidden


def scales_the_embedding(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    hidden = hidden * 8
    for layer in layers:
        hidden = layer(hidden)
    return hidden


@pytest.mark.parametrize(
    "loop", [tells_layers_the_sum, tells_layers_what_cannot_be_compared, fills_a_store_first, scales_the_embedding]
)
def test_where_batches_differ_in_more_than_their_embedding_each_is_recorded_whole(
    loop: Callable[[nn.ModuleList, Tensor], Tensor],
) -> None:
    skeleton = skeleton_with(loop)
    runs = whole_runs(skeleton)
    batches = [torch.tensor([[at, at + 1]]) for at in range(5)]
    recorded = list(record_batches(skeleton, batches))
    assert len(runs) == 5
    for batch, found in zip(batches, recorded, strict=True):
        wanted: list[Tensor] = []
        loop(nn.ModuleList([Noting(wanted)] * 3), skeleton.decoder.get_input_embeddings()(batch))
        assert torch.equal(found.hidden, wanted[0])


def hands_a_table(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    table = {"kind": torch.ones(2)}
    for layer in layers:
        hidden = layer(hidden, table)
    return hidden


def test_a_table_is_no_store_keeps_its_entries_and_loses_what_layers_add() -> None:
    skeleton = skeleton_with(hands_a_table)
    runs = whole_runs(skeleton)
    batches = [torch.tensor([[at, at + 1]]) for at in range(5)]
    recorded = list(record_batches(skeleton, batches))
    assert len(runs) == 2, "equal tables do not require the whole model"
    hidden = HiddenStates(CPU, HiddenBudget(0, 1 << 20, Path("no file is made")))
    lane = Lane("source", skeleton, hidden, [batch.calls for batch in recorded])
    table = lane.call(0, 0).args[0]
    table["added"] = 1
    assert "added" not in lane.call(1, 0).args[0], "each batch has a table of its own"
    lane.empty_stores(0, 0)
    assert list(lane.call(0, 0).args[0]) == ["kind"]


def takes_what_the_first_layer_returns(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    hidden, first = layers[0](hidden)
    for layer in list(layers)[1:]:
        hidden, _ = layer(hidden, state=first)
    return hidden


def test_an_output_of_an_earlier_layer_is_kept_until_the_last_layer_that_takes_it() -> None:
    skeleton = skeleton_with(takes_what_the_first_layer_returns)
    (recorded,) = record_batches(skeleton, [torch.tensor([[1, 2]])])
    assert [list(call.kwargs.values()) for call in recorded.calls] == [[], [Handed(0, 0)], [Handed(0, 0)]]
    hidden = HiddenStates(CPU, HiddenBudget(0, 1 << 20, Path("no file is made")))
    lane = Lane("source", skeleton, hidden, [recorded.calls])
    lane.keep_outputs(0, 0, ("first",))
    lane.keep_outputs(0, 1, ("second",))
    assert lane.call(0, 2).kwargs == {"state": "first"}
    assert lane.outputs == {0: {0: ("first",)}}
    lane.keep_outputs(0, 2, ("third",))
    assert lane.outputs == {0: {}}


def test_layers_that_return_tuples_need_the_whole_model_for_two_batches_only() -> None:
    skeleton = skeleton_with(takes_tuples)
    runs = whole_runs(skeleton)
    batches = [torch.tensor([[at, at + 1]]) for at in range(5)]
    recorded = list(record_batches(skeleton, batches))
    assert len(runs) == 3  # the first batch twice, until it is known that they are tuples
    embed = skeleton.decoder.get_input_embeddings()
    assert all(torch.equal(found.hidden, embed(batch)) for found, batch in zip(recorded, batches, strict=True))
    assert [call for found in recorded for call in found.calls] == [LayerCall(("argument",), {})] * 15


def test_batches_are_recorded_one_by_one_and_layers_are_real_between_them_and_after_giving_up(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("gemma4"))
    layers = list(skeleton.layers)
    batches = [one(20, 1), one(20, 2), torch.full((1, 20), 600)]  # the last one's ids are in no vocabulary
    load_outer(skeleton, torch.cat(batches[:2]))
    recorded = record_batches(skeleton, batches)
    for _ in range(2):
        next(recorded)
        assert all(now is then for now, then in zip(skeleton.layers, layers, strict=True))
    recorded.close()
    assert all(now is then for now, then in zip(skeleton.layers, layers, strict=True))


def test_an_error_of_the_models_own_leaves_the_real_layers_in_place(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    layers = list(skeleton.layers)
    load_outer(skeleton, one(20))
    with pytest.raises(InputError, match="looks up ids"):
        list(record_batches(skeleton, [one(20), torch.full((1, 20), 491)]))
    assert all(now is then for now, then in zip(skeleton.layers, layers, strict=True))


def share(*values: Any) -> list[Any]:
    return [call.args[0] for call in TensorPool().share([LayerCall((value,), {}) for value in values])]


def test_the_pool_tells_equal_sums_apart() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    first, second, again = share(a, b, a.clone())
    assert first is a
    assert second is b
    assert again is a


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([[True, False], [True, True]]),
        torch.arange(5).unsqueeze(0),
        torch.tensor([0.0, float("-inf")], dtype=torch.bfloat16),
        torch.polar(torch.ones(3), torch.arange(3.0)),
    ],
    ids=["boolean mask", "positions", "additive mask", "complex rotary table"],
)
def test_the_pool_keeps_one_of_equal_tensors_inside_of_tuples_too(value: Tensor) -> None:
    first, second = share((value.clone(), 7), (value.clone(), 7))
    assert first[0] is second[0]
    assert first[1] == 7


def test_the_pool_leaves_everything_else_alone() -> None:
    store = UserDict()
    assert share(store, None, "text", 1.5)[0] is store
