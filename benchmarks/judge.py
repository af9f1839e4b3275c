"""Judge one checkpoint against its source, on given token ids; one JSON document is the last line.

usage: PYTHON benchmarks/judge.py SOURCE CHECKPOINT IDS.jsonl [--device cpu|cuda] [--batch 1]

Shares no code with nvquant or a peer: `tests/support/emulation.py` reads the files with safetensors, loads the model
with transformers, and computes in float32 what a server of W4A4 computes. It reads the checkpoints of nvquant,
llm-compressor, auto-round (compressed-tensors) and modelopt, with what they changed outside the quantized matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.emulation import decode_tensors, load_emulation, read_tensors

Json = dict[str, Any]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SHARED = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")


def main() -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("ids", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=1, help="sequences in one forward")
    options = parser.parse_args()
    begin = time.perf_counter()
    rows = [json.loads(line) for line in options.ids.read_text(encoding="utf-8").splitlines()]
    source = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).eval().to(options.device)
    quantized = load_emulation(options.checkpoint, options.device)
    sequences = [one for batch in batches(rows, options.batch) for one in scored(source, quantized, batch)]
    document = {
        "sequences": sequences,
        "tokens": sum(one["tokens"] for one in sequences),
        **census(read_tensors(options.checkpoint)),
        "judge_seconds": time.perf_counter() - begin,
        "judge_device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "judge_torch": torch.__version__,
    }
    print("\n" + json.dumps(document))


def batches(rows: Sequence[Json], size: int) -> Iterator[list[Json]]:
    """Rows in their order, at most so many together and only of one length, so that none is padded."""
    batch: list[Json] = []
    for row in rows:
        if batch and (len(batch) == size or len(batch[0]["input_ids"]) != len(row["input_ids"])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def scored(source: Any, quantized: Any, batch: Sequence[Json]) -> list[Json]:
    """Of each sequence: kind, predicted tokens, and the means over them.

    `kl` is the divergence of the quantized model's next-token distribution from the source's over the whole vocabulary,
    in nats, `top1` the share of equal most likely tokens, `nll` and `nll_source` the negative log-likelihoods.
    """
    ids = torch.tensor([row["input_ids"] for row in batch], device=source.device)
    of_source, of_quantized = (log_probabilities(model, ids) for model in (source, quantized))
    kl = (of_source.exp() * (of_source - of_quantized)).sum(-1)
    top1 = (of_source.argmax(-1) == of_quantized.argmax(-1)).double()
    nll_source, nll = (-one.gather(-1, ids[:, 1:, None])[..., 0] for one in (of_source, of_quantized))
    means = {"kl": kl, "top1": top1, "nll": nll, "nll_source": nll_source}
    return [
        {"kind": row["kind"], "tokens": ids.shape[1] - 1}
        | {name: round(float(values[at].mean()), 6) for name, values in means.items()}
        for at, row in enumerate(batch)
    ]


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """float64 [sequences, tokens - 1, vocabulary]."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.double().log_softmax(-1)


def census(stored: dict[str, Tensor]) -> Json:
    """What the checkpoint stores of its decoder layers' matrices.

    `matrices`: how many, `rounded`: how many of them round their inputs, `bits`: of a weight, with all scales.
    `unequal`: groups that a server fuses and whose global scales differ, so that it serves other values than these.
    `pre_quant_scales`: matrices whose inputs are multiplied first, which stock vLLM does not do (0.24).
    """
    state, rounds = decode_tensors(stored)
    matrices = {key.removesuffix(".weight"): tensor for key, tensor in state.items() if _is_matrix(key, tensor)}
    kept = sum(tensor.nbytes for key, tensor in stored.items() if key.rpartition(".")[0] in matrices)
    return {
        "matrices": len(matrices),
        "rounded": sum(name in rounds for name in matrices),
        "bits": round(8 * kept / sum(tensor.numel() for tensor in matrices.values()), 4),
        "tensor_bytes": sum(tensor.nbytes for tensor in stored.values()),
        "unequal": sum(_differ(stored, name, names) for name in matrices for names in FUSED if name.endswith(names[0])),
        "pre_quant_scales": sum(key.endswith(".pre_quant_scale") for key in stored),
    }


def _is_matrix(key: str, tensor: Tensor) -> bool:
    return ".layers." in key and key.endswith(".weight") and tensor.ndim == 2


def _differ(stored: dict[str, Tensor], first: str, names: Sequence[str]) -> bool:
    group = [first.removesuffix(names[0]) + name for name in names]
    found = [[float(stored[f"{name}.{kind}"]) for name in group if f"{name}.{kind}" in stored] for kind in SHARED]
    return any(len(set(values)) > 1 for values in found)


if __name__ == "__main__":
    main()
