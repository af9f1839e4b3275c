"""Ways in which a quantized checkpoint can be wrong, and what `verify` must make of each.

A fault takes a copy of a good checkpoint and breaks it in one way, as a tool with that fault would have written it: the
index and the manifest's hashes are brought up to date, unless the fault lies there. `fails` names the checks that must
fail, and no other may; there is more than one only where the fault shows in more than one way, as the comment says.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import open_checkpoint, torch_dtype
from nvquant.format.blocks import quantize_blocks, weight_amax
from nvquant.format.scales import global_scale
from support.raw_safetensors import INDEX_NAME, read_raw, write_index, write_raw

MANIFEST = "nvquant_manifest.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
LAYER = "model.layers.1"  # of the tiny Llama
GEMMA = "model.language_model.layers"
FULL_LAYER = f"{GEMMA}.5"  # the tiny Gemma 4's layer without v_proj


@dataclass
class Stored:
    """A tensor of a checkpoint as stored."""

    file: str
    dtype: str
    shape: list[int]
    data: bytearray

    def scalar(self) -> float:
        """The value of a float32 scalar."""
        return float(torch.frombuffer(self.data, dtype=torch.float32)[0])

    def set_scalar(self, value: float) -> None:
        """Store another value of a float32 scalar."""
        self.data[:] = torch.tensor([value]).view(torch.uint8).numpy().tobytes()


Tensors = dict[str, Stored]


@dataclass(frozen=True)
class Fault:
    """A way to be wrong.

    Attributes:
        on: name of the good checkpoint that it is done to.
        fails: the checks that must fail with `--against`; without it, those of them that need no source.
        apply: breaks the copy in the given folder; returns words that the first failing check must say.
    """

    on: str
    fails: tuple[str, ...]
    apply: Callable[[Path], str]

    @property
    def name(self) -> str:
        return f"{self.apply.__name__}-{self.on}"


FAULTS: list[Fault] = []


def fault(*fails: str, on: str = "llama-ct") -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """List a function as a fault."""

    def register(function: Callable[[Path], str]) -> Callable[[Path], str]:
        FAULTS.append(Fault(on, fails, function))
        return function

    return register


@contextmanager
def edit_tensors(folder: Path) -> Iterator[Tensors]:
    """All tensors of a checkpoint, to be changed, added or removed; the shards, index and hashes follow."""
    tensors: Tensors = {}
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    for file in files:
        entries, data = read_raw(folder / file)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            tensors[name] = Stored(file, entry["dtype"], entry["shape"], bytearray(data[begin:end]))
    yield tensors
    for file in files:
        entries, pieces, at = {}, [], 0
        for name, stored in tensors.items():
            if stored.file == file:
                end = at + len(stored.data)
                entries[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, end]}
                pieces.append(bytes(stored.data))
                at = end
        write_raw(folder / file, entries, b"".join(pieces))
    total = sum(len(stored.data) for stored in tensors.values())
    write_index(folder, {name: stored.file for name, stored in tensors.items()}, total)
    sign(folder)


@contextmanager
def edit_json(path: Path) -> Iterator[dict[str, Any]]:
    """The content of a JSON file, to be changed."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content, indent=2))


def sign(folder: Path) -> None:
    """Bring the manifest's hashes up to date."""
    if (folder / MANIFEST).exists():
        with edit_json(folder / MANIFEST) as manifest:
            for name in manifest["files"]:
                manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()


def flip_last_byte(path: Path) -> None:
    """Change a file by one bit."""
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)


# index


@fault("index")
def total_size_wrong(folder: Path) -> str:
    with edit_json(folder / INDEX_NAME) as index:
        index["metadata"]["total_size"] += 2
    return "total_size"


@fault("index")
def index_points_to_the_wrong_shard(folder: Path) -> str:
    name = f"{LAYER}.mlp.down_proj.weight_packed"
    with edit_json(folder / INDEX_NAME) as index:
        index["weight_map"][name] = "model-00001-of-00004.safetensors"
    return f"{name} is said to lie in model-00001-of-00004.safetensors, but lies in model-00002-of-00004.safetensors"


