"""The stage `numerics`: the loss by quantization, measured and compared with limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from ...calibrate.samples import CalibrationSet
from ...checkpoint.source import Checkpoint
from ...format.schemes import ARITHMETIC_WORDS
from ...plan.quantized_source import as_computed
from ...recipe.decoder import layer_index
from ...stream.manifest import Manifest
from ...weights.decoding import decoded_form
from ..folds import in_recorded_order
from ..report import Check, Finding, counted, not_applicable
from ..subject import Subject
from ..tally import RMSE_LIMIT
from ..threads import Progress
from .document import (
    Agreement,
    Divergence,
    InputLoss,
    LayerLoss,
    LayerLosses,
    MeasuredText,
    Numerics,
    Predictions,
    Thresholds,
    known,
)
from .kinds import kind_warnings, losses_by_kind, warning_words
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
    "weight_only": "weight-only, as Marlin computes it on GPUs without units for the formats",
}
SHORT = ARITHMETIC_WORDS
# Sound W4A4 layers of SmolLM2-135M have 0.1 to 0.32 (docs/verification.md).
MOST_LAYER_ERROR = 0.6
MOST_CLIPPED = 0.01  # share of an input's blocks; calibration with head-room leaves none
MOST_LOST = 0.1  # share of an input's blocks that become zeros; a scale ten thousand times too large does it


@dataclass(frozen=True)
class NumericsOptions:
    """The options of the measurement.

    Attributes:
        text: the user's own file. None for the shipped held-out text.
        device: torch's name.
        max_kl, min_top1: instead of the recipe's.
    """

    text: Path | None = None
    samples: int = 18
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
        numbers: the document after `run` has ended. None before.
    Args:
        subject: a checkpoint whose headers, layout and matrices are sound.
    """

    def __init__(self, subject: Subject, source: Checkpoint, options: NumericsOptions, progress: Progress) -> None:
        self._subject, self._options, self._progress = subject, options, progress
        self._source = source
        self.numbers: Numerics | None = None

    def run(self) -> Iterator[Check]:
        """Measure, then yield the checks.

        Raises:
            InputError: too little text, another model for a source, or an architecture that cannot be walked.
            EnvironmentLack: a transformers that does not know the model.
        """
        options, subject = self._options, self._subject
        source = in_recorded_order(subject, as_computed(self._source, str(self._source.folder)))
        text = load_text(options.text, subject.folder, subject.config, options.samples, options.sequence_length)
        self.numbers = measure(subject, source, text, options, self._progress)
        for name, finding in findings(self.numbers).items():
            yield Check(STAGE, name, finding)


def measure(
    subject: Subject, source: Checkpoint, text: CalibrationSet, options: NumericsOptions, progress: Progress
) -> Numerics:
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
        name: replace(
            score.numbers(words[name], nll_of_tokens, again.get(name)),
            kinds=losses_by_kind(score, None if name == "floor" else scores["floor"], text.kinds, again.get(name)),
        )
        for name, score in scores.items()
    }
    own = lanes[arithmetics[0]]  # of the checkpoint's own scheme
    by_name = {str(name): lane for name, lane in lanes.items()}
    scored = len(logits["source"].targets)
    return Numerics(
        kl=own.kl.mean,
        perplexity=own.perplexity,
        perplexity_source=perplexity(nll),
        top1=own.top1.agreement,
        source=source.name,
        source_form=decoded_form(source),
        text=MeasuredText(text.name, text.framing, len(text.samples), text.tokens, scored, text.sha256),
        device=_device_name(run.device),
        dtype=str(run.dtype).removeprefix("torch."),
        nll_source=nll,
        arithmetics=by_name,
        layers=[_layer_losses(layer, run) for layer in run.layers],
        matrices=run.matrices,
        inputs=[_input_loss(name, run) for name in run.rounding.numbers],
        thresholds=thresholds,
        kind_warnings=kind_warnings(by_name),
    )


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _layer_losses(layer: LayerNumbers, run: SideBySide) -> LayerLosses:
    inputs = [
        n for name, n in run.rounding.numbers.items() if layer_index(f"{name}.", run.served.prefix) == layer.layer
    ]
    blocks = sum(numbers.blocks for numbers in inputs)
    clipped = sum(numbers.clipped for numbers in inputs) / blocks if blocks else None
    losses: dict[str, LayerLoss] = {}
    for name, own in layer.own.items():
        accumulated = layer.stream[name].relative
        losses[name] = LayerLoss(
            **own.as_json(), accumulated_error=accumulated, clipped=clipped if name == "w4a4" else None
        )
    return LayerLosses(layer.layer, losses)


