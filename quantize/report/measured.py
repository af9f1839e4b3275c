"""The numbers of the stage `numerics`: headline numbers, layers, matrices, and bytes by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..format.schemes import ARITHMETIC_WORDS
from ..quoting import one_line
from ..recipe.kept import kept_words
from ..verify.numerics.document import (
    Agreement,
    Divergence,
    InputLoss,
    LayerLosses,
    MatrixLoss,
    Numerics,
    Predictions,
)
from .document import at, numeric, rows
from .parts import Bar, Column, Layers, Series, Sizes, Table, Tile
from .words import ABSENT, as_float, fixed, number, percent, size, with_error

ARITHMETICS = ARITHMETIC_WORDS
COLOURS = 8
WORST_LAYERS, WORST_MATRICES, WORST_INPUTS = 3, 10, 6


def value_at(values: Any, *keys: str) -> Any:
    """The number under these keys of a document."""
    return numeric(at(values, *keys))


def present(numerics: Numerics | None) -> list[str]:
    """The arithmetics that were measured, the one of Blackwell first."""
    return [] if numerics is None else [name for name in ARITHMETICS if name in numerics.arithmetics]


def accuracy_tiles(numerics: Numerics | None) -> list[Tile]:
    """KL divergence, top-1 agreement and perplexity under the arithmetic that the checkpoint was made for."""
    names = present(numerics)
    if numerics is None or not names:
        return []
    own, floor, word = numerics.arithmetics[names[0]], numerics.arithmetics.get("floor"), ARITHMETICS[names[0]]
    kl = own.kl
    return [
        Tile(
            f"KL divergence, {word}",
            fixed_unit(kl.mean, "nats"),
            (f"median {number(kl.median)}", f"p99 {number(kl.p99)}", *_floor(number(floor and floor.kl.mean))),
        ),
        Tile(
            f"Top-1 agreement, {word}",
            percent(own.top1.agreement),
            (*_error(own.top1), *_floor(percent(floor and floor.top1.agreement))),
        ),
        Tile(
            f"Perplexity, {word}",
            number(own.perplexity),
            (f"source {number(numerics.perplexity_source)}", f"{signed(own.delta_nll)} nats a token"),
        ),
    ]


def size_tile(checkpoint: Mapping[str, Any]) -> list[Tile]:
    """The size of the checkpoint."""
    after, before = value_at(checkpoint, "bytes"), value_at(checkpoint, "source_bytes")
    if as_float(after) is None:
        return []
    notes = [f"{percent(after / before, 0)} of {size(before)}"] if as_float(before) else []
    return [Tile("Size", size(after), (*notes, f"{number(value_at(checkpoint, 'matrices'))} matrices in NVFP4"))]


def source_words(numerics: Numerics) -> str:
    """The reference of the losses: the BF16 source, or the one that was decoded."""
    return "BF16 source" if numerics.source_form is None else f"decoded {numerics.source_form} source"


def accuracy_table(numerics: Numerics | None) -> Table | None:
    """All arithmetics beside the source and the floor."""
    if numerics is None or not numerics.arithmetics:
        return None
    lines = [(source_words(numerics), *[ABSENT] * 4, number(numerics.perplexity_source), ABSENT)]
    for name in [*present(numerics), "floor"]:
        own = numerics.arithmetics.get(name)
        if own is None:
            continue
        lines.append(
            (
                _arithmetic_words(name, own),
                " ".join([with_error(own.kl.mean, own.kl.standard_error), *_noise(own.kl)]),
                number(own.kl.median),
                number(own.kl.p99),
                " ".join([percent(own.top1.agreement), *_error(own.top1)]),
                number(own.perplexity),
                signed(own.delta_nll),
            )
        )
    titles = ("KL mean, nats", "median", "p99", "top-1 agreement", "perplexity", "ΔNLL, nats")
    caption = "Loss against the source, on held-out text"
    return Table(caption, (Column("arithmetic", "text"), *(Column(title) for title in titles)), tuple(lines))


def accuracy_notes(numerics: Numerics | None) -> tuple[str, ...]:
    """The text of the measurement, and the meaning of the floor."""
    if numerics is None:
        return ()
    text, notes = numerics.text, []
    if text is not None:
        notes.append(
            f"Text: {one_line(text.name or 'unnamed')}, {number(text.tokens)} tokens in "
            f"{number(text.sequences)} sequences, framing: {one_line(text.framing or 'as is')}."
        )
    if "w4a4" in numerics.arithmetics and numerics.arithmetics["w4a4"].kl.rounding_noise is not None:
        notes.append(
            "Rounding: the last bits of a product differ between processors, and rounding to four bits amplifies them. "
            "The same checkpoint measured elsewhere differs by about this much."
        )
    if "floor" in numerics.arithmetics:
        notes.append("The floor compares the source with itself. A value that is not above the floor is noise.")
    if any(one.kinds for one in numerics.arithmetics.values()):
        notes.append(
            "Beside the others: KL divergence over that of the floor, divided by the median of the other kinds. "
            "A kind with 1 lost as much as the others."
        )
    return tuple(notes)


def layers_of(numerics: Numerics | None) -> Layers | None:
    """Charts and table of the decoder's layers."""
    layers = [] if numerics is None else sorted(numerics.layers, key=lambda layer: layer.layer)
    names = [name for name in ARITHMETICS if any(name in layer.losses for layer in layers)]
    if not names:
        return None
    titles = [
        (name, key, f"{ARITHMETICS[name]} {title}")
        for name in names
        for key, title in (
            ("relative_error", "error"),
            ("sqnr_db", "SQNR, dB"),
            ("cosine", "cosine"),
            ("accumulated_error", "accumulated"),
            ("clipped", "clipped blocks"),
        )
        if any(_loss(layer, name, key) is not None for layer in layers)
    ]
    lines = [(str(layer.layer), *(_cell(key, _loss(layer, name, key)) for name, key, _ in titles)) for layer in layers]
    table = Table("Every layer", (Column("layer"), *(Column(title) for *_, title in titles)), tuple(lines))
    own = _series(layers, names, "relative_error")
    return Layers(own, _series(layers, names, "accumulated_error"), _worst(own), table)


