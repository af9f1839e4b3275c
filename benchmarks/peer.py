"""Run a peer on the same work as nvquant and time it; one JSON document is the last line.

usage: PYTHON benchmarks/peer.py llmcompressor|modelopt|auto-round SOURCE OUTPUT --ids FILE --scope mlp|all
           [--method NAME] [--device cpu|cuda]

Imports nothing of nvquant, so that PYTHON may be an environment that holds the peer alone (versions:
docs/benchmarks.md). Each peer runs as its documentation shows for a model that fits into memory, with its default
pipeline, in W4A4 NVFP4, on the given token ids. `load`, `quantize` and `save` are seconds after the imports, `seconds`
their sum. On the CPU the model is loaded in float32, as nvquant computes there and as is fastest.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

Times = list[float]
PACKAGES = {"llmcompressor": "llmcompressor", "modelopt": "nvidia-modelopt", "auto-round": "auto-round"}
# The first of each is the default. Where a method has options, the peer's own examples for NVFP4 give them:
# llm-compressor 0.14 (examples/quantization_w4a4_fp4), modelopt 0.47 (modelopt_recipes), auto-round 0.16 (README).
METHODS = {
    "llmcompressor": ("rtn", "gptq", "awq", "smoothquant-gptq"),
    "modelopt": ("max", "mse", "awq_lite", "gptq"),
    "auto-round": ("signround",),
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(METHODS))
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--scope", choices=["mlp", "all"], required=True)
    parser.add_argument("--method", help="; ".join(f"{peer}: {', '.join(names)}" for peer, names in METHODS.items()))
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    options = parser.parse_args()
    options.method = options.method or METHODS[options.peer][0]
    if options.method not in METHODS[options.peer]:
        parser.error(f"{options.peer} has the methods {', '.join(METHODS[options.peer])}")
    package = PACKAGES[options.peer]
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        print(json.dumps({"missing": f"{package} is not installed for {sys.executable}"}))
        return
    begin, loaded, quantized, saved = RUNS[options.peer](options)
    import torch

    memory = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert memory is not None
    document: dict[str, Any] = {
        "versions": {name: metadata.version(name) for name in (package, "torch", "transformers")},
        "version": version,
        "load": loaded - begin,
        "quantize": quantized - loaded,
        "save": saved - quantized,
        "seconds": saved - begin,
        "peak_host_bytes": int(memory[1]) * 1024,
        "peak_gpu_bytes": torch.cuda.max_memory_reserved() if options.device == "cuda" else 0,
        "peak_gpu_allocated_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else 0,
        "output_bytes": sum(path.stat().st_size for path in options.output.glob("*.safetensors")),
    }
    print("\n" + json.dumps(document))


def run_llmcompressor(options: argparse.Namespace) -> Times:
    """`oneshot` with its NVFP4 preset, then `save_pretrained`."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file

    auto, dtype = auto_class(options.source, options.device)
    ids = load_file(options.ids)["input_ids"]
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    tokenizer, data = placeholder_tokenizer(), Dataset.from_dict(columns)
    begin = time.perf_counter()
    model = auto.from_pretrained(options.source, dtype=dtype)
    loaded = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=llmcompressor_recipe(options.method, options.scope),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    synchronize()
    quantized = time.perf_counter()
    model.save_pretrained(options.output, save_compressed=True)
    return [begin, loaded, quantized, time.perf_counter()]


def llmcompressor_recipe(method: str, scope: str) -> list[Any]:
    """The modifiers of a method, with the options of its NVFP4 example."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    ignored = ["lm_head", "re:.*vision.*", "re:.*embed.*"] + (["re:.*self_attn.*"] if scope == "mlp" else [])
    kind = GPTQModifier if method.endswith("gptq") else QuantizationModifier
    recipe: list[Any] = [kind(targets="Linear", scheme="NVFP4", ignore=ignored)]
    if method == "awq":
        recipe.insert(0, AWQModifier(duo_scaling="both"))
    if method == "smoothquant-gptq":
        recipe.insert(0, SmoothQuantModifier(smoothing_strength=0.5))
    return recipe


def run_modelopt(options: argparse.Namespace) -> Times:
    """`mtq.quantize` with its NVFP4 configuration, then `export_hf_checkpoint`."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file

    auto, dtype = auto_class(options.source, options.device)
    ids = load_file(options.ids)["input_ids"]
    begin = time.perf_counter()
    model = auto.from_pretrained(options.source, dtype=dtype, device_map=options.device).eval()
    loaded = time.perf_counter()

    @torch.no_grad()
    def forward_loop(calibrated: Any) -> None:
        for row in ids:
            calibrated(input_ids=row[None].to(calibrated.device))

    mtq.quantize(model, modelopt_config(options.method, options.scope), forward_loop=forward_loop)
    synchronize()
    quantized = time.perf_counter()
    export_hf_checkpoint(model.to(torch.bfloat16), export_dir=options.output)
    return [begin, loaded, quantized, time.perf_counter()]


def modelopt_config(method: str, scope: str) -> dict[str, Any]:
    """The preset of a method. That of gptq is the recipe `general/ptq/nvfp4_default-kv_none-gptq`: the scales of the
    sweep's preset, which stand still while weights move, and one layer after the other."""
    import modelopt.torch.quantization as mtq

    if scope == "mlp":
        if method != "max":
            raise SystemExit(f"modelopt {method} has no preset for the MLP alone")
        return mtq.NVFP4_MLP_ONLY_CFG
    presets = {"max": mtq.NVFP4_DEFAULT_CFG, "awq_lite": mtq.NVFP4_AWQ_LITE_CFG}
    config = copy.deepcopy(presets.get(method, mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG))
    if method == "gptq":
        config["algorithm"] = {"method": "gptq", "layerwise": {"enable": True}}
    return config


def run_auto_round(options: argparse.Namespace) -> Times:
    """`AutoRound` with its scheme NVFP4 and default iterations, then `quantize_and_save`, which is one call."""
    from auto_round import AutoRound
    from safetensors.torch import load_file

    if options.scope == "mlp":
        raise SystemExit("auto-round has no preset for the MLP alone")
    ids = load_file(options.ids)["input_ids"]
    begin = time.perf_counter()
    rounding = AutoRound(
        str(options.source),
        scheme="NVFP4",
        dataset=list(ids.split(1)),
        seqlen=ids.shape[1],
        nsamples=ids.shape[0],
        device_map="cpu" if options.device == "cpu" else 0,
    )
    loaded = time.perf_counter()
    rounding.quantize_and_save(output_dir=str(options.output), format="llm_compressor")
    synchronize()
    done = time.perf_counter()
    for folder in [path for path in options.output.iterdir() if path.is_dir()]:  # one with the scheme in its name
        for path in folder.iterdir():
            path.rename(options.output / path.name)
        folder.rmdir()
    return [begin, loaded, done, done]


def auto_class(source: Path, device: str) -> tuple[Any, Any]:
    """The class that loads the model, and the dtype to load it in."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    has_vision = hasattr(AutoConfig.from_pretrained(source), "vision_config")
    auto = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
    return auto, torch.float32 if device == "cpu" else torch.bfloat16


def placeholder_tokenizer() -> Any:
    """What `oneshot` insists on although the data are token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<unk>")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


RUNS = {"llmcompressor": run_llmcompressor, "modelopt": run_modelopt, "auto-round": run_auto_round}


if __name__ == "__main__":
    main()
