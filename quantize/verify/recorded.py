"""Checks of the tensors against what the manifest says of the run that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..calibrate.input_scales import stored_amax
from ..calibrate.output_head import head_input_bound
from ..checkpoint.headers import TensorInfo
from ..errors import EnvironmentLack, InputError
from ..format.constants import BLOCK
from ..format.fp8 import fp8_scale
from ..format.scales import block_scale_bytes, decode_e4m3, global_scale
from ..format.schemes import INPUT_PARTS, Part, Scheme
from ..quantizers import QUANTIZERS, quantizer_for
from ..quantizers.base import Claim, Quantizer
from ..recipe.match import select
from ..stream.manifest import MANIFEST_NAME, CastRecord, Manifest, RecordedGroup
from ..stream.scalars import scalar_values
from .moved import scale_change
from .numerics.served import ServedModel
from .report import Finding, counted, not_applicable
from .subject import Subject
from .tally_distilled import TOLERANCE

_NO_MANIFEST = "no manifest, so another tool made this checkpoint"


def own_quantizer(subject: Subject) -> Quantizer | None:
    """The quantizer that the manifest names, where it is one of nvquant's whose results can be recomputed."""
    name = subject.manifest.quantizer if isinstance(subject.manifest, Manifest) else None
    return QUANTIZERS.get(name) if name is not None else None


def claim_of(subject: Subject, group: RecordedGroup, quantizer: Quantizer) -> Claim:
    """The claim of a quantizer for a recorded group. The head is quantized by rows, without its inputs."""
    own = quantizer_for(group.record.scheme, quantizer)
    return own.rows_claim if group.name == subject.head else own.claim


def cast_of(subject: Subject, module: str) -> CastRecord | None:
    """The recorded cast of a matrix's group, or None."""
    if not isinstance(subject.manifest, Manifest):
        return None
    group = subject.manifest.groups.get(subject.fusions.name(module))
    return None if group is None else group.record.cast


def check_manifest(subject: Subject) -> Finding:
    """The manifest is readable, and its format, recipe and groups are those of the tensors."""
    manifest = subject.manifest
    if manifest is None:
        return not_applicable(_NO_MANIFEST)
    if isinstance(manifest, str):
        return Finding(MANIFEST_NAME, [manifest])
    faults = []
    if manifest.format != subject.layout.name:
        faults.append(f"format is {manifest.format}, but the tensors are named as {subject.layout.name} does")
    if manifest.quantizer not in QUANTIZERS:
        faults.append(f"quantizer {manifest.quantizer} is unknown (known: {', '.join(QUANTIZERS)})")
    faults += _unlike_recipe(subject, manifest)
    is_wanted = any(
        is_calibrated(subject, group) or _has_seen_inputs(subject, group) for group in manifest.groups.values()
    )
    if (manifest.framing is not None) != (is_wanted or manifest.recipe.kv_cache.has_scales):
        faults.append("calibration is recorded although no group requires it, or missing for groups that do")
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
    stored = {m.module: m.scheme.name for m in subject.matrices.values()}
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
    schemes = {subject.matrices[module].scheme.name for module in members}
    faults = []
    if schemes != {record.scheme}:
        faults.append(f"{group.name} is stored as {sorted(schemes)}, not {record.scheme}")
    if record.input_bound is not None and (group.name != subject.head or record.input is not None):
        faults.append(f"{group.name}: a bound of its inputs is recorded, which only the head has")
    if (record.feedback is not None) != (record.cast is None and _has_seen_inputs(subject, group)):
        faults.append(f"{group.name}: the record of error feedback does not fit the quantizer")
    if (record.input is not None) != is_calibrated(subject, group):
        faults.append(f"{group.name}: input statistics do not fit scheme {record.scheme}")
    files = {subject.checkpoint.files[info.name] for m in members for info in subject.matrices[m].parts.values()}
    return faults if files == {group.file} else [*faults, f"{group.name} lies in {sorted(files)}, not in {group.file}"]


