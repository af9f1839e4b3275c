"""Reports as `verify` gives them, through its own dataclasses: a good one of many layers, a failed one, a bare one."""

from __future__ import annotations

import math
from typing import Any

from nvquant.verify.report import Check, Finding, Report, not_applicable

GB = 10**9
ANSWER = (
    " Paris. The city lies on the Seine, in the north of the country, and has been its capital for most of the time "
    "since the tenth century.\n\nMore than two million people live within its limits, and about twelve million in the "
    "region around it. It is known for its museums, among them the Louvre, for the Eiffel Tower, built for the "
    "exhibition of 1889, and for its cafés.\n\nThe river divides the city in two parts, which are called the left bank "
    "and the right bank. On the left bank are the university and many of the older schools; on the right bank are the "
    "large shops, the stock exchange and most of the theatres. Two islands lie between them, and on the larger one "
    "stands the cathedral.\n\nThe city is divided into twenty districts, which are counted from the middle outwards in "
    "the form of a spiral, like the shell of a snail."
)
WORDS = {
    "w4a4": "W4A4, as GPUs with FP4 units compute it",
    "weight_only": "weight-only, as Marlin computes it on GPUs without units for the formats",
    "floor": "the source with every module's output rounded to BF16, against float32",
}
STRUCTURE = {
    "headers": "12 shards, 1,728 tensors, no holes",
    "index": "1,728 tensors, 32,633,255,032 bytes",
    "layout": "compressed-tensors, nvfp4-pack-quantized, 180 matrices",
    "matrices": "180 matrices: packed, block scales, global scale",
    "config": "410 linear layers under vLLM's matching rules",
    "protected": "1 embedding, 27 layers of the vision tower, tied head",
    "kv_cache": "not applicable: no KV cache scheme",
    "tokenizer": "tokenizer.json (262,144 tokens), chat_template.jinja",
    "block_scales": "1,071,644,672 block scales",
    "global_scales": "180 weight and 180 input global scales",
    "fused_groups": "60 groups of gate_proj and up_proj",
    "marlin": "0 of 1,071,644,672 blocks flushed",
    "manifest": "nvquant 0.1.0, recipe nvfp4, 180 matrices",
    "hashes": "12 files, 32.6 GB",
    "input_scales": "180 scales from 64 samples of 2,048 tokens",
    "weight_scales": "180 scales, quantizer mse",
    "names": "1,188 tensors of the source",
    "untouched": "1,008 tensors, 15.2 GB",
    "config_source": "config.json is the source's plus quantization_config",
    "side_files": "7 files",
    "weights": "180 matrices, 17,146,314,752 elements",
}


