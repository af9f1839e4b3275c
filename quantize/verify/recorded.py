"""Checks of the tensors against what the manifest says of the run that made them."""

from __future__ import annotations

import torch

from ..calibrate.statistics.ranges import calibrated_amax
from ..checkpoint.headers import TensorInfo
from ..convert.matrices import stored_scalar
from ..errors import InputError
from ..format.constants import BLOCK
from ..format.scales import block_scale_bytes, decode_e4m3, global_scale
from ..plan.plan import Part
from ..quantizers import QUANTIZERS
from ..quantizers.base import Quantizer
from ..quantizers.mse import OFFSETS
from ..recipe.match import select
from ..stream.manifest import Manifest, RecordedGroup
from .report import Finding, counted, not_applicable
from .served import W4A4, WEIGHT_ONLY
from .subject import Subject

# How far a block scale's byte may lie from round-to-nearest's, by quantizer.
BYTE_OFFSETS = {"rtn": range(1), "mse": OFFSETS}
_NO_MANIFEST = "no manifest, so another tool made this checkpoint"


def own_quantizer(subject: Subject) -> Quantizer | None:
    """The quantizer that the manifest names, where it is one of nvquant's whose results can be recomputed."""
    name = subject.manifest.quantizer if isinstance(subject.manifest, Manifest) else None
    return QUANTIZERS[name] if name in QUANTIZERS and name in BYTE_OFFSETS else None


def check_manifest(subject: Subject) -> Finding:
    """The manifest is readable, and its format, recipe and groups are those of the tensors."""
    manifest = subject.manifest
    if manifest is None:
        return not_applicable(_NO_MANIFEST)
    if isinstance(manifest, str):
        return Finding("nvquant_manifest.json", [manifest])
    faults = []
    if manifest.format != subject.layout.name:
        faults.append(f"format is {manifest.format}, but the tensors are named as {subject.layout.name} does")
    if manifest.quantizer not in QUANTIZERS:
        faults.append(f"quantizer {manifest.quantizer} is unknown (known: {', '.join(QUANTIZERS)})")
    faults += _unlike_recipe(subject, manifest)
    if (manifest.framing is not None) != any(group.record.scheme == W4A4 for group in manifest.groups.values()):
        faults.append("calibration is recorded for weight-only groups, or missing for others")
    stored = {group.name: group.members for group in subject.groups}
    faults += [f"{name} is recorded but not quantized" for name in manifest.groups if name not in stored]
    faults += [f"{name} is quantized but not recorded" for name in stored if name not in manifest.groups]
    for name in stored:
        if name in manifest.groups:
            faults += _group_faults(subject, manifest.groups[name], stored[name])
    return Finding(
        f"{counted(len(manifest.groups), 'group')}, recipe {manifest.recipe.name}, quantizer {manifest.quantizer}",
        faults,
    )


def _unlike_recipe(subject: Subject, manifest: Manifest) -> list[str]:
    """Matrices whose scheme is not what the recipe selects on the unquantized model, as the tensors tell of it."""
    stored = {m.module: W4A4 if m.has_input_scale else WEIGHT_ONLY for m in subject.matrices.values()}
    infos = {name: info for name, info in subject.infos.items() if name in subject.roles}
    for matrix in subject.matrices.values():
        shape = (matrix.rows, matrix.cols) if matrix.is_sound else (BLOCK, BLOCK)
        infos[f"{matrix.module}.weight"] = TensorInfo(f"{matrix.module}.weight", "BF16", shape, 0, 0)
    try:
        selected = select(manifest.recipe, infos, subject.folder.name, subject.config).schemes
    except InputError as error:
        return [str(error)]
    return [
        f"{module} is {stored.get(module, 'not quantized')}, but recipe {manifest.recipe.name} makes it "
        f"{selected.get(module, 'not quantized')}"
        for module in dict.fromkeys([*selected, *stored])
        if selected.get(module) != stored.get(module)
    ]


def _group_faults(subject: Subject, group: RecordedGroup, members: tuple[str, ...]) -> list[str]:
    record = group.record
    if sorted(record.members) != sorted(members):
        return [f"{group.name} has the members {', '.join(members)}, but {', '.join(record.members)} are recorded"]
    schemes = {W4A4 if subject.matrices[module].has_input_scale else WEIGHT_ONLY for module in members}
    faults = []
    if schemes != {record.scheme}:
        faults.append(f"{group.name} is stored as {sorted(schemes)}, not {record.scheme}")
    if (record.input is not None) != (record.scheme == W4A4):
        faults.append(f"{group.name}: input statistics do not fit scheme {record.scheme}")
    files = {subject.checkpoint.files[info.name] for m in members for info in subject.matrices[m].parts.values()}
    return faults if files == {group.file} else [*faults, f"{group.name} lies in {sorted(files)}, not in {group.file}"]


