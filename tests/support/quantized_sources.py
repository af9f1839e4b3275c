"""Checkpoints in the quantized forms that models are released in, each with its twin in BF16.

A form has an encoder, which makes stored tensors of a matrix, and a decoder, which is the judge of nvquant's: tables,
indices and float64, each product rounded to float32 and then to BF16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nvquant.checkpoint.source import INDEX_NAME
from safetensors.torch import load_file, save_file
from support.conversions import tensors_in
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A form of quantized sources.

    Attributes:
        encode: stored tensors, by the end of their names behind the module's, for a matrix.
        decode: the BF16 matrix that they mean.
        claim: `quantization_config`.
    """

    encode: Callable[[Tensor], Stored]
    decode: Callable[[Stored], Tensor]
    claim: Mapping[str, Any]
    extras: Mapping[str, Tensor] = field(default_factory=dict)


def product(codes: Tensor, scales: Tensor) -> Tensor:
    """codes * scales, rounded to float32 and then to BF16."""
    return (codes.double() * scales.double()).float().bfloat16()


def under(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scale of every element, where each rectangle of `block` shares one."""
    rows, cols = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scales[rows][:, cols]


def block_amax(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each rectangle, those at the edges included."""
    down, across = -(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1])
    found = torch.zeros(down, across, dtype=torch.float64)
    for i in range(down):
        for j in range(across):
            part = matrix[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            found[i, j] = part.abs().max().double()
    return found


def fp8_form(
    block: tuple[int, int] | None,
    claim: Mapping[str, Any],
    *,
    name: str = "weight_scale_inv",
    dtype: torch.dtype = torch.float32,
    shape: Callable[[Tensor], Tensor] = lambda scales: scales,
    extras: Mapping[str, Tensor] | None = None,
) -> Form:
    """FP8 under float scales, or powers of two where `dtype` is E8M0.

    Args:
        block: None for one scale of the matrix.
        shape: brings scales [down, across] into the form that is stored.
    """

    def size(matrix: Tensor) -> tuple[int, int]:
        rows, cols = matrix.shape
        return (rows, cols) if block is None else (block[0] or rows, block[1] or cols)

    def encode(matrix: Tensor) -> Stored:
        scales = (block_amax(matrix.float(), size(matrix)) / 448).clamp(min=2.0**-100)
        if dtype in (torch.uint8, torch.float8_e8m0fnu):
            exponents = scales.log2().ceil()
            scales, stored = exponents.exp2(), (exponents + 127).to(torch.uint8)
            stored = stored.view(torch.float8_e8m0fnu) if dtype == torch.float8_e8m0fnu else stored
        else:
            stored = scales.to(dtype)
            scales = stored.double()
        codes = (matrix.double() / under(scales, tuple(matrix.shape), size(matrix))).clamp(-448, 448)
        return {"weight": codes.float().to(torch.float8_e4m3fn), name: shape(stored), **(extras or {})}

    def decode(stored: Stored) -> Tensor:
        codes, scales = stored["weight"], stored[name]
        if dtype in (torch.uint8, torch.float8_e8m0fnu):
            scales = (scales.view(torch.uint8).double() - 127).exp2()
        down, across = (-(-n // b) for n, b in zip(codes.shape, size(codes), strict=True))
        return product(codes.float(), under(scales.double().reshape(down, across), tuple(codes.shape), size(codes)))

    return Form(encode, decode, claim)


def nearest_e2m1(values: Tensor) -> Tensor:
    """The codes of nearest E2M1 values. Ties do not matter to a source."""
    distance = (values.double().unsqueeze(-1) - E2M1).abs()
    return distance.argmin(-1).to(torch.uint8)


def packed(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpacked(stored: Tensor) -> Tensor:
    """The inverse of `packed`."""
    codes = torch.zeros(stored.shape[0], 2 * stored.shape[1], dtype=torch.long)
    codes[:, 0::2], codes[:, 1::2] = (stored & 15).long(), (stored >> 4).long()
    return codes


def write_source(model: Path, folder: Path, form: Form, matrices: Callable[[str], bool], shards: int = 2) -> Path:
    """Store some matrices of a BF16 model in a form. Codes and scales lie in different shards."""
    return _write(model, folder, form, matrices, shards, is_twin=False)


def write_twin(model: Path, folder: Path, form: Form, matrices: Callable[[str], bool], shards: int = 2) -> Path:
    """The same values in BF16."""
    return _write(model, folder, form, matrices, shards, is_twin=True)


def _write(
    model: Path, folder: Path, form: Form, matrices: Callable[[str], bool], shards: int, *, is_twin: bool
) -> Path:
    shutil.copytree(model, folder)
    tensors: Stored = {}
    for name, tensor in tensors_in(model).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not matrices(name):
            tensors[name] = tensor
        elif is_twin:
            tensors[name] = form.decode(form.encode(tensor))
        else:
            tensors |= {f"{module}.{end}": part for end, part in form.encode(tensor).items()}
    if not is_twin:
        tensors |= form.extras
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(form.claim)}, indent=2))
    spread(folder, tensors, shards)
    return folder


def spread(folder: Path, tensors: Stored, shards: int) -> None:
    """Write a folder's tensors into shards, neighbours into different ones."""
    for old in [*folder.glob("*.safetensors"), folder / INDEX_NAME]:
        old.unlink(missing_ok=True)
    weight_map = {}
    for at in range(shards):
        file = f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: tensors[name].clone().contiguous() for name in sorted(tensors)[at::shards]}
        save_file(own, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_source(folder: Path, edit: Callable[[Stored], object], shards: int = 2) -> Path:
    """Change a checkpoint's stored tensors in place."""
    tensors: Stored = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    edit(tensors)
    spread(folder, tensors, shards)
    return folder


def in_layers(name: str) -> bool:
    """The linear layers of a decoder."""
    return ".layers." in name and name.endswith("_proj.weight")


def mxfp4_form(
    claim: Mapping[str, Any], *, names: tuple[str, str] = ("weight_packed", "weight_scale"), **how: Any
) -> Form:
    """MXFP4.

    Args:
        names: of codes and scales.
        how: `shape` gives codes and scales the form that is stored, `dtype` the scales theirs, `spread` makes the
            exponents of neighbouring blocks differ.
    """
    shape, dtype, spread_of = how.get("shape"), how.get("dtype", torch.uint8), how.get("spread", 0)

    def encode(matrix: Tensor) -> Stored:
        blocks = matrix.double().unflatten(1, (-1, 32))
        exponents = (blocks.abs().amax(-1).clamp(min=2.0**-60).log2().floor() - 2).int()
        if spread_of:
            exponents -= torch.arange(exponents.numel()).reshape(exponents.shape).int() % (spread_of + 1)
        codes = nearest_e2m1(blocks / exponents.double().exp2().unsqueeze(-1)).flatten(1)
        scales = (exponents + 127).to(torch.uint8)
        stored = {names[0]: packed(codes), names[1]: scales.view(dtype)}
        return stored if shape is None else {name: shape(name, tensor) for name, tensor in stored.items()}

    def decode(stored: Stored) -> Tensor:
        rows, exponents = stored[names[0]].shape[0], stored[names[1]].view(torch.uint8).double() - 127
        values = E2M1[unpacked(stored[names[0]].view(torch.uint8).reshape(rows, -1))]
        return (values.unflatten(1, (-1, 32)) * exponents.exp2().unsqueeze(-1)).flatten(1).bfloat16()

    return Form(encode, decode, claim)


def integer_form(bits: int, group: int, claim: Mapping[str, Any]) -> Form:
    """compressed-tensors' symmetric integers, packed into words of 32 bits, the first in the lowest bits."""
    half, each = 1 << (bits - 1), 32 // bits

    def encode(matrix: Tensor) -> Stored:
        scales = (block_amax(matrix.float(), (1, group)) / (half - 1)).clamp(min=2.0**-100).bfloat16()
        steps = under(scales.double(), tuple(matrix.shape), (1, group))
        codes = (matrix.double() / steps).round().clamp(-half, half - 1).long() + half
        words = sum(codes[:, at::each] << (bits * at) for at in range(each))
        assert isinstance(words, Tensor)
        return {
            "weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).int(),
            "weight_scale": scales,
            "weight_shape": torch.tensor(matrix.shape),
        }

    def decode(stored: Stored) -> Tensor:
        words = stored["weight_packed"].long() & 0xFFFFFFFF
        codes = torch.zeros(words.shape[0], each * words.shape[1], dtype=torch.long)
        for at in range(each):
            codes[:, at::each] = (words >> (bits * at)) & (2 * half - 1)
        return product(codes - half, under(stored["weight_scale"], tuple(codes.shape), (1, group)))

    return Form(encode, decode, claim)


def nvfp4_form(claim: Mapping[str, Any], *, is_modelopt: bool) -> Form:
    """NVFP4 in either layout, with input scales."""
    names = (
        ("weight", "weight_scale", "weight_scale_2", "input_scale")
        if is_modelopt
        else (*("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),)
    )

    def encode(matrix: Tensor) -> Stored:
        amax = matrix.float().abs().max()
        divisor = 2688 / amax
        scales = (block_amax(matrix.float(), (1, 16)) / 6 * divisor.double()).clamp(2.0**-9, 448)
        stored = scales.float().to(torch.float8_e4m3fn)
        steps = under(stored.float().double() / divisor.double(), tuple(matrix.shape), (1, 16))
        scalar = (amax / 2688).reshape(()) if is_modelopt else divisor.reshape(1)
        parts = (packed(nearest_e2m1(matrix.double() / steps)), stored, scalar, torch.ones_like(scalar))
        return dict(zip(names, parts, strict=True))

    def decode(stored: Stored) -> Tensor:
        scales, scalar = stored[names[1]].float(), stored[names[2]]
        steps = scales * scalar if is_modelopt else scales / scalar
        codes = E2M1[unpacked(stored[names[0]])]
        return product(codes, under(steps, tuple(codes.shape), (1, 16)))

    return Form(encode, decode, claim)
