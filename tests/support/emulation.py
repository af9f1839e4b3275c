"""What a server of an NVFP4 or FP8 checkpoint computes, in float32 and from the checkpoint's files alone.

This is the judge of converted checkpoints, so it shares no code with the package under test: tensors are read with
safetensors, the architecture comes from transformers, and the arithmetic below is written out from the number formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor

E2M1_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK_COLUMNS = 16
Rounding = Callable[[Tensor], Tensor]


def load_emulation(checkpoint: Path, device: str = "cpu") -> transformers.PreTrainedModel:
    """Build the checkpoint's model in float32: decoded weights, inputs of quantized layers rounded where it says so.

    Both layouts are told apart by their tensor names; an NVFP4 layer without an input scale is weight-only, and an FP8
    layer without one rounds each token under a scale of its own. Inputs that have a `pre_quant_scale` (modelopt's AWQ)
    are multiplied by it first.
    Raises AssertionError when the stored tensors are not exactly those of the architecture.
    """
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state, rounds = decode_tensors(read_tensors(checkpoint), device)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    absent = set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert not absent, f"{checkpoint} lacks {absent}"
    assert not unexpected, f"{checkpoint} holds tensors that the architecture lacks: {unexpected}"
    model.tie_weights()
    for name, rounded in rounds.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, rounded=rounded: (rounded(args[0]), *args[1:])
        )
    return model.to(device).eval()


@torch.no_grad()
def token_logprobs(model: transformers.PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Natural-log likelihood of each id but the first, given all ids before it."""
    tokens = torch.tensor(ids)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(dim=-1).gather(1, tokens[1:, None])[:, 0].tolist()


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of every shard in the folder, in its stored dtype."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def decode_tensors(stored: dict[str, Tensor], device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Rounding]]:
    """Return a checkpoint's float32 state dict, and how the inputs of each layer are rounded that rounds them.

    The state is where the tensors are, the roundings take inputs on `device`.
    """
    state: dict[str, Tensor] = {}
    rounds: dict[str, Rounding] = {}
    factors: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and tensor.dtype == torch.float8_e4m3fn:
            state[key] = tensor.float() * stored[f"{layer}.weight_scale"].float()
            scale = stored.get(f"{layer}.input_scale")
            rounds[layer] = partial(round_to_fp8, scale=None if scale is None else scale.to(device))
        elif kind == "weight_packed":  # compressed-tensors: scales are divisors
            state[f"{layer}.weight"] = decode(
                tensor, stored[f"{layer}.weight_scale"].float() / stored[f"{layer}.weight_global_scale"]
            )
        elif kind == "weight" and f"{layer}.weight_scale_2" in stored:  # modelopt: scales are multipliers
            state[key] = decode(tensor, stored[f"{layer}.weight_scale"].float() * stored[f"{layer}.weight_scale_2"])
        elif kind == "input_global_scale":
            rounds[layer] = partial(quantize_dequantize, global_scale=tensor.to(device))
        elif kind == "input_scale" and f"{layer}.weight_scale_2" in stored:
            rounds[layer] = partial(quantize_dequantize, global_scale=1 / tensor.to(device))
        elif kind == "pre_quant_scale":
            factors[layer] = tensor.float().to(device)
        elif kind not in (
            *("weight_scale", "weight_global_scale", "weight_scale_2", "input_scale"),
            *("k_scale", "v_scale"),  # of the KV cache, which the emulation does not have
        ):
            state[key] = tensor.float()
    for layer, factor in factors.items():
        rounds[layer] = partial(multiplied_first, factor=factor, rounding=rounds.get(layer))
    return state, rounds


def multiplied_first(x: Tensor, factor: Tensor, rounding: Rounding | None) -> Tensor:
    """Multiply x [..., columns] by a factor for each column, then round it where the layer rounds its inputs."""
    return x * factor if rounding is None else rounding(x * factor)


def decode(packed: Tensor, block_scales: Tensor) -> Tensor:
    """Values [rows, columns] of E2M1 codes uint8 [rows, columns / 2], even column in the low nibble.

    block_scales is float32 [rows, columns / 16], the global scale already in it.
    """
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    blocks = E2M1_VALUES[codes.long()].unflatten(-1, (-1, BLOCK_COLUMNS))
    return (blocks * block_scales[..., None]).flatten(-2)


def quantize_dequantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """Round x, float32 [..., columns], to NVFP4 values: one E4M3 scale for each 16 columns, then E2M1."""
    blocks = x.unflatten(-1, (-1, BLOCK_COLUMNS))
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scales = (global_scale * (amax / 6)).clamp(max=448).to(torch.float8_e4m3fn).float() / global_scale
    # A block whose scale is rounded to 0 has no other value than 0; any divisor does.
    scaled = blocks / torch.where(scales == 0, torch.inf, scales)
    return (round_to_e2m1(scaled) * scales).flatten(-2)


def round_to_fp8(x: Tensor, scale: Tensor | None) -> Tensor:
    """Round x, float32 [..., columns], to E4M3 values under a scale; where it is None, under one of each token."""
    if scale is None:
        scale = (x.abs().amax(dim=-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to the even code, and clip at 6."""
    magnitude = x.abs()
    # The distance between neighbours doubles at 2 and at 4, so an even multiple of it is an even code.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).clamp(max=6).copysign(x)
