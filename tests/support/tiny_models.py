"""Tiny random BF16 checkpoints as the Hub has them: shards, index, config, generation settings, tokenizer, template.

`tiny_x(folder)` writes one and returns the folder; `build_x()` makes the same model in memory, equal bit by bit because
the seed is fixed. Weights are pushed off their initial values (`perturb`), so that a norm, bias or `layer_scalar` that
gets lost changes the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from support.raw_safetensors import read_raw, split_file, write_raw
from support.tiny_tokenizer import FAMILIES, special_ids, write_tiny_tokenizer

if TYPE_CHECKING:  # importing them takes seconds, which collection does without
    from transformers import PreTrainedConfig, PreTrainedModel

CLIP_BOUND = 16.0


def perturb(model: PreTrainedModel, seed: int) -> None:
    """Move every weight off its initial value, in place and seeded.

    Layer scalars become 0.3 + 0.1·(i mod 5), vectors w·(1 + 0.2·noise), or 0.2·noise where all zero, and matrices in
    layers four times as large. Clip bounds, infinite at first, become finite as in released checkpoints. Buffers that
    are not stored stay.

    Gemma 4 divides no attention score by √head_dim: its q and k norms carry that. Without it, attention here is so
    sharp that BF16 rounding alone changes three predictions in four, and no comparison of logits means anything.
    """
    attention_unscaled = model.config.model_type.startswith("gemma4")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith("layer_scalar"):
                weight.fill_(0.3 + 0.1 * (int(name.split(".")[-2]) % 5))
            elif weight.ndim == 0:
                weight.clamp_(-CLIP_BOUND, CLIP_BOUND)
            elif weight.ndim == 1:
                noise = 0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
                weight.copy_(weight * (1 + noise) if weight.any() else noise)
                if attention_unscaled and name.endswith(("q_norm.weight", "k_norm.weight")):
                    weight.mul_(len(weight) ** -0.25)
            elif ".layers." in name:
                weight.mul_(4)


def _build(class_name: str, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Not model.to(bfloat16): that would round the F32 rotary tables too.
        model: PreTrainedModel = getattr(transformers, class_name)._from_config(config, dtype=torch.bfloat16)
    perturb(model, seed)
    return model.eval()


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def as_released(config: dict[str, Any]) -> None:
    """Give a Gemma 4 config.json the release's form: two `global` keys where transformers writes `per_layer_config`."""
    text = config.get("text_config", config)
    full_layer = next(iter(text.pop("per_layer_config").values()))
    text["global_head_dim"] = full_layer["head_dim"]
    text["num_global_key_value_heads"] = full_layer.get("num_key_value_heads")


def _generation_settings(family_name: str, vocab_size: int) -> dict[str, Any]:
    family, ids = FAMILIES[family_name], special_ids(family_name, vocab_size)
    settings: dict[str, Any] = {
        "bos_token_id": ids[family.bos] if family.bos else None,
        "eos_token_id": ids[family.eos],
        "pad_token_id": ids[family.pad] if family.pad else None,
    }
    if family_name == "gemma4":
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
        settings |= {"eos_token_id": [ids[family.eos], ids[family.turn_end]], **sampling}
    return {key: value for key, value in settings.items() if value is not None}


def save_tiny(model: PreTrainedModel, folder: Path, *, tokenizer: str, shards: int, base: bool) -> Path:
    """Write a whole checkpoint folder; with one shard there is no index, as on the Hub."""
    model.save_pretrained(folder)
    if model.config.model_type.startswith("gemma4"):
        _edit_json(folder / "config.json", as_released)
    if shards > 1:
        split_file(folder / "model.safetensors", shards)
    vocab_size = model.config.get_text_config().vocab_size
    settings = _generation_settings(tokenizer, vocab_size)
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return write_tiny_tokenizer(folder, tokenizer, vocab_size=vocab_size, base=base)


