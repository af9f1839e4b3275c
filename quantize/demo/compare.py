"""What a checkpoint lost against its source on a few held-out texts: perplexity, KL divergence, top-1 agreement, in
float32 on small models.

Both models are held whole, so this is for models that fit in memory several times over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.quiet import quiet_transformers
from ..checkpoint.source import Checkpoint, open_checkpoint
from ..format.activations import quantize_dequantize
from ..format.blocks import dequantize_blocks
from ..format.layouts import LAYOUTS, Layout


@dataclass(frozen=True)
class Comparison:
    """Means over all predicted tokens; KL divergence in nats."""

    perplexity_source: float
    perplexity: float
    perplexity_weight_only: float
    kl: float
    kl_weight_only: float
    top1: float
    tokens: int


@torch.no_grad()
def compare(source: Path, output: Path, samples: Sequence[Tensor]) -> Comparison:
    """Compare a checkpoint with its source.

    Args:
        samples: int64 [tokens] each: held-out text as the model expects it.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    reference = [_log_probabilities(model, sample) for sample in samples]
    checkpoint = open_checkpoint(output)
    input_scales = _load_quantized(model, checkpoint)
    weight_only = [_log_probabilities(model, sample) for sample in samples]
    with _quantized_inputs(model, input_scales):
        served = [_log_probabilities(model, sample) for sample in samples] if input_scales else weight_only
    return Comparison(
        perplexity_source=_perplexity(reference, samples),
        perplexity=_perplexity(served, samples),
        perplexity_weight_only=_perplexity(weight_only, samples),
        kl=_mean_kl(reference, served),
        kl_weight_only=_mean_kl(reference, weight_only),
        top1=_top1(reference, served),
        tokens=sum(len(sample) - 1 for sample in samples),
    )


@torch.no_grad()
def continue_prompt(output: Path, source: Path, prompt: str, tokens: int) -> str:
    """Greedy continuation of a prompt by the checkpoint's weights, inputs in full precision."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    _load_quantized(model, open_checkpoint(output))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=-1)
    return str(tokenizer.decode(ids[0, -tokens:]))


def _load_quantized(model: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Put dequantized weights into a model; returns the input global scales (divisors) by module."""
    method = checkpoint.config["quantization_config"]["quant_method"]
    layout = LAYOUTS[method]
    scales = {}
    for name in checkpoint.files:
        if not name.endswith(f".{layout.scales}"):
            continue
        module = name.removesuffix(f".{layout.scales}")
        packed, block_scales = checkpoint.read(f"{module}.{layout.packed}"), checkpoint.read(name)
        divisor = _divisor(checkpoint, f"{module}.{layout.weight_global}", layout)
        model.get_submodule(module).weight.copy_(dequantize_blocks(packed, block_scales, divisor))
        if f"{module}.{layout.input_global}" in checkpoint.files:
            scales[module] = _divisor(checkpoint, f"{module}.{layout.input_global}", layout)
    return scales


def _divisor(checkpoint: Checkpoint, name: str, layout: Layout) -> Tensor:
    value = checkpoint.read(name).reshape(())
    return value if layout.divisor else 1.0 / value


@contextmanager
def _quantized_inputs(model: nn.Module, scales: dict[str, Tensor]) -> Iterator[None]:
    def hook_for(scale: Tensor) -> Any:
        return lambda _module, args: (quantize_dequantize(args[0], scale), *args[1:])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(scale)) for name, scale in scales.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _log_probabilities(model: Any, sample: Tensor) -> Tensor:
    return torch.log_softmax(model(sample[None], use_cache=False).logits[0, :-1], dim=-1)


def _perplexity(rows: Sequence[Tensor], samples: Sequence[Tensor]) -> float:
    lost = [-row.gather(1, sample[1:, None]) for row, sample in zip(rows, samples, strict=True)]
    return math.exp(float(torch.cat(lost).mean()))


def _mean_kl(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, other, strict=True)]).mean())


def _top1(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(
        torch.cat([(p.argmax(-1) == q.argmax(-1)).float() for p, q in zip(reference, other, strict=True)]).mean()
    )
