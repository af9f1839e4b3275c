"""Folds are found by structure and proved: the logits of the folded model are the source's, and what would not be exact
is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from nvquant.recipe.schema import Recipe
from nvquant.reshape.folding import FoldedLayer, KnownPlaces
from nvquant.reshape.folds import Fold, Heads, Place
from nvquant.reshape.reshaping import Reshaping
from nvquant.reshape.structure import TRIAL_TOLERANCE, error_of
from nvquant.reshape.trial import LayerTrial
from support.conversions import TinyModels, experts_in_bf16, random_samples
from support.folding import WalkedLayer, folded_tensors, walked_layers
from support.tiny_models import WRITERS, tiny_cohere, tiny_llama, tiny_qwen2
from torch import Tensor, nn

FAMILIES = sorted(WRITERS)
NORMS_ADD_ONE = {"gemma2", "gemma3_text"}
WITHOUT_VALUES = {
    "qwen2": "its values have a bias",
    **dict.fromkeys([name for name in FAMILIES if name.startswith("gemma4")], "a norm follows its values"),
}


def recipe_of(name: str) -> str | Recipe:
    return experts_in_bf16("nvfp4-full") if name == "gemma4_moe" else "nvfp4-full"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_fold_of_a_family_is_found_and_no_other(tiny: TinyModels, name: str) -> None:
    for layer in walked_layers(tiny(name), recipe_of(name)):
        folded = layer.fold()
        by_group = {group: fold.place for fold in folded.reshaping.folds for group in fold.place.groups}
        groups = {group.removeprefix(layer.prefix): place for group, place in by_group.items()}
        assert {place.adds_one for place in by_group.values() if place.norm} == {name in NORMS_ADD_ONE}
        assert groups["mlp.gate_up_proj"].norm is not None
        queries = next(key for key in groups if key.startswith("self_attn.q"))
        assert groups[queries].norm == f"{layer.prefix}input_layernorm.weight"
        assert groups["mlp.down_proj"].maker is not None
        assert ("self_attn.o_proj" in groups) == (name not in WITHOUT_VALUES)
        unfolded = {f"{layer.prefix}self_attn.o_proj"} if name in WITHOUT_VALUES else set()
        assert folded.reasons.keys() == unfolded
        assert folded.error < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_folded_model_has_the_logits_of_the_source(tiny: TinyModels, name: str) -> None:
    changed: dict[str, Tensor] = {}
    for layer in walked_layers(tiny(name), recipe_of(name)):
        changed |= folded_tensors(layer, layer.fold())
    assert changed
    ids = random_samples((32,))[0].unsqueeze(0)
    config = transformers.AutoConfig.from_pretrained(tiny(name))
    model = getattr(transformers, config.architectures[0]).from_pretrained(tiny(name), dtype=torch.float32).eval()
    before = model(ids).logits
    stored = {_parameter(model, key): value for key, value in changed.items()}
    moved = max(float((dict(model.named_parameters())[key] - value).abs().max()) for key, value in stored.items())
    _missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected
    assert moved > 0.01
    assert float((model(ids).logits - before).abs().max()) < 1e-3


def _parameter(model: nn.Module, stored: str) -> str:
    """A parameter's name by that of its stored tensor, which lacks the prefix of a model's base in some families."""
    names = dict(model.named_parameters())
    return stored if stored in names else next(name for name in names if name.endswith(stored))


def first_layer(folder: Path) -> WalkedLayer:
    return next(walked_layers(folder))


def error_with(layer: WalkedLayer, place: Place, channels: int) -> float:
    """The error of a layer in which a place is folded, exact or not."""
    exponents = ((torch.arange(channels) % 5 - 2) * 8).to(torch.int8)
    reference = layer.trial.run().output
    reshaping = Reshaping([Fold(place, exponents)], lambda name: layer.tensors[name].float())
    return error_of(layer.trial, reference, layer.tensors, layer.plan.matrices, reshaping)


def test_values_with_a_bias_would_change_the_layer_and_are_left_alone(tmp_path: Path) -> None:
    layer = first_layer(tiny_qwen2(tmp_path / "source"))
    attention = f"{layer.prefix}self_attn"
    place = Place(
        (f"{attention}.o_proj",), (f"{attention}.o_proj",), maker=f"{attention}.v_proj", heads=Heads(2, 2, 16)
    )
    assert error_with(layer, place, 32) > 100 * TRIAL_TOLERANCE
    assert f"{attention}.o_proj" in layer.fold().reasons


def test_the_gate_would_change_the_layer_and_is_not_taken_for_the_maker(tmp_path: Path) -> None:
    layer = first_layer(tiny_llama(tmp_path / "source"))
    down, gate, up = (f"{layer.prefix}mlp.{name}_proj" for name in ("down", "gate", "up"))
    channels = layer.plan.matrices[down].cols
    place = Place((down,), (down,), maker=gate)
    assert error_with(layer, place, channels) > 100 * TRIAL_TOLERANCE
    assert error_with(layer, replace(place, maker=up), channels) <= TRIAL_TOLERANCE


def test_a_norm_that_another_module_reads_would_change_the_layer_and_is_left_alone(tmp_path: Path) -> None:
    """Attention stays as it is, so the fold of its norm would miss three readers."""
    layer = next(walked_layers(tiny_llama(tmp_path / "source"), "nvfp4"))
    groups = {group for fold in layer.fold().reshaping.folds for group in fold.place.groups}
    assert groups == {f"{layer.prefix}mlp.gate_up_proj", f"{layer.prefix}mlp.down_proj"}
    query = f"{layer.prefix}self_attn.q_proj"
    whole = first_layer(tmp_path / "source")
    place = Place((query,), (query,), norm=f"{layer.prefix}input_layernorm.weight")
    assert error_with(whole, place, whole.plan.matrices[query].cols) > 100 * TRIAL_TOLERANCE


def test_two_groups_that_read_one_norm_are_folded_together_or_not_at_all(tmp_path: Path) -> None:
    source = tiny_cohere(tmp_path / "source")
    layer = first_layer(source)
    norm = f"{layer.prefix}input_layernorm.weight"
    readers = {f"{layer.prefix}self_attn.qkv_proj", f"{layer.prefix}mlp.gate_up_proj"}
    places = [fold.place for fold in layer.fold().reshaping.folds if fold.place.norm is not None]
    assert [(place.norm, set(place.groups)) for place in places] == [(norm, readers)]
    assert layer.fold().error < 1e-5
    mlp_alone = next(walked_layers(source, "nvfp4")).fold()
    assert mlp_alone.reasons == {f"{layer.prefix}mlp.gate_up_proj": "no candidate of this layer is exact"}


def places_of(folded: FoldedLayer) -> tuple[Place, ...]:
    return tuple(fold.place for fold in folded.reshaping.folds)


def assert_same_folds(one: FoldedLayer, other: FoldedLayer) -> None:
    assert places_of(one) == places_of(other)
    for first, second in zip(one.reshaping.folds, other.reshaping.folds, strict=True):
        assert torch.equal(first.exponents, second.exponents)
    assert one.reasons == other.reasons


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_places_of_an_equal_layer_are_proved_without_a_search(tiny: TinyModels, name: str) -> None:
    first, second = list(walked_layers(tiny(name)))[:2]
    searched = second.fold()
    folded = first.fold()
    known = KnownPlaces(first.prefix, places_of(folded), folded.reasons).moved(second.prefix)
    with patch.object(LayerTrial, "run", autospec=True, side_effect=LayerTrial.run) as run:
        assert_same_folds(second.fold(known), searched)
    assert run.call_count == 2  # the source, and the folded layer


def test_known_places_that_do_not_hold_in_a_layer_are_searched_anew(tmp_path: Path) -> None:
    layer = first_layer(tiny_llama(tmp_path / "source"))
    down, gate = (f"{layer.prefix}mlp.{name}_proj" for name in ("down", "gate"))
    wrong = KnownPlaces(layer.prefix, (Place((down,), (down,), maker=gate),), {})
    assert_same_folds(layer.fold(wrong), layer.fold())