def form_of(subject: Subject, group: RecordedGroup) -> Scheme | None:
    """The form of a recorded scheme in the checkpoint's layout. None for a scheme that nvquant does not know."""
    return subject.layout.schemes.get(group.record.scheme)


def is_calibrated(subject: Subject, group: RecordedGroup) -> bool:
    """Whether a recorded group must have statistics of its inputs. Those of the head have a bound instead."""
    form = form_of(subject, group)
    return form is not None and form.inputs == "calibrated" and group.record.input_bound is None


def _has_seen_inputs(subject: Subject, group: RecordedGroup) -> bool:
    """Whether the quantizer of a recorded group must have seen its inputs, whatever its scheme."""
    quantizer = own_quantizer(subject)
    if quantizer is None or group.name == subject.head:
        return False
    return "moments" in quantizer_for(group.record.scheme, quantizer).needs


def check_input_scales(subject: Subject) -> Finding:
    """Input scales are, bit for bit, what the recorded amax, low percentile and head-room give, and that of the head is
    what the norm before it gives."""
    manifest = subject.manifest
    if not isinstance(manifest, Manifest):
        return not_applicable("no manifest with observed amaxes")
    faults = []
    looked_at = 0
    for group in manifest.groups.values():
        seen, form = group.record.input, form_of(subject, group)
        if form is None or not INPUT_PARTS.intersection(form.shared):
            continue
        if group.record.input_bound is not None:
            faults += _wrong_bound(subject, group)
            calibrated = group.record.input_bound
        elif seen is not None:
            calibrated = stored_amax(
                form, seen.observed_amax, seen.low_percentile, manifest.recipe.activations.headroom
            )
        else:
            continue
        if seen is not None and calibrated != seen.calibrated_amax:
            faults.append(f"{group.name}: calibrated amax is {seen.calibrated_amax!r}, follows as {calibrated!r}")
        part = next(part for part in form.shared if part in INPUT_PARTS)
        expected = float(subject.layout.stored_scalar(part, calibrated))
        faults += _unequal_scalars(subject, group, {part: expected})
        looked_at += 1
    return (
        Finding(counted(looked_at, "group"), faults) if looked_at else not_applicable("no group has quantized inputs")
    )


def _wrong_bound(subject: Subject, group: RecordedGroup) -> list[str]:
    """A bound of the head's inputs that is not the one of the stored norm, where transformers knows the class."""
    if subject.is_remote:
        return []
    try:
        model = ServedModel(subject)
        bound = head_input_bound(model, model.prefix)
    except (InputError, EnvironmentLack):
        return []
    if bound == group.record.input_bound:
        return []
    return [
        f"{group.name}: the bound of its inputs is {group.record.input_bound!r}, the norm before it gives {bound!r}"
    ]


def check_weight_scales(subject: Subject) -> Finding:
    """The shared scales of weights are, bit for bit, what the recorded amax and quantizer give, and the scales of
    blocks, or of rows, reach it."""
    manifest, quantizer = subject.manifest, own_quantizer(subject)
    if not isinstance(manifest, Manifest) or quantizer is None:
        return not_applicable("no manifest with weight amaxes of a quantizer known here")
    faults = []
    for group in manifest.groups.values():
        values = _recorded_values(subject, group, quantizer)
        faults += _unequal_scalars(subject, group, {p: v for p, v in values.items() if p not in INPUT_PARTS})
        faults += [*_unreached_top(subject, group, quantizer), *_unreached_rows(subject, group)]
    return Finding(f"{counted(len(manifest.groups), 'group')}, quantizer {quantizer.name}", faults)


def recorded_scalars(subject: Subject) -> dict[tuple[str, Part], float]:
    """The scalars, by module and part, that follow from the amaxes in nvquant's own manifest; empty without one.

    Whether amaxes and tensors belong together is for `check_weight_scales` and `check_input_scales`."""
    manifest, quantizer = subject.manifest, own_quantizer(subject)
    found: dict[tuple[str, Part], float] = {}
    if isinstance(manifest, Manifest) and quantizer is not None:
        for group in manifest.groups.values():
            values = _recorded_values(subject, group, quantizer)
            found.update({(module, part): value for module in group.record.members for part, value in values.items()})
    return found


