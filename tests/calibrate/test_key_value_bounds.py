"""Bounds on keys and values are proved for the models that norm them, and no text exceeds them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.key_value_bounds import KeyValueBounds, key_value_bounds
from nvquant.calibrate.taps import KeyValueTap
from nvquant.checkpoint.source import open_checkpoint
from nvquant.recipe.decoder import decoder_prefix
from support.conversions import TinyModels, random_samples, tensors_in
from support.tiny_hybrids import tiny_delta_net, tiny_latent
from support.tiny_models import tiny_qwen3
from torch import Tensor

NORMED = {"gemma4": "kv", "gemma4_e2b": "kv", "gemma4_moe": "kv", "qwen3": "k", "gemma3_text": "k"}
PLAIN = ("llama", "qwen2", "phi3", "gemma2")


def bounds_of(folder: Path) -> list[KeyValueBounds]:
    """The bounds of each layer's only attention module."""
    source = open_checkpoint(folder)
    prefix = decoder_prefix({name: info.shape for name, info in source.infos().items()}, source.config)
    assert prefix is not None
    found = key_value_bounds(source, prefix)
    assert all(list(one) == [f"{prefix}.{layer}.self_attn"] for layer, one in found.items())
    return [bounds for one in found.values() for bounds in one.values()]


def note(seen: dict[str, Tensor], site: str, part: Tensor) -> None:
    seen[site[-1]] = part.clone()


def parts_of(folder: Path, factor: float = 1.0) -> list[dict[str, Tensor]]:
    """Keys and values of each layer in transformers' own forward.

    Args:
        factor: of the weights that make them.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model.get_decoder().layers
    found: list[dict[str, Tensor]] = []
    ids = random_samples((48,))[0].unsqueeze(0)
    with torch.no_grad():
        for layer in layers:
            for name, parameter in layer.named_parameters():
                if name.endswith(("k_proj.weight", "v_proj.weight")):
                    parameter.mul_(factor)
        for layer in layers:
            seen: dict[str, Tensor] = {}
            with KeyValueTap().on(layer, partial(note, seen)):
                model(input_ids=ids, use_cache=False)
            found.append(seen)
    return found


@pytest.mark.parametrize("name", NORMED)
def test_no_key_and_no_value_exceeds_its_bound(tiny: TinyModels, name: str) -> None:
    bounds, parts = bounds_of(tiny(name)), parts_of(tiny(name))
    assert len(bounds) == len(parts)
    for one, seen in zip(bounds, parts, strict=True):
        for half in "kv":
            bound = getattr(one, half)
            assert (bound is not None) == (half in NORMED[name])
            if bound is not None:
                assert 0.2 * bound < float(seen[half].abs().max()) <= bound


@pytest.mark.parametrize("name", PLAIN)
def test_models_without_norms_have_no_bounds(tiny: TinyModels, name: str) -> None:
    assert bounds_of(tiny(name)) == [KeyValueBounds(None, None)] * len(bounds_of(tiny(name)))


@pytest.mark.parametrize("name", ["gemma4", "qwen3"])
def test_what_is_bounded_does_not_grow_with_the_weights_and_what_is_not_does(tiny: TinyModels, name: str) -> None:
    first = bounds_of(tiny(name))[0]
    small, large = parts_of(tiny(name))[0], parts_of(tiny(name), 1024.0)[0]
    for half in "kv":
        ratio = float(large[half].abs().max() / small[half].abs().max())
        assert ratio == pytest.approx(1 if getattr(first, half) is not None else 1024, rel=0.01)


def test_the_bounds_of_gemma_4_are_those_of_the_formula(tiny: TinyModels) -> None:
    tensors = tensors_in(tiny("gemma4"))
    for layer, one in enumerate(bounds_of(tiny("gemma4"))):
        weight = tensors[f"model.language_model.layers.{layer}.self_attn.k_norm.weight"].float()
        width = math.sqrt(len(weight))
        assert one.k is not None
        assert one.v is not None
        assert width * float(weight.abs().max()) < one.k < 1.02 * width * float(weight.abs().max())
        assert width < one.v < 1.01 * width


def test_layers_that_share_keys_and_values_have_the_bounds_of_their_donor(tiny: TinyModels) -> None:
    """That is the last layer of the same kind with keys and values of its own."""
    bounds = bounds_of(tiny("gemma4_e2b"))
    config = transformers.AutoConfig.from_pretrained(tiny("gemma4_e2b")).get_text_config()
    first = config.num_hidden_layers - config.num_kv_shared_layers
    for layer in range(first, config.num_hidden_layers):
        kinds = config.layer_types
        donor = max(other for other in range(first) if kinds[other] == kinds[layer])
        assert bounds[layer] == bounds[donor]


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_rotary_tables_that_lengthen_vectors_raise_the_bound(tmp_path: Path, factor: float) -> None:
    """YaRN multiplies cosines and sines by an attention factor."""
    rope: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": factor}
    folder = tiny_qwen3(tmp_path / "model", rope_parameters=rope, max_position_embeddings=256)
    bounds, parts = bounds_of(folder), parts_of(folder)
    weight = tensors_in(folder)["model.layers.0.self_attn.k_norm.weight"].float()
    expected = math.sqrt(len(weight)) * float(weight.abs().max()) * factor
    for one, seen in zip(bounds, parts, strict=True):
        assert one.k is not None
        assert float(seen["k"].abs().max()) <= one.k
    assert bounds[0].k == pytest.approx(expected, rel=0.03)


def test_only_layers_that_attend_have_modules(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_delta_net(tmp_path / "model"))
    found = key_value_bounds(source, "model.layers")
    kinds = source.config["layer_types"]
    assert {layer for layer, one in found.items() if one} == {
        layer for layer, kind in enumerate(kinds) if kind == "full_attention"
    }


def test_a_model_that_caches_a_latent_vector_has_no_modules(tmp_path: Path) -> None:
    found = key_value_bounds(open_checkpoint(tiny_latent(tmp_path / "model")), "model.layers")
    assert found
    assert not any(found.values())
