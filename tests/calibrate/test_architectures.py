"""Classes that are made in other ways than Llama's: each is walked to its own logits, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.record import finish_batch
from nvquant.calibrate.skeleton import Skeleton
from nvquant.errors import EnvironmentLack, InputError
from nvquant.plan.forecast import forecast_memory
from nvquant.stream.hidden import HiddenBudget
from nvquant.verify.numerics.head import Head
from support.conversions import layer_weights, planned, random_samples, skeleton_of
from support.tiny_models import perturb, tiny_gemma2
from support.walking import OneLane
from torch import Tensor

IN_MEMORY = HiddenBudget(0, 1 << 30, Path("no file is made"))
IDS = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    **IDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
OLD = {**IDS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}


def gemma3n() -> Any:
    """Four axes of hidden states, an inner size of each layer's own, shared keys and values."""
    return transformers.Gemma3nTextConfig(
        **{**SMALL, "num_hidden_layers": 4, "intermediate_size": [128] * 4},
        head_dim=16,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        laurel_rank=8,
        altup_num_inputs=3,
    )


def idefics3() -> Any:
    """A composite model that asks itself for its device, whose first weight is in the vision tower."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Idefics3Config(
        text_config={"model_type": "llama", **SMALL},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        image_token_id=511,
    )


def bamba() -> Any:
    """Layers that return two values, taken apart by the loop."""
    return transformers.BambaConfig(
        **SMALL, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, attn_layer_indices=[1]
    )


def glm_moe_dsa() -> Any:
    """Layers that take the choice of tokens that an earlier layer returns beside its hidden state."""
    return transformers.GlmMoeDsaConfig(
        **{**SMALL, "num_key_value_heads": 4, "num_hidden_layers": 4},
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        index_topk=4,
        index_head_dim=16,
        index_n_heads=4,
        mlp_layer_types=["dense", "dense", "sparse", "sparse"],
        indexer_types=["full", "shared", "full", "shared"],
    )


def deepseek_v4() -> Any:
    """Rotary tables in a dictionary by kind of attention, several streams of hidden states."""
    return transformers.DeepseekV4Config(
        **{**SMALL, "num_key_value_heads": 1},
        head_dim=16,
        q_lora_rank=32,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"],
        sliding_window=16,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=4,
        index_head_dim=16,
        index_topk=16,
        qk_rope_head_dim=2,
    )


# What is special: no sdpa (Bloom, GPT-J, MPT, XGLM), layers called `h` or `blocks`, positions beside the tokens' table
# (GPT-2, OPT), a head's class that calls a part of its base model (OPT), a list of layers below the
# decoder (Bert), a state from layer to layer (RWKV, GLM), weights between the decoder and the head (Bert).
WALKED: dict[str, Callable[[], Any]] = {
    "BloomForCausalLM": lambda: transformers.BloomConfig(**IDS, hidden_size=64, n_layer=3, n_head=4),
    "GPTJForCausalLM": lambda: transformers.GPTJConfig(**OLD, rotary_dim=8),
    "MptForCausalLM": lambda: transformers.MptConfig(vocab_size=512, d_model=64, n_layers=3, n_heads=4),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(**OLD),
    "FalconForCausalLM": lambda: transformers.FalconConfig(
        **IDS, hidden_size=64, num_hidden_layers=3, num_attention_heads=4
    ),
    "OPTForCausalLM": lambda: transformers.OPTConfig(
        **IDS, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4
    ),
    "XGLMForCausalLM": lambda: transformers.XGLMConfig(
        **IDS, d_model=64, ffn_dim=128, num_layers=3, attention_heads=4, max_position_embeddings=256
    ),
    "BambaForCausalLM": bamba,
    "DeepseekV4ForCausalLM": deepseek_v4,
    "GlmMoeDsaForCausalLM": glm_moe_dsa,
    "RwkvForCausalLM": lambda: transformers.RwkvConfig(**IDS, hidden_size=64, num_hidden_layers=3, context_length=64),
    "BertLMHeadModel": lambda: transformers.BertConfig(
        **IDS, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, is_decoder=True
    ),
    "Gemma3nForCausalLM": gemma3n,
    "Idefics3ForConditionalGeneration": idefics3,
}


def write(class_name: str, config: Any, folder: Path) -> Any:
    """Write a BF16 checkpoint into the folder; returns it as transformers loads it, in float32."""
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model = model_class._from_config(config, dtype=torch.bfloat16)
    perturb(model, 0)
    model.save_pretrained(folder)
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def walked(skeleton: Skeleton, ids: Tensor) -> Tensor:
    """What the head multiplies."""
    walk = OneLane(skeleton, [ids[None]], IN_MEMORY, keeps_last=True)
    for layer in range(len(skeleton.layers)):
        walk.step(layer, layer_weights(skeleton, layer))
    return finish_batch(skeleton, ids[None], walk.hidden.fetch(0))[0]


@pytest.mark.parametrize("name", WALKED)
def test_the_walk_and_the_head_give_the_models_own_logits(name: str, tmp_path: Path) -> None:
    model = write(name, WALKED[name](), tmp_path / "model")
    (ids,) = random_samples((20,))
    with torch.no_grad():
        finished = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    skeleton = skeleton_of(tmp_path / "model")
    found = walked(skeleton, ids)
    torch.testing.assert_close(found, finished, rtol=1e-4, atol=1e-4 * float(finished.abs().max()))
    head = Head(skeleton)
    parts = torch.cat([head.logits(found, first, rows.float()) for first, rows in head.parts()], dim=-1)
    torch.testing.assert_close(parts, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_a_model_that_needs_weights_beyond_its_decoder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("FalconForCausalLM", WALKED["FalconForCausalLM"](), tmp_path / "model")
    skeleton = skeleton_of(tmp_path / "model")
    (ids,) = random_samples((20,))

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(type(skeleton.model), "forward", fails)
    with pytest.raises(InputError, match=r"^FalconModel does not run without .*item\(\) cannot be called on meta"):
        OneLane(skeleton, [ids[None]], IN_MEMORY)


# sdpa


def test_a_class_that_refuses_sdpa_computes_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.23 does with Gemma 2, whose caps on attention scores sdpa cannot compute."""
    folder = tiny_gemma2(tmp_path / "model")
    (ids,) = random_samples((20,))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", False)
    skeleton = skeleton_of(folder)
    full: Any = skeleton.full
    assert full.config._attn_implementation == "eager"
    with torch.no_grad():
        finished = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(walked(skeleton, ids), finished, rtol=1e-5, atol=1e-5)


def test_a_part_that_refuses_sdpa_leaves_the_text_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.23 does with Gemma 4's audio tower."""
    write("Idefics3ForConditionalGeneration", idefics3(), tmp_path / "model")
    vision = type(skeleton_of(tmp_path / "model").model.vision_model)
    monkeypatch.setattr(vision, "_supports_sdpa", False)
    full: Any = skeleton_of(tmp_path / "model").full
    assert full.config.text_config._attn_implementation == "sdpa"
    assert full.config.vision_config._attn_implementation == "eager"


def test_another_refusal_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_gemma2(tmp_path / "model")

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("no such activation")

    monkeypatch.setattr(transformers.Gemma2ForCausalLM, "_from_config", fails)
    with pytest.raises(EnvironmentLack, match=r"cannot build Gemma2ForCausalLM .*no such activation"):
        skeleton_of(folder)


def test_an_inner_size_of_each_layers_own_is_planned(tmp_path: Path) -> None:
    write("Gemma3nForCausalLM", gemma3n(), tmp_path / "model")
    assert forecast_memory(planned(tmp_path / "model", "nvfp4"), 8, 64, 1, gpu=False).host_bytes > 0
