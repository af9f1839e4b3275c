"""Checkpoints that other tools write in their own way, and that a server loads: verify passes them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from nvquant.format.fp8 import quantize_rows
from nvquant.verify.structure import verify_structure
from safetensors.torch import load_file, save_file
from support.conversions import converted
from support.conversions import tensors_in as load_tensors
from support.tiny_models import perturb, tiny_llama
from verify.breaking import HF_QUANT_CONFIG, MANIFEST, Stored, Tensors, bytes_of, edit_ct, edit_json, edit_tensors
from verify.checkpoints import Copy

EMBEDDING = "model.embed_tokens.weight"


def failed(folder: Path, source: Path | None = None) -> dict[str, list[str]]:
    """Faults of the checks that fail."""
    report = verify_structure(folder, source)
    return {check.name: list(check.finding.faults) for check in report.checks if not check.passed}


def details(folder: Path, source: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify_structure(folder, source).checks}


# Older exports of modelopt


def make_legacy(folder: Path, cache: str | None = None) -> None:
    """Leave the quantization in hf_quant_config.json alone."""
    with edit_json(folder / "config.json") as config:
        del config["quantization_config"]
    with edit_json(folder / HF_QUANT_CONFIG) as config:
        config["quantization"]["kv_cache_quant_algo"] = cache


def store_cache_scales(tensors: Tensors) -> None:
    scale = bytearray(struct.pack("<f", 0.02))
    file = tensors[EMBEDDING].file
    for layer in range(3):
        for part in "kv":
            tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"] = Stored(file, "F32", [], scale)


def test_an_export_with_hf_quant_config_alone_passes(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign-mo")
    make_legacy(made.folder)
    assert failed(made.folder, made.source) == {}


def test_such_an_export_with_scales_of_an_fp8_cache_passes(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign-mo")
    make_legacy(made.folder, "FP8")
    with edit_tensors(made.folder) as tensors:
        store_cache_scales(tensors)
    assert failed(made.folder, made.source) == {}
    assert details(made.folder, made.source)["kv_cache"] == (
        "FP8 scheme, 6 scales; keys and values: 6 neither proved nor observed"
    )


def test_a_config_group_of_attention_is_no_group_of_matrices(copy: Callable[[str], Copy]) -> None:
    """llm-compressor writes one for a KV cache, and vLLM skips it."""
    made = copy("llama-foreign")
    numbers = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    group = {"targets": ["LlamaAttention"], "input_activations": numbers, "weights": None, "format": None}
    edit_ct(made.folder, lambda config: config["config_groups"].update(group_1=group))
    assert failed(made.folder, made.source) == {}


def test_its_cache_scales_without_a_word_in_the_file_fail(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign-mo")
    make_legacy(made.folder)
    with edit_tensors(made.folder) as tensors:
        store_cache_scales(tensors)
    assert set(failed(made.folder, made.source)) == {"kv_cache", "names"}


def test_its_cache_in_another_format_fails(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign-mo")
    make_legacy(made.folder, "NVFP4")
    assert failed(made.folder, made.source) == {
        "kv_cache": ["kv_cache_scheme is NVFP4, not 8-bit float with one static scale"]
    }


def test_a_layer_that_it_excludes_but_quantizes_fails(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign-mo")
    make_legacy(made.folder)
    with edit_json(made.folder / HF_QUANT_CONFIG) as config:
        config["quantization"]["exclude_modules"].append("model.layers.1*")
    assert list(failed(made.folder, made.source)) == ["config"]


# FP8


def round_to_bf16(tensors: Tensors, name: str) -> torch.Tensor:
    """Store a scale as BF16, as llm-compressor and modelopt do. Returns its values."""
    stored = tensors[name]
    values = torch.frombuffer(stored.data, dtype=torch.float32).bfloat16()
    stored.dtype, stored.data = "BF16", bytes_of(values)
    return values.float()


def test_scales_of_rows_in_bf16_pass(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-fp8-foreign")
    source = load_tensors(made.source)
    with edit_tensors(made.folder) as tensors:
        for name in [name for name in tensors if name.endswith("self_attn.o_proj.weight_scale")]:
            scales = round_to_bf16(tensors, name)
            weight = name.removesuffix("_scale")
            tensors[weight].data = bytes_of(quantize_rows(source[weight], scales[:, None]))
    assert failed(made.folder, made.source) == {}
    assert details(made.folder, made.source)["fp8"].startswith("12 matrices, 576 scales")


def test_scalars_of_fp8_in_bf16_pass_in_either_shape(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-fp8-mo")
    (made.folder / MANIFEST).unlink()
    source = load_tensors(made.source)
    with edit_tensors(made.folder) as tensors:
        for name in [name for name in tensors if name.endswith("self_attn.o_proj.weight_scale")]:
            scale = round_to_bf16(tensors, name)
            round_to_bf16(tensors, name.replace("weight", "input"))
            tensors[name].shape = [1]
            weight = name.removesuffix("_scale")
            tensors[weight].data = bytes_of(quantize_rows(source[weight], scale[0]))
    assert failed(made.folder, made.source) == {}


# Heads


def add_head(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], name: str = "lm_head.weight") -> None:
    with edit_tensors(folder) as tensors:
        stored = tensors[EMBEDDING]
        values = torch.frombuffer(stored.data, dtype=torch.bfloat16).reshape(stored.shape)
        data = bytearray(change(values).contiguous().view(torch.uint8).numpy().tobytes())
        tensors[name] = Stored(stored.file, "BF16", stored.shape, data)


def test_an_equal_copy_of_a_tied_head_passes(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign")
    add_head(made.folder, torch.Tensor.clone)
    assert failed(made.folder, made.source) == {}


def test_a_copy_that_differs_fails_and_says_who_reads_it(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign")
    add_head(made.folder, lambda values: values * 1.5)
    found = failed(made.folder, made.source)
    assert found["names"] == ["lm_head.weight is added"]
    assert found["protected"][0].endswith("use the stored head, older readers use the embedding")


def test_a_head_that_the_source_stores_beside_its_tie_may_not_be_left_out_where_it_differs(
    copy: Callable[[str], Copy], tmp_path: Path
) -> None:
    made = copy("llama-foreign")
    for factor, faults in ((1.0, {}), (1.5, {"names": ["lm_head.weight is missing"]})):
        source = tiny_llama(tmp_path / f"source {factor}", shards=1)
        tensors = load_file(source / "model.safetensors")
        save_file({**tensors, "lm_head.weight": tensors[EMBEDDING] * factor}, source / "model.safetensors")
        assert failed(made.folder, source) == faults


@pytest.mark.parametrize("name", ["output.weight", "transformer.output_layer.weight", "embed_out.weight"])
def test_an_untied_head_of_another_name_passes(name: str, copy: Callable[[str], Copy]) -> None:
    made = copy("untied-a16-ct")
    (made.folder / MANIFEST).unlink()
    with edit_tensors(made.folder) as tensors:
        tensors[name] = tensors.pop("lm_head.weight")
    edit_ct(made.folder, lambda ct: ct.update(ignore=["lm_head"]))
    assert failed(made.folder) == {}


def test_a_tie_that_only_the_class_knows_needs_no_head(copy: Callable[[str], Copy]) -> None:
    made = copy("gemma2-a16-ct")
    (made.folder / MANIFEST).unlink()
    with edit_json(made.folder / "config.json") as config:
        config.pop("tie_word_embeddings", None)
    assert failed(made.folder) == {}


def test_without_a_tie_of_the_class_a_missing_head_fails(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign")
    with edit_json(made.folder / "config.json") as config:
        config.pop("tie_word_embeddings", None)
    assert list(failed(made.folder)) == ["architecture"]


# Tables


def siglip_model(folder: Path) -> tuple[Path, Any]:
    """A Gemma 3 with a SigLIP tower, whose positions are an nn.Embedding."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **ids,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model: Any = transformers.Gemma3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    perturb(model, 0)
    model.save_pretrained(folder)
    return folder, model


