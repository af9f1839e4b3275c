"""The attention of an FP8 source that a recipe leaves unquantized: its size in BF16, and in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..checkpoint.headers import DTYPE_BYTES
from ..format.schemes import FP8
from ..recipe.matrices import Matrix
from ..recipe.roles import Role, module_of
from ..weights.decoding import Decoding, stored_bytes
from ..weights.encoded import cast_form
from .plan import Plan

RECIPE = "nvfp4-fp8"  # the shipped recipe whose attention is in FP8


@dataclass(frozen=True)
class Fp8Attention:
    """The matrices of attention that are stored in FP8 and written in BF16.

    Attributes:
        matrices: their number.
        kept: how many of them keep their codes under a recipe with attention in FP8. The others are quantized anew.
        stored_bytes: in the source, with scales.
        bf16_bytes, fp8_bytes: in the output, by this recipe and by `recipe`.
        recipe: the shipped recipe with attention in FP8.
    """

    matrices: int
    kept: int
    stored_bytes: int
    bf16_bytes: int
    fp8_bytes: int
    recipe: str = RECIPE

    @property
    def words(self) -> str:
        """Both sizes in two sentences."""
        how = "keeps their codes" if self.kept == self.matrices else "quantizes them to FP8"
        how = f"keeps the codes of {self.kept:,} and quantizes the others" if 0 < self.kept < self.matrices else how
        return (
            f"{self.matrices:,} attention matrices grow from FP8 to BF16 and take {_size(self.bf16_bytes)}. "
            f"Recipe {self.recipe} {how}, in {_size(self.fp8_bytes)}."
        )


def fp8_attention(plan: Plan) -> Fp8Attention | None:
    """The matrices of attention that the recipe of a plan decodes from FP8, or None where there are none."""
    content, scheme = plan.source.content, plan.layout.schemes[FP8.name]
    if not isinstance(content, Decoding):
        return None
    matrices = []
    for name, coded in content.found.coded.items():
        is_copied = name in plan.origins and plan.origins[name].is_copy
        if coded.form == "FP8" and is_copied and plan.selection.roles[name] is Role.ATTENTION and len(coded.shape) == 2:
            matrices.append(Matrix(module_of(name), name, scheme, *coded.shape, "", "", ""))
    if not matrices:
        return None
    parts = [spec for m in matrices for _, spec in plan.layout.specs(scheme, m.rows, m.cols).values()]
    return Fp8Attention(
        len(matrices),
        sum(cast_form(plan.source, matrix) is not None for matrix in matrices),
        sum(stored_bytes(plan.source, matrix.tensor) for matrix in matrices),
        sum(plan.source.info(matrix.tensor).nbytes for matrix in matrices),
        sum(prod(spec.shape) * DTYPE_BYTES[spec.dtype] for spec in parts),
    )


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
