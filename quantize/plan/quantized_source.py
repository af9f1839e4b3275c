"""Sources that are quantized already: decoded where nvquant knows the form, and refused elsewhere."""

from __future__ import annotations

import re

from ..checkpoint.headers import TensorInfo
from ..checkpoint.regular import is_file
from ..checkpoint.sidefiles import MANIFEST_NAME
from ..checkpoint.source import Checkpoint
from ..errors import InputError
from ..weights.claims import METHODS, find_claim
from ..weights.decoding import decoded, decoded_form

# Ends of names that only tensors of a quantized matrix have, and the formats that use them.
_MARKS = (
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "FP8 with block scales"),
    (
        re.compile(r"\.quant_state\.bitsandbytes__\w+$|\.(SCB|weight_format|absmax|nested_absmax|quant_map)$"),
        "bitsandbytes",
    ),
    (re.compile(r"(\.|_)blocks$"), "MXFP4"),
)
_FLOATS = ("BF16", "F16", "F32", "F64")


def as_computed(source: Checkpoint, model: str) -> Checkpoint:
    """The source as its model computes with it: decoded, if it is quantized in a form that nvquant decodes.

    Args:
        model: its name in messages.
    Raises:
        InputError: it is nvquant's own output, or quantized in another form, or its codes and scales do not fit each
            other. See also `refuse_quantized`.
    """
    if is_file(source.folder / MANIFEST_NAME):
        raise InputError(
            f"{model} is quantized already (nvquant made it, as {MANIFEST_NAME} shows)",
            where=model,
            hint="convert from the original BF16 model, or change the layout with `nvquant relayout`",
        )
    found = decoded(source)
    refuse_quantized(found, model)
    return found


def refuse_quantized(source: Checkpoint, model: str) -> None:
    """Refuse a checkpoint that is quantized already: by its config, the files beside it, or its tensors.

    Args:
        model: its name in the message.
    Raises:
        InputError: it is quantized, or its config claims it although every matrix is a plain float. In the second case,
            the message names the claim to remove.
    """
    claim = None if decoded_form(source) else find_claim(source.folder, source.config)
    infos = source.infos().values()
    proof = next((found for find in (_odd_dtype, _odd_name) for info in infos if (found := find(info))), None)
    way_out = "convert from the original BF16 model"
    if claim is None:
        if proof is not None:
            raise InputError(f"{model} is quantized already ({proof})", where=model, hint=way_out)
        return
    if proof is not None:
        unknown = "" if claim.method in METHODS else ", which nvquant does not decode"
        raise InputError(
            f"{model} is quantized already ({claim.where} names {claim.method}{unknown})", where=model, hint=way_out
        )
    dtype = next((info.dtype for info in infos if len(info.shape) > 1), "absent")
    place = f"{claim.key} from {claim.file}" if claim.key else claim.file
    raise InputError(
        f"{claim.where} names {claim.method}, but no tensor is quantized, and the matrices are {dtype}",
        where=model,
        hint=f"remove {place} if these are the model's original weights",
    )


def _odd_dtype(info: TensorInfo) -> str | None:
    """Why a tensor's dtype can only be that of a quantized matrix; None if it need not be."""
    if len(info.shape) < 2 or info.dtype in _FLOATS:
        return None
    is_quantized = info.dtype.startswith("F8_") or info.name.endswith(".weight")
    return f"{info.name} is stored as {info.dtype}" if is_quantized else None


def _odd_name(info: TensorInfo) -> str | None:
    """Why a tensor's name can only be that of a part of a quantized matrix; None if it need not be."""
    for mark, method in _MARKS:
        if mark.search(info.name) and not (method == "MXFP4" and info.dtype != "U8"):
            return f"{info.name} is a tensor of {method}"
    return None