def test_tables_of_positions_need_no_entry_in_an_ignore_list_of_linears(tmp_path: Path) -> None:
    source, model = siglip_model(tmp_path / "source")
    made = converted(source, tmp_path / "made", "nvfp4-a16")
    (made / MANIFEST).unlink()
    names = {name for shard in made.glob("*.safetensors") for name in load_file(shard)}
    linears = {name.removeprefix("model.") for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    ends = tuple(linear.removeprefix("language_model.") for linear in linears)
    ignore = [name.removesuffix(".weight") for name in names if name.removesuffix(".weight").endswith(ends)]
    assert any("position_embedding" in name for name in names) and not any("position" in name for name in ignore)
    edit_ct(made, lambda ct: [group.update(targets=["Linear"]) for group in ct["config_groups"].values()])
    edit_ct(made, lambda ct: ct.update(ignore=[*ignore, "lm_head"]))
    assert failed(made, source) == {}
    edit_ct(made, lambda ct: ct.update(ignore=[name for name in [*ignore, "lm_head"] if "out_proj" not in name]))
    assert list(failed(made, source)) == ["config"]


# Rows


def pad(folder: Path, rows: int) -> None:
    """Give the embedding more rows, as tools do that round the vocabulary up."""
    with edit_tensors(folder) as tensors:
        stored = tensors[EMBEDDING]
        stored.data += bytes(rows * stored.shape[1] * 2)
        stored.shape = [stored.shape[0] + rows, stored.shape[1]]


def test_a_vocabulary_that_was_padded_beyond_the_sources_passes(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign")
    pad(made.folder, 64)
    with edit_json(made.folder / "config.json") as config:
        config["vocab_size"] = 576
    assert failed(made.folder, made.source) == {}
    assert details(made.folder, made.source)["untouched"].endswith(f", {EMBEDDING} has 64 extra rows")
    with edit_tensors(made.folder) as tensors:
        tensors[EMBEDDING].data[5 * 128] ^= 1
    assert failed(made.folder, made.source) == {
        "untouched": [f"{EMBEDDING} differs from the source, from byte 640 of 65,536 on"],
    }


def test_rows_that_the_config_does_not_count_fail_as_in_vllm(copy: Callable[[str], Copy]) -> None:
    made = copy("llama-foreign")
    pad(made.folder, 64)
    assert failed(made.folder)["architecture"] == [f"vocab_size is 512, but {EMBEDDING} has 576 rows"]


def test_rows_that_the_models_class_adds_by_itself_pass(tmp_path: Path) -> None:
    """Llama 3.2 Vision has eight more, for its image token."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.MllamaConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False, **ids,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 32, "patch_size": 8, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=512,
    )  # fmt: skip
    model: Any = transformers.MllamaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    made = converted(tmp_path / "source", tmp_path / "made", "nvfp4-a16")
    assert "architecture" not in failed(made, tmp_path / "source")
    with edit_json(made / "config.json") as config_file:
        config_file["text_config"]["vocab_size"] = 511
    assert "has 520 rows" in failed(made)["architecture"][0]
