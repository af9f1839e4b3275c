"""Checks of the scales and of what is quantized, from the checkpoint alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..format.constants import E4M3_MAX, SCALE_RANGE
from ..format.layouts import GLOBAL_SCALES
from ..format.marlin import RULE_READ_FROM, count_flushed_blocks
from ..format.schemes import INPUT_PARTS, Part
from ..plan.heads import HOW_READERS_TAKE_IT, equal_tensors, tied_pair
from ..recipe.decoder import LAYER
from ..recipe.heads import class_ties_head
from ..recipe.roles import QUANTIZABLE, Role, module_of
from ..stream.manifest import Manifest
from .recorded import recorded_fp8_scale, recorded_scalars
from .report import NOT_READ, Finding, counted
from .subject import Subject, pieces
from .threads import map_in_threads

# Bounds on the amax that a global scale stands for, unless the manifest records that amax. The smallest is the amax
# whose divisor, 2688 / amax, is the largest float32 number. The largest of a weight is 2688, where divisor and
# multiplier meet at 1: few trained models have a larger weight, and a scale stored the wrong way round stands for one.
# Inputs have no such side: headroom alone brings them to 10^6. Their bound catches a number that is no amax at all.
SMALLEST_AMAX = SCALE_RANGE / torch.finfo(torch.float32).max
LARGEST_AMAX = {"weight": SCALE_RANGE, "input": 1e10}
FP8_NANS = (0x7F, 0xFF)


def _matrices(number: int) -> str:
    return counted(number, "matrix", "matrices")


def check_block_scales(subject: Subject) -> Finding:
    """Every block scale is a number above zero: no NaN (0x7F, 0xFF), no sign bit (servers read none), no zero."""
    blocks = 0
    faults = []
    for module, histogram in subject.histograms.items():
        blocks += int(histogram.sum())
        bad = {
            "NaN": histogram[0x7F] + histogram[0xFF],
            "negative": histogram[0x80:0xFF].sum(),
            "zero": histogram[0],
        }
        found = [f"{int(count):,} {what}" for what, count in bad.items() if count]
        if found:
            row, block, byte = _first_bad(subject, module)
            faults.append(f"{module}: {', '.join(found)} (first at row {row}, block {block}: byte 0x{byte:02X})")
    return Finding(f"{_matrices(len(subject.histograms))}, {counted(blocks, 'block scale')}", faults)


def _first_bad(subject: Subject, module: str) -> tuple[int, int, int]:
    """Row, block and byte of a matrix's first block scale that is no positive number."""
    info = subject.sound[module].parts["scales"]
    for begin, piece in pieces(subject.checkpoint, info.name):
        at = next((at for at, byte in enumerate(piece) if byte == 0 or byte >= 0x7F), None)
        if at is not None:
            row, block = divmod(begin + at, info.shape[1])
            return row, block, piece[at]
    raise AssertionError("asked only where the histogram has one")


def check_global_scales(subject: Subject) -> Finding:
    """Every scalar scale is finite and positive, and stands for an amax on the right side of 1.

    An amax is 2688 / scale where the layout stores divisors and 2688 * scale where it stores multipliers, and 448 *
    scale for an input in FP8. Exactly 1.0 is what stands for a matrix of zeros. A scale that follows from the
    manifest's amax needs no bound. `check_fp8` looks at the scales of weights in FP8.
    """
    recorded = recorded_scalars(subject)
    faults = []
    ranges: dict[str, list[float]] = {kind: [] for kind in LARGEST_AMAX}
    scalars = {at: value for at, value in subject.scalars.items() if at[1] != "scales"}
    for (module, part), value in scalars.items():
        name, kind = subject.sound[module].parts[part].name, _kind(part)
        if not math.isfinite(value) or value <= 0:
            faults.append(f"{name} is {value}")
            continue
        amax = subject.layout.amax_of(part, value)
        ranges[kind].append(amax)
        if recorded.get((module, part)) != value and not SMALLEST_AMAX <= amax <= LARGEST_AMAX[kind]:
            faults.append(f"{name} is {value:.6g}, which stands for an amax of {amax:.3g}")
    spans = [f"{kind} scales for amax {min(found):.3g} to {max(found):.3g}" for kind, found in ranges.items() if found]
    modules = {module for module, _ in scalars}
    return Finding(", ".join([_matrices(len(modules)), counted(len(scalars), "scale"), *spans]), faults)


def check_fp8(subject: Subject) -> Finding:
    """No FP8 code is a NaN (0x7F, 0xFF). Every scale of a row, or of a matrix, is finite, above zero, and stands for an
    amax (448 * scale) that is recorded or plausible.

    Codes of a checkpoint on the Hub are not read.
    """
    faults = [fault for module in subject.fp8 for fault in _wrong_fp8_scales(subject, module)]
    if not subject.is_remote:
        names = [matrix.parts["codes"].name for matrix in subject.fp8.values()]
        found = map_in_threads(lambda name: _nan_codes(subject, name), names, subject.progress, "reading FP8 codes")
        faults += [fault for one in found for fault in one]
    codes = sum(matrix.rows * matrix.cols for matrix in subject.fp8.values())
    scales = sum(scales.numel() for scales in subject.fp8_scales.values())
    looked_at = f"{_matrices(len(subject.fp8))}, {counted(scales, 'scale')}, {counted(codes, 'code')}"
    return Finding(f"{looked_at} {NOT_READ}" if subject.is_remote else looked_at, faults)