@fault("index")
def shard_that_the_index_does_not_name(folder: Path) -> str:
    shutil.copyfile(folder / "model-00004-of-00004.safetensors", folder / "consolidated.safetensors")
    with edit_json(folder / MANIFEST) as manifest:
        manifest["files"]["consolidated.safetensors"] = manifest["files"]["model-00004-of-00004.safetensors"]
    return "model.embed_tokens.weight lies in consolidated.safetensors and in model-00004-of-00004.safetensors"


@fault("index")
def index_entry_that_is_no_name(folder: Path) -> str:
    with edit_json(folder / INDEX_NAME) as index:
        index["weight_map"]["model.norm.weight"] = ["model-00004-of-00004.safetensors"]
    return "model.norm.weight is said to lie in ['model-00004-of-00004.safetensors'], which is not a shard"


# layout


@fault("layout", "config")  # without a group nothing has a scheme
def config_group_that_is_no_map(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["config_groups"].update(group_0="nvfp4"))
    return "config_groups is not a map of groups"


@fault("layout", on="llama-mo")
def hf_quant_config_missing(folder: Path) -> str:
    (folder / HF_QUANT_CONFIG).unlink()
    return HF_QUANT_CONFIG


@fault("layout", on="llama-mo")
def hf_quant_config_excludes_less(folder: Path) -> str:
    with edit_json(folder / HF_QUANT_CONFIG) as nested:
        nested["quantization"]["exclude_modules"] = []
    return "exclude_modules"


@fault("layout")
def hf_quant_config_beside_compressed_tensors(folder: Path) -> str:
    (folder / HF_QUANT_CONFIG).write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    return HF_QUANT_CONFIG


