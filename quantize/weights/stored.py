"""The quantized matrices of a checkpoint, found by the names and dtypes of their tensors, and their faults.

One reader for relayout, verify and bench.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from ..checkpoint.headers import TensorInfo
from ..format.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from ..format.schemes import INPUT_PARTS, Part, PartSpec, Scheme

SCALAR_SHAPES = ((), (1,))  # servers read both
KV_SCALES = ("k_scale", "v_scale")
_MAY_STAND_BESIDE = ("bias", *KV_SCALES)
_OPTIONAL: Part = "input_global"  # a matrix without it is weight-only


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix as it is stored, complete or not.

    Attributes:
        module: name of its module.
        scheme: that its tensors fit best.
        parts: its tensors.
        faults: in their names, dtypes and shapes.
    """

    module: str
    scheme: Scheme
    parts: Mapping[Part, TensorInfo]
    faults: tuple[str, ...]

    @property
    def tensor(self) -> str:
        """The name of its weight in the unquantized model."""
        return f"{self.module}.weight"

    @property
    def is_sound(self) -> bool:
        """Whether its numbers can be read."""
        return not self.faults

    @property
    def has_input_scale(self) -> bool:
        """Whether it stores a scale of its inputs."""
        return not INPUT_PARTS.isdisjoint(self.parts)

    @property
    def rows(self) -> int:
        """Rows of a sound matrix."""
        return self.scheme.shape_of(self.parts["codes"].shape)[0]

    @property
    def cols(self) -> int:
        """Columns of a sound matrix."""
        return self.scheme.shape_of(self.parts["codes"].shape)[1]


def split_name(tensor: str) -> tuple[str, str]:
    """Module and last part of a tensor's name."""
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


