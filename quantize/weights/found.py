"""The coded tensors of a checkpoint, found by the names, dtypes and shapes of their companions.

No form follows from a dtype alone: one byte may be FP8, two codes of FP4, or a scale. A tensor of codes without its
scale, and a scale without its codes, are errors.
Source: docs/formats.md, section "Quantized sources", with the tensors' names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint.headers import TensorInfo
from ..errors import InputError
from ..format.constants import BLOCK
from ..format.microscaling import MX_BLOCK
from .claims import Claim
from .coded import Coded, FormName

_ONE_BYTE = ("F8_E4M3", "F8_E5M2", "U8", "I8")
_E8M0 = ("U8", "F8_E8M0")
_FLOATS = ("F32", "BF16", "F16")
# Ends of the names of scales, behind a tensor's own name, then behind its module's.
_SCALE_ENDS = ("_scale_inv", "_scale")
_MODULE_SCALE = ".scale"
# Ends of names that only companions have. Those of the second line are no part of a weight's value.
_COMPANION = re.compile(
    r"(_scale_inv|[._]weight_scale|[._]weight_scale_2|\.weight_global_scale|\.weight_shape|_blocks|_scales"
    r"|[._]input_scale|[._]activation_scale|\.input_global_scale|[._]input_scale_ub|[._]output_scale)$"
)
_DROPPED = ("weight_shape", "input_scale", "activation_scale", "input_global_scale", "input_scale_ub", "output_scale")
_CACHE = re.compile(r"\.([kvq]_scale|kv_scale|[kvq]_zero_point)$")
_REFUSED = ("weight_zero_point", "weight_g_idx")
_AGAIN = "download the model again"


@dataclass(frozen=True)
class Found:
    """The coded tensors of a checkpoint.

    Attributes:
        coded: by the name that the model has.
        dropped: the names of tensors that the decoded model does not have: companions, and scales of a KV cache.
    """

    coded: Mapping[str, Coded]
    dropped: frozenset[str]

    @property
    def words(self) -> str:
        """The forms, the one of most elements first."""
        sizes: dict[str, int] = {}
        for coded in self.coded.values():
            sizes[coded.form] = sizes.get(coded.form, 0) + math.prod(coded.shape)
        return " and ".join(sorted(sizes, key=lambda form: -sizes[form]))


def find_coded(infos: Mapping[str, TensorInfo], claim: Claim) -> Found:
    """The coded tensors under the stored names of a checkpoint.

    Raises:
        InputError: codes without scales, scales without codes, or shapes and dtypes that do not fit each other.
    """
    coded = {one.name: one for name in infos if (one := _coded(name, infos, claim)) is not None}
    used = {name for one in coded.values() for name in one.stored}
    dropped = {name for one in coded.values() for name in _beside(one, infos)}
    for name, info in infos.items():
        if name in used or name in dropped:
            continue
        if _CACHE.search(name) and math.prod(info.shape) == 1:
            dropped.add(name)
        elif _is_companion(name, info):
            raise InputError(
                f"{name} is a scale or a part of quantized weights that the model lacks", where=name, hint=_AGAIN
            )
        elif name in coded:
            raise InputError(f"{name} is stored both decoded and as codes", where=name, hint=_AGAIN)
    stored = {one.codes.name for one in coded.values()}
    return Found(coded, frozenset((used | dropped) - stored) | (stored - set(coded)))


def _is_companion(name: str, info: TensorInfo) -> bool:
    if name.endswith(("_blocks", "_scales")):
        return info.dtype == "U8"
    return info.dtype == "F8_E8M0" or _COMPANION.search(name) is not None


def _coded(name: str, infos: Mapping[str, TensorInfo], claim: Claim) -> Coded | None:
    """The coded tensor whose codes have this name, or None."""
    info = infos[name]
    if name.endswith(".weight_packed"):
        return _packed(name, infos, claim)
    if name.endswith("_blocks") and info.dtype == "U8" and len(info.shape) in (3, 4):
        return _gpt_oss(name, infos)
    is_scale = _COMPANION.search(name) is not None or name.endswith(_MODULE_SCALE)
    if info.dtype not in _ONE_BYTE or len(info.shape) < 2 or is_scale:
        return None
    scales = _scales_of(name, infos)
    if scales is None:
        if info.dtype.startswith("F8_") or name.endswith(".weight"):
            raise InputError(f"{name} is stored as {info.dtype} without a scale", where=name, hint=_AGAIN)
        return None
    if info.dtype == "F8_E4M3":
        return _fp8(name, info, scales, claim)
    if info.dtype == "U8" and scales.dtype == "F8_E4M3":
        return _nvfp4(name, info, scales, infos.get(f"{name}_scale_2"), is_divisor=False)
    if info.dtype in ("U8", "I8") and scales.dtype in _E8M0:
        return _mxfp4(name, info, scales)
    raise _unlike(name, info, scales)


def _scales_of(name: str, infos: Mapping[str, TensorInfo]) -> TensorInfo | None:
    names = [name + end for end in _SCALE_ENDS]
    names += [name.removesuffix(".weight") + _MODULE_SCALE] if name.endswith(".weight") else []
    found = [infos[one] for one in names if one in infos]
    if len(found) > 1:
        raise InputError(f"{name} has two scales, {found[0].name} and {found[1].name}", where=name, hint=_AGAIN)
    return found[0] if found else None


def _packed(name: str, infos: Mapping[str, TensorInfo], claim: Claim) -> Coded:
    """compressed-tensors' packed codes."""
    module, info = name.removesuffix(".weight_packed"), infos[name]
    tensor, scales = f"{module}.weight", infos.get(f"{module}.weight_scale")
    if scales is None:
        raise InputError(f"{name} is stored without a scale", where=name, hint=_AGAIN)
    for leaf in _REFUSED:
        if f"{module}.{leaf}" in infos:
            raise InputError(
                f"{module}.{leaf} is a part of integers that are not symmetric or in another order",
                where=name,
                hint="convert from the original BF16 model",
            )
    if info.dtype == "I32":
        return _integers(tensor, info, scales, claim)
    if info.dtype == "U8" and scales.dtype == "F8_E4M3":
        return _nvfp4(tensor, info, scales, infos.get(f"{module}.weight_global_scale"), is_divisor=True)
    if info.dtype == "U8" and scales.dtype in _E8M0:
        return _mxfp4(tensor, info, scales)
    raise _unlike(name, info, scales)


