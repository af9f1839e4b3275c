"""Run a peer on the same work as nvquant and time it; one JSON document is the last line.

usage: PYTHON benchmarks/peer.py llmcompressor|modelopt SOURCE OUTPUT --ids FILE --scope mlp|all [--device cpu|cuda]

Imports nothing of nvquant, so that PYTHON may be an environment that holds the peer alone (versions:
docs/benchmarks.md). Each peer runs as its documentation shows for a model that fits into memory, with its default
pipeline, in W4A4 NVFP4, on the given token ids. `load`, `quantize` and `save` are seconds after the imports, `seconds`
their sum. On the CPU the model is loaded in float32, as nvquant computes there and as is fastest.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

Times = list[float]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["llmcompressor", "modelopt"])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--scope", choices=["mlp", "all"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    options = parser.parse_args()
    package = {"llmcompressor": "llmcompressor", "modelopt": "nvidia-modelopt"}[options.peer]
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        print(json.dumps({"missing": f"{package} is not installed for {sys.executable}"}))
        return
    run = run_llmcompressor if options.peer == "llmcompressor" else run_modelopt
    begin, loaded, quantized, saved = run(options)
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
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from safetensors.torch import load_file

    auto, dtype = auto_class(options.source, options.device)
    ids = load_file(options.ids)["input_ids"]
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    ignored = ["lm_head", "re:.*vision.*", "re:.*embed.*"] + (["re:.*self_attn.*"] if options.scope == "mlp" else [])
    tokenizer, data = placeholder_tokenizer(), Dataset.from_dict(columns)
    begin = time.perf_counter()
    model = auto.from_pretrained(options.source, dtype=dtype)
    loaded = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=ignored),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    synchronize()
    quantized = time.perf_counter()
    model.save_pretrained(options.output, save_compressed=True)
    return [begin, loaded, quantized, time.perf_counter()]


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

    mtq.quantize(
        model, mtq.NVFP4_MLP_ONLY_CFG if options.scope == "mlp" else mtq.NVFP4_DEFAULT_CFG, forward_loop=forward_loop
    )
    synchronize()
    quantized = time.perf_counter()
    export_hf_checkpoint(model.to(torch.bfloat16), export_dir=options.output)
    return [begin, loaded, quantized, time.perf_counter()]


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


if __name__ == "__main__":
    main()
