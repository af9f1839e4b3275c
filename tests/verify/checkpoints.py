"""What the good checkpoints of these tests are, and how they are made: by the real conversion, from tiny models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvquant.calibrate.samples import CalibrationSet, load_calibration
from nvquant.checkpoint.source import Checkpoint, open_checkpoint
from nvquant.convert.options import ConvertOptions
from nvquant.convert.pipeline import convert
from nvquant.format.layouts import LAYOUTS
from nvquant.plan.plan import compute_plan
from nvquant.recipe.load import load_recipe
from nvquant.recipe.roles import text_config
from nvquant.recipe.schema import KvCache
from support.distilling import distilled
from support.tiny_models import tiny_gemma2, tiny_gemma4, tiny_llama, tiny_qwen2


def deep_llama(folder: Path) -> Path:
    """With more than ten layers, so that text takes layer 1 for the beginning of layer 10."""
    return tiny_llama(folder, num_layers=12, intermediate_size=64)


def untied_llama(folder: Path) -> Path:
    return tiny_llama(folder, tied=False)


WRITERS = {
    "llama": tiny_llama, "gemma4": tiny_gemma4, "gemma2": tiny_gemma2, "qwen2": tiny_qwen2, "deep": deep_llama,
    "untied": untied_llama,
}  # fmt: skip
# Name: model, layout, recipe and perhaps head, KV cache, folds or distillation, quantizer, and whether the manifest is
# kept. Without it another tool might have made it.
GOOD = {
    "llama-ct": ("llama", "compressed-tensors", "nvfp4-full", "rtn", True),
    "llama-mo": ("llama", "modelopt", "nvfp4-full", "mse", True),
    "llama-a16-ct": ("llama", "compressed-tensors", "nvfp4-a16", "mse", True),
    "llama-a16-mo": ("llama", "modelopt", "nvfp4-a16", "rtn", True),
    "gemma4-ct": ("gemma4", "compressed-tensors", "nvfp4-full", "mse", True),
    "gemma4-mo": ("gemma4", "modelopt", "nvfp4-full", "mse", True),
    "gemma4-a16-ct": ("gemma4", "compressed-tensors", "nvfp4-a16", "rtn", True),
    "gemma4-a16-mo": ("gemma4", "modelopt", "nvfp4-a16", "mse", True),
    "gemma4-mlp-ct": ("gemma4", "compressed-tensors", "nvfp4", "rtn", True),
    "llama-fp8-ct": ("llama", "compressed-tensors", "nvfp4-fp8", "rtn", True),
    "llama-fp8-mo": ("llama", "modelopt", "nvfp4-fp8", "mse", True),
    "gemma4-fp8-ct": ("gemma4", "compressed-tensors", "nvfp4-fp8", "mse", True),
    "gemma4-fp8-mo": ("gemma4", "modelopt", "nvfp4-fp8", "rtn", True),
    "llama-fp8-foreign": ("llama", "compressed-tensors", "nvfp4-fp8", "rtn", False),
    "deep-a16-mo": ("deep", "modelopt", "nvfp4-a16", "rtn", True),
    "deep-foreign": ("deep", "compressed-tensors", "nvfp4-a16", "rtn", False),
    "gemma2-a16-ct": ("gemma2", "compressed-tensors", "nvfp4-a16", "rtn", True),
    "qwen2-a16-ct": ("qwen2", "compressed-tensors", "nvfp4-a16", "rtn", True),
    "untied-a16-ct": ("untied", "compressed-tensors", "nvfp4-a16", "rtn", True),
    "llama-foreign-mo": ("llama", "modelopt", "nvfp4-full", "rtn", False),
    "llama-head-ct": ("llama", "compressed-tensors", "nvfp4-a16 fp8", "mse", True),
    "llama-head-mo": ("llama", "modelopt", "nvfp4-a16 fp8", "rtn", True),
    "gemma4-head-ct": ("gemma4", "compressed-tensors", "nvfp4-full nvfp4", "mse", True),
    "gemma4-head-mo": ("gemma4", "modelopt", "nvfp4-a16 nvfp4", "rtn", True),
    "untied-head-foreign": ("untied", "compressed-tensors", "nvfp4-a16 nvfp4", "rtn", False),
    "llama-kv-ct": ("llama", "compressed-tensors", "nvfp4-full kv:fp8-calibrated", "rtn", True),
    "llama-kv-mo": ("llama", "modelopt", "nvfp4-a16 kv:fp8-calibrated", "rtn", True),
    "llama-kv-unit": ("llama", "compressed-tensors", "nvfp4 kv:fp8", "rtn", True),
    "gemma4-kv-ct": ("gemma4", "compressed-tensors", "nvfp4-a16 kv:fp8", "rtn", True),
    "gemma4-kv-mo": ("gemma4", "modelopt", "nvfp4-full kv:fp8-calibrated", "rtn", True),
    "gemma4-kv-foreign": ("gemma4", "compressed-tensors", "nvfp4-a16 kv:fp8", "rtn", False),
    "llama-gptq-ct": ("llama", "compressed-tensors", "nvfp4-full", "gptq", True),
    "llama-gptq-fp8-mo": ("llama", "modelopt", "nvfp4-fp8", "gptq", True),
    "gemma4-gptq-mo": ("gemma4", "modelopt", "nvfp4-full", "gptq", True),
    "gemma4-gptq-a16-head-ct": ("gemma4", "compressed-tensors", "nvfp4-a16 nvfp4", "gptq", True),
    "llama-fold-ct": ("llama", "compressed-tensors", "nvfp4-full fold", "mse", True),
    "gemma4-fold-mo": ("gemma4", "modelopt", "nvfp4-fp8 fold", "rtn", True),
    "llama-distilled-ct": ("llama", "compressed-tensors", "nvfp4-full distilled", "mse", True),
    "llama-fold-distilled-mo": ("llama", "modelopt", "nvfp4-full fold distilled", "gptq", True),
    "gemma4-fp8-distilled-ct": ("gemma4", "compressed-tensors", "nvfp4-fp8 distilled", "rtn", True),
    "llama-foreign": ("llama", "compressed-tensors", "nvfp4-full", "rtn", False),
}


@dataclass(frozen=True)
class Copy:
    """A checkpoint that a test may change, and the source that it may not."""

    folder: Path
    source: Path


def convert_good(name: str, models: Mapping[str, Path], output: Path) -> Path:
    """Convert what `GOOD` says under a name."""
    model, layout, recipe, quantizer, keeps_manifest = GOOD[name]
    named, _, more = recipe.partition(" ")
    is_distilled, fold = more.endswith("distilled"), more.startswith("fold")
    is_cache = more.startswith("kv:")
    more = "" if fold or is_distilled else more
    chosen = load_recipe(named).model_copy(
        update={"kv_cache": KvCache(dtype=more.removeprefix("kv:"))} if is_cache else {"head": more or "bf16"}  # type: ignore[arg-type]
    )
    plan = compute_plan(open_checkpoint(models[model]), chosen, LAYOUTS[layout], model, quantizer)
    samples = token_ids(plan.source, output.parent) if plan.needs_calibration else None
    made = output.with_name(f"{name}-undistilled") if is_distilled else output
    convert(plan, ConvertOptions(made, quantizer, fold=fold), samples)
    if is_distilled:
        assert distilled(made, models[model], output).record.is_kept
    if not keeps_manifest:
        (output / "nvquant_manifest.json").unlink()
    return output


def token_ids(source: Checkpoint, folder: Path) -> CalibrationSet:
    """Two samples of 61 token ids, the first of them BOS."""
    bos = text_config(source.config)["bos_token_id"]
    path = folder / f"{source.folder.name}.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [bos, *range(first, first + 60)]}) for first in (20, 130)))
    return load_calibration(
        str(path), model_folder=source.folder, config=source.config, samples=2, sequence_length=64, seed=0
    )
