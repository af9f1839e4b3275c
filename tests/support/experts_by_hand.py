"""Quantized experts, made and emulated without `nvquant convert`.

The maker uses the package's number formats. The emulation shares no code with the package: it decodes as
`support.emulation` does, and calls the experts one by one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from nvquant.format.blocks import quantize_blocks
from nvquant.format.declared import numbers_of
from nvquant.format.layouts import LAYOUTS, Layout
from nvquant.format.scales import global_scale
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .emulation import Rounding, decode_tensors, read_tensors

PATTERN = r"re:.*\.experts\.\d+\.(gate|up|down)_proj$"
PROJECTIONS = ("gate", "up", "down")
_NUMBERS = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


class OneByOne(nn.Module):
    """The experts of a layer, each with matrices of its own. Notes the largest inputs of both products.

    Args:
        weights: gate, up and down of each expert, float32.
        rounds: rounds the input of each of them, or None for no rounding.
    """

    def __init__(self, weights: list[list[Tensor]], rounds: list[list[Rounding | None]], act_fn: Any) -> None:
        super().__init__()
        self._weights, self._rounds, self._act_fn = weights, rounds, act_fn
        self.amax = [0.0, 0.0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts modules of transformers: [tokens, hidden size], [tokens, k] and [tokens, k]."""
        total = torch.zeros_like(hidden_states)
        for expert in range(len(self._weights)):
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            gate, up = (self._product(hidden_states[token], expert, at) for at in (0, 1))
            inner = self._act_fn(gate) * up
            made = self._product(inner, expert, 2)
            for at, inputs in enumerate((hidden_states[token], inner)):
                self.amax[at] = max(self.amax[at], float(inputs.abs().amax()))
            total.index_add_(0, token, made * top_k_weights[token, choice, None])
        return total

    def _product(self, inputs: Tensor, expert: int, at: int) -> Tensor:
        rounded = self._rounds[expert][at]
        return nn.functional.linear(inputs if rounded is None else rounded(inputs), self._weights[expert][at])


def load_experts_emulation(checkpoint: Path) -> transformers.PreTrainedModel:
    """`load_emulation` for a model whose experts are stored one by one, quantized or not."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state, rounds = decode_tensors(read_tensors(checkpoint))
    for name, module in _experts(model):
        count = len({key.removeprefix(f"{name}.").split(".")[0] for key in state if key.startswith(f"{name}.")})
        members = [[f"{name}.{at}.{part}_proj" for part in PROJECTIONS] for at in range(count)]
        weights = [[state.pop(f"{member}.weight") for member in row] for row in members]
        parent, _, leaf = name.rpartition(".")
        own = OneByOne(weights, [[rounds.get(member) for member in row] for row in members], module.act_fn)
        setattr(model.get_submodule(parent), leaf, own)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _experts(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]


@torch.no_grad()
def quantize_experts(source: Path, folder: Path, layout_name: str, scheme_name: str, ids: list[int]) -> Path:
    """A checkpoint of a small source in one shard, with its experts in NVFP4. Gate and up of an expert share a global
    scale, and all experts of a layer the input scales, from the inputs that these token ids give."""
    model = load_experts_emulation(source)
    model(input_ids=torch.tensor([ids]), use_cache=False)
    amax = {name: module.amax for name, module in _experts(model)}
    shutil.copytree(source, folder)
    layout = LAYOUTS[layout_name]
    tensors = load_file(folder / "model.safetensors")
    made = dict(_made(tensors, amax, layout, scheme_name))
    assert made
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _config(layout_name, scheme_name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _made(
    tensors: Mapping[str, Tensor], amax: Mapping[str, list[float]], layout: Layout, scheme_name: str
) -> Iterator[tuple[str, Tensor]]:
    scheme = layout.schemes[scheme_name]
    names = layout.suffixes(scheme)
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        experts = module.rpartition(".")[0].rpartition(".")[0]
        if experts not in amax:
            yield key, tensor
            continue
        leaf = module.rpartition(".")[2]
        parent = module.rpartition(".")[0]
        sharing = ["down_proj"] if leaf == "down_proj" else ["gate_proj", "up_proj"]
        largest = max(float(tensors[f"{parent}.{one}.weight"].float().abs().amax()) for one in sharing)
        quantized = quantize_blocks(tensor, global_scale(torch.tensor(largest)))
        yield f"{module}.{names['codes']}", quantized.packed
        yield f"{module}.{names['scales']}", quantized.scales
        yield f"{module}.{names['weight_global']}", layout.stored_scalar("weight_global", largest)
        if "input_global" in scheme.parts(16, 16):
            seen = amax[experts][leaf == "down_proj"]
            yield f"{module}.{names['input_global']}", layout.stored_scalar("input_global", seen)


def _config(layout_name: str, scheme_name: str) -> dict[str, Any]:
    if layout_name == "compressed-tensors":
        inputs = None if scheme_name == "nvfp4-a16" else {**_NUMBERS, "dynamic": "local"}
        group = {"targets": [PATTERN], "weights": {**_NUMBERS, "dynamic": False}, "input_activations": inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"targets": ["Linear"], **numbers_of(scheme_name)}},
        "ignore": ["lm_head", "*self_attn*", "*mlp.gate", "*embed_tokens*"],
    }