def _wrong_fp8_scales(subject: Subject, module: str) -> Iterator[str]:
    scales = subject.fp8_scales[module]
    name = subject.sound[module].parts["scales"].name
    most = max(torch.tensor(LARGEST_AMAX["weight"]) / E4M3_MAX, recorded_fp8_scale(subject, module))
    wrong = (~(scales.isfinite() & (scales > 0) & (scales <= most))).nonzero().flatten()
    if not len(wrong):
        return
    row = int(wrong[0])
    value = float(scales[row])
    is_amax = math.isfinite(value) and value > 0
    words = f"{value:.6g}" + (f", which stands for an amax of {E4M3_MAX * value:.3g}" if is_amax else "")
    if len(scales) == 1:
        yield f"{name} is {words}"
    else:
        yield f"{name}: {len(wrong):,} of {len(scales):,} scales cannot be right (first at row {row}: {words})"


def _nan_codes(subject: Subject, name: str) -> list[str]:
    count, first = 0, ""
    cols = subject.infos[name].shape[1]
    for begin, piece in pieces(subject.checkpoint, name):
        found = sum(piece.count(byte) for byte in FP8_NANS)
        if found and not count:
            at = min(at for byte in FP8_NANS if (at := piece.find(byte)) >= 0)
            row, column = divmod(begin + at, cols)
            first = f"first at row {row}, column {column}: byte 0x{piece[at]:02X}"
        count += found
    return [f"{name}: {counted(count, 'NaN code')} ({first})"] if count else []


def _kind(part: Part) -> str:
    return "input" if part in INPUT_PARTS else "weight"


def check_fused_groups(subject: Subject) -> Finding:
    """What servers fuse (see `recipe.groups`) is quantized as a whole, in one scheme, its shared scales bit-equal."""
    faults = []
    fused = [group for group in subject.groups if len(group.members) > 1]
    for group in fused:
        schemes = {subject.matrices[module].scheme.words for module in group.members}
        if len({subject.matrices[module].scheme.bits for module in group.members}) > 1:
            faults.append(f"{group.name}: its members are in different schemes: {', '.join(sorted(schemes))}")
        for part in subject.matrices[group.members[0]].scheme.shared:
            values = {m: subject.scalars[m, part] for m in group.members if (m, part) in subject.scalars}
            if len(set(map(repr, values.values()))) > 1:
                listed = ", ".join(f"{module.rpartition('.')[2]} {value!r}" for module, value in values.items())
                kind = f"{_kind(part)} global" if part in GLOBAL_SCALES else _kind(part)
                faults.append(f"{group.name}: {kind} scales differ: {listed}")
    quantized = {subject.fusions.name(module) for module in subject.matrices}
    for name in subject.roles:
        is_matrix = name.endswith(".weight") and len(subject.infos[name].shape) > 1
        if is_matrix and name not in subject.unused and module_of(name) not in subject.matrices:
            group_name = subject.fusions.name(module_of(name))
            if group_name in quantized:
                faults.append(f"{module_of(name)} is not quantized, but the rest of {group_name} is")
    return Finding(counted(len(fused), "fused group"), faults)


def _may_tie(subject: Subject) -> bool:
    """Whether the model's class ties weights at all, or is unknown."""
    return class_ties_head(subject.config) is not False


def check_protected(subject: Subject) -> Finding:
    """No tower, projector, router or embedding is quantized, a head only if the recipe requires it, and no tied model
    stores a head of its own."""
    allowed = QUANTIZABLE | {Role.EXPERT, Role.DRAFT}
    roles = {module: subject.model_roles[f"{module}.weight"] for module in subject.matrices}
    faults = [
        f"{module} ({role.value}) is quantized"
        for module, role in roles.items()
        # A second stack of layers, as an encoder's, may be quantized by other tools.
        if role not in allowed
        and not (role is Role.OTHER and LAYER.match(f"{module}.weight"))
        and not (module == subject.head and _may_quantize_head(subject))
    ]
    kept = sum(role not in allowed and len(subject.infos[name].shape) > 1 for name, role in subject.roles.items())
    pair = tied_pair(subject.checkpoint)
    is_stored = pair is not None and pair[0] in subject.roles
    if pair is not None and is_stored and not equal_tensors(subject.checkpoint, *pair) and _may_tie(subject):
        faults.append(f"{pair[0]} differs from {pair[1]}, although the config ties them: {HOW_READERS_TAKE_IT}")
    return Finding(f"{_matrices(len(subject.matrices))} quantized; {counted(kept, 'protected tensor')}", faults)


def _may_quantize_head(subject: Subject) -> bool:
    """Whether the recipe quantizes the head. Other tools have no recipe, and vLLM reads their heads."""
    return not isinstance(subject.manifest, Manifest) or subject.manifest.recipe.head_scheme is not None


def check_marlin(subject: Subject) -> Finding:
    """As many blocks as the manifest says would be served as zeros by Marlin, on GPUs without FP4 units."""
    recorded = subject.manifest.groups if isinstance(subject.manifest, Manifest) else {}
    faults = []
    flushed = blocks = 0
    blocks_of = [group for group in subject.sound_groups if all(m in subject.histograms for m in group.members)]
    for group in blocks_of:
        histogram: Tensor = torch.stack([subject.histograms[module] for module in group.members]).sum(0)
        count = count_flushed_blocks(histogram)
        flushed += count
        blocks += int(histogram.sum())
        if group.name in recorded and recorded[group.name].record.marlin_flushed_blocks != count:
            told = recorded[group.name].record.marlin_flushed_blocks
            faults.append(f"{group.name}: {count:,} blocks, but the manifest records {told:,}")
    source = "" if recorded else ", without a manifest to compare with"
    return Finding(f"{flushed:,} of {blocks:,} blocks flushed to zero (rule of {RULE_READ_FROM}){source}", faults)