def _integers(tensor: str, info: TensorInfo, scales: TensorInfo, claim: Claim) -> Coded:
    bits = claim.integer_bits or frozenset({4})
    if bits not in ({4}, {8}):
        raise InputError(
            f"{claim.where} declares integers of {' and '.join(map(str, sorted(bits)))} bits, and nvquant decodes 4 "
            "or 8",
            where=info.name,
            hint="convert from the original BF16 model",
        )
    form: FormName = "INT4" if bits == {4} else "INT8"
    if len(info.shape) < 2 or scales.dtype not in _FLOATS or scales.shape[:-1] != info.shape[:-1]:
        raise _unlike(tensor, info, scales)
    cols, groups = info.shape[-1] * (32 // min(bits)), scales.shape[-1]
    fitting = [size for size in claim.groups_of_integers if -(-cols // size) == groups]
    if not fitting and (not groups or cols % groups):
        raise _unlike(tensor, info, scales)
    grid = (1, fitting[0] if fitting else cols // groups)
    return Coded(tensor, form, (*info.shape[:-1], cols), info, scales, grid)


def _nvfp4(tensor: str, info: TensorInfo, scales: TensorInfo, scalar: TensorInfo | None, is_divisor: bool) -> Coded:
    if scalar is None:
        raise InputError(f"{info.name} is stored without a global scale", where=info.name, hint=_AGAIN)
    *outer, half = info.shape
    fits = half % (BLOCK // 2) == 0 and scales.shape == (*outer, half // (BLOCK // 2)) and len(outer) == 1
    if not fits or scalar.dtype != "F32" or math.prod(scalar.shape) != 1:
        raise _unlike(tensor, info, scales)
    return Coded(tensor, "NVFP4", (*outer, 2 * half), info, scales, (1, BLOCK), scalar, is_divisor)


def _mxfp4(tensor: str, info: TensorInfo, scales: TensorInfo) -> Coded:
    *outer, half = info.shape
    if half % (MX_BLOCK // 2) or scales.shape != (*outer, half // (MX_BLOCK // 2)):
        raise _unlike(tensor, info, scales)
    return Coded(tensor, "MXFP4", (*outer, 2 * half), info, scales, (1, MX_BLOCK))


def _gpt_oss(name: str, infos: Mapping[str, TensorInfo]) -> Coded:
    """gpt-oss's blocks of 16 bytes. Its experts are stored with rows and columns the other way round."""
    tensor, info = name.removesuffix("_blocks"), infos[name]
    scales = infos.get(f"{tensor}_scales")
    if scales is None:
        raise InputError(f"{name} is stored without a scale", where=name, hint=_AGAIN)
    *outer, rows, blocks, width = info.shape
    if scales.dtype not in _E8M0 or width != MX_BLOCK // 2 or scales.shape != info.shape[:-1]:
        raise _unlike(name, info, scales)
    cols, is_stack = blocks * MX_BLOCK, bool(outer)
    shape = (*outer, cols, rows) if is_stack else (rows, cols)
    return Coded(tensor, "MXFP4", shape, info, scales, (1, MX_BLOCK), is_transposed=is_stack)


def _fp8(name: str, info: TensorInfo, scales: TensorInfo, claim: Claim) -> Coded:
    *outer, rows, cols = info.shape
    if scales.dtype not in (*_FLOATS, *_E8M0):
        raise _unlike(name, info, scales)
    shapes = _fp8_shapes(tuple(outer), rows, cols, claim.block)
    grid = next((grid for shape, grid in shapes if shape == scales.shape), None)
    if grid is None:
        raise _unlike(name, info, scales)
    form: FormName = "MXFP8" if grid == (1, MX_BLOCK) else "FP8"
    return Coded(name, form, info.shape, info, scales, grid)


def _fp8_shapes(
    outer: tuple[int, ...], rows: int, cols: int, block: tuple[int, int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, int]]]:
    """The shapes that scales may have, each with its grid: blocks, whole, rows, groups of a row."""
    down, across = -(-rows // block[0]), -(-cols // block[1])
    yield (*outer, down, across), block
    yield (*outer, down, 1, across, 1), block
    if outer:
        yield outer, (rows, cols)
    else:
        yield (), (rows, cols)
        yield (1,), (rows, cols)
    yield (*outer, 1, 1), (rows, cols)
    yield (*outer, rows, 1), (1, cols)
    yield (*outer, rows), (1, cols)
    if cols % MX_BLOCK == 0:
        yield (*outer, rows, cols // MX_BLOCK), (1, MX_BLOCK)


def _beside(coded: Coded, infos: Mapping[str, TensorInfo]) -> Iterator[str]:
    """The names of companions of a coded tensor that have no part in its values."""
    module, is_module = coded.name.removesuffix(".weight"), coded.name.endswith(".weight")
    for leaf in _DROPPED:
        name = f"{module}.{leaf}" if is_module else f"{coded.name}_{leaf}"
        if name in infos:
            yield name


def _unlike(name: str, info: TensorInfo, scales: TensorInfo) -> InputError:
    return InputError(
        f"{scales.name} ({scales.dtype} {list(scales.shape)}) is no scale that nvquant knows for {info.name} "
        f"({info.dtype} {list(info.shape)})",
        where=name,
        hint="convert from the original BF16 model",
    )