def matrices_of(numerics: Numerics | None) -> Table | None:
    """The matrices that lost most, and those with anything unusual, worst first."""
    if numerics is None or not numerics.matrices:
        return None
    matrices = numerics.matrices

    def badness(matrix: MatrixLoss) -> float:
        error = matrix.weight_error
        return -math.inf if error is None else math.inf if math.isnan(error) else error

    shown = sorted(matrices, key=badness, reverse=True)[:WORST_MATRICES]
    keys = {
        "weight_error": "weight error",
        "blocks": "blocks",
        "zero_blocks": "zero",
        "clamped_blocks": "clamped",
        "flushed_blocks": "flushed",
    }
    keys = {key: title for key, title in keys.items() if any(getattr(row, key) is not None for row in shown)}
    schemes = {one_line(row.scheme) for row in matrices}
    lines = [
        (
            one_line(row.name),
            *([one_line(row.scheme)] if len(schemes) > 1 else []),
            *(_cell(key, getattr(row, key)) for key in keys),
        )
        for row in shown
    ]
    caption = f"The {len(shown)} matrices of {len(matrices):,} with the largest weight error"
    scheme = (Column("scheme", "text"),) if len(schemes) > 1 else ()
    columns = (Column("matrix", "code"), *scheme, *(Column(title) for title in keys.values()))
    return Table(caption if len(shown) < len(matrices) else "All matrices, worst first", columns, tuple(lines))


def inputs_of(numerics: Numerics | None) -> Table | None:
    """The quantized inputs that lost most: clipped, become zeros, or larger than in calibration."""
    if numerics is None or not numerics.inputs:
        return None

    def badness(found: InputLoss) -> tuple[float, float]:
        lost = (found.clipped or 0.0) + (found.lost or 0.0)
        return (math.inf if math.isnan(lost) else lost, found.growth or 0.0)

    inputs = numerics.inputs
    shown = sorted(inputs, key=badness, reverse=True)[:WORST_INPUTS]
    titles = ("clipped blocks", "blocks lost to zero", "amax here", "amax in calibration", "ratio")
    lines = [
        (
            one_line(found.name),
            percent(found.clipped, 2),
            percent(found.lost, 2),
            number(found.amax),
            number(found.calibrated_amax),
            number(found.growth, 2),
        )
        for found in shown
    ]
    caption = f"The {len(shown)} inputs of {len(inputs):,} that lose most to their global scale"
    columns = (Column("input of", "code"), *(Column(title) for title in titles))
    return Table(caption if len(shown) < len(inputs) else "All inputs, worst first", columns, tuple(lines))


