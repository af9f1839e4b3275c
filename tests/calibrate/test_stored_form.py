"""Parameters that the Hub stores in another form: a layer is filled as transformers itself loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from nvquant.calibrate.skeleton import loaded_layer
from nvquant.errors import InputError
from safetensors.torch import load_file, save_file
from support.conversions import random_samples, skeleton_of
from support.tiny_hybrids import tiny_experts, tiny_latent


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "deepseek"])
def test_a_layer_of_experts_is_filled_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    folder = tiny_latent(tmp_path) if family == "deepseek" else tiny_experts(tmp_path, family)
    stored = load_file(folder / "model.safetensors")
    assert any(".experts.3." in name for name in stored), "the file has the experts one by one"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    skeleton = skeleton_of(folder)
    tokens = random_samples((8,))[0].reshape(1, -1)
    hidden = torch.randn(1, tokens.shape[1], 64, generator=torch.Generator().manual_seed(0))
    for number, layer in enumerate(reference.model.layers):
        weights = {name: value for name, value in stored.items() if name.startswith(f"model.layers.{number}.")}
        with loaded_layer(skeleton, number, weights) as filled:
            state = filled.state_dict()
            assert list(state) == list(layer.state_dict())
            for name, value in layer.state_dict().items():
                assert torch.equal(state[name], value), name
            assert torch.equal(filled.mlp(hidden), layer.mlp(hidden))
        assert all(value.is_meta for value in skeleton.layers[number].parameters())


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_an_expert_that_is_not_stored_is_missed(family: str, tmp_path: Path) -> None:
    path = tiny_experts(tmp_path, family) / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if ".1." not in name or ".experts.2." not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.experts\.\w+"):
        skeleton_of(tmp_path)


def test_experts_of_unequal_shapes_are_missed(tmp_path: Path) -> None:
    path = tiny_experts(tmp_path, "qwen3") / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name] = tensors[name][:, :16].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.experts\.down_proj"):
        skeleton_of(tmp_path)
