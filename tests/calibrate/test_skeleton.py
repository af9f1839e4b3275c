"""The model without its weights: on the meta device, filled layer by layer, numerically the model that config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.calibrate.skeleton import load_outer, loaded_layer
from nvquant.errors import EnvironmentLack, InputError
from support.conversions import (
    TinyModels,
    cast_checkpoint,
    edit_config,
    layer_weights,
    random_samples,
    skeleton_of,
    tensors_in,
)
from support.raw_safetensors import read_raw, write_raw
from support.tiny_models import WRITERS, tiny_gemma4, tiny_gemma4_e2b, tiny_llama
from torch import nn

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_e2b": "Gemma4ForConditionalGeneration",
    "gemma4_moe": "Gemma4ForConditionalGeneration",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
}


@pytest.mark.parametrize("name", WRITERS)
def test_it_is_the_base_model_of_the_class_that_config_names_and_holds_no_weight(tiny: TinyModels, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    model_class = getattr(transformers, CLASSES[name])
    assert type(skeleton.model) is type(model_class(skeleton.model.config).base_model)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("name", WRITERS)
def test_every_stored_tensor_of_a_layer_has_its_place_in_it(tiny: TinyModels, name: str) -> None:
    skeleton = skeleton_of(tiny(name))
    for layer in range(len(skeleton.layers)):
        start = f"{skeleton.layer_prefix}.{layer}."
        on_disk = {tensor for tensor in skeleton.source.files if tensor.startswith(start)}
        assert set(skeleton.layer_tensors(layer).values()) == on_disk


def test_unused_keys_and_values_of_sharing_layers_are_left_on_disk(tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny_gemma4_e2b(tmp_path, unused_kv=True))
    assert "model.language_model.layers.7.self_attn.k_proj.weight" in skeleton.source.files
    assert "self_attn.k_proj.weight" not in skeleton.layer_tensors(7)
    assert "self_attn.q_proj.weight" in skeleton.layer_tensors(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma4", "gemma4_moe"])
def test_a_loaded_layer_holds_the_stored_values_and_gives_them_back(
    tiny: TinyModels, name: str, dtype: torch.dtype
) -> None:
    skeleton = skeleton_of(tiny(name), dtype)
    with loaded_layer(skeleton, 1, layer_weights(skeleton, 1)) as layer:
        state = layer.state_dict()
        for inside, outside in skeleton.layer_tensors(1).items():
            assert state[inside].dtype == dtype
            assert torch.equal(state[inside], skeleton.source.read(outside).to(dtype))
    assert all(value.is_meta for value in skeleton.layers[1].state_dict().values())


@pytest.mark.parametrize("error", [KeyError("missing"), RuntimeError("compute")])
def test_a_layer_is_emptied_after_an_error_too(tiny: TinyModels, error: Exception) -> None:
    skeleton = skeleton_of(tiny("llama"))
    tensors = layer_weights(skeleton, 0)
    if isinstance(error, KeyError):
        del tensors["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(type(error)), loaded_layer(skeleton, 0, tensors):
        raise error
    assert all(value.is_meta for value in skeleton.layers[0].state_dict().values())


@pytest.mark.parametrize("source_dtype", [torch.float16, torch.float32])
def test_sources_in_other_dtypes_are_loaded_in_the_dtype_of_the_walk(tmp_path: Path, source_dtype: torch.dtype) -> None:
    skeleton = skeleton_of(cast_checkpoint(tiny_llama(tmp_path), source_dtype), torch.bfloat16)
    with loaded_layer(skeleton, 0, layer_weights(skeleton, 0)) as layer:
        assert {value.dtype for value in layer.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gemma2", "gemma4", "gemma4_e2b"])
def test_token_embeddings_hold_only_the_rows_that_are_asked_for(tiny: TinyModels, name: str) -> None:
    skeleton = skeleton_of(tiny(name), torch.bfloat16)
    ids = torch.tensor([[2, 77, 5, 480, 77]])
    load_outer(skeleton, ids)
    tables = {at: m for at, m in skeleton.decoder.named_modules() if isinstance(m, nn.Embedding)}
    assert len(tables) == (2 if name == "gemma4_e2b" else 1)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.bfloat16).get_decoder()
    for at, table in tables.items():
        assert table.weight.shape[0] == 5  # 0 (padding), 2, 5, 77, 480
        assert torch.equal(table(ids), whole.get_submodule(at)(ids))


def test_an_embedding_asked_for_an_unknown_id_refuses_instead_of_guessing(tiny: TinyModels) -> None:
    skeleton = skeleton_of(tiny("llama"))
    load_outer(skeleton, torch.tensor([2, 77]))
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight looks up ids"):
        skeleton.decoder.get_input_embeddings()(torch.tensor([[2, 78]]))


def test_ids_beyond_the_embedding_are_refused(tiny: TinyModels) -> None:
    with pytest.raises(InputError, match=r"token id 512, but model\.embed_tokens\.weight has 512 rows"):
        load_outer(skeleton_of(tiny("llama")), torch.tensor([2, 512]))


def test_learned_positions_are_no_token_embedding(tmp_path: Path) -> None:
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    transformers.OPTForCausalLM._from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    load_outer(skeleton, random_samples((9,))[0])
    positions = skeleton.decoder.get_submodule("embed_positions")
    assert torch.equal(positions.weight, tensors_in(tmp_path)["model.decoder.embed_positions.weight"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["UnheardOfForCausalLM"]}, "does not know the architecture UnheardOfForCausalLM"),
        ({"architectures": ["X"], "auto_map": {"AutoModel": "m.X"}}, "does not run the code that auto_map names"),
        ({"architectures": ["LlamaConfig"]}, "does not know the architecture LlamaConfig"),
        ({"architectures": []}, "does not know the architecture none"),
        ({"model_type": "unheard_of"}, r"cannot build LlamaForCausalLM from config\.json"),
        ({"hidden_act": "unheard_of"}, r"cannot build LlamaForCausalLM .*KeyError: 'unheard_of'"),
        ({"num_attention_heads": 5}, "cannot build LlamaForCausalLM"),
    ],
)
def test_a_model_that_transformers_cannot_build_is_a_lack_of_the_environment(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    folder = edit_config(tiny_llama(tmp_path), **changes)
    with pytest.raises(EnvironmentLack, match=sentence) as caught:
        skeleton_of(folder)
    assert transformers.__version__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 4}, r"lacks model\.layers\.3\."),
        ({"intermediate_size": 192}, r"mlp\.gate_proj\.weight has shape \[128, 64\], but config\.json .* \[192, 64\]"),
        ({"vocab_size": 600}, r"model\.embed_tokens\.weight has shape \[512, 64\]"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        skeleton_of(edit_config(tiny_llama(tmp_path), **changes))


def test_layers_that_lead_to_no_list_of_the_model_are_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", shards=1)
    header, content = read_raw(folder / "model.safetensors")
    renamed = {name.replace("model.layers.", "model.h."): entry for name, entry in header.items()}
    write_raw(folder / "model.safetensors", renamed, content)
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no list of decoder layers that model\.h\.N of"):
        skeleton_of(folder)


def test_the_list_of_layers_is_found_below_the_decoder(tmp_path: Path) -> None:
    config = transformers.CpmAntConfig(
        vocab_size=512, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=128, num_hidden_layers=2
    )
    transformers.CpmAntForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    skeleton = skeleton_of(tmp_path)
    assert (skeleton.layers_path, skeleton.decoder_path) == ("cpmant.encoder.layers", "cpmant")
    assert type(skeleton.layers[1]).__name__ == "CpmAntTransformerBlock"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma4"])
def test_rotary_tables_stay_float32_and_those_of_the_model(tiny: TinyModels, name: str, dtype: torch.dtype) -> None:
    skeleton = skeleton_of(tiny(name), dtype)
    load_outer(skeleton, torch.tensor([2, 3]))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=dtype).get_decoder()
    tables = {key: value for key, value in skeleton.decoder.named_buffers() if "inv_freq" in key}
    assert tables
    for key, table in tables.items():
        assert table.dtype == torch.float32
        assert torch.equal(table, whole.get_buffer(key))


def test_a_vision_tower_is_never_read(tmp_path: Path) -> None:
    skeleton = skeleton_of(tiny_gemma4(tmp_path))
    load_outer(skeleton, torch.tensor([2, 3]))
    with loaded_layer(skeleton, 0, layer_weights(skeleton, 0)):
        tower = {key: value for key, value in skeleton.model.named_parameters() if "vision" in key}
        assert tower
        assert all(value.is_meta for value in tower.values())
