"""The quantized matrices of a checkpoint, found by the names of their tensors, and their faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..checkpoint.headers import TensorInfo
from ..format.constants import BLOCK
from ..format.layouts import COMPRESSED_TENSORS, MODELOPT, Layout
from ..plan.plan import Part

PARTS: tuple[Part, ...] = ("packed", "scales", "weight_global", "input_global")  # in the order of Layout.suffixes
REQUIRED: tuple[Part, ...] = PARTS[:3]
DTYPES: Mapping[Part, str] = {"packed": "U8", "scales": "F8_E4M3", "weight_global": "F32", "input_global": "F32"}
SCALAR_SHAPES = ((), (1,))  # servers read both
KV_SCALES = ("k_scale", "v_scale")
_MAY_STAND_BESIDE = ("bias", *KV_SCALES)


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix as it is stored, complete or not.

    Attributes:
        module: name of its module.
        parts: its tensors.
        faults: in their names, dtypes and shapes. The input global scale may be absent.
    """

    module: str
    parts: Mapping[Part, TensorInfo]
    faults: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether its numbers can be read."""
        return not self.faults

    @property
    def has_input_scale(self) -> bool:
        """Whether it is stored for quantized inputs (W4A4)."""
        return "input_global" in self.parts

    @property
    def rows(self) -> int:
        """Rows of a sound matrix."""
        return self.parts["packed"].shape[0]

    @property
    def cols(self) -> int:
        """Columns of a sound matrix."""
        return 2 * self.parts["packed"].shape[1]


def split_name(tensor: str) -> tuple[str, str]:
    """Module and last part of a tensor's name."""
    module, _, leaf = tensor.rpartition(".")
    return module, leaf


def layouts_present(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The number of tensors with a name that only one layout uses, by the layout's name."""
    own = {
        leaf: layout.name
        for layout, other in ((COMPRESSED_TENSORS, MODELOPT), (MODELOPT, COMPRESSED_TENSORS))
        for leaf in set(layout.suffixes) - {*other.suffixes, "weight"}
    }
    counts: dict[str, int] = {}
    for name in infos:
        layout_name = own.get(split_name(name)[1])
        if layout_name is not None:
            counts[layout_name] = counts.get(layout_name, 0) + 1
    return counts


def find_matrices(infos: Mapping[str, TensorInfo], layout: Layout) -> dict[str, Matrix]:
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


def _is_quantized_part(leaf: str, info: TensorInfo, layout: Layout) -> bool:
    if leaf == "weight":  # modelopt's packed codes are called what an unquantized weight is called
        return layout.packed == "weight" and info.dtype == "U8"
    return leaf in layout.suffixes


def _matrix(module: str, tensors: Mapping[str, TensorInfo], layout: Layout) -> Matrix:
    names = dict(zip(PARTS, layout.suffixes, strict=True))
    parts = {part: tensors[leaf] for part, leaf in names.items() if leaf in tensors}
    faults = [f"{module} lacks {names[part]}" for part in REQUIRED if part not in parts]
    faults += [f"{module} also has {leaf}" for leaf in _strangers(tensors, names.values())]
    faults += _wrong_dtypes(parts) or _wrong_shapes(parts)
    return Matrix(module, parts, tuple(faults))


def _strangers(tensors: Iterable[str], expected: Iterable[str]) -> list[str]:
    return sorted(set(tensors) - {*expected, *_MAY_STAND_BESIDE})


def _wrong_dtypes(parts: Mapping[Part, TensorInfo]) -> list[str]:
    return [
        f"{info.name} is {info.dtype}, not {DTYPES[part]}" for part, info in parts.items() if info.dtype != DTYPES[part]
    ]


def _wrong_shapes(parts: Mapping[Part, TensorInfo]) -> list[str]:
    faults = []
    packed, scales = parts.get("packed"), parts.get("scales")
    if packed is not None and (len(packed.shape) != 2 or packed.shape[1] * 2 % BLOCK):
        faults.append(f"{packed.name} has shape {list(packed.shape)}, not [rows, a multiple of 8]")
    elif packed is not None and scales is not None:
        wanted = (packed.shape[0], packed.shape[1] * 2 // BLOCK)
        if scales.shape != wanted:
            faults.append(
                f"{scales.name} has shape {list(scales.shape)}, not {list(wanted)} as the packed {list(packed.shape)} "
                f"requires"
            )
    scalars = [parts[part] for part in ("weight_global", "input_global") if part in parts]
    return faults + [
        f"{info.name} has shape {list(info.shape)}, not [1] or []"
        for info in scalars
        if info.shape not in SCALAR_SHAPES
    ]