def layouts_present(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The number of tensors with a name that only one layout uses, by the layout's name."""
    names = {layout.name: part_leaves(layout) - {"weight"} for layout in LAYOUTS.values()}
    own = {
        leaf: layout.name
        for layout, other in ((COMPRESSED_TENSORS, MODELOPT), (MODELOPT, COMPRESSED_TENSORS))
        for leaf in names[layout.name] - names[other.name]
    }
    counts: dict[str, int] = {}
    for name in infos:
        layout_name = own.get(split_name(name)[1])
        if layout_name is not None:
            counts[layout_name] = counts.get(layout_name, 0) + 1
    return counts


def find_matrices(infos: Mapping[str, TensorInfo], layout: Layout) -> dict[str, StoredMatrix]:
    """Every module that owns a tensor of a quantized matrix, in the order of the files."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        module, leaf = split_name(name)
        modules.setdefault(module, {})[leaf] = info
    return {
        module: _matrix(module, tensors, layout)
        for module, tensors in modules.items()
        if any(_is_quantized_part(leaf, info, layout) for leaf, info in tensors.items())
    }


def input_leaf(layout: Layout, scheme: Scheme) -> str:
    """The last part of the name of the scale of a scheme's inputs."""
    return next(leaf for part, leaf in layout.suffixes(scheme).items() if part in INPUT_PARTS)


def is_complete(matrix: StoredMatrix, layout: Layout) -> bool:
    """Whether a matrix has every tensor that its scheme requires, whatever their forms."""
    return all(part in matrix.parts for part in layout.suffixes(matrix.scheme) if part != _OPTIONAL)


@cache
def part_leaves(layout: Layout) -> frozenset[str]:
    """The last parts of the names of all tensors that belong to quantized matrices in a layout."""
    return frozenset(leaf for scheme in layout.schemes.values() for leaf in layout.suffixes(scheme).values())


def _is_quantized_part(leaf: str, info: TensorInfo, layout: Layout) -> bool:
    if leaf != "weight":
        return leaf in part_leaves(layout)
    # Codes may have the name of an unquantized weight.
    named_so = (scheme for scheme in layout.schemes.values() if layout.suffixes(scheme)["codes"] == leaf)
    return any(info.dtype == scheme.parts(1, scheme.divides)["codes"].dtype for scheme in named_so)


def _matrix(module: str, tensors: Mapping[str, TensorInfo], layout: Layout) -> StoredMatrix:
    scheme = _scheme_of(tensors, layout)
    names = layout.suffixes(scheme)
    parts = {part: tensors[leaf] for part, leaf in names.items() if leaf in tensors}
    faults = [f"{module} lacks {leaf}" for part, leaf in names.items() if part not in parts and part != _OPTIONAL]
    faults += [f"{module} also has {leaf}" for leaf in _strangers(tensors, names.values())]
    faults += _wrong_dtypes(parts, scheme) or _wrong_shapes(parts, scheme)
    return StoredMatrix(module, scheme, parts, tuple(faults))


def _scheme_of(tensors: Mapping[str, TensorInfo], layout: Layout) -> Scheme:
    """The scheme that the most tensors fit by name and dtype, and that misses the fewest."""

    def fit(scheme: Scheme) -> tuple[int, int, int]:
        names, specs = layout.suffixes(scheme), scheme.parts(1, scheme.divides)
        present = {part: tensors[names[part]].dtype for part in specs if names[part] in tensors}
        fitting = sum(fits_dtype(scheme, part, dtype, specs[part].dtype) for part, dtype in present.items())
        return fitting, len(present), -len(specs)

    return max(layout.schemes.values(), key=fit)


def fits_dtype(scheme: Scheme, part: Part, dtype: str, wanted: str) -> bool:
    """Whether a part may have a dtype: the one that the scheme wants, or for scales another that servers read."""
    return dtype == wanted or (part != "codes" and dtype in scheme.scale_dtypes)


def _strangers(tensors: Iterable[str], expected: Iterable[str]) -> list[str]:
    return sorted(set(tensors) - {*expected, *_MAY_STAND_BESIDE})


def _specs(scheme: Scheme, parts: Mapping[Part, TensorInfo]) -> dict[Part, PartSpec]:
    codes = parts.get("codes")
    rows, cols = (0, 0) if codes is None or len(codes.shape) != 2 else scheme.shape_of(codes.shape)
    return scheme.parts(rows, cols) | ({_OPTIONAL: PartSpec("F32", ())} if _OPTIONAL in parts else {})


def _wrong_dtypes(parts: Mapping[Part, TensorInfo], scheme: Scheme) -> list[str]:
    specs = _specs(scheme, parts)
    return [
        f"{info.name} is {info.dtype}, not {specs[part].dtype}"
        for part, info in parts.items()
        if not fits_dtype(scheme, part, info.dtype, specs[part].dtype)
    ]


def _wrong_shapes(parts: Mapping[Part, TensorInfo], scheme: Scheme) -> list[str]:
    faults = []
    codes, specs = parts.get("codes"), _specs(scheme, parts)
    if codes is not None and (len(codes.shape) != 2 or scheme.shape_of(codes.shape)[1] % scheme.divides):
        step = scheme.divides * scheme.bits // 8
        faults.append(f"{codes.name} has shape {list(codes.shape)}, not [rows, a multiple of {step}]")
        return faults + _wrong_scalars(parts, specs)
    scales = parts.get("scales")
    if codes is not None and scales is not None and specs["scales"].shape and scales.shape != specs["scales"].shape:
        faults.append(
            f"{scales.name} has shape {list(scales.shape)}, not {list(specs['scales'].shape)} as codes of "
            f"{list(codes.shape)} require"
        )
    return faults + _wrong_scalars(parts, specs)


def _wrong_scalars(parts: Mapping[Part, TensorInfo], specs: Mapping[Part, PartSpec]) -> list[str]:
    return [
        f"{info.name} has shape {list(info.shape)}, not [1] or []"
        for part, info in parts.items()
        if not specs[part].shape and info.shape not in SCALAR_SHAPES
    ]
