"""The numbers of the stage `numerics`: headline numbers, layers, matrices, and bytes by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..format.schemes import ARITHMETIC_WORDS
from ..quoting import one_line
from .document import at, numeric, rows
from .parts import Bar, Column, Layers, Series, Sizes, Table, Tile
from .words import ABSENT, as_float, fixed, number, percent, size, with_error

ARITHMETICS = ARITHMETIC_WORDS
COLOURS = 8
WORST_LAYERS, WORST_MATRICES, WORST_INPUTS = 3, 10, 6


def value_at(values: Any, *keys: str) -> Any:
    """The number under these keys of a document."""
    return numeric(at(values, *keys))


def present(numerics: Any) -> list[str]:
    """The arithmetics that were measured, the one of Blackwell first."""
    return [name for name in ARITHMETICS if at(numerics, "arithmetics", name) is not None]


def accuracy_tiles(numerics: Any) -> list[Tile]:
    """KL divergence, top-1 agreement and perplexity under the arithmetic that the checkpoint was made for."""
    names = present(numerics)
    if not names:
        return []
    own, floor = at(numerics, "arithmetics", names[0]), at(numerics, "arithmetics", "floor")
    kl, word = at(own, "kl"), ARITHMETICS[names[0]]
    agreement = at(own, "top1")
    before = value_at(numerics, "perplexity_source")
    return [
        Tile(
            f"KL divergence, {word}",
            fixed_unit(value_at(kl, "mean"), "nats"),
            (
                f"median {number(value_at(kl, 'median'))}",
                f"p99 {number(value_at(kl, 'p99'))}",
                *_floor(number(value_at(floor, "kl", "mean"))),
            ),
        ),
        Tile(
            f"Top-1 agreement, {word}",
            percent(value_at(agreement, "agreement")),
            (*_error(agreement), *_floor(percent(value_at(floor, "top1", "agreement")))),
        ),
        Tile(
            f"Perplexity, {word}",
            number(value_at(own, "perplexity")),
            (f"source {number(before)}", f"{signed(value_at(own, 'delta_nll'))} nats a token"),
        ),
    ]


def size_tile(checkpoint: Mapping[str, Any]) -> list[Tile]:
    """The size of the checkpoint."""
    after, before = value_at(checkpoint, "bytes"), value_at(checkpoint, "source_bytes")
    if as_float(after) is None:
        return []
    notes = [f"{percent(after / before, 0)} of {size(before)}"] if as_float(before) else []
    return [Tile("Size", size(after), (*notes, f"{number(value_at(checkpoint, 'matrices'))} matrices in NVFP4"))]


def accuracy_table(numerics: Any) -> Table | None:
    """All arithmetics beside the source and the floor."""
    if not at(numerics, "arithmetics"):
        return None
    lines = [("BF16 source", *[ABSENT] * 4, number(value_at(numerics, "perplexity_source")), ABSENT)]
    for name in [*present(numerics), "floor"]:
        own = at(numerics, "arithmetics", name)
        if own is None:
            continue
        kl = at(own, "kl")
        lines.append(
            (
                _arithmetic_words(name, own),
                " ".join([with_error(value_at(kl, "mean"), value_at(kl, "standard_error")), *_noise(kl)]),
                number(value_at(kl, "median")),
                number(value_at(kl, "p99")),
                " ".join([percent(value_at(own, "top1", "agreement")), *_error(at(own, "top1"))]),
                number(value_at(own, "perplexity")),
                signed(value_at(own, "delta_nll")),
            )
        )
    titles = ("KL mean, nats", "median", "p99", "top-1 agreement", "perplexity", "ΔNLL, nats")
    caption = "Loss against the source, on held-out text"
    return Table(caption, (Column("arithmetic", "text"), *(Column(title) for title in titles)), tuple(lines))


def accuracy_notes(numerics: Any) -> tuple[str, ...]:
    """The text of the measurement, and the meaning of the floor."""
    text = at(numerics, "text")
    notes = []
    if text is not None:
        framing = one_line(at(text, "framing") or "as is")
        notes.append(
            f"Text: {one_line(at(text, 'name') or 'unnamed')}, {number(value_at(text, 'tokens'))} tokens in "
            f"{number(value_at(text, 'sequences'))} sequences, framing: {framing}."
        )
    if as_float(value_at(numerics, "arithmetics", "w4a4", "kl", "rounding_noise")) is not None:
        notes.append(
            "Rounding: the last bits of a product differ between processors, and rounding to four bits amplifies them. "
            "The same checkpoint measured elsewhere differs by about this much."
        )
    if at(numerics, "arithmetics", "floor") is not None:
        notes.append("The floor compares the source with itself. A value that is not above the floor is noise.")
    return tuple(notes)


def layers_of(numerics: Any) -> Layers | None:
    """Charts and table of the decoder's layers."""
    layers = sorted(
        (layer for layer in rows(at(numerics, "layers")) if isinstance(layer.get("layer"), int)),
        key=lambda layer: int(layer["layer"]),
    )
    names = [name for name in ARITHMETICS if any(at(layer, name) is not None for layer in layers)]
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
        if any(as_float(value_at(layer, name, key)) is not None for layer in layers)
    ]
    lines = [
        (str(layer["layer"]), *(_cell(key, value_at(layer, name, key)) for name, key, _ in titles)) for layer in layers
    ]
    table = Table("Every layer", (Column("layer"), *(Column(title) for *_, title in titles)), tuple(lines))
    own = _series(layers, names, "relative_error")
    return Layers(own, _series(layers, names, "accumulated_error"), _worst(own), table)


