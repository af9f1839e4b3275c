"""Tests of the test support: tiny models, tokenizers, the synthetic 31B and the breakages are what they claim to be."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from support import hostile, synthetic_gemma4
from support.hostile import BREAKAGES, FILE_LIES
from support.raw_safetensors import INDEX_NAME
from support.tiny_models import BUILDERS, WRITERS, tiny_gemma4, tiny_gemma4_e2b, tiny_llama
from support.tiny_tokenizer import FAMILIES, special_ids, stdlib_text, write_tiny_tokenizer
from tokenizers import Tokenizer

# Tensors and bytes; those of the multimodal Gemma 4 were computed from the shapes before this code existed.
CENSUS = {
    "llama": (29, 287_616),
    "qwen2": (38, 288_384),
    "qwen3": (35, 287_808),
    "phi3": (21, 353_152),
    "gemma2": (35, 288_384),
    "gemma3_text": (41, 288_576),
    "gemma4": (116, 734_988),
    "gemma4_text": (85, 7_551_244),
    "gemma4_e2b": (295, 1_472_048),
    "gemma4_moe": (164, 1_334_124),
    "gemma4_unified": (96, 730_508),
}
GEMMA4 = [name for name in CENSUS if name.startswith("gemma4")]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]


@cache
def in_memory(name: str) -> transformers.PreTrainedModel:
    return BUILDERS[name]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write(root / name) for name, write in WRITERS.items()}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}
    return tensors


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(10, 490, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def snapshot(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", CENSUS)
def test_saved_model_gives_the_logits_of_the_model_in_memory(folders: dict[str, Path], name: str) -> None:
    model = in_memory(name)
    loaded = type(model).from_pretrained(folders[name], dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", CENSUS)
def test_census_of_the_files(folders: dict[str, Path], name: str) -> None:
    tensors = read_all(folders[name])
    index = json.loads((folders[name] / INDEX_NAME).read_text())
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert (len(tensors), total) == CENSUS[name]
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(tensors)
    assert len(set(index["weight_map"].values())) == 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize("name", CENSUS)
def test_no_vector_has_its_initial_value(folders: dict[str, Path], name: str) -> None:
    vectors = {key: tensor for key, tensor in read_all(folders[name]).items() if tensor.ndim == 1}
    assert vectors
    assert not [key for key, tensor in vectors.items() if tensor.unique().tolist() in ([0.0], [1.0])]


@pytest.mark.parametrize("name", GEMMA4)
def test_losing_layer_scalar_changes_most_predictions(name: str) -> None:
    model = BUILDERS[name]()
    right = logits(model).argmax(-1)
    scalars = [value for key, value in model.state_dict().items() if key.endswith("layer_scalar")]
    assert [round(float(value), 1) for value in scalars[:6]] == [0.3, 0.4, 0.5, 0.6, 0.7, 0.3]
    for value in scalars:
        value.fill_(1.0)
    assert (logits(model).argmax(-1) == right).float().mean() < 0.1


@pytest.mark.parametrize("name", CENSUS)
def test_bf16_rounding_changes_few_predictions(folders: dict[str, Path], name: str) -> None:
    model = in_memory(name)
    exact = type(model).from_pretrained(folders[name], dtype=torch.float32).eval()
    agreement = (logits(model).argmax(-1) == logits(exact).argmax(-1)).float().mean()
    assert agreement > (0.5 if name == "gemma4_moe" else 0.9)  # a rounded router picks other experts


@pytest.mark.parametrize("name", GEMMA4)
def test_config_has_the_released_form_and_loads_as_that_of_transformers(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config_text = (folders[name] / "config.json").read_text()
    saved = json.loads(config_text)
    text = saved.get("text_config", saved)
    assert "per_layer_config" not in config_text
    assert text["global_head_dim"] == 2 * text["head_dim"]
    assert text["num_global_key_value_heads"] == (None if name == "gemma4_e2b" else 1)
    assert text["dtype"] == saved["dtype"] == "bfloat16"
    in_memory(name).config.save_pretrained(tmp_path)
    assert "per_layer_config" in (tmp_path / "config.json").read_text()
    released, rewritten = (
        transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (folders[name], tmp_path)
    )
    assert released["architectures"] == [type(in_memory(name)).__name__]
    assert all(
        released[key] == rewritten[key] for key in (released | rewritten).keys() - {"architectures", "_name_or_path"}
    )


def test_head_is_stored_only_when_untied(folders: dict[str, Path], tmp_path: Path) -> None:
    assert [name for name in CENSUS if "lm_head.weight" in read_all(folders[name])] == ["phi3"]
    assert "lm_head.weight" in read_all(tiny_llama(tmp_path, tied=False))


def test_names_on_disk_follow_each_architecture(folders: dict[str, Path]) -> None:
    names = {name: set(read_all(folder)) for name, folder in folders.items()}
    assert "model.layers.0.self_attn.k_proj.bias" in names["qwen2"]
    assert "model.layers.0.self_attn.k_norm.weight" in names["qwen3"]
    assert {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"} <= names["phi3"]
    full, sliding = "model.language_model.layers.5.self_attn.", "model.language_model.layers.4.self_attn."
    assert {f"{full}k_proj.weight", f"{sliding}v_proj.weight"} <= names["gemma4"]
    assert f"{full}v_proj.weight" not in names["gemma4"]
    assert "model.layers.0.layer_scalar" in names["gemma4_text"]
    assert "model.language_model.layers.0.experts.gate_up_proj" in names["gemma4_moe"]
    assert f"{full}k_proj.weight" not in names["gemma4_e2b"]
    assert "model.vision_embedder.patch_dense.weight" in names["gemma4_unified"]
    assert names["gemma4_unified"] - set(in_memory("gemma4_unified").state_dict())


def test_unused_kv_of_shared_layers_changes_no_logit(tmp_path: Path) -> None:
    folder = tiny_gemma4_e2b(tmp_path, unused_kv=True)
    assert len(read_all(folder)) == CENSUS["gemma4_e2b"][0] + 3 * 3
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    assert torch.equal(logits(model), logits(in_memory("gemma4_e2b")))


def test_wider_gemma4_has_its_computed_size(tmp_path: Path) -> None:
    tensors = read_all(tiny_gemma4(tmp_path, wider=True))
    assert (len(tensors), sum(tensor.nbytes for tensor in tensors.values())) == (116, 7_702_156)


def test_two_runs_write_equal_files_whatever_the_global_seed(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    assert snapshot(tiny_gemma4(tmp_path / "again")) == snapshot(folders["gemma4"])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert snapshot(tiny_llama(tmp_path / "other", seed=99)) != snapshot(folders["llama"])


def test_parameters_of_tiny_llama(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", base=True, num_layers=4, shards=1)
    assert sorted(path.name for path in base.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "model.layers.3.mlp.up_proj.weight" in read_all(base)
    smollm2 = tiny_llama(tmp_path / "smollm2", family="smollm2", shards=5)
    assert len(list(smollm2.glob("*.safetensors"))) == 5
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


@pytest.mark.parametrize("name", CENSUS)
def test_tokenizer_beside_a_model_is_read_as_written(folders: dict[str, Path], name: str) -> None:
    text = stdlib_text()[5000:7000]
    raw = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    assert tokenizer(text).input_ids == raw.encode(text).ids
    assert tokenizer.decode(raw.encode(text).ids, skip_special_tokens=True) == text
    assert tokenizer.chat_template == (folders[name] / "chat_template.jinja").read_text()
    config = in_memory(name).config.get_text_config()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (config.bos_token_id, config.eos_token_id)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocab_size", [512, 1000])
def test_tokenizer_keeps_special_ids_out_of_text(tmp_path: Path, family: str, vocab_size: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        write_tiny_tokenizer(tmp_path, family, vocab_size=vocab_size)
    )
    ids = special_ids(family, vocab_size)
    assert len(tokenizer) == vocab_size
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    assert not set(tokenizer(stdlib_text()[:50_000], add_special_tokens=False).input_ids) & set(ids.values())


def test_each_family_treats_bos_in_its_own_way(tmp_path: Path) -> None:
    read = {
        name: transformers.AutoTokenizer.from_pretrained(write_tiny_tokenizer(tmp_path / name, name))
        for name in FAMILIES
    }
    first = {name: tokenizer("value").input_ids[0] for name, tokenizer in read.items()}
    bos = {name: tokenizer.bos_token_id for name, tokenizer in read.items()}
    assert bos == {"llama": 1, "qwen": None, "smollm2": 1, "gemma4": 2}
    assert [name for name in FAMILIES if first[name] == bos[name]] == ["llama"]
    assert read["smollm2"].bos_token == "<|im_start|>"
    in_chat = {name: read[name].apply_chat_template(CHAT, return_dict=False) for name in FAMILIES}
    assert {name: ids.count(bos[name]) for name, ids in in_chat.items()} == {
        "llama": 1,
        "qwen": 0,
        "smollm2": 2,
        "gemma4": 1,
    }


def test_gemma4_template_switches_thinking(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_tiny_tokenizer(tmp_path, "gemma4"))

    def render(chat: list[dict[str, object]], **options: bool) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)

    user = "<|turn>user\nWhat is 2 + 2?<turn|>\n"
    assert render(CHAT) == f"<bos><|turn>system\nBe brief.<turn|>\n{user}"
    assert render(CHAT[1:], add_generation_prompt=True) == f"<bos>{user}<|turn>model\n<|channel>thought\n<channel|>"
    thinking = {"enable_thinking": True, "add_generation_prompt": True}
    assert render(CHAT[1:], **thinking) == f"<bos><|turn>system\n<|think|><turn|>\n{user}<|turn>model\n"
    assert render(CHAT, **thinking) == f"<bos><|turn>system\n<|think|>Be brief.<turn|>\n{user}<|turn>model\n"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Yes"}]
    assert render(parts) == "<bos><|turn>user\nHi<turn|>\n<|turn>model\nYes<turn|>\n"


def test_synthetic_31b_has_the_published_census_and_takes_no_space(tmp_path: Path) -> None:
    folder = synthetic_gemma4.write_synthetic_gemma4(tmp_path)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            shapes |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}
    assert (len(shapes), 2 * sum(map(prod, shapes.values()))) == (1188, 62_546_177_752)
    assert set(json.loads((folder / INDEX_NAME).read_text())["weight_map"]) == set(shapes)
    assert len(list(folder.glob("*.safetensors"))) == 13
    assert sum(512 * path.stat().st_blocks for path in folder.iterdir()) < 2_000_000


@pytest.mark.parametrize("layers", [8, 60])
def test_synthetic_names_and_shapes_are_those_of_transformers(layers: int) -> None:
    config = transformers.Gemma4Config(**synthetic_gemma4.config(layers))
    with init_empty_weights(include_buffers=True):
        model = transformers.Gemma4ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert synthetic_gemma4.tensor_shapes(layers) == expected


def test_dense_synthetic_shards_hold_the_seeded_values(tmp_path: Path) -> None:
    shapes = {"layers.3.layer_scalar": (1,), "layers.3.norm.weight": (64,), "layers.3.mlp.up_proj.weight": (32, 64)}
    synthetic_gemma4.write_shards(tmp_path, shapes, sparse=False, shard_bytes=1000, seed=5)
    tensors = read_all(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert round(float(tensors["layers.3.layer_scalar"]), 1) == 0.6
    assert 0.01 < tensors["layers.3.mlp.up_proj.weight"].float().std() < 0.03


@pytest.fixture
def good(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["llama"], tmp_path / "model")


@pytest.mark.parametrize("name", BREAKAGES)
def test_every_breakage_changes_the_folder_and_says_where(good: Path, name: str) -> None:
    before = snapshot(good.parent)
    named = BREAKAGES[name](good)
    assert snapshot(good.parent) != before
    assert named
    shutil.rmtree(good)  # one of them is larger than 100 MB


@pytest.mark.parametrize("name", FILE_LIES)
def test_safetensors_refuses_the_file_that_the_breakage_names(good: Path, name: str) -> None:
    shard = good / FILE_LIES[name](good)
    with pytest.raises(SafetensorError), safe_open(shard, framework="pt"):
        pass
    for other in set(good.glob("*.safetensors")) - {shard}:
        with safe_open(other, framework="pt"):
            pass
    shutil.rmtree(good)


@pytest.mark.parametrize("breakage", [hostile.index_names_parent_folder, hostile.index_names_absolute_path])
def test_a_careless_reader_finds_the_file_outside(good: Path, breakage: hostile.Breakage) -> None:
    target = good / breakage(good)
    assert target.resolve().parent == good.resolve().parent
    with safe_open(target, framework="pt") as shard:
        assert shard.keys()


@pytest.mark.parametrize("breakage", [hostile.nan_in_weight, hostile.infinity_in_weight])
@pytest.mark.parametrize("name", ["llama", "gemma4", "phi3"])
def test_exactly_one_weight_is_not_finite(
    folders: dict[str, Path], tmp_path: Path, name: str, breakage: hostile.Breakage
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    named = breakage(folder)
    counts = {key: int((~tensor.isfinite()).sum()) for key, tensor in read_all(folder).items()}
    assert {key: count for key, count in counts.items() if count} == {named: 1}