@fault("layout")
def format_of_another_compressor(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "float-quantized"
    return "float-quantized"


@fault("layout", "config")  # under modelopt's rules nothing has a scheme
def method_of_the_other_layout(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["quantization_config"]["quant_method"] = "modelopt"
    return "63 tensors are named as compressed-tensors does"


@fault("layout", "config")  # without a config nothing has a scheme
def config_without_quantization(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["quantization_config"]
    return "quantization_config"


# matrices


def _drop(folder: Path, name: str) -> str:
    with edit_tensors(folder) as tensors:
        del tensors[name]
    return " lacks ".join(name.rsplit(".", 1))


@fault("matrices")
def missing_block_scales(folder: Path) -> str:
    return _drop(folder, f"{LAYER}.mlp.up_proj.weight_scale")


@fault("matrices", on="llama-mo")
def missing_global_scale(folder: Path) -> str:
    return _drop(folder, f"{LAYER}.mlp.down_proj.weight_scale_2")


@fault("matrices", "manifest")  # which records the matrix as W4A4
def missing_input_scale(folder: Path) -> str:
    return _drop(folder, f"{LAYER}.mlp.down_proj.input_global_scale")


@fault("matrices", "manifest", on="llama-a16-ct")  # which records the matrix as weight-only
def input_scale_in_a_weight_only_checkpoint(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        scale = tensors[f"{LAYER}.mlp.down_proj.weight_global_scale"]
        tensors[f"{LAYER}.mlp.down_proj.input_global_scale"] = Stored(scale.file, "F32", [1], bytearray(scale.data))
    return f"{LAYER}.mlp.down_proj also holds input_global_scale"


@fault("matrices")
def block_scales_stored_as_bytes(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.mlp.up_proj.weight_scale"].dtype = "U8"
    return f"{LAYER}.mlp.up_proj.weight_scale is U8, not F8_E4M3"


@fault("matrices")
def block_scales_of_another_shape(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.mlp.up_proj.weight_scale"].shape.reverse()
    return f"{LAYER}.mlp.up_proj.weight_scale has shape [4, 128], not [128, 4]"


@fault("matrices", on="llama-mo")
def global_scale_a_row(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{LAYER}.mlp.up_proj.weight_scale_2"]
        stored.shape, stored.data = [2], stored.data * 2
    return f"{LAYER}.mlp.up_proj.weight_scale_2 has shape [2]"


@fault("matrices")
def unquantized_weight_left_beside_the_packed(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        packed = tensors[f"{LAYER}.mlp.up_proj.weight_packed"]
        data = source_bytes(folder, f"{LAYER}.mlp.up_proj.weight")
        tensors[f"{LAYER}.mlp.up_proj.weight"] = Stored(packed.file, "BF16", [128, 64], data)
    return f"{LAYER}.mlp.up_proj also holds weight"


def source_bytes(folder: Path, name: str) -> bytearray:
    """A tensor of the model that the copy was made from, which lies beside it."""
    return _bytes_of(open_checkpoint(folder.parent / "source").read(name))


def _bytes_of(tensor: torch.Tensor) -> bytearray:
    return bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


# config


def _edit_ct(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    with edit_json(folder / "config.json") as config:
        edit(config["quantization_config"])


@fault("config", on="gemma4-mlp-ct")
def ignoring_q_and_k_but_not_the_phantom_v(folder: Path) -> str:
    # What llm-compressor writes for Gemma 4: a list of the modules that exist. vLLM refuses it.
    def edit(config: dict[str, Any]) -> None:
        kept = [entry for entry in config["ignore"] if "self_attn" not in entry]
        names = [f"{GEMMA}.{i}.self_attn.{x}_proj" for i in range(6) for x in "qkvo" if (i, x) != (5, "v")]
        config["ignore"] = kept + names

    _edit_ct(folder, edit)
    return f"{FULL_LAYER}.self_attn.qkv_proj is not quantized, but the config makes it refused"


@fault("config")
def target_dropped_from_the_config(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        targets = config["config_groups"]["group_0"]["targets"]
        config["config_groups"]["group_0"]["targets"] = [target for target in targets if "mlp" not in target]

    _edit_ct(folder, edit)
    return "model.layers.0.mlp.gate_up_proj is quantized, but the config makes it unquantized"


@fault("config")
def ignoring_one_member_of_each_fused_layer(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["ignore"].append("re:.*up_proj$"))
    return "mlp.gate_up_proj is quantized, but the config makes it unquantized"


@fault("config", on="gemma4-mlp-ct")
def targets_that_reach_the_vision_tower(folder: Path) -> str:
    def edit(config: dict[str, Any]) -> None:
        config["ignore"] = [entry for entry in config["ignore"] if "vision" not in entry]
        config["config_groups"]["group_0"]["targets"].append("re:.*vision_tower.*")

    _edit_ct(folder, edit)
    return "is not quantized, but the config makes it nvfp4"


@fault("config")
def targets_that_reach_the_embedding(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["config_groups"]["group_0"]["targets"].append("re:.*embed_tokens$"))
    return "model.embed_tokens is not quantized, but the config makes it nvfp4"


@fault("config")
def weight_only_config_of_a_w4a4_checkpoint(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["config_groups"]["group_0"].update(input_activations=None))
    return "the config gives nvfp4-a16 to 21 matrices, of which 21 have an input scale"


@fault("config", on="llama-a16-mo")
def w4a4_config_of_a_weight_only_checkpoint(folder: Path) -> str:
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = group["weights"]
        config["quantization_config"]["quant_algo"] = nested["quantization"]["quant_algo"] = "NVFP4"
    return "the config gives nvfp4 to 21 matrices, of which 0 have an input scale"


@fault("config")
def strategy_that_servers_do_not_take_for_nvfp4(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["config_groups"]["group_0"]["weights"].update(strategy="group"))
    return "the config makes it not NVFP4"


@fault("config")
def unknown_key_among_the_numbers(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["config_groups"]["group_0"]["input_activations"].update(amax=3.0))
    return "the config makes it refused"


@fault("config", on="llama-mo")
def head_not_excluded(folder: Path) -> str:
    with edit_json(folder / "config.json") as config, edit_json(folder / HF_QUANT_CONFIG) as nested:
        config["quantization_config"]["ignore"] = nested["quantization"]["exclude_modules"] = ["*embed_tokens*"]
    return "lm_head is not quantized, but the config makes it nvfp4"


@fault("config")
def pattern_that_does_not_compile(folder: Path) -> str:
    _edit_ct(folder, lambda config: config["ignore"].append("re:.*(mlp"))
    return "the config makes it refused"


# protected


@fault("protected", "config", "manifest", on="gemma4-mlp-ct")  # the tower is neither a target nor recorded
def vision_tower_quantized(folder: Path) -> str:
    module = "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear"
    with edit_tensors(folder) as tensors:
        stored = tensors.pop(f"{module}.weight")
        weight = torch.frombuffer(stored.data, dtype=torch_dtype(stored.dtype)).view(stored.shape)
        scale = global_scale(weight_amax(weight))
        packed = quantize_blocks(weight, scale)
        rows, cols = stored.shape
        parts = {
            "weight_packed": ("U8", [rows, cols // 2], packed.packed),
            "weight_scale": ("F8_E4M3", [rows, cols // 16], packed.scales),
            "weight_global_scale": ("F32", [1], scale.view(1)),
            "input_global_scale": ("F32", [1], scale.view(1)),
        }
        for leaf, (dtype, shape, tensor) in parts.items():
            tensors[f"{module}.{leaf}"] = Stored(stored.file, dtype, shape, _bytes_of(tensor))
    return module


@fault("protected", "names")  # it is not the embedding, and the source has none
def head_written_for_a_tied_model(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = bytearray(reversed(embedding.data))
        tensors["lm_head.weight"] = Stored(embedding.file, "BF16", embedding.shape, head)
    return "lm_head.weight differs from model.embed_tokens.weight"


@fault("names")
def tied_head_written_twice(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return "lm_head.weight is added"


# kv_cache


@fault("kv_cache")
def kv_cache_of_integers(folder: Path) -> str:
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["kv_cache"]["dtype"] = "fp8"
    _edit_ct(folder, lambda config: config.update(kv_cache_scheme=scheme))
    return "kv_cache_scheme is"


@fault("kv_cache")
def kv_cache_scheme_that_the_recipe_did_not_ask_for(folder: Path) -> str:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    _edit_ct(folder, lambda config: config.update(kv_cache_scheme=scheme))
    return "the recipe asks for bf16"


@fault("kv_cache", "names")  # the source has no such tensor
def kv_scale_without_a_scheme(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        one = _bytes_of(torch.ones(1))
        tensors[f"{LAYER}.self_attn.k_scale"] = Stored("model-00002-of-00004.safetensors", "F32", [1], one)
    return f"{LAYER}.self_attn.k_scale is stored"


# tokenizer, side_files


@fault("tokenizer", "side_files")  # it was in the source
def tokenizer_missing(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "vocabulary"


@fault("tokenizer", "side_files")  # it differs from the source's
def generation_config_cut_off(folder: Path) -> str:
    path = folder / "generation_config.json"
    path.write_text(path.read_text()[:-5])
    return "generation_config.json is not readable JSON"


@fault("tokenizer", "side_files")  # it was in the source
def chat_template_missing_after_calibration_on_chats(folder: Path) -> str:
    (folder / "chat_template.jinja").unlink()
    with edit_json(folder / MANIFEST) as manifest:
        manifest["calibration"]["framing"] = "chat"
    return "chat template"


@fault("side_files")
def chat_template_missing(folder: Path) -> str:
    (folder / "chat_template.jinja").unlink()
    return "chat_template.jinja is missing"


@fault("side_files")
def tokenizer_changed(folder: Path) -> str:
    with edit_json(folder / "tokenizer_config.json") as settings:
        settings["eos_token"] = "<s>"
    return "tokenizer_config.json differs"


# block_scales


def _set_block_scale(folder: Path, value: Callable[[int], int]) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data  # [64, 8]
        at = next(i for i in range(13, len(data)) if data[i] < 0x70)  # not the one that holds the amax
        data[at] = value(data[at])
        return f"first at row {at // 8}, block {at % 8}: byte 0x{data[at]:02X}"


@fault("block_scales", "weights")  # what it decodes to is not the source's either
def block_scale_that_is_nan(folder: Path) -> str:
    return _set_block_scale(folder, lambda _: 0x7F)


@fault("block_scales", "weights")
def block_scale_that_is_negative_nan(folder: Path) -> str:
    return _set_block_scale(folder, lambda _: 0xFF)


@fault("block_scales", "weights")
def block_scale_that_is_negative(folder: Path) -> str:
    return _set_block_scale(folder, lambda byte: byte | 0x80)


@fault("block_scales", "weights")
def block_scale_that_is_zero(folder: Path) -> str:
    return _set_block_scale(folder, lambda _: 0)


# global_scales, fused_groups


def _change_scalar(folder: Path, names: list[str], change: Callable[[float], float]) -> str:
    with edit_tensors(folder) as tensors:
        for name in names:
            tensors[name].set_scalar(change(tensors[name].scalar()))
    return names[0]


@fault("global_scales", "weight_scales", "weights")  # nor is it the recorded one, nor does it decode the weights
def weight_global_scale_stored_as_multiplier(folder: Path) -> str:
    return _change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: 1 / scale)


@fault("global_scales", "weight_scales", "weights", on="llama-mo")
def weight_global_scale_stored_as_divisor(folder: Path) -> str:
    return _change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_scale_2"], lambda scale: 1 / scale)


@fault("global_scales", "input_scales")  # nor is it what follows from calibration
def input_global_scale_that_is_zero(folder: Path) -> str:
    return _change_scalar(folder, [f"{LAYER}.mlp.down_proj.input_global_scale"], lambda _: 0.0)


@fault("global_scales", "input_scales", on="llama-mo")
def input_global_scale_that_is_infinite(folder: Path) -> str:
    return _change_scalar(folder, [f"{LAYER}.mlp.down_proj.input_scale"], lambda _: float("inf"))


@fault("fused_groups", "weight_scales", "weights")  # nor is it the recorded one, nor does it decode the weights
def gate_and_up_with_different_scales(folder: Path) -> str:
    _change_scalar(folder, [f"{LAYER}.mlp.up_proj.weight_global_scale"], lambda scale: scale * 2)
    return f"{LAYER}.mlp.gate_up_proj: weight global scales differ: gate_proj"


@fault("fused_groups", "input_scales", on="gemma4-mo")  # nor is it what follows from calibration
def q_and_k_with_different_input_scales(folder: Path) -> str:
    name = f"{FULL_LAYER}.self_attn.k_proj.input_scale"
    _change_scalar(folder, [name], lambda scale: scale * (1 + 2**-23))
    return f"{FULL_LAYER}.self_attn.qkv_proj: input global scales differ: q_proj"


@fault("fused_groups", "manifest")  # which records v_proj as quantized
def v_proj_left_out_of_the_fused_layer(folder: Path) -> str:
    module = f"{LAYER}.self_attn.v_proj"
    weight = source_bytes(folder, f"{module}.weight")
    with edit_tensors(folder) as tensors:
        packed = tensors[f"{module}.weight_packed"]
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
            del tensors[f"{module}.{leaf}"]
        tensors[f"{module}.weight"] = Stored(packed.file, "BF16", [packed.shape[0], packed.shape[1] * 2], weight)
    return f"{module} is not quantized, but the rest of {LAYER}.self_attn.qkv_proj is"


# manifest, hashes, and what follows from what they record


def _group(manifest: dict[str, Any], leaf: str) -> dict[str, Any]:
    record: dict[str, Any] = manifest["layers"][1]["groups"][f"{LAYER}.{leaf}"]
    return record


@fault("manifest")
def manifest_cut_off(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_text(path.read_text()[:-40])
    return "not readable JSON"


@fault("manifest")
def manifest_without_a_recipe(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["recipe"]
    return "lacks or misstates a key (KeyError: 'recipe')"


@fault("manifest")
def manifest_with_a_member_that_is_no_name(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        _group(manifest, "mlp.down_proj")["members"] = [7]
    return "lacks or misstates a key (TypeError: 7 is not a name)"


@fault("manifest")
def manifest_of_the_other_layout(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["format"] = "modelopt"
    return "format is modelopt"


@fault("manifest")
def manifest_of_an_unknown_quantizer(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["quantizer"] = "magic"
    return "quantizer magic is unknown"


@fault("manifest")
def manifest_of_another_recipe(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["quantize"][0]["scheme"] = "nvfp4-a16"
    return "down_proj is nvfp4, but recipe nvfp4-full makes it nvfp4-a16"


@fault("manifest")
def manifest_of_a_narrower_recipe(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["quantize"][0]["modules"] = ["mlp"]
    return "_proj is nvfp4, but recipe nvfp4-full makes it not quantized"


@fault("manifest", on="gemma4-mlp-ct")
def manifest_of_a_recipe_that_matches_nothing(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["recipe"]["quantize"][0]["modules"] = ["re:.*ffn.*"]
    return "pattern 're:.*ffn.*' matches no matrix"


@fault("manifest")
def manifest_without_a_group(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["layers"][1]["groups"][f"{LAYER}.mlp.down_proj"]
    return f"{LAYER}.mlp.down_proj is quantized but not recorded"


@fault("manifest")
def manifest_with_swapped_files(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        first, second = manifest["layers"][:2]
        first["file"], second["file"] = second["file"], first["file"]
    return "lies in ['model-00001-of-00004.safetensors'], not in model-00002-of-00004.safetensors"


@fault("weight_scales", "weights")  # neither the scales nor the codes are what mse chooses from
def quantizer_claimed_wrongly(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["quantizer"] = "mse"
    return "weight_global_scale"


@fault("marlin")
def flushed_blocks_claimed_wrongly(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        _group(manifest, "mlp.down_proj")["marlin_flushed_blocks"] = 3
    return f"{LAYER}.mlp.down_proj: 0 blocks, but the manifest records 3"


@fault("hashes")
def hash_wrong(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        manifest["files"]["model-00002-of-00004.safetensors"] = "0" * 64
    return "model-00002-of-00004.safetensors has sha256"


@fault("hashes")
def shard_without_a_hash(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        del manifest["files"]["model-00002-of-00004.safetensors"]
    return "model-00002-of-00004.safetensors is not recorded"


@fault("hashes", "untouched")  # the byte belongs to a tensor that is not quantized
def byte_flipped_after_the_run(folder: Path) -> str:
    flip_last_byte(folder / "model-00004-of-00004.safetensors")
    return "model-00004-of-00004.safetensors has sha256"


@fault("input_scales")
def input_scale_ten_times_off(folder: Path) -> str:
    return _change_scalar(folder, [f"{LAYER}.mlp.down_proj.input_global_scale"], lambda scale: scale * 10)


@fault("input_scales", on="gemma4-mo")
def input_scale_an_ulp_off(folder: Path) -> str:
    return _change_scalar(folder, [f"{FULL_LAYER}.mlp.down_proj.input_scale"], lambda scale: scale * (1 + 2**-23))


@fault("input_scales")
def observed_amax_changed(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        _group(manifest, "mlp.down_proj")["input"]["observed_amax"] *= 1.5
    return f"{LAYER}.mlp.down_proj: calibrated amax"


@fault("weight_scales", "weights")  # the source has another amax
def weight_amax_changed(folder: Path) -> str:
    with edit_json(folder / MANIFEST) as manifest:
        _group(manifest, "mlp.down_proj")["weight_amax"] *= 2
    return f"{LAYER}.mlp.down_proj.weight_global_scale"


@fault("weight_scales", "weights")  # nor do they decode the weights
def block_scales_halved(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data
        data[:] = bytes(max(1, byte - 8) for byte in data)
    return f"{LAYER}.mlp.down_proj: its largest block scale is 224, but its recorded amax asks for about 448"


# names, untouched, config_source


@fault("names")
def norm_lost(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        del tensors["model.norm.weight"]
    return "model.norm.weight is missing"


@fault("names", on="gemma4-mlp-ct")
def v_proj_invented(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{FULL_LAYER}.self_attn.v_proj.weight"] = tensors[f"{FULL_LAYER}.self_attn.k_proj.weight"]
    return f"{FULL_LAYER}.self_attn.v_proj.weight is added"


@fault("names")
def norm_widened(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        norm = tensors["model.norm.weight"]
        values = torch.frombuffer(norm.data, dtype=torch.bfloat16).float()
        norm.dtype, norm.data = "F32", _bytes_of(values)
    return "model.norm.weight is F32 [64], was BF16 [64]"


@fault("untouched")
def byte_of_a_norm_changed(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{LAYER}.input_layernorm.weight"].data[3] ^= 1
    return f"{LAYER}.input_layernorm.weight differs from byte 3 of 128 on"


@fault("untouched", on="gemma4-mlp-ct")
def layer_scalar_reset(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        tensors[f"{FULL_LAYER}.layer_scalar"].data[:] = _bytes_of(torch.ones(1, dtype=torch.bfloat16))
    return f"{FULL_LAYER}.layer_scalar differs"


@fault("config_source")
def head_dim_changed(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["head_dim"] = 32
    return "head_dim is 32, was 16"


@fault("config_source", on="gemma4-mlp-ct")
def nested_key_dropped(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        del config["text_config"]["global_head_dim"]
    return "text_config.global_head_dim is missing"


# weights


def _swap_nibbles(folder: Path, name: str) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[name].data
        data[:] = bytes((byte >> 4) | (byte & 15) << 4 for byte in data)
    return name.rpartition(".")[0]


@fault("weights")
def nibbles_swapped(folder: Path) -> str:
    return _swap_nibbles(folder, f"{LAYER}.mlp.down_proj.weight_packed")


@fault("weights", on="gemma4-mo")
def nibbles_swapped_in_modelopt(folder: Path) -> str:
    return _swap_nibbles(folder, f"{FULL_LAYER}.mlp.down_proj.weight")


@fault("weights", on="llama-foreign")
def nibbles_swapped_by_another_tool(folder: Path) -> str:
    return _swap_nibbles(folder, f"{LAYER}.mlp.down_proj.weight_packed") + ": relative RMSE 1."


@fault("weights")
def one_code_off_by_one(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_packed"].data  # [64, 64]
        at = next(i for i, byte in enumerate(data) if i > 100 and byte & 7 in (2, 3))
        data[at] -= 1
    return f"1 of 8,192 elements are not the nearest under their stored scale (first at row 1, column {(at - 64) * 2}"


@fault("weights")
def matrix_of_zeros(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        stored = tensors[f"{LAYER}.mlp.down_proj.weight_packed"]
        stored.data[:] = bytes(len(stored.data))
    return f"{LAYER}.mlp.down_proj"


@fault("weights", on="llama-foreign")
def matrix_of_zeros_by_another_tool(folder: Path) -> str:
    matrix_of_zeros(folder)
    return f"{LAYER}.mlp.down_proj: relative RMSE 1 and gain 0"


@fault("weights")
def block_scales_of_two_rows_swapped(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data  # [64, 8]
        data[8:16], data[16:24] = data[16:24], data[8:16]
    return f"{LAYER}.mlp.down_proj: "


@fault("weights", on="gemma4-mo")
def block_scales_of_two_rows_swapped_under_mse(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{FULL_LAYER}.mlp.down_proj.weight_scale"].data
        data[8:16], data[16:24] = data[16:24], data[8:16]
    return f"{FULL_LAYER}.mlp.down_proj: "


@fault("weights", on="llama-foreign")
def two_percent_of_the_blocks_wrong(folder: Path) -> str:
    with edit_tensors(folder) as tensors:
        data = tensors[f"{LAYER}.mlp.down_proj.weight_scale"].data  # 512 blocks
        quiet = sorted(range(len(data)), key=lambda i: data[i])[:11]  # too little to show in the whole matrix
        for at in quiet:
            data[at] -= 8
    return f"{LAYER}.mlp.down_proj: 11 of 512 blocks are beyond these bounds"


@fault("weights", on="llama-foreign")
def gain_of_a_matrix_wrong(folder: Path) -> str:
    _change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: scale / 1.15)
    return "gain 1.15"


def _swap_layers(folder: Path, leaves: tuple[str, ...]) -> str:
    with edit_tensors(folder) as tensors:
        for leaf in leaves:
            one, other = (tensors[f"model.layers.{i}.mlp.down_proj.{leaf}"] for i in (0, 1))
            one.data, other.data = other.data, one.data
    return "model.layers.0.mlp.down_proj"


@fault("weight_scales", "input_scales", "weights")  # the recorded amaxes are swapped too
def two_layers_swapped(folder: Path) -> str:
    return _swap_layers(folder, ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"))


@fault("weights", on="llama-foreign")
def two_layers_swapped_by_another_tool(folder: Path) -> str:
    return _swap_layers(folder, ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"))


@fault("global_scales", "weights", on="llama-foreign")  # what it decodes to is not the source's either
def scale_stored_as_multiplier_by_another_tool(folder: Path) -> str:
    return _change_scalar(folder, [f"{LAYER}.mlp.down_proj.weight_global_scale"], lambda scale: 1 / scale)


@fault("config_source", on="llama-foreign")
def key_added_by_another_tool(folder: Path) -> str:
    with edit_json(folder / "config.json") as config:
        config["sliding_window"] = 4096
    return "sliding_window is added"