def _token_ids(family_name: str, vocab_size: int) -> dict[str, int | None]:
    settings = _generation_settings(family_name, vocab_size)
    ids = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ids | {"eos_token_id": special_ids(family_name, vocab_size)[FAMILIES[family_name].eos]}


def _plain_values(family_name: str, **changes: Any) -> dict[str, Any]:
    values = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    } | changes
    return values | _token_ids(family_name, values["vocab_size"])


def build_llama(
    *, num_layers: int = 3, tied: bool = True, family: str = "llama", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Llama: 4 heads of 16, 2 KV heads; `changes` are further config values, such as hidden_size."""
    values = _plain_values(family, num_hidden_layers=num_layers, tie_word_embeddings=tied, **changes)
    return _build("LlamaForCausalLM", transformers.LlamaConfig(**values), seed)


def tiny_llama(folder: Path, *, shards: int = 2, base: bool = False, family: str = "llama", **build: Any) -> Path:
    """Write `build_llama(**build)`; family `smollm2` gives it the tokenizer whose BOS is the turn marker."""
    return save_tiny(build_llama(family=family, **build), folder, tokenizer=family, shards=shards, base=base)


def build_qwen2(*, seed: int = 1, **changes: Any) -> PreTrainedModel:
    """Qwen2: biases on q, k and v."""
    return _build("Qwen2ForCausalLM", transformers.Qwen2Config(**_plain_values("qwen", **changes)), seed)


def tiny_qwen2(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_qwen2(**build)`; its tokenizer has no BOS."""
    return save_tiny(build_qwen2(**build), folder, tokenizer="qwen", shards=shards, base=base)


def build_qwen3(*, seed: int = 2, **changes: Any) -> PreTrainedModel:
    """Qwen3: norms on each head of q and k."""
    return _build("Qwen3ForCausalLM", transformers.Qwen3Config(**_plain_values("qwen", **changes)), seed)


def tiny_qwen3(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_qwen3(**build)`; its tokenizer has no BOS."""
    return save_tiny(build_qwen3(**build), folder, tokenizer="qwen", shards=shards, base=base)


def build_qwen3_moe(*, seed: int = 11, **changes: Any) -> PreTrainedModel:
    """Qwen3 with 8 experts in each layer, 2 of them for each token. They are stored one by one."""
    values = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    config = transformers.Qwen3MoeConfig(**_plain_values("qwen", **values | changes))
    return _build("Qwen3MoeForCausalLM", config, seed)


def tiny_qwen3_moe(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_qwen3_moe(**build)`; its tokenizer has no BOS."""
    return save_tiny(build_qwen3_moe(**build), folder, tokenizer="qwen", shards=shards, base=base)


def build_phi3(*, seed: int = 3, **changes: Any) -> PreTrainedModel:
    """Phi-3: q, k, v in one matrix and gate, up in one matrix, on disk too; untied head."""
    values = _plain_values("llama", **({"tie_word_embeddings": False} | changes))
    # Phi-3's own default pad id lies beyond a tiny vocabulary.
    return _build("Phi3ForCausalLM", transformers.Phi3Config(**values | {"pad_token_id": 0}), seed)


def tiny_phi3(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_phi3(**build)`."""
    return save_tiny(build_phi3(**build), folder, tokenizer="llama", shards=shards, base=base)


def build_cohere(*, seed: int = 11, **changes: Any) -> PreTrainedModel:
    """Cohere: attention and MLP side by side behind one norm, which subtracts the mean."""
    values = _plain_values("llama", **changes)
    return _build("CohereForCausalLM", transformers.CohereConfig(**values), seed)


def tiny_cohere(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_cohere(**build)`."""
    return save_tiny(build_cohere(**build), folder, tokenizer="llama", shards=shards, base=base)


def build_gemma2(*, seed: int = 4, **changes: Any) -> PreTrainedModel:
    """Gemma 2: four norms a layer, weights stored as w - 1, soft caps, every other layer with a window of 16."""
    values = _plain_values("gemma4", **changes) | {"sliding_window": 16, "query_pre_attn_scalar": 16}
    return _build("Gemma2ForCausalLM", transformers.Gemma2Config(**values), seed)


def tiny_gemma2(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_gemma2(**build)`; the tokenizer is the Gemma 4 one."""
    return save_tiny(build_gemma2(**build), folder, tokenizer="gemma4", shards=shards, base=base)


def build_gemma3_text(*, seed: int = 5, **changes: Any) -> PreTrainedModel:
    """Gemma 3, text only: two kinds of layers with different rotary tables, window 16, q and k norms."""
    values = _plain_values("gemma4", **changes) | {"sliding_window": 16, "query_pre_attn_scalar": 16}
    values["layer_types"] = ["sliding_attention"] * (values["num_hidden_layers"] - 1) + ["full_attention"]
    return _build("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**values), seed)


def tiny_gemma3_text(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_gemma3_text(**build)`; the tokenizer is the Gemma 4 one."""
    return save_tiny(build_gemma3_text(**build), folder, tokenizer="gemma4", shards=shards, base=base)


WIDER = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "global_head_dim": 128}


def _gemma4_text_values(**changes: Any) -> dict[str, Any]:
    values = {
        "vocab_size": 512,
        "vocab_size_per_layer_input": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "final_logit_softcapping": 30.0,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    } | changes
    return values | _token_ids("gemma4", values["vocab_size"])


def _media_ids(vocab_size: int) -> dict[str, int]:
    ids = special_ids("gemma4", vocab_size)
    keys = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "audio_token_id": "<|audio|>",
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "boa_token_id": "<|audio>",
        "eoa_token_index": "<audio|>",
    }
    return {key: ids[token] for key, token in keys.items()}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 64,
    "pooling_kernel_size": 2,
    "standardize": True,
    "dtype": "bfloat16",
}


