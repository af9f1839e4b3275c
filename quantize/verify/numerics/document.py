"""The document of the stage `numerics`: its form, its JSON, and a parser for documents of others.

`as_json` writes the keys in the order of the fields (docs/verification.md, "Document"). A document may come with a
checkpoint, so its author may have written anything into it. Behind `numerics_of` numbers are numbers, texts are texts,
and anything else is None. A document of an older nvquant may lack a value, which is None too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias, TypeVar

Number: TypeAlias = float | int | None
_WRITTEN = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as `report.plain_json` writes them


@dataclass(frozen=True)
class Divergence:
    """KL divergence from the source over tokens, in nats.

    Attributes:
        standard_error: over sequences. None for one sequence.
        rounding_noise: the spread through the last bits of products. None where it was not measured.
    """

    mean: Number = None
    standard_error: Number = None
    rounding_noise: Number = None
    median: Number = None
    p99: Number = None


@dataclass(frozen=True)
class Agreement:
    """Top-1 agreement with the source, a share of tokens. See `Divergence`."""

    agreement: Number = None
    standard_error: Number = None
    rounding_noise: Number = None


@dataclass(frozen=True)
class KindLoss:
    """The loss of a lane on one kind of text.

    Attributes:
        sequences, tokens: that were scored.
        relative: its KL over the floor's KL, beside the median of that ratio over the other kinds. See `kinds`. None
            for the floor itself, for one sequence, and for one kind.
        relative_error: the standard error of it, over sequences.
    """

    sequences: Number = None
    tokens: Number = None
    kl: Divergence = field(default_factory=Divergence)
    top1: Agreement = field(default_factory=Agreement)
    relative: Number = None
    relative_error: Number = None


@dataclass(frozen=True)
class KindWarning:
    """A kind of text that lost clearly more than the others under an arithmetic. See `KindLoss`."""

    arithmetic: str | None = None
    kind: str | None = None
    kl: Number = None
    relative: Number = None
    relative_error: Number = None


@dataclass(frozen=True)
class Predictions:
    """The predictions of a lane against the source's.

    Attributes:
        words: the lane's arithmetic.
        nll: mean negative log-likelihood in nats a token.
        delta_nll: its increase over the source's.
        nll_difference: mean absolute difference of the tokens' likelihoods.
        kinds: the loss by kind of text. Empty where the kinds are not known.
    """

    words: str | None = None
    kl: Divergence = field(default_factory=Divergence)
    nll: Number = None
    delta_nll: Number = None
    nll_difference: Number = None
    perplexity: Number = None
    top1: Agreement = field(default_factory=Agreement)
    kinds: Mapping[str, KindLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerLoss:
    """The loss of a decoder layer under one arithmetic.

    Attributes:
        relative_error, sqnr_db, cosine: of its output on the source's own input.
        accumulated_error: relative error of the hidden state behind it.
        clipped: share of its inputs' blocks. None for weight-only.
    """

    relative_error: Number = None
    sqnr_db: Number = None
    cosine: Number = None
    accumulated_error: Number = None
    clipped: Number = None


@dataclass(frozen=True)
class LayerLosses:
    """The losses of a decoder layer by arithmetic."""

    layer: int
    losses: Mapping[str, LayerLoss]

    def as_json(self) -> dict[str, Any]:
        """The layer's number, then each arithmetic."""
        return {"layer": self.layer, **{name: asdict(loss) for name, loss in self.losses.items()}}


@dataclass(frozen=True)
class MatrixLoss:
    """The loss of a matrix: relative error, and numbers of blocks. See `errors.matrix_numbers`."""

    name: str | None = None
    layer: Number = None
    scheme: str | None = None
    weight_error: Number = None
    blocks: Number = None
    zero_blocks: Number = None
    clamped_blocks: Number = None
    flushed_blocks: Number = None


@dataclass(frozen=True)
class InputLoss:
    """The loss of the quantized inputs of a fused layer.

    Attributes:
        clipped, lost: shares of their blocks that are clipped, and that become zeros.
    """

    name: str | None = None
    layer: Number = None
    amax: Number = None
    calibrated_amax: Number = None
    clipped: Number = None
    lost: Number = None

    @property
    def growth(self) -> float | None:
        """The largest input over the largest in calibration."""
        return self.amax / self.calibrated_amax if self.amax is not None and self.calibrated_amax else None


@dataclass(frozen=True)
class MeasuredText:
    """The text that was measured.

    Attributes:
        scored: tokens with a prediction: all but the first of each sequence.
    """

    name: str | None = None
    framing: str | None = None
    sequences: Number = None
    tokens: Number = None
    scored: Number = None
    sha256: str | None = None


