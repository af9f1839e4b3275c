"""Tiny checkpoints of models that servers fuse, draft or route in ways of their own; see `tiny_models`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from support.tiny_models import _build, _plain_values, save_tiny
from torch import Tensor


def tiny_delta_net(folder: Path, **changes: Any) -> Path:
    """Qwen3.5's text model: two layers of gated delta nets, one of full attention. The z projections are large."""
    values = _plain_values("qwen", layer_types=["linear_attention", "linear_attention", "full_attention"], **changes)
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    model = _build("Qwen3_5ForCausalLM", transformers.Qwen3_5TextConfig(**values, **sizes), 21)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("in_proj_z.weight"):
                weight.mul_(3)
    return save_tiny(model, folder, tokenizer="qwen", shards=1, base=True)


def tiny_latent(folder: Path, **changes: Any) -> Path:
    """DeepSeek V3: latent attention; one dense layer, two with experts that are stored one by one."""
    sizes = {
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    values = _plain_values("llama", tie_word_embeddings=False, **sizes, **changes)
    del values["head_dim"]
    values["num_key_value_heads"] = 4
    model = _build("DeepseekV3ForCausalLM", transformers.DeepseekV3Config(**values), 22)
    return save_tiny(model, folder, tokenizer="llama", shards=1, base=True)


def tiny_experts(folder: Path, family: str, **changes: Any) -> Path:
    """Qwen3 MoE or Mixtral, whose experts the Hub has one by one."""
    values = _plain_values("llama", tie_word_embeddings=False, num_experts_per_tok=2, **changes)
    if family == "mixtral":
        config: Any = transformers.MixtralConfig(**values, num_local_experts=4)
        model = _build("MixtralForCausalLM", config, 23)
    else:
        config = transformers.Qwen3MoeConfig(**values, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=1)
        model = _build("Qwen3MoeForCausalLM", config, 24)
    return save_tiny(model, folder, tokenizer="llama", shards=1, base=True)


def add_tensors(folder: Path, more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store further tensors in a checkpoint of one shard; returns them."""
    path = folder / "model.safetensors"
    save_file(
        {**load_file(path), **{name: value.clone() for name, value in more.items()}}, path, metadata={"format": "pt"}
    )
    return more


def draft_layer(folder: Path, layer: str, draft: str) -> dict[str, Tensor]:
    """The tensors of a decoder layer once more, under the names of a draft layer and with other values."""
    generator = torch.Generator().manual_seed(31)
    return {
        draft + name.removeprefix(layer): torch.randn(value.shape, generator=generator).mul(0.05).to(value.dtype)
        for name, value in load_file(folder / "model.safetensors").items()
        if name.startswith(layer)
    }