def layer(index: int, layers: int) -> dict[str, Any]:
    """Errors that grow with depth, wavy, with a peak near a third: as they are in trained models."""
    own = 0.045 + 0.02 * math.sin(index * 0.9) + 0.03 * index / layers + (0.21 if index == layers // 3 else 0.0)
    accumulated = 0.05 + 0.4 * (index / layers) ** 0.7 + 0.02 * math.sin(index * 1.7)

    def errors(scale: float, clipped: float | None) -> dict[str, Any]:
        error = own * scale
        return {
            "relative_error": error,
            "sqnr_db": -20 * math.log10(error),
            "cosine": 1 - error * error / 2,
            "accumulated_error": accumulated * scale,
            "clipped": clipped,
        }

    return {"layer": index, "w4a4": errors(1.0, 0.0002 * (1 + index % 5)), "weight_only": errors(0.57, None)}


def matrix(index: int, name: str, scheme: str = "W4A4") -> dict[str, Any]:
    return {
        "name": f"model.language_model.layers.{index}.mlp.{name}",
        "layer": index,
        "scheme": scheme,
        "weight_error": 0.0881 + 0.004 * math.sin(index * 2.1) + (0.003 if name == "down_proj" else 0.0),
        "blocks": 5953581,
        "zero_blocks": index % 7,
        "clamped_blocks": index % 3,
        "flushed_blocks": 0,
    }


def quantized_input(index: int, name: str) -> dict[str, Any]:
    return {
        "name": f"model.language_model.layers.{index}.mlp.{name}",
        "layer": index,
        "amax": 40.0 + index,
        "calibrated_amax": 43.0,
        "clipped": 0.0002 if index == 21 and name == "gate_up_proj" else 0.0,
        "lost": 0.0,
    }


KINDS = {"code": 0.9, "dialogue": 0.95, "language": 1.5, "mathematics": 0.85, "prose": 1.1, "technical": 0.8}


def kinds_of(mean: float, agreement: float, *, of_floor: bool = False) -> dict[str, Any]:
    """The loss by kind of text, in which a language other than English loses as much more as it does in noise."""
    return {
        kind: {
            "sequences": 5,
            "tokens": 2555,
            "kl": {"mean": mean * share, "standard_error": mean * 0.04, "median": mean * 0.3, "p99": mean * 9},
            "top1": {"agreement": agreement / share**0.1, "standard_error": 0.003},
            "relative": None if of_floor else 1 + 0.02 * at,
            "relative_error": None if of_floor else 0.04,
        }
        for at, (kind, share) in enumerate(KINDS.items())
    }


def arithmetic(words: str, mean: float, agreement: float, delta: float) -> dict[str, Any]:
    noise = 0.0017 if words.startswith("W4A4") else None
    return {
        "words": words,
        "kl": {
            "mean": mean,
            "median": mean * 0.29,
            "p99": mean * 9.3,
            "standard_error": mean * 0.04,
            "rounding_noise": noise,
        },
        "nll": 2.1733 + delta,
        "delta_nll": delta,
        "perplexity": math.exp(2.1733 + delta),
        "top1": {"agreement": agreement, "standard_error": 0.0031, "rounding_noise": noise},
        "kinds": kinds_of(mean, agreement, of_floor=words == WORDS["floor"]),
    }


def numerics(layers: int = 60) -> dict[str, Any]:
    return {
        "kl": 0.0831,
        "perplexity": math.exp(2.1733 + 0.0378),
        "perplexity_source": math.exp(2.1733),
        "top1": 0.8924,
        "source": "gemma-4-31b",
        "text": {
            "name": "heldout",
            "framing": "chat template",
            "sequences": 32,
            "tokens": 16352,
            "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        },
        "device": "cuda",
        "dtype": "bfloat16",
        "nll_source": 2.1733,
        "arithmetics": {
            "w4a4": arithmetic(WORDS["w4a4"], 0.0831, 0.8924, 0.0378),
            "weight_only": arithmetic(
                "weight-only, as Marlin computes it on GPUs without units for the formats", 0.0317, 0.9341, 0.0124
            ),
            "floor": arithmetic(
                "the source with every module's output rounded to BF16, against float32", 0.00021, 0.9962, 0.0001
            ),
        },
        "layers": [layer(index, layers) for index in range(layers)],
        "matrices": [matrix(index, name) for index in range(layers) for name in ("gate_proj", "up_proj", "down_proj")],
        "inputs": [quantized_input(index, name) for index in range(layers) for name in ("gate_up_proj", "down_proj")],
        "thresholds": {"max_kl": None, "min_top1": 0.5, "max_delta_nll": 1.0},
        "kind_warnings": [],
    }


def serve() -> dict[str, Any]:
    return {
        "server": {
            "vllm": "0.32.0",
            "command": "/home/ada/venv/bin/vllm serve /data/out/gemma-4-31b-nvfp4 --port 43117 --max-model-len 4096",
            "url": None,
            "ready_seconds": 94.2,
        },
        "kernel": {
            "class": "MarlinNvFp4LinearKernel",
            "arithmetic": "weight_only",
            "words": "weight-only (Marlin): weights are expanded to BF16, inputs stay BF16",
        },
        "attention": "FLASH_ATTN",
        "memory": {
            "reported_bytes": 32_450_000_000,
            "forecast_bytes": 32_633_255_032,
            "kv_tokens": 48_320,
            "max_model_len": 4096,
        },
        "answers": [
            {
                "prompt": "The capital of France is",
                "endpoint": "completions",
                "text": ANSWER,
                "tokens": 256,
                "finish_reason": "length",
                "fault": None,
            },
            {
                "prompt": "Write a short function in Python that says whether a number is prime.",
                "endpoint": "chat",
                "text": "def is_prime(n):\n    return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))",
                "tokens": 41,
                "finish_reason": "stop",
                "fault": None,
            },
        ],
        "logprobs": {
            "arithmetic": "weight_only",
            "tokens": 412,
            "nll_served": 2.18731,
            "nll_emulated": 2.18694,
            "mean_difference": 0.00037,
            "max_difference": 0.041,
        },
        "decode_tokens_per_second": 74.8,
        "hints": [],
    }


def checkpoint() -> dict[str, Any]:
    return {
        "name": "gemma-4-31b-nvfp4",
        "layout": "compressed-tensors",
        "recipe": "nvfp4",
        "quantizer": "mse",
        "made_by": "nvquant 0.1.0",
        "tensors": 1728,
        "bytes": 32_633_255_032,
        "matrices": 180,
        "source": "gemma-4-31b",
        "source_bytes": 62_545_972_312,
        "groups": [
            {"name": "MLP, NVFP4 W4A4", "tensors": 720, "bytes": 11_700_000_000, "source_bytes": 41_600_000_000},
            {"name": "attention, BF16", "tensors": 476, "bytes": 16_900_000_000, "source_bytes": 16_900_000_000},
            {"name": "embedding, BF16", "tensors": 1, "bytes": 2_818_572_288, "source_bytes": 2_818_572_288},
            {"name": "vision tower, BF16", "tensors": 355, "bytes": 1_190_000_000, "source_bytes": 1_190_000_000},
            {"name": "norms, BF16", "tensors": 176, "bytes": 24_682_744, "source_bytes": 24_682_744},
        ],
    }


def checks(stage: str, found: dict[str, str], faults: dict[str, list[str]] | None = None) -> list[Check]:
    return [Check(stage, name, Finding(words, (faults or {}).get(name, ()))) for name, words in found.items()]


NUMERICS = {
    "kl": "W4A4: mean 0.0831 nats over 16,352 tokens, no limit",
    "top1": "W4A4: 89.2 % ± 0.31 % of next tokens are the source's, at least 50 %",
    "delta_nll": "W4A4: +0.0378 nats a token, at most 1",
}
SERVE = {
    "starts": "vLLM 0.32.0, ready after 94.2 s",
    "loaded": "every tensor of the checkpoint was loaded",
    "answers": "2 prompts, 297 tokens, none degenerated",
    "logprobs": "mean difference 0.00037 nats over 412 tokens",
    "memory": "32.5 GB of weights reported, 32.6 GB forecast",
}


def good(layers: int = 60) -> Report:
    found = [*checks("structure", STRUCTURE), *checks("numerics", NUMERICS), *checks("serve", SERVE)]
    return Report(tuple(found), checkpoint(), numerics(layers), serve())


def failing() -> Report:
    """A damaged checkpoint: a layer of zeros, scales of NaN, a server that repeats itself in HTML."""
    broken = numerics()
    broken["layers"][31]["w4a4"]["relative_error"] = math.nan
    broken["layers"][32]["w4a4"]["accumulated_error"] = math.inf
    broken["layers"][32]["weight_only"] = None
    broken["arithmetics"]["w4a4"]["kl"] = {"mean": math.nan, "median": 2.31, "p99": math.inf, "standard_error": None}
    broken["arithmetics"]["w4a4"]["perplexity"] = math.inf
    broken["arithmetics"]["w4a4"]["delta_nll"] = math.inf
    broken["matrices"][94]["weight_error"] = math.nan
    broken["thresholds"]["max_kl"] = 0.2
    broken["arithmetics"]["weight_only"]["kinds"]["code"] |= {"relative": 1.9, "relative_error": 0.1}
    broken["kind_warnings"] = [
        {"arithmetic": "weight_only", "kind": "code", "kl": 0.0285, "relative": 1.9, "relative_error": 0.1}
    ]
    served = serve()
    served["answers"][0] |= {
        "text": "<script>document.title = 'taken'</script><img src=x onerror=alert(1)> " + "the the \x00\x1b[31m" * 20,
        "fault": "the last 180 tokens repeat 'the '",
    }
    served["hints"] = ["vLLM 0.24 serves tied models of the modelopt layout as noise: use 0.25 (issue 48238)"]
    scales = [f"model.language_model.layers.{index}.mlp.gate_proj.weight_scale: NaN in block 17" for index in range(31)]
    return Report(
        (
            *checks("structure", STRUCTURE, {"block_scales": scales}),
            Check("structure", "shards", Finding("12 files", ["model-00012-of-00012.safetensors ends at byte 4,823"])),
            *checks("numerics", NUMERICS, {"kl": ["mean KL is not a number, layer 31 first; the limit is 0.2"]}),
            *checks("serve", SERVE, {"answers": ["prompt 1: the last 180 tokens repeat 'the '"]}),
        ),
        checkpoint(),
        broken,
        served,
    )


def bare() -> Report:
    """Structure alone, without a source."""
    found = {"headers": "1 shard, 12 tensors", "index": "12 tensors, 105,216 bytes"}
    return Report((*checks("structure", found), Check("structure", "kv_cache", not_applicable("no KV cache scheme"))))


def bench() -> dict[str, Any]:
    """Of `nvquant bench`: two models, one of whose points failed."""

    def point(name: str, context: int, users: int, decode: float | None, **more: Any) -> dict[str, Any]:
        figures = {"server": 0, "name": name, "kv_cache": "auto", "context": context, "users": users, **more}
        if decode is None:
            return figures
        return figures | {
            "decode_tokens_per_second": decode,
            "ceiling_tokens_per_second": 149.2 * users,
            "share_of_ceiling": round(decode / (149.2 * users), 3),
            "prefill_tokens_per_second": 33950.0,
            "ttft_p50_ms": 41.3,
            "ttft_p99_ms": 188.0,
            "itl_p50_ms": 1000 * users / decode,
            "itl_p99_ms": 1200 * users / decode,
        }

    nvfp4, bf16 = "gemma-4-31b-nvfp4", "gemma-4-31b"
    return {
        "nvquant": "0.1.0",
        "complete": True,
        "machine": {
            "gpus": [{"name": "NVIDIA H200", "capability": "9.0", "memory_bytes": 150_754_820_096}],
            "driver": "570.86.15",
            "fp4": "weight-only, by Marlin",
            "bandwidth_bytes_per_second": 4.8e12,
            "cpu": "x86_64",
            "cores": 16,
        },
        "settings": {"load_generator": "vllm bench serve", "output_tokens": 128},
        "servers": [
            {
                "name": nvfp4,
                "kv_cache": "auto",
                "scheme": "NVFP4 W4A4",
                "vllm": "0.32.0",
                "command": "/home/ada/bin/vllm serve /data/m --port 43117",
                "url": None,
                "kernel": "weight-only, by Marlin",
                "checkpoint_bytes": 32_633_255_032,
                "weights_bytes": 32_450_000_000,
                "gpu_memory_bytes": 131_000_000_000,
                "kv_cache_tokens": 98_320,
            }
        ],
        "points": [
            point(nvfp4, 1024, 1, 74.83),
            point(nvfp4, 1024, 32, 1721.0),
            point(nvfp4, 65536, 8, 210.4, note="the KV cache holds 1.5 of 8 users at a time, the others wait"),
            point(bf16, 1024, 1, 53.1),
            point(bf16, 65536, 8, None, failed="CUDA out of memory"),
        ],
    }