@dataclass(frozen=True)
class Thresholds:
    """The limits of the measured numbers.

    Attributes:
        max_kl: mean KL divergence in nats. None for no limit.
        min_top1: top-1 agreement, the share of tokens with the same most likely next token.
        max_delta_nll: increase of the mean negative log-likelihood in nats.
    """

    max_kl: Number = None
    min_top1: Number = 0.5
    max_delta_nll: Number = 1.0

    def tightened(self, max_kl: float | None, min_top1: float | None) -> Thresholds:
        """These limits, with those of the command line in their places."""
        return Thresholds(
            self.max_kl if max_kl is None else max_kl,
            self.min_top1 if min_top1 is None else min_top1,
            self.max_delta_nll,
        )


@dataclass(frozen=True)
class Numerics:
    """The document of the stage.

    Attributes:
        kl, perplexity, top1: of the checkpoint's own scheme.
        arithmetics: the predictions by lane: `w4a4`, `weight_only`, `floor`.
        source_form: the forms that the source was decoded from. None for an unquantized source.
        kind_warnings: the kinds of text that lost clearly more than the others.
    """

    kl: Number = None
    perplexity: Number = None
    perplexity_source: Number = None
    top1: Number = None
    source: str | None = None
    source_form: str | None = None
    text: MeasuredText | None = None
    device: str | None = None
    dtype: str | None = None
    nll_source: Number = None
    arithmetics: Mapping[str, Predictions] = field(default_factory=dict)
    layers: Sequence[LayerLosses] = ()
    matrices: Sequence[MatrixLoss] = ()
    inputs: Sequence[InputLoss] = ()
    thresholds: Thresholds | None = None
    kind_warnings: Sequence[KindWarning] = ()

    def as_json(self) -> dict[str, Any]:
        """The document as JSON values, with floats for what JSON cannot hold (see `report.plain_json`)."""
        document = {**asdict(self), "layers": [layer.as_json() for layer in self.layers]} | {
            key: list(map(asdict, getattr(self, key))) for key in ("matrices", "inputs", "kind_warnings")
        }
        if self.source_form is None:  # as in documents of earlier releases
            del document["source_form"]
        return document


Form = TypeVar(
    "Form",
    Divergence,
    Agreement,
    KindLoss,
    KindWarning,
    Predictions,
    LayerLoss,
    MatrixLoss,
    InputLoss,
    MeasuredText,
    Thresholds,
    Numerics,
)


Loss = TypeVar("Loss", KindLoss, Predictions)


def known(number: Number) -> float:
    """A number, or NaN for a missing one, which no comparison with a limit passes."""
    return math.nan if number is None else number


def numerics_of(document: object) -> Numerics | None:
    """The document of a report, parsed. None where there is none.

    Values of a wrong type, and layers without a number, are skipped.
    """
    if not isinstance(document, Mapping):
        return None
    return replace(
        _parsed(Numerics, document),
        text=_parsed_if_there(MeasuredText, document.get("text")),
        arithmetics={name: _predictions(one) for name, one in _map(document.get("arithmetics")).items() if one},
        layers=tuple(_layer(row) for row in _rows(document.get("layers")) if isinstance(row.get("layer"), int)),
        matrices=tuple(_parsed(MatrixLoss, row) for row in _rows(document.get("matrices"))),
        inputs=tuple(_parsed(InputLoss, row) for row in _rows(document.get("inputs"))),
        thresholds=_parsed_if_there(Thresholds, document.get("thresholds")),
        kind_warnings=tuple(_parsed(KindWarning, row) for row in _rows(document.get("kind_warnings"))),
    )


def _number(value: object) -> Number:
    if isinstance(value, str):
        return _WRITTEN.get(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(value: object) -> list[Mapping[str, Any]]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return [row for row in value if isinstance(row, Mapping)] if is_list else []  # type: ignore[attr-defined]


_PARSERS: Mapping[object, Callable[[object], Any]] = {"Number": _number, "str | None": _text}
"""The parser of a field, by its annotation."""


def _parsed(form: type[Form], document: object) -> Form:
    """A part of the document. Its numbers and texts are read, and its other fields keep their defaults."""
    found = _map(document)
    parsers = {field.name: _PARSERS[field.type] for field in fields(form) if field.type in _PARSERS}
    return form(**{name: parse(found.get(name)) for name, parse in parsers.items()})


def _parsed_if_there(form: type[Form], document: object) -> Form | None:
    return _parsed(form, document) if isinstance(document, Mapping) else None


def _predictions(document: object) -> Predictions:
    found = _map(document)
    kinds = {str(name): _kind_loss(loss) for name, loss in _map(found.get("kinds")).items()}
    return replace(_with_loss(_parsed(Predictions, found), found), kinds=kinds)


def _kind_loss(document: object) -> KindLoss:
    found = _map(document)
    return _with_loss(_parsed(KindLoss, found), found)


def _with_loss(form: Loss, found: Mapping[str, Any]) -> Loss:
    return replace(form, kl=_parsed(Divergence, found.get("kl")), top1=_parsed(Agreement, found.get("top1")))


def _layer(document: Mapping[str, Any]) -> LayerLosses:
    losses = {name: value for name, value in document.items() if isinstance(value, Mapping)}
    return LayerLosses(int(document["layer"]), {name: _parsed(LayerLoss, value) for name, value in losses.items()})