def check_input_scales(subject: Subject) -> Finding:
    """Input global scales are, bit for bit, what the recorded amax, low percentile and head-room give."""
    manifest = subject.manifest
    if not isinstance(manifest, Manifest):
        return not_applicable("no manifest with observed amaxes")
    faults = []
    looked_at = 0
    for group in manifest.groups.values():
        if group.record.input is None:
            continue
        headroom = manifest.recipe.activations.headroom
        calibrated = calibrated_amax(group.record.input.observed_amax, group.record.input.low_percentile, headroom)
        if calibrated != group.record.input.calibrated_amax:
            faults.append(
                f"{group.name}: calibrated amax is {group.record.input.calibrated_amax!r}, follows as {calibrated!r}"
            )
        faults += _unequal_scalars(subject, group, "input_global", calibrated)
        looked_at += 1
    return (
        Finding(counted(looked_at, "group"), faults) if looked_at else not_applicable("no group has quantized inputs")
    )


def check_weight_scales(subject: Subject) -> Finding:
    """Weight global scales are, bit for bit, what the recorded amax and quantizer give, and block scales reach it."""
    manifest, quantizer = subject.manifest, own_quantizer(subject)
    if not isinstance(manifest, Manifest) or quantizer is None:
        return not_applicable("no manifest with weight amaxes of a quantizer known here")
    faults = []
    for group in manifest.groups.values():
        faults += _unequal_scalars(subject, group, "weight_global", group.record.weight_amax * quantizer.headroom)
        faults += _unreached_top(subject, group, quantizer)
    return Finding(f"{counted(len(manifest.groups), 'group')}, quantizer {quantizer.name}", faults)


def recorded_scalars(subject: Subject) -> dict[tuple[str, Part], float]:
    """The global scales, by module and part, that follow from the amaxes in nvquant's own manifest; empty without one.

    Whether amaxes and tensors belong together is for `check_weight_scales` and `check_input_scales`."""
    manifest, quantizer = subject.manifest, own_quantizer(subject)
    found: dict[tuple[str, Part], float] = {}
    if isinstance(manifest, Manifest) and quantizer is not None:
        for group in manifest.groups.values():
            amaxes: dict[Part, float] = {"weight_global": group.record.weight_amax * quantizer.headroom}
            if group.record.input is not None:
                amaxes["input_global"] = group.record.input.calibrated_amax
            values = {part: float(stored_scalar(amax, subject.layout)) for part, amax in amaxes.items()}
            found.update({(module, part): value for module in group.record.members for part, value in values.items()})
    return found


def _unequal_scalars(subject: Subject, group: RecordedGroup, part: Part, amax: float) -> list[str]:
    expected = float(stored_scalar(amax, subject.layout))
    found = {
        subject.sound[module].parts[part].name: subject.scalars[module, part]
        for module in group.record.members
        if (module, part) in subject.scalars
    }
    return [f"{name} is {value!r}, follows as {expected!r}" for name, value in found.items() if value != expected]


def _unreached_top(subject: Subject, group: RecordedGroup, quantizer: Quantizer) -> list[str]:
    """The block that holds the group's amax has one of the largest scales: about 448 / head-room."""
    if not group.record.members or not all(module in subject.histograms for module in group.record.members):
        return []
    amax = torch.tensor(group.record.weight_amax, dtype=torch.float32)
    nearest = int(block_scale_bytes(amax, global_scale(amax, quantizer.headroom)))
    histogram = torch.stack([subject.histograms[module] for module in group.record.members]).sum(0)
    present = histogram[:0x7F].nonzero()
    top = int(present[-1]) if len(present) else 0
    if top - nearest in BYTE_OFFSETS[quantizer.name]:
        return []
    largest, wanted = decode_e4m3(torch.tensor([top, nearest], dtype=torch.uint8)).tolist()
    return [f"{group.name}: its largest block scale is {largest:g}, but its recorded amax asks for about {wanted:g}"]
