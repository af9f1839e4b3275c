"""Distillations of tiny checkpoints on random token ids, in a few seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvquant.checkpoint.source import open_checkpoint
from nvquant.distill.options import DistillOptions, DistillResult
from nvquant.distill.run import distill
from support.conversions import random_samples

LENGTH = 64
KINDS = ("even", "odd")


def write_text(path: Path, samples: int, different: int, seed: int = 5) -> Path:
    """A `.jsonl` file of token ids, each row of one of `KINDS`, in sequences of two lengths.

    Args:
        different: rows, which then repeat.
    """
    lengths = [LENGTH if at % 3 else LENGTH - 9 for at in range(different)]
    drawn = [ids.tolist() for ids in random_samples(lengths, seed)]
    rows = [{"input_ids": drawn[at % different], "kind": KINDS[at % different % 2]} for at in range(samples)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options_of(output: Path, steps: int = 8, *, on_other_text: bool = False, **changes: Any) -> DistillOptions:
    """The options of a distillation of so many steps, whose texts lie beside the output.

    Args:
        on_other_text: judge the training on other text. Otherwise the gate sees the twelve rows of the training, which
            every sound training learns by heart.
    """
    text, heldout = (output.with_name(f"{output.name}-{kind}.jsonl") for kind in ("training", "heldout"))
    values: dict[str, Any] = {
        "tokens": steps * 8 * LENGTH,
        "text": str(write_text(text, steps * 8, steps * 8 if on_other_text else 12)),
        "heldout": str(write_text(heldout, 12, 12, seed=6) if on_other_text else text),
        "heldout_samples": 12,
        "sequence_length": LENGTH,
        "scale_rate": 0.01,
        "norm_rate": 0.005,
    }
    return DistillOptions(output, **(values | changes))


def distilled(checkpoint: Path, source: Path, output: Path, steps: int = 8, **changes: Any) -> DistillResult:
    """Distill a tiny checkpoint."""
    return distill(checkpoint, open_checkpoint(source), options_of(output, steps, **changes))
