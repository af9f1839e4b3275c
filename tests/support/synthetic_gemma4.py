"""The 31B Gemma 4 checkpoint without its weights: real tensor names, shapes and dtypes, cut to any number of layers.

Sparse files (holes instead of data) make the whole 62.5 GB model fit in a few kB of disk, for tests of plans and
censuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support.raw_safetensors import lay_out, pack_header, shard_name, tensor_bytes, write_index

Shape = tuple[int, ...]

HIDDEN, INTERMEDIATE, VOCAB = 5376, 21504, 262144
HEADS = 32
KV_HEADS = {"sliding_attention": 16, "full_attention": 4}
HEAD_DIM = {"sliding_attention": 256, "full_attention": 512}
VISION_LAYERS, VISION_HIDDEN, VISION_INTERMEDIATE, VISION_HEAD_DIM = 27, 1152, 4304, 72
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")

TENSORS_31B = 1188
BYTES_31B = 62_546_177_752


def layer_types(layers: int) -> list[str]:
    """Attention kind of each decoder layer: every sixth is full, and the last one, as transformers insists."""
    return ["full_attention" if i % 6 == 5 or i == layers - 1 else "sliding_attention" for i in range(layers)]


def _mlp(prefix: str, hidden: int, intermediate: int, suffix: str) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}mlp.gate_proj{suffix}", (intermediate, hidden)
    yield f"{prefix}mlp.up_proj{suffix}", (intermediate, hidden)
    yield f"{prefix}mlp.down_proj{suffix}", (hidden, intermediate)


def _norms(prefix: str, hidden: int, head_dim: int) -> Iterator[tuple[str, Shape]]:
    for norm in NORMS:
        yield f"{prefix}{norm}.weight", (hidden,)
    yield f"{prefix}self_attn.q_norm.weight", (head_dim,)
    yield f"{prefix}self_attn.k_norm.weight", (head_dim,)


def _decoder_layer(prefix: str, kind: str) -> Iterator[tuple[str, Shape]]:
    q_rows, kv_rows = HEADS * HEAD_DIM[kind], KV_HEADS[kind] * HEAD_DIM[kind]
    yield f"{prefix}layer_scalar", (1,)
    yield from _norms(prefix, HIDDEN, HEAD_DIM[kind])
    yield f"{prefix}self_attn.q_proj.weight", (q_rows, HIDDEN)
    yield f"{prefix}self_attn.k_proj.weight", (kv_rows, HIDDEN)
    if kind == "sliding_attention":  # full layers take V from k_proj
        yield f"{prefix}self_attn.v_proj.weight", (kv_rows, HIDDEN)
    yield f"{prefix}self_attn.o_proj.weight", (HIDDEN, q_rows)
    yield from _mlp(prefix, HIDDEN, INTERMEDIATE, ".weight")


def _vision() -> Iterator[tuple[str, Shape]]:
    for i in range(VISION_LAYERS):
        prefix = f"model.vision_tower.encoder.layers.{i}."
        yield from _norms(prefix, VISION_HIDDEN, VISION_HEAD_DIM)
        for letter in "qkvo":
            yield f"{prefix}self_attn.{letter}_proj.linear.weight", (VISION_HIDDEN, VISION_HIDDEN)
        yield from _mlp(prefix, VISION_HIDDEN, VISION_INTERMEDIATE, ".linear.weight")
    yield "model.vision_tower.patch_embedder.input_proj.weight", (VISION_HIDDEN, 768)
    yield "model.vision_tower.patch_embedder.position_embedding_table", (2, 10240, VISION_HIDDEN)
    yield "model.vision_tower.std_bias", (VISION_HIDDEN,)
    yield "model.vision_tower.std_scale", (VISION_HIDDEN,)
    yield "model.embed_vision.embedding_projection.weight", (HIDDEN, VISION_HIDDEN)


def text_shapes(layers: int = 60) -> dict[str, Shape]:
    """The text model alone, under the names that it has where it is a model of its own."""
    whole = tensor_shapes(layers)
    return {
        name.replace("language_model.", ""): shape for name, shape in whole.items() if name.startswith("model.language")
    }


def text_config(layers: int = 60) -> dict[str, Any]:
    """The content of the text model's config.json."""
    text: dict[str, Any] = config(layers)["text_config"]
    return {"architectures": ["Gemma4ForCausalLM"], **text}