def _input_loss(name: str, run: SideBySide) -> InputLoss:
    numbers = run.rounding.numbers[name]
    return InputLoss(
        name=name,
        layer=layer_index(f"{name}.", run.served.prefix),
        amax=numbers.amax,
        calibrated_amax=numbers.calibrated,
        clipped=numbers.clipped / numbers.blocks,
        lost=numbers.lost / numbers.blocks,
    )


def findings(numbers: Numerics) -> dict[str, Finding]:
    """The verdict on the numbers, check by check."""
    checks = {"predictions": _predictions, "kl": _kl, "top1": _top1, "nll": _nll}
    more = {"layers": _layers, "matrices": _matrices, "inputs": _inputs}
    return {name: check(numbers) for name, check in {**checks, **more}.items()}


def _compared(numbers: Numerics) -> dict[str, Predictions]:
    return {name: one for name, one in numbers.arithmetics.items() if name != "floor"}


def _limits(numbers: Numerics) -> Thresholds:
    return numbers.thresholds or Thresholds()


def _predictions(numbers: Numerics) -> Finding:
    text = numbers.text or MeasuredText()
    faults = [
        f"{SHORT.get(name, name)}: the predictions contain a NaN or an infinity"
        for name, one in numbers.arithmetics.items()
        if not math.isfinite(known(one.kl.mean)) or math.isnan(known(one.nll))
    ]
    looked_at = (
        f"{text.scored:,} tokens of {text.name} ({text.framing}), {counted(int(known(text.sequences)), 'sequence')}"
    )
    return Finding(f"{looked_at}, on {numbers.device} in {numbers.dtype}", faults)


def _kl(numbers: Numerics) -> Finding:
    limit = _limits(numbers).max_kl
    faults = [
        f"{SHORT[name]}: mean KL divergence {known(one.kl.mean):.4f}, the limit is {limit:g}"
        for name, one in _compared(numbers).items()
        if limit is not None and not known(one.kl.mean) <= limit
    ]
    said = [
        f"{SHORT[name]} {known(one.kl.mean):.4f}{_spread(one.kl)} (median {known(one.kl.median):.4f}, "
        f"p99 {known(one.kl.p99):.3g})"
        for name, one in _compared(numbers).items()
    ]
    floor = numbers.arithmetics["floor"]
    said.append(f"floor {known(floor.kl.mean):.2g} ({floor.words})")
    asked = "no limit set" if limit is None else f"at most {limit:g}"
    return Finding(f"mean KL divergence in nats, {asked}: {', '.join(said)}", faults, _kind_notes(numbers))


def _kind_notes(numbers: Numerics) -> list[str]:
    """A line of KL divergence and top-1 agreement by kind for each arithmetic, then the warnings."""
    notes = []
    for name, one in _compared(numbers).items():
        kinds = [
            f"{kind} {known(loss.kl.mean):.4f} ({known(loss.top1.agreement):.1%}, {known(loss.tokens):,.0f} tokens)"
            for kind, loss in one.kinds.items()
        ]
        notes += [f"{SHORT[name]} by kind, KL (top-1): {', '.join(kinds)}"] if kinds else []
    warnings = [warning_words(one, SHORT.get(one.arithmetic or "", "")) for one in numbers.kind_warnings]
    return notes + [f"warning: {words}" for words in warnings]


def _spread(numbers: Divergence | Agreement) -> str:
    error, noise = numbers.standard_error, numbers.rounding_noise
    return ("" if error is None else f" ± {error:.2g}") + ("" if noise is None else f", rounding ± {noise:.2g}")


def _top1(numbers: Numerics) -> Finding:
    limit = known(_limits(numbers).min_top1)
    faults = [
        f"{SHORT[name]}: top-1 agreement {known(one.top1.agreement):.4f}, the limit is {limit:g}"
        for name, one in _compared(numbers).items()
        if not known(one.top1.agreement) >= limit
    ]
    said = [
        f"{SHORT[name]} {known(one.top1.agreement):.4f}{_spread(one.top1)}" for name, one in _compared(numbers).items()
    ]
    said.append(f"floor {known(numbers.arithmetics['floor'].top1.agreement):.4f}")
    return Finding(f"top-1 agreement, at least {limit:g}: {', '.join(said)}", faults)