def _recorded_values(subject: Subject, group: RecordedGroup, quantizer: Quantizer) -> dict[Part, float]:
    form = form_of(subject, group)
    if form is None:
        return {}
    headroom = claim_of(subject, group, quantizer).headroom
    values = scalar_values(subject.layout, form, group.record, headroom)
    return {part: float(value) for part, value in values.items()}


def _unequal_scalars(subject: Subject, group: RecordedGroup, expected: Mapping[Part, float]) -> list[str]:
    return [
        f"{subject.sound[module].parts[part].name} is {subject.scalars[module, part]!r}, follows as {value!r}"
        for module in group.record.members
        for part, value in expected.items()
        if (module, part) in subject.scalars and subject.scalars[module, part] != value
    ]


def _unreached_top(subject: Subject, group: RecordedGroup, quantizer: Quantizer) -> list[str]:
    """The block that holds the group's amax has one of the largest scales: about 448 / head-room."""
    claim = claim_of(subject, group, quantizer)
    offsets = None if group.record.cast is not None else claim.scale_offsets
    if not group.record.members or not all(module in subject.histograms for module in group.record.members):
        return []
    if offsets is None:
        return []
    amax = torch.tensor(group.record.weight_amax, dtype=torch.float32)
    nearest = int(block_scale_bytes(amax, global_scale(amax, claim.headroom)))
    histogram = torch.stack([subject.histograms[module] for module in group.record.members]).sum(0)
    present = histogram[:0x7F].nonzero()
    top = int(present[-1]) if len(present) else 0
    if top - nearest in offsets or _is_moved_top(subject, group, top, [nearest + offset for offset in offsets]):
        return []
    largest, wanted = decode_e4m3(torch.tensor([top, nearest], dtype=torch.uint8)).tolist()
    return [f"{group.name}: its largest block scale is {largest:g}, but its recorded amax asks for about {wanted:g}"]


def _is_moved_top(subject: Subject, group: RecordedGroup, top: int, allowed: Sequence[int]) -> bool:
    """Whether distillation may have moved the largest block scale from an allowed one, all as bytes."""
    change = max(scale_change(subject, module) for module in group.record.members)
    known = [byte for byte in allowed if 0 < byte < 0x7F]
    if not change or not top or not known:
        return False
    largest, *before = decode_e4m3(torch.tensor([top, *known], dtype=torch.uint8)).log().tolist()
    return any(abs(largest - one) <= change + TOLERANCE for one in before)


def _unreached_rows(subject: Subject, group: RecordedGroup) -> list[str]:
    """The row that holds the group's amax has the largest scale: amax / 448. A row of zeros has the scale 1."""
    form, members = form_of(subject, group), group.record.members
    if form is None or form.has_block_scales or "scales" in form.shared or group.record.cast is not None:
        return []
    if not all(module in subject.fp8_scales for module in members):
        return []
    scales = torch.cat([subject.fp8_scales[module] for module in members])
    known = scales[scales.isfinite() & (scales > 0) & (scales != 1)]
    wanted = fp8_scale(torch.tensor(group.record.weight_amax))
    largest = known.amax() if len(known) else torch.ones(())
    if largest == wanted or (wanted == 1 and largest < 1):
        return []
    return [f"{group.name}: its largest row scale is {float(largest)!r}, follows as {float(wanted)!r}"]


def recorded_fp8_scale(subject: Subject, module: str) -> Tensor:
    """The largest FP8 scale that follows from the recorded amax of a module's group. Zero without a record."""
    groups = subject.manifest.groups if isinstance(subject.manifest, Manifest) else {}
    group = groups.get(subject.fusions.name(module))
    return torch.zeros(()) if group is None else fp8_scale(torch.tensor(group.record.weight_amax))