def tensor_shapes(layers: int = 60) -> dict[str, Shape]:
    """Every tensor on disk with its shape; all are BF16. The tied head is not stored."""
    shapes: dict[str, Shape] = {"model.language_model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i, kind in enumerate(layer_types(layers)):
        shapes.update(_decoder_layer(f"model.language_model.layers.{i}.", kind))
    shapes["model.language_model.norm.weight"] = (HIDDEN,)
    shapes.update(_vision())
    return shapes


def config(layers: int = 60) -> dict[str, Any]:
    """The content of config.json in the release's form, with the two `global` keys and no `per_layer_config`."""
    text = {
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        "attention_k_eq_v": True,
        "bos_token_id": 2,
        "enable_moe_block": False,
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "global_head_dim": HEAD_DIM["full_attention"],
        "head_dim": HEAD_DIM["sliding_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": INTERMEDIATE,
        "layer_types": layer_types(layers),
        "max_position_embeddings": 262144,
        "num_attention_heads": HEADS,
        "num_global_key_value_heads": KV_HEADS["full_attention"],
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS["sliding_attention"],
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "vocab_size": VOCAB,
    }
    vision = {
        "model_type": "gemma4_vision",
        "dtype": "bfloat16",
        "head_dim": VISION_HEAD_DIM,
        "hidden_size": VISION_HIDDEN,
        "intermediate_size": VISION_INTERMEDIATE,
        "num_attention_heads": 16,
        "num_hidden_layers": VISION_LAYERS,
        "num_key_value_heads": 16,
        "standardize": True,
        "use_clipped_linears": False,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "audio_config": None,
        "eos_token_id": [1, 106],
        "text_config": text,
        "tie_word_embeddings": True,
        "vision_config": vision,
    }


def _group(shapes: dict[str, Shape], shard_bytes: int) -> list[dict[str, Shape]]:
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        nbytes = tensor_bytes(shape)
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    return groups


def random_values(name: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """BF16 values of a plausible size: scalars 0.3 to 0.7, vectors near 1, matrices of deviation 0.02."""
    if name.endswith("layer_scalar"):
        return torch.full(shape, 0.3 + 0.1 * (int(name.split(".")[-2]) % 5), dtype=torch.bfloat16)
    noise = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
    return 1 + 0.2 * noise if len(shape) == 1 else 0.02 * noise


def write_shards(folder: Path, shapes: dict[str, Shape], *, sparse: bool, shard_bytes: int, seed: int = 0) -> None:
    """Write shards of at most `shard_bytes` of data (one tensor at least) and their index.

    With `sparse` the data are holes that read as zeros; else seeded random values, made and written tensor by tensor.
    """
    groups = _group(shapes, shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    for k, group in enumerate(groups):
        file_name = shard_name(k, len(groups))
        weight_map.update(dict.fromkeys(group, file_name))
        with (folder / file_name).open("wb") as file:
            file.write(pack_header(lay_out(group)))
            if sparse:
                file.truncate(file.tell() + sum(map(tensor_bytes, group.values())))
                continue
            for name, shape in group.items():
                file.write(random_values(name, shape, generator).view(torch.int16).numpy().data)
    write_index(folder, weight_map, sum(map(tensor_bytes, shapes.values())))


def write_synthetic_gemma4(
    folder: Path,
    *,
    layers: int = 60,
    sparse: bool = True,
    shard_bytes: int = 5_000_000_000,
    seed: int = 0,
    text_only: bool = False,
) -> Path:
    """Write config, index and shards of the 31B cut to `layers` decoder layers; see `write_shards`."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = text_shapes(layers) if text_only else tensor_shapes(layers)
    write_shards(folder, shapes, sparse=sparse, shard_bytes=shard_bytes, seed=seed)
    content = text_config(layers) if text_only else config(layers)
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    return folder
