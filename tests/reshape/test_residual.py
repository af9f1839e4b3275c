"""The order of the residual stream: which tensors follow it, and where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from nvquant.checkpoint.reordered import reordered
from nvquant.reshape.residual import dealt, layer_axes, outer_axes, share_of_energy
from support.conversions import TinyModels, experts_in_bf16, planned, random_samples
from support.folding import walked_layers
from support.tiny_models import tiny_cohere
from torch import Tensor

ORDERED = ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gemma4_text", "cohere"]
HIDDEN = 64  # of most tiny models


@pytest.fixture
def folder(tiny: TinyModels, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    name: str = request.param
    return tiny_cohere(tmp_path / "cohere") if name == "cohere" else tiny(name)


def hidden_size(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["hidden_size"])


def all_axes(folder: Path) -> dict[str, int]:
    plan, size = planned(folder), hidden_size(folder)
    outer = {name: info.shape for name, info in plan.source.infos().items() if plan.layer_of(name) is None}
    found = outer_axes(outer, plan.selection.roles, size)
    assert not found.reason
    axes = dict(found.axes)
    for layer in walked_layers(folder):
        of_layer = layer_axes(layer.trial, layer.tensors, size)
        assert not of_layer.reason
        axes |= of_layer.axes
    return axes


@pytest.mark.parametrize("folder", ORDERED, indirect=True)
@torch.no_grad()
def test_the_reordered_model_has_the_logits_of_the_source(folder: Path) -> None:
    axes = all_axes(folder)
    order = torch.randperm(hidden_size(folder), generator=torch.Generator().manual_seed(3)).tolist()
    changed = reordered(planned(folder).source, order, axes)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
    ids = random_samples((32,))[0].unsqueeze(0)
    before = model(ids).logits
    state = {name: changed.read(name).float() for name in changed.infos()}
    _missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert float((model(ids).logits - before).abs().max()) < 1e-3
    assert any(not torch.equal(planned(folder).source.read(name), changed.read(name)) for name in axes)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_e2b", "gemma4_unified", "gemma4_moe"])
def test_a_model_with_towers_or_more_readers_has_no_order(tiny: TinyModels, name: str) -> None:
    plan = planned(tiny(name), experts_in_bf16("nvfp4"))
    outer = {key: info.shape for key, info in plan.source.infos().items() if plan.layer_of(key) is None}
    assert "may read hidden states" in outer_axes(outer, plan.selection.roles, HIDDEN).reason


def test_a_layer_whose_router_reads_the_stream_otherwise_has_no_order(tiny: TinyModels) -> None:
    layer = next(walked_layers(tiny("gemma4_moe"), experts_in_bf16("nvfp4-full")))
    found = layer_axes(layer.trial, layer.tensors, HIDDEN)
    assert not found.axes
    assert found.reason == "a layer's output does not follow the order"


def test_channels_are_dealt_out_to_the_blocks_by_score() -> None:
    scores = torch.arange(64, dtype=torch.float64).flip(0)  # channel 0 is the largest
    order = dealt(scores)
    assert sorted(order) == list(range(64))
    blocks = [order[at : at + 16] for at in range(0, 64, 16)]
    assert [block[:3] for block in blocks] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    totals = [float(scores[block].sum()) for block in blocks]
    assert max(totals) - min(totals) <= 3 * 16


def test_a_channel_counts_by_its_share_at_each_site() -> None:
    loud, quiet = torch.tensor([100.0, 300.0]).double(), torch.tensor([0.03, 0.01]).double()
    shares: Tensor = share_of_energy([loud, quiet])
    assert shares.tolist() == pytest.approx([1.0, 1.0])
    assert share_of_energy([torch.zeros(2).double()]).tolist() == [0.0, 0.0]
