"""The stage `numerics`: the loss by quantization, measured and compared with limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...calibrate.samples import CalibrationSet
from ...checkpoint.source import Checkpoint
from ...format.schemes import ARITHMETIC_WORDS
from ...plan.quantized_source import refuse_quantized
from ...recipe.decoder import layer_index
from ...stream.manifest import Manifest
from ..report import Check, Finding, counted, not_applicable
from ..subject import Subject
from ..tally import RMSE_LIMIT
from ..threads import Progress
from .measure import LayerNumbers, SideBySide
from .noise import noise_words
from .predictions import predict
from .served import ServedModel
from .text import load_text
from .tokens import perplexity

STAGE = "numerics"
WORDS: Mapping[str, str] = {
    "w4a4": "W4A4, as GPUs with FP4 units compute it",
    "w8a8": "FP8 with rounded inputs, NVFP4 weight-only, as Hopper and Ada compute it",
    "weight_only": "weight-only, as Marlin computes it on Hopper, Ada and Ampere",
}
SHORT = ARITHMETIC_WORDS
# Sound W4A4 layers of SmolLM2-135M have 0.1 to 0.32 (docs/verification.md).
MOST_LAYER_ERROR = 0.6
MOST_CLIPPED = 0.01  # share of an input's blocks; calibration with head-room leaves none
MOST_LOST = 0.1  # share of an input's blocks that become zeros; a scale ten thousand times too large does it


@dataclass(frozen=True)
class Thresholds:
    """The limits of the measured numbers.

    Attributes:
        max_kl: mean KL divergence in nats. None for no limit.
        min_top1: top-1 agreement, the share of tokens with the same most likely next token.
        max_delta_nll: increase of the mean negative log-likelihood in nats.
    """

    max_kl: float | None = None
    min_top1: float = 0.5
    max_delta_nll: float = 1.0

    def tightened(self, max_kl: float | None, min_top1: float | None) -> Thresholds:
        """These limits, with those of the command line in their places."""
        return Thresholds(
            self.max_kl if max_kl is None else max_kl,
            self.min_top1 if min_top1 is None else min_top1,
            self.max_delta_nll,
        )


@dataclass(frozen=True)
class NumericsOptions:
    """The options of the measurement.

    Attributes:
        text: the user's own file. None for the shipped held-out text.
        device: torch's name.
        max_kl, min_top1: instead of the recipe's.
    """

    text: Path | None = None
    samples: int = 16
    sequence_length: int = 512
    device: str = "cpu"
    max_kl: float | None = None
    min_top1: float | None = None


def thresholds_of(subject: Subject) -> Thresholds:
    """The limits of the recipe, or the defaults."""
    if not isinstance(subject.manifest, Manifest):
        return Thresholds()
    asked = subject.manifest.recipe.verify
    return Thresholds(asked.max_kl, asked.min_top1, asked.max_delta_nll)


class NumericsStage:
    """One run of the stage.

    Attributes:
        document: the numbers after `run` has ended. None before.
    Args:
        subject: a checkpoint whose headers, layout and matrices are sound.
    """

    def __init__(self, subject: Subject, source: Checkpoint, options: NumericsOptions, progress: Progress) -> None:
        self._subject, self._source, self._options, self._progress = subject, source, options, progress
        self.document: dict[str, Any] | None = None

    def run(self) -> Iterator[Check]:
        """Measure, then yield the checks.

        Raises:
            InputError: too little text, another model for a source, or an architecture that cannot be walked.
            EnvironmentLack: a transformers that does not know the model.
        """
        refuse_quantized(self._source, str(self._source.folder))
        options, subject = self._options, self._subject
        text = load_text(options.text, subject.folder, subject.config, options.samples, options.sequence_length)
        self.document = measure(subject, self._source, text, options, self._progress)
        for name, finding in findings(self.document).items():
            yield Check(STAGE, name, finding)


def measure(
    subject: Subject, source: Checkpoint, text: CalibrationSet, options: NumericsOptions, progress: Progress
) -> dict[str, Any]:
    """Measure a checkpoint against its source. Returns the stage's document (docs/verification.md, "Numbers")."""
    served = ServedModel(subject)
    arithmetics = served.arithmetics
    run = SideBySide(served, source, text.samples, arithmetics, options.device, progress)
    try:
        run.run()
        logits, scores = predict(run, progress)
    finally:
        run.close()
    nll_of_tokens = logits["source"].nll.cpu()
    nll = float(nll_of_tokens.mean())
    words = {**WORDS, "floor": noise_words(run.device)}
    thresholds = thresholds_of(subject).tightened(options.max_kl, options.min_top1)
    again = {"w4a4": scores.pop("w4a4_again", None)}
    lanes = {
        name: {"words": words[name], **score.as_json(nll_of_tokens, again.get(name))} for name, score in scores.items()
    }
    own = lanes[arithmetics[0]]  # of the checkpoint's own scheme
    return {
        "kl": own["kl"]["mean"],
        "perplexity": own["perplexity"],
        "perplexity_source": perplexity(nll),
        "top1": own["top1"]["agreement"],
        "source": source.name,
        "text": {
            "name": text.name,
            "framing": text.framing,
            "sequences": len(text.samples),
            "tokens": text.tokens,
            "scored": len(logits["source"].targets),
            "sha256": text.sha256,
        },
        "device": _device_name(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "nll_source": nll,
        "arithmetics": lanes,
        "layers": [_layer_json(layer, run) for layer in run.layers],
        "matrices": run.matrices,
        "inputs": [_input_json(name, run) for name in run.rounding.numbers],
        "thresholds": asdict(thresholds),
    }


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _layer_json(layer: LayerNumbers, run: SideBySide) -> dict[str, Any]:
    inputs = [
        n for name, n in run.rounding.numbers.items() if layer_index(f"{name}.", run.served.prefix) == layer.layer
    ]
    blocks = sum(numbers.blocks for numbers in inputs)
    clipped = sum(numbers.clipped for numbers in inputs) / blocks if blocks else None
    made: dict[str, Any] = {"layer": layer.layer}
    for name, own in layer.own.items():
        made[name] = {
            **own.as_json(),
            "accumulated_error": layer.stream[name].relative,
            "clipped": clipped if name == "w4a4" else None,
        }
    return made


def _input_json(name: str, run: SideBySide) -> dict[str, Any]:
    numbers = run.rounding.numbers[name]
    return {
        "name": name,
        "layer": layer_index(f"{name}.", run.served.prefix),
        "amax": numbers.amax,
        "calibrated_amax": numbers.calibrated,
        "clipped": numbers.clipped / numbers.blocks,
        "lost": numbers.lost / numbers.blocks,
    }


def findings(document: Mapping[str, Any]) -> dict[str, Finding]:
    """The verdict on the numbers, check by check."""
    checks = {"predictions": _predictions, "kl": _kl, "top1": _top1, "nll": _nll}
    more = {"layers": _layers, "matrices": _matrices, "inputs": _inputs}
    return {name: check(document) for name, check in {**checks, **more}.items()}


def _compared(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: one for name, one in document["arithmetics"].items() if name != "floor"}


def _predictions(document: Mapping[str, Any]) -> Finding:
    text = document["text"]
    faults = [
        f"{SHORT.get(name, name)}: the predictions contain a NaN or an infinity"
        for name, one in document["arithmetics"].items()
        if not math.isfinite(one["kl"]["mean"]) or math.isnan(one["nll"])
    ]
    looked_at = (
        f"{text['scored']:,} tokens of {text['name']} ({text['framing']}), {counted(text['sequences'], 'sequence')}"
    )
    return Finding(f"{looked_at}, on {document['device']} in {document['dtype']}", faults)


def _kl(document: Mapping[str, Any]) -> Finding:
    limit = document["thresholds"]["max_kl"]
    faults = [
        f"{SHORT[name]}: mean KL divergence {one['kl']['mean']:.4f}, the limit is {limit:g}"
        for name, one in _compared(document).items()
        if limit is not None and not one["kl"]["mean"] <= limit
    ]
    said = [
        f"{SHORT[name]} {one['kl']['mean']:.4f}{_spread(one['kl'])} (median {one['kl']['median']:.4f}, "
        f"p99 {one['kl']['p99']:.3g})"
        for name, one in _compared(document).items()
    ]
    floor = document["arithmetics"]["floor"]
    said.append(f"floor {floor['kl']['mean']:.2g} ({floor['words']})")
    asked = "no limit set" if limit is None else f"at most {limit:g}"
    return Finding(f"mean KL divergence in nats, {asked}: {', '.join(said)}", faults)


def _spread(numbers: Mapping[str, Any]) -> str:
    error, noise = numbers["standard_error"], numbers["rounding_noise"]
    return ("" if error is None else f" ± {error:.2g}") + ("" if noise is None else f", rounding ± {noise:.2g}")


def _top1(document: Mapping[str, Any]) -> Finding:
    limit = document["thresholds"]["min_top1"]
    faults = [
        f"{SHORT[name]}: top-1 agreement {one['top1']['agreement']:.4f}, the limit is {limit:g}"
        for name, one in _compared(document).items()
        if not one["top1"]["agreement"] >= limit
    ]
    said = [
        f"{SHORT[name]} {one['top1']['agreement']:.4f}{_spread(one['top1'])}"
        for name, one in _compared(document).items()
    ]
    said.append(f"floor {document['arithmetics']['floor']['top1']['agreement']:.4f}")
    return Finding(f"top-1 agreement, at least {limit:g}: {', '.join(said)}", faults)


def _nll(document: Mapping[str, Any]) -> Finding:
    limit = document["thresholds"]["max_delta_nll"]
    faults = [
        f"{SHORT[name]}: {one['delta_nll']:+.3f} nats a token, the limit is {limit:+g}"
        for name, one in _compared(document).items()
        if not one["delta_nll"] <= limit
    ]
    said = [
        f"{SHORT[name]} {one['perplexity']:.3f} ({one['delta_nll']:+.4f} nats)"
        for name, one in _compared(document).items()
    ]
    return Finding(f"perplexity: source {document['perplexity_source']:.3f}, {', '.join(said)}", faults)


def _layers(document: Mapping[str, Any]) -> Finding:
    faults = []
    said = []
    for name in _compared(document):
        errors = {layer["layer"]: layer[name]["relative_error"] for layer in document["layers"]}
        worst = max(errors, key=lambda layer: _orderable(errors[layer]))
        faults += [
            f"layer {layer}, {SHORT[name]}: relative error {error:.3g} of its output on the source's own input, the "
            f"limit is {MOST_LAYER_ERROR} (median of all layers {median(errors.values()):.3g})"
            for layer, error in errors.items()
            if not error <= MOST_LAYER_ERROR
        ]
        said.append(f"{SHORT[name]} median {median(errors.values()):.3f}, worst {errors[worst]:.3f} (layer {worst})")
    return Finding(f"{counted(len(document['layers']), 'layer')}, relative error each: {', '.join(said)}", faults)


def _orderable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _matrices(document: Mapping[str, Any]) -> Finding:
    matrices = document["matrices"]
    faults = [
        f"{one['name']}: relative error {one['weight_error']:.3g}, the limit is {RMSE_LIMIT}"
        for one in matrices
        if one["weight_error"] is not None and not one["weight_error"] <= RMSE_LIMIT
    ]
    totals = {
        key: sum(one[key] for one in matrices) for key in ("blocks", "zero_blocks", "clamped_blocks", "flushed_blocks")
    }
    errors = [one["weight_error"] for one in matrices if one["weight_error"] is not None]
    said = f"weight error median {median(errors):.4f}, worst {max(errors, key=_orderable):.4f}, " if errors else ""
    number = counted(len(matrices), "matrix", "matrices")
    return Finding(
        f"{number}, {said}of {totals['blocks']:,} blocks {totals['zero_blocks']:,} lost to zero, "
        f"{totals['clamped_blocks']:,} clamped, {totals['flushed_blocks']:,} flushed by Marlin",
        faults,
    )


def _inputs(document: Mapping[str, Any]) -> Finding:
    inputs = document["inputs"]
    if not inputs:
        return not_applicable("no input is quantized")
    faults = [
        f"{one['name']}: its input contains a NaN or an infinity" for one in inputs if not math.isfinite(one["amax"])
    ]
    faults += [
        f"{one['name']}: {one['clipped']:.1%} of its input's blocks are clipped (amax {one['amax']:.4g}, calibrated "
        f"{one['calibrated_amax']:.4g}): the input global scale is too large"
        for one in inputs
        if one["clipped"] > MOST_CLIPPED
    ]
    faults += [
        f"{one['name']}: {one['lost']:.1%} of its input's blocks become zeros (amax {one['amax']:.4g}, calibrated "
        f"{one['calibrated_amax']:.4g}): the input global scale is too small"
        for one in inputs
        if one["lost"] > MOST_LOST
    ]
    clipped = max(inputs, key=lambda one: one["clipped"])
    lost = max(inputs, key=lambda one: one["lost"])
    beyond = [one for one in inputs if one["amax"] > one["calibrated_amax"]]
    said = ""
    if beyond:
        ratios = [one["amax"] / one["calibrated_amax"] for one in beyond if one["calibrated_amax"]]
        said = f", {len(beyond)} beyond their calibrated amax (up to {max(ratios, default=math.inf):.2f} times)"
    return Finding(
        f"{counted(len(inputs), 'input')}{said}, most clipped blocks {clipped['clipped']:.2%} ({clipped['name']}), "
        f"most blocks lost to zero {lost['lost']:.2%} ({lost['name']})",
        faults,
    )