def _build_composite(
    text: dict[str, Any], seed: int, vision: dict[str, Any], audio: dict[str, Any] | None
) -> PreTrainedModel:
    config = transformers.Gemma4Config(
        text_config=text, vision_config=VISION | vision, audio_config=audio, **_media_ids(text["vocab_size"])
    )
    return _build("Gemma4ForConditionalGeneration", config, seed)


def build_gemma4(*, wider: bool = False, seed: int = 6, **changes: Any) -> PreTrainedModel:
    """Like the 31B: 5 sliding layers, a full one without v_proj, vision tower, tied head; `changes` are text values."""
    text = _gemma4_text_values(**(WIDER if wider else {}) | changes)
    return _build_composite(text, seed, {"hidden_size": 64, "intermediate_size": 80} if wider else {}, None)


def tiny_gemma4(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_gemma4(**build)`."""
    return save_tiny(build_gemma4(**build), folder, tokenizer="gemma4", shards=shards, base=base)


def build_gemma4_text(*, wider: bool = True, seed: int = 7, **changes: Any) -> PreTrainedModel:
    """The text model alone (`model_type` gemma4_text), by default with head sizes that serving kernels accept."""
    config = transformers.Gemma4TextConfig(**_gemma4_text_values(**(WIDER if wider else {}) | changes))
    return _build("Gemma4ForCausalLM", config, seed)


def tiny_gemma4_text(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_gemma4_text(**build)`."""
    return save_tiny(build_gemma4_text(**build), folder, tokenizer="gemma4", shards=shards, base=base)


def build_gemma4_e2b(*, seed: int = 8, **changes: Any) -> PreTrainedModel:
    """Like E2B: per-layer inputs, audio tower; the last 3 of 8 layers reuse K and V and have an MLP twice as wide."""
    values = {
        "attention_k_eq_v": False,
        "num_global_key_value_heads": None,
        "num_key_value_heads": 1,
        "num_hidden_layers": 8,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "use_bidirectional_attention": None,
    }
    audio = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "output_proj_dims": 48,
        "dtype": "bfloat16",
    }
    return _build_composite(_gemma4_text_values(**values | changes), seed, {}, audio)


def _add_unused_kv(path: Path, text: PreTrainedConfig) -> None:
    """Give the layers that reuse K and V some of their own, copied from the first layer of their kind."""
    entries, data = read_raw(path)
    for i in range(text.num_hidden_layers - text.num_kv_shared_layers, text.num_hidden_layers):
        donor = text.layer_types.index(text.layer_types[i])
        for part in ("k_proj", "v_proj", "k_norm"):
            name = "model.language_model.layers.{}.self_attn." + part + ".weight"
            entry = entries[name.format(donor)]
            begin, end = entry["data_offsets"]
            entries[name.format(i)] = {**entry, "data_offsets": [len(data), len(data) + end - begin]}
            data += data[begin:end]
    write_raw(path, entries, data)


def tiny_gemma4_e2b(
    folder: Path, *, shards: int = 2, base: bool = False, unused_kv: bool = False, **build: Any
) -> Path:
    """Write `build_gemma4_e2b(**build)`; with `unused_kv` all layers have K and V on disk, as in Google's files."""
    model = build_gemma4_e2b(**build)
    save_tiny(model, folder, tokenizer="gemma4", shards=1, base=base)
    if unused_kv:
        _add_unused_kv(folder / "model.safetensors", model.config.text_config)
    if shards > 1:
        split_file(folder / "model.safetensors", shards)
    return folder


def build_gemma4_moe(*, seed: int = 9, **changes: Any) -> PreTrainedModel:
    """Like the 26B: 8 experts of width 32, 2 a token, as 3-D tensors beside the dense MLP."""
    values = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
    return _build_composite(_gemma4_text_values(**values | changes), seed, {}, None)


def tiny_gemma4_moe(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_gemma4_moe(**build)`."""
    return save_tiny(build_gemma4_moe(**build), folder, tokenizer="gemma4", shards=shards, base=base)


def build_gemma4_unified(*, seed: int = 10, **changes: Any) -> PreTrainedModel:
    """Like the 12B: no towers, only projections, whose names in memory differ from those on disk."""
    text = _gemma4_text_values(**changes)
    for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
        del text[key]
    vision = {
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 64,
        "mm_posemb_size": 32,
        "output_proj_dims": 64,
    }
    config = transformers.Gemma4UnifiedConfig(
        text_config=text,
        vision_config=vision | {"dtype": "bfloat16"},
        audio_config={"audio_embed_dim": 32, "dtype": "bfloat16"},
        **_media_ids(text["vocab_size"]),
    )
    return _build("Gemma4UnifiedForConditionalGeneration", config, seed)


def tiny_gemma4_unified(folder: Path, *, shards: int = 2, base: bool = False, **build: Any) -> Path:
    """Write `build_gemma4_unified(**build)`, with the tensor names that transformers writes."""
    return save_tiny(build_gemma4_unified(**build), folder, tokenizer="gemma4", shards=shards, base=base)


BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": build_llama,
    "qwen2": build_qwen2,
    "qwen3": build_qwen3,
    "phi3": build_phi3,
    "gemma2": build_gemma2,
    "gemma3_text": build_gemma3_text,
    "gemma4": build_gemma4,
    "gemma4_text": build_gemma4_text,
    "gemma4_e2b": build_gemma4_e2b,
    "gemma4_moe": build_gemma4_moe,
    "gemma4_unified": build_gemma4_unified,
}

WRITERS: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "phi3": tiny_phi3,
    "gemma2": tiny_gemma2,
    "gemma3_text": tiny_gemma3_text,
    "gemma4": tiny_gemma4,
    "gemma4_text": tiny_gemma4_text,
    "gemma4_e2b": tiny_gemma4_e2b,
    "gemma4_moe": tiny_gemma4_moe,
    "gemma4_unified": tiny_gemma4_unified,
}