def known_shares(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """The shares of the decoder's matrices that stay as in the source, by role, fit for a line."""
    shares = checkpoint.get("kept_shares")
    found = shares.items() if isinstance(shares, Mapping) else ()
    return {one_line(role): known for role, share in found if (known := as_float(share)) is not None}


def sizes_of(checkpoint: Mapping[str, Any]) -> Sizes | None:
    """The bytes by group, before and after. Small groups beyond the colours are one."""
    groups = [group for group in rows(checkpoint.get("groups")) if as_float(value_at(group, "bytes")) is not None]
    if not groups:
        return None
    by_size = sorted(groups, key=lambda group: -max(_bytes(group, "bytes"), _bytes(group, "source_bytes")))
    colours = {id(group): min(at_place, COLOURS - 1) for at_place, group in enumerate(by_size)}
    knows_source = any(as_float(value_at(group, "source_bytes")) is not None for group in groups)
    bars = [Bar("before", _segments(by_size, "source_bytes", colours))] if knows_source else []
    lines = []
    for group in by_size:
        before, after = value_at(group, "source_bytes"), value_at(group, "bytes")
        share = percent(after / before, 0) if as_float(before) else ABSENT
        lines.append((one_line(group.get("name", "")), number(group.get("tensors")), size(before), size(after), share))
    columns = (Column("group", "text"), Column("tensors"), Column("before"), Column("after"), Column("share"))
    table = Table("Bytes by group", columns, tuple(lines), tuple(colours[id(group)] for group in by_size))
    before, after = value_at(checkpoint, "source_bytes"), value_at(checkpoint, "bytes")
    words = (
        f"Reduced from {size(before)} to {size(after)}." if as_float(before) is not None else f"{size(after)} in total."
    )
    kept = kept_words(known_shares(checkpoint))
    words += "" if kept is None else f" {kept}"
    return Sizes(words, (*bars, Bar("after", _segments(by_size, "bytes", colours))), table)


def fixed_unit(value: Any, unit: str) -> str:
    """A number with its unit, or without it where there is no number."""
    return number(value) if as_float(value) is None or not math.isfinite(value) else f"{number(value)} {unit}"


def signed(value: Any) -> str:
    """A difference, with its sign."""
    text = number(value)
    return (
        f"+{text}"
        if as_float(value) is not None and value > 0 and math.isfinite(value)
        else text.replace("-", "\u2212")
    )


def _error(agreement: Agreement) -> tuple[str, ...]:
    error = agreement.standard_error
    return () if error is None else (f"± {percent(error, 2)}",)


def _noise(numbers: Divergence) -> tuple[str, ...]:
    noise = numbers.rounding_noise
    return () if noise is None else (f"(rounding ± {number(noise)})",)


def _arithmetic_words(name: str, own: Predictions) -> str:
    words = one_line(own.words) or ARITHMETICS.get(name, "the source against itself")
    return words if name != "floor" or words.startswith("floor") else f"floor: {words}"


def _loss(layer: LayerLosses, name: str, key: str) -> float | None:
    return as_float(getattr(layer.losses.get(name), key, None))


def _floor(text: str) -> tuple[str, ...]:
    return () if text == ABSENT else (f"floor {text}",)


def _cell(key: str, value: Any) -> str:
    if key == "clipped":
        return percent(value, 2)
    return fixed(value, 1) if key == "sqnr_db" else fixed(value, 5) if key == "cosine" else number(value)


def _series(layers: Sequence[LayerLosses], names: Sequence[str], key: str) -> tuple[Series, ...]:
    found = []
    for name in names:
        points = [(layer.layer, _loss(layer, name, key)) for layer in layers]
        known = tuple((layer, value) for layer, value in points if value is not None)
        if known:
            found.append(Series(ARITHMETICS[name], known))
    return tuple(found)


def _worst(own: Sequence[Series]) -> tuple[str, ...]:
    """The layers that lost most under the first arithmetic, in words."""
    if not own:
        return ()
    points = own[0].points
    usual = median([value for _, value in points if math.isfinite(value)] or [math.nan])
    unusual = sorted(points, key=lambda point: math.inf if math.isnan(point[1]) else point[1], reverse=True)
    worst = []
    for layer, value in unusual[:WORST_LAYERS]:
        ratio = f" ({value / usual:.1f} times the median)" if usual > 0 and math.isfinite(value) else ""
        worst.append(f"layer {layer}: {number(value)}{ratio}")
    return tuple(worst)


def _bytes(group: Mapping[str, Any], key: str) -> float:
    return as_float(value_at(group, key)) or 0.0


def _segments(
    groups: Sequence[Mapping[str, Any]], key: str, colours: Mapping[int, int]
) -> tuple[tuple[str, float, int], ...]:
    return tuple((one_line(group.get("name", "")), _bytes(group, key), colours[id(group)]) for group in groups)