def matrices_of(numerics: Any) -> Table | None:
    """The matrices that lost most, and those with anything unusual, worst first."""
    matrices = rows(at(numerics, "matrices"))
    if not matrices:
        return None

    def badness(matrix: Mapping[str, Any]) -> float:
        error = as_float(value_at(matrix, "weight_error"))
        return -math.inf if error is None else math.inf if math.isnan(error) else error

    shown = sorted(matrices, key=badness, reverse=True)[:WORST_MATRICES]
    keys = {
        "weight_error": "weight error",
        "blocks": "blocks",
        "zero_blocks": "zero",
        "clamped_blocks": "clamped",
        "flushed_blocks": "flushed",
        "input_clipped": "inputs clipped",
        "input_amax_ratio": "input amax ratio",
    }
    keys = {key: title for key, title in keys.items() if any(as_float(value_at(row, key)) is not None for row in shown)}
    schemes = {one_line(row.get("scheme", "")) for row in matrices}
    lines = [
        (
            one_line(row.get("name", "")),
            *([one_line(row.get("scheme", ""))] if len(schemes) > 1 else []),
            *(_cell("clipped" if key == "input_clipped" else key, value_at(row, key)) for key in keys),
        )
        for row in shown
    ]
    caption = f"The {len(shown)} matrices of {len(matrices):,} with the largest weight error"
    scheme = (Column("scheme", "text"),) if len(schemes) > 1 else ()
    columns = (Column("matrix", "code"), *scheme, *(Column(title) for title in keys.values()))
    return Table(caption if len(shown) < len(matrices) else "All matrices, worst first", columns, tuple(lines))


def inputs_of(numerics: Any) -> Table | None:
    """The quantized inputs that lost most: clipped, become zeros, or larger than in calibration."""

    def badness(found: Mapping[str, Any]) -> tuple[float, float]:
        lost = sum(as_float(value_at(found, key)) or 0.0 for key in ("clipped", "lost"))
        return (math.inf if math.isnan(lost) else lost, _growth(found) or 0.0)

    inputs = rows(at(numerics, "inputs"))
    if not inputs:
        return None
    shown = sorted(inputs, key=badness, reverse=True)[:WORST_INPUTS]
    titles = ("clipped blocks", "blocks lost to zero", "amax here", "amax in calibration", "ratio")
    lines = [
        (
            one_line(found.get("name")),
            percent(value_at(found, "clipped"), 2),
            percent(value_at(found, "lost"), 2),
            number(value_at(found, "amax")),
            number(value_at(found, "calibrated_amax")),
            number(_growth(found), 2),
        )
        for found in shown
    ]
    caption = f"The {len(shown)} inputs of {len(inputs):,} that lose most to their global scale"
    columns = (Column("input of", "code"), *(Column(title) for title in titles))
    return Table(caption if len(shown) < len(inputs) else "All inputs, worst first", columns, tuple(lines))


def _growth(found: Mapping[str, Any]) -> float | None:
    """The largest input over the largest in calibration."""
    here, calibrated = (as_float(value_at(found, key)) for key in ("amax", "calibrated_amax"))
    return here / calibrated if here is not None and calibrated else None


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


def _error(agreement: Any) -> tuple[str, ...]:
    error = value_at(agreement, "standard_error")
    return () if as_float(error) is None else (f"± {percent(error, 2)}",)


def _noise(numbers: Any) -> tuple[str, ...]:
    noise = value_at(numbers, "rounding_noise")
    return () if as_float(noise) is None else (f"(rounding ± {number(noise)})",)


def _arithmetic_words(name: str, own: Any) -> str:
    words = one_line(at(own, "words")) or ARITHMETICS.get(name, "the source against itself")
    return words if name != "floor" or words.startswith("floor") else f"floor: {words}"


def _floor(text: str) -> tuple[str, ...]:
    return () if text == ABSENT else (f"floor {text}",)


def _cell(key: str, value: Any) -> str:
    if key == "clipped":
        return percent(value, 2)
    return fixed(value, 1) if key == "sqnr_db" else fixed(value, 5) if key == "cosine" else number(value)


def _series(layers: Sequence[Mapping[str, Any]], names: Sequence[str], key: str) -> tuple[Series, ...]:
    found = []
    for name in names:
        points = [(int(layer["layer"]), as_float(value_at(layer, name, key))) for layer in layers]
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
