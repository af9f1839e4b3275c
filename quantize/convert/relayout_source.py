"""What relayout reads from an NVFP4 checkpoint: its layout, its matrices, and the amaxes that its manifest records."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..checkpoint.source import Checkpoint, read_json
from ..errors import InputError
from ..format.layouts import GLOBAL_SCALES, LAYOUTS, Layout
from ..format.schemes import Part
from ..quantizers import get_quantizer, quantizer_for
from ..recipe.groups import FusedGroup, Fusions
from ..recipe.matrices import Matrix, matrix_entries
from ..stream.manifest import MANIFEST_NAME, Manifest, held_to
from ..stream.scalars import scalar_amaxes
from ..weights.stored import find_matrices, fits_dtype, is_complete
from .matrices import is_scalar

HF_QUANT_CONFIG = "hf_quant_config.json"


def stored_layout(source: Checkpoint) -> Layout:
    """The layout of a checkpoint, from the names of its tensors.

    Raises:
        InputError: it is not quantized, or not in NVFP4, or in both layouts at once.
    """
    infos = source.infos()
    found = [
        layout
        for layout in LAYOUTS.values()
        if any(
            matrix.scheme.has_block_scales and is_complete(matrix, layout) and matrix.parts["codes"].dtype == "U8"
            for matrix in find_matrices(infos, layout).values()
        )
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{source.where} contains NVFP4 matrices in both layouts",
            where=source.where,
            hint="convert its source again",
        )
    config = source.config.get("quantization_config")
    if config is None and not (source.folder / HF_QUANT_CONFIG).exists():
        raise InputError(
            f"{source.where} is not quantized", where=source.where, hint="convert it with `nvquant convert --format`"
        )
    method = config.get("quant_method", "unknown") if isinstance(config, Mapping) else "modelopt"
    raise InputError(
        f"{source.where} is quantized (quant_method {method}), but not in NVFP4",
        where=source.where,
        hint="give an NVFP4 checkpoint",
    )


def stored_matrices(source: Checkpoint, layout: Layout) -> dict[str, Matrix]:
    """The quantized matrices of a checkpoint by module, in its order.

    Raises:
        InputError: a tensor has the wrong dtype or shape.
    """
    matrices = {}
    fusions = _fusions(source, layout)
    for module, stored in find_matrices(source.infos(), layout).items():
        if not is_complete(stored, layout):
            continue
        shape = stored.parts["codes"].shape
        rows, cols = stored.scheme.shape_of(shape) if len(shape) == 2 else (0, 0)
        group = fusions.name(module)
        matrices[module] = Matrix(module, stored.tensor, stored.scheme, rows, cols, group, group, group)
        for part, entry in matrix_entries(matrices[module], layout).items():
            info = stored.parts[part]
            has_shape = info.shape == entry.shape or (is_scalar(part, entry) and prod(info.shape) == 1)
            if not (has_shape and fits_dtype(stored.scheme, part, info.dtype, entry.dtype)):
                raise InputError(
                    f"{entry.name} is {info.dtype} {list(info.shape)}, but {stored.scheme.words.split()[0]} "
                    f"stores {entry.dtype} {list(entry.shape)}",
                    where=entry.name,
                    hint="the checkpoint is damaged, or not in that scheme",
                )
    return matrices


def _fusions(source: Checkpoint, layout: Layout) -> Fusions:
    """The matrices of a quantized checkpoint that servers fuse."""
    ends = (".weight", *(f".{layout.suffixes(scheme)['codes']}" for scheme in layout.schemes.values()))
    return Fusions((name.rpartition(".")[0] for name in source.infos() if name.endswith(ends)), source.config)


def unequal_groups(source: Checkpoint, matrices: Mapping[str, Matrix], layout: Layout) -> list[FusedGroup]:
    """The fused groups whose members do not share their weight's, or their input's, global scale bit for bit."""
    found = []
    for group in _fusions(source, layout).groups(matrices):
        scalars = [scalar_names(matrices[member], layout) for member in group.members]
        values = {tuple(float(source.read(name)) for name in names.values()) for names in scalars}
        if len(values) > 1:
            found.append(group)
    return found


def recorded_amaxes(manifest: Manifest) -> dict[str, dict[Part, float]]:
    """The amaxes behind the global scales, by module and part, with headroom.

    Raises:
        InputError: the quantizer is unknown.
    """
    amaxes: dict[str, dict[Part, float]] = {}
    chosen, layout = get_quantizer(manifest.quantizer), LAYOUTS.get(manifest.format)
    for group in (recorded.record for recorded in manifest.groups.values()):
        scheme = layout.schemes.get(group.scheme) if layout is not None else None
        if scheme is not None:
            headroom = quantizer_for(scheme.name, chosen).claim.headroom
            amaxes.update(dict.fromkeys(group.members, scalar_amaxes(scheme, group, headroom)))
    return amaxes


def read_manifest(source: Checkpoint, layout: Layout) -> tuple[dict[str, Any], Manifest] | None:
    """The manifest as JSON and parsed, or None without a manifest."""
    path = source.folder / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = read_json(path, "nvquant writes one")
    try:
        form = held_to(Manifest, manifest, str(path))
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}", hint="remove it, and relayout uses the tensors alone") from error
    if form.format != layout.name:
        raise InputError(
            f"{path} names the {form.format} layout, but the tensors are in {layout.name}",
            where=path,
            hint="remove it, and relayout uses the tensors alone",
        )
    return manifest, form


def scalar_names(matrix: Matrix, layout: Layout) -> dict[Part, str]:
    """The names of a matrix's global scales, by part."""
    return {part: entry.name for part, entry in matrix_entries(matrix, layout).items() if part in GLOBAL_SCALES}
