"""A model's weights are the same through every storage: as stored, and decoded from a quantized checkpoint."""

from __future__ import annotations

import pytest
import torch
from nvquant.calibrate.skeleton import wanted_shapes
from nvquant.checkpoint.source import open_checkpoint
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.subject import open_subject
from nvquant.weights.base import Weights, names_by_layer, stored_names
from support.conversions import COMPRESSED_TENSORS, MODELOPT, Conversions, TinyModels, tensors_in
from support.emulation import decode_tensors

CASES = [
    (name, recipe, layout)
    for name in ("llama", "gemma4")
    for recipe in ("nvfp4-full", "nvfp4-fp8")
    for layout in (COMPRESSED_TENSORS, MODELOPT)
]


@pytest.fixture(scope="module")
def done(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    """Converted tiny models; shared, so only to be read."""
    return Conversions(tiny, tmp_path_factory.mktemp("done"))


def test_a_checkpoint_is_its_own_weights(tiny: TinyModels) -> None:
    checkpoint = open_checkpoint(tiny("llama"))
    weights: Weights = checkpoint
    names = names_by_layer(weights, "model.layers")[1]
    assert stored_names(weights, names) == names
    stored = {name: checkpoint.read(name) for name in names}
    assembled = weights.assemble(names, stored, torch.float64)
    assert all(assembled[name] is stored[name] for name in names)
    with pytest.raises(KeyError):
        weights.stored("model.layers.9.mlp.up_proj.weight")


@pytest.mark.parametrize(("name", "recipe", "layout"), CASES)
def test_a_quantized_checkpoint_has_the_names_and_shapes_of_its_source(
    tiny: TinyModels, done: Conversions, name: str, recipe: str, layout: str
) -> None:
    served, source = ServedModel(open_subject(done(name, recipe, layout))), open_checkpoint(tiny(name))
    weights: Weights = served
    assert {key: info.shape for key, info in weights.infos().items()} == {
        key: info.shape for key, info in source.infos().items()
    }
    assert "quantization_config" not in weights.config
    assert wanted_shapes(weights, served.prefix) == wanted_shapes(source, served.prefix)
    assert names_by_layer(weights, served.prefix).keys() == names_by_layer(source, served.prefix).keys()
    layers = [stored_names(weights, names) for names in names_by_layer(weights, served.prefix).values()]
    assert {key for names in layers for key in names} <= set(served.subject.infos)


@pytest.mark.parametrize(("name", "recipe", "layout"), CASES)
def test_a_quantized_checkpoint_is_read_as_its_bytes_say(
    done: Conversions, name: str, recipe: str, layout: str
) -> None:
    """Whole, a few rows, and with its layer, as the tests' own decoder has it."""
    folder = done(name, recipe, layout)
    served, (expected, _) = ServedModel(open_subject(folder)), decode_tensors(tensors_in(folder))
    names = names_by_layer(served, served.prefix)[1]
    stored = {key: served.subject.checkpoint.read(key) for key in stored_names(served, names)}
    layer = served.assemble(names, stored, torch.float32)
    assert set(layer) == set(names)
    for key in names:
        whole = served.read(key).float()
        torch.testing.assert_close(whole, expected[key], rtol=1e-6, atol=0)  # modelopt's multipliers are inverted
        assert torch.equal(layer[key].float(), whole), key
        if whole.ndim == 2:
            rows = [3, 0, len(whole) - 1]
            assert torch.equal(served.read_rows(key, rows).float(), whole[rows]), key
