"""Checkpoints of plain dense decoders as headers in memory: names, shapes and dtypes of Llama's form, no file at all.

Shards hold at most 5 GB, in the order in which the Hub's files usually are: names sorted as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvquant.checkpoint.headers import Header, TensorInfo
from nvquant.checkpoint.source import Checkpoint

from .raw_safetensors import shard_name, tensor_bytes

Shape = tuple[int, ...]
SHARD_BYTES = 5_000_000_000
DATA_START = 65_536  # a header of some length: sizes of shards need no more truth than that


@dataclass(frozen=True)
class Dense:
    """Sizes of a decoder with grouped queries and a gated MLP."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool = False

    @property
    def parameters(self) -> int:
        """Of all tensors."""
        return sum(map(tensor_bytes, self.shapes().values())) // 2

    def shapes(self) -> dict[str, Shape]:
        """Every tensor on disk with its shape; all are BF16."""
        found: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            found.update(self._layer(f"model.layers.{layer}."))
        found["model.norm.weight"] = (self.hidden,)
        if not self.is_tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found

    def _layer(self, prefix: str) -> dict[str, Shape]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            f"{prefix}input_layernorm.weight": (self.hidden,),
            f"{prefix}post_attention_layernorm.weight": (self.hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, self.hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, self.hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, self.hidden),
            f"{prefix}self_attn.o_proj.weight": (self.hidden, queries),
            f"{prefix}mlp.gate_proj.weight": (self.intermediate, self.hidden),
            f"{prefix}mlp.up_proj.weight": (self.intermediate, self.hidden),
            f"{prefix}mlp.down_proj.weight": (self.hidden, self.intermediate),
        }

    def config(self) -> dict[str, Any]:
        """The content of config.json that a plan and its forecasts read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": self.is_tied,
            "vocab_size": self.vocabulary,
        }


def headers_only(shapes: dict[str, Shape], config: dict[str, Any]) -> Checkpoint:
    """An opened checkpoint of BF16 tensors that lies nowhere."""
    groups: list[list[TensorInfo]] = [[]]
    at = DATA_START
    for name in sorted(shapes):
        size = tensor_bytes(shapes[name])
        if groups[-1] and at + size > DATA_START + SHARD_BYTES:
            groups.append([])
            at = DATA_START
        groups[-1].append(TensorInfo(name, "BF16", shapes[name], at, at + size))
        at += size
    folder = Path("nowhere")
    shards = {}
    for number, infos in enumerate(groups):
        file = shard_name(number, len(groups))
        shards[file] = Header(folder / file, {info.name: info for info in infos}, {}, DATA_START, infos[-1].end)
    files = {name: file for file, header in shards.items() for name in header.tensors}
    return Checkpoint(folder, config, shards, files)


SMOLLM2_135M = Dense(30, 576, 1536, 9, 3, 64, 49152, is_tied=True)
# config.json of mistralai/Mistral-Large-Instruct-2407 and of meta-llama/Llama-3.1-405B.
MISTRAL_LARGE_123B = Dense(88, 12288, 28672, 96, 8, 128, 32768)
LLAMA_405B = Dense(126, 16384, 53248, 128, 8, 128, 128256)
# No such model is known: the 405B's form, wider and deeper.
DENSE_1T = Dense(184, 20480, 73728, 160, 8, 128, 128256)