def _nll(numbers: Numerics) -> Finding:
    limit = known(_limits(numbers).max_delta_nll)
    faults = [
        f"{SHORT[name]}: {known(one.delta_nll):+.3f} nats a token, the limit is {limit:+g}"
        for name, one in _compared(numbers).items()
        if not known(one.delta_nll) <= limit
    ]
    said = [
        f"{SHORT[name]} {known(one.perplexity):.3f} ({known(one.delta_nll):+.4f} nats)"
        for name, one in _compared(numbers).items()
    ]
    return Finding(f"perplexity: source {known(numbers.perplexity_source):.3f}, {', '.join(said)}", faults)


def _layers(numbers: Numerics) -> Finding:
    faults = []
    said = []
    for name in _compared(numbers):
        errors = {layer.layer: known(layer.losses[name].relative_error) for layer in numbers.layers}
        worst = max(errors, key=lambda layer: _orderable(errors[layer]))
        faults += [
            f"layer {layer}, {SHORT[name]}: relative error {error:.3g} of its output on the source's own input, the "
            f"limit is {MOST_LAYER_ERROR} (median of all layers {median(errors.values()):.3g})"
            for layer, error in errors.items()
            if not error <= MOST_LAYER_ERROR
        ]
        said.append(f"{SHORT[name]} median {median(errors.values()):.3f}, worst {errors[worst]:.3f} (layer {worst})")
    return Finding(f"{counted(len(numbers.layers), 'layer')}, relative error each: {', '.join(said)}", faults)


def _orderable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _matrices(numbers: Numerics) -> Finding:
    matrices = numbers.matrices
    faults = [
        f"{one.name}: relative error {one.weight_error:.3g}, the limit is {RMSE_LIMIT}"
        for one in matrices
        if one.weight_error is not None and not one.weight_error <= RMSE_LIMIT
    ]
    counts = ("blocks", "zero_blocks", "clamped_blocks", "flushed_blocks")
    totals = {key: sum(getattr(one, key) for one in matrices) for key in counts}
    errors = [one.weight_error for one in matrices if one.weight_error is not None]
    said = f"weight error median {median(errors):.4f}, worst {max(errors, key=_orderable):.4f}, " if errors else ""
    number = counted(len(matrices), "matrix", "matrices")
    return Finding(
        f"{number}, {said}of {totals['blocks']:,} blocks {totals['zero_blocks']:,} lost to zero, "
        f"{totals['clamped_blocks']:,} clamped, {totals['flushed_blocks']:,} flushed by Marlin",
        faults,
    )


def _inputs(numbers: Numerics) -> Finding:
    inputs = numbers.inputs
    if not inputs:
        return not_applicable("no input is quantized")
    faults = [
        f"{one.name}: its input contains a NaN or an infinity" for one in inputs if not math.isfinite(known(one.amax))
    ]
    faults += [
        f"{one.name}: {known(one.clipped):.1%} of its input's blocks are clipped (amax {known(one.amax):.4g}, "
        f"calibrated {known(one.calibrated_amax):.4g}): the input global scale is too large"
        for one in inputs
        if known(one.clipped) > MOST_CLIPPED
    ]
    faults += [
        f"{one.name}: {known(one.lost):.1%} of its input's blocks become zeros (amax {known(one.amax):.4g}, calibrated "
        f"{known(one.calibrated_amax):.4g}): the input global scale is too small"
        for one in inputs
        if known(one.lost) > MOST_LOST
    ]
    clipped = max(inputs, key=lambda one: known(one.clipped))
    lost = max(inputs, key=lambda one: known(one.lost))
    beyond = [one for one in inputs if known(one.amax) > known(one.calibrated_amax)]
    said = ""
    if beyond:
        ratios = [one.growth for one in beyond if one.growth is not None]
        said = f", {len(beyond)} beyond their calibrated amax (up to {max(ratios, default=math.inf):.2f} times)"
    return Finding(
        f"{counted(len(inputs), 'input')}{said}, most clipped blocks {known(clipped.clipped):.2%} ({clipped.name}), "
        f"most blocks lost to zero {known(lost.lost):.2%} ({lost.name})",
        faults,
    )
