"""What the tests of this stage measure with: the stage on given token ids, and models of other makers beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from nvquant.calibrate.samples import CalibrationSet
from nvquant.calibrate.specs import shipped_folder
from nvquant.checkpoint.source import open_checkpoint, read_json
from nvquant.format.schemes import Arithmetic
from nvquant.verify.numerics.document import numerics_of
from nvquant.verify.numerics.measure import SideBySide
from nvquant.verify.numerics.predictions import predict
from nvquant.verify.numerics.served import ServedModel
from nvquant.verify.numerics.stage import NumericsOptions, findings, measure
from nvquant.verify.numerics.text import HELDOUT, load_calibration
from nvquant.verify.numerics.tokens import RunningLogits, TokenScores
from nvquant.verify.report import Finding
from nvquant.verify.subject import open_subject
from torch import Tensor

Samples = Sequence[Tensor]


def no_progress(_done: int, _total: int, _words: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Measured:
    """The stage's document, and what it finds in it."""

    document: Mapping[str, Any]

    @property
    def findings(self) -> dict[str, Finding]:
        numbers = numerics_of(self.document)
        assert numbers is not None
        return findings(numbers)

    @property
    def failed(self) -> set[str]:
        return {name for name, finding in self.findings.items() if finding.faults}

    def kl(self, arithmetic: str) -> float:
        return float(self.document["arithmetics"][arithmetic]["kl"]["mean"])

    def own_errors(self, arithmetic: str) -> list[float]:
        """Each layer's own error."""
        return [layer[arithmetic]["relative_error"] for layer in self.document["layers"]]

    def accumulated(self, arithmetic: str) -> list[float]:
        """How far the hidden state is off behind each layer."""
        return [layer[arithmetic]["accumulated_error"] for layer in self.document["layers"]]


def text_of(samples: Samples, kinds: Sequence[str] = ()) -> CalibrationSet:
    """Token ids as the stage takes them."""
    tokens = sum(map(len, samples))
    return CalibrationSet("ids.jsonl", tuple(samples), tokens, "0" * 64, "ids", kinds=tuple(kinds))


def measured(
    checkpoint: Path, source: Path, samples: Samples, *, kinds: Sequence[str] = (), **options: Any
) -> Measured:
    """Run the stage on token ids."""
    subject, text = open_subject(checkpoint), text_of(samples, kinds)
    numbers = measure(subject, open_checkpoint(source), text, NumericsOptions(**options), no_progress)
    return Measured(numbers.as_json())


def predicted(
    checkpoint: Path, source: Path | None, samples: Samples, *arithmetics: Arithmetic
) -> tuple[Mapping[Any, RunningLogits], Mapping[Any, TokenScores]]:
    """What each lane predicts, token by token."""
    opened = None if source is None else open_checkpoint(source)
    run = SideBySide(ServedModel(open_subject(checkpoint)), opened, samples, arithmetics, "cpu", no_progress)
    try:
        run.run()
        return predict(run, no_progress)
    finally:
        run.close()


def held_out(model: Path, samples: int, length: int, seed: int = 1) -> tuple[Tensor, ...]:
    """Token ids of the shipped held-out text, of each kind equally many, as the stage takes them."""
    config = read_json(model / "config.json", "")
    text = load_calibration(
        str(shipped_folder() / HELDOUT),
        model_folder=model,
        config=config,
        samples=samples,
        sequence_length=length,
        seed=seed,
        in_equal_kinds=True,
    )
    return text.samples


def original(folder: Path) -> Any:
    """The unquantized model as transformers loads it, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """float64 [tokens - 1, vocabulary], by the whole model at once."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)


def whole_models(model: Any, emulation: Any, samples: Samples) -> tuple[float, float, float]:
    """KL divergence, NLL and top-1 agreement from the whole logits of both models."""
    kl, nll, agrees = [], [], []
    for ids in samples:
        a, b = log_probabilities(model, ids), log_probabilities(emulation, ids)
        kl.append((a.exp() * (a - b)).sum(-1))
        nll.append(-b.gather(1, ids[1:, None])[:, 0])
        agrees.append((a.argmax(-1) == b.argmax(-1)).double())
    return float(torch.cat(kl).mean()), float(torch.cat(nll).mean()), float(torch.cat(agrees).mean())


def likelihoods(model: Any, samples: Samples) -> Tensor:
    """Natural-log likelihood of each id that has one before it, float64 [all scored tokens]."""
    parts = [log_probabilities(model, ids).gather(1, ids[1:, None])[:, 0] for ids in samples]
    return torch.cat(parts)
