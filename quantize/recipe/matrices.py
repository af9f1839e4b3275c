"""The unit of quantization: a matrix, cut from a tensor of the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.writer import TensorEntry
from ..format.layouts import Layout
from ..format.schemes import Part, Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Matrix:
    """A matrix to be quantized.

    Attributes:
        name: the module's name for a server, which the names of the stored tensors begin with.
        tensor: name of the source tensor that contains it.
        index: its place in the tensor's first axes, () for a tensor that is the matrix, (17,) for expert 17 of a stack.
        first_row: number of its first row there. Rows of gate and up may share a tensor.
        rows, cols: its shape.
        is_transposed: whether the tensor has its rows and columns exchanged.
        weight_group: name of the matrices that share its weight global scale.
        input_group: name of the matrices that share its input scale.
        site: name of the input that it reads.
    """

    name: str
    tensor: str
    scheme: Scheme
    rows: int
    cols: int
    weight_group: str
    input_group: str
    site: str
    index: tuple[int, ...] = ()
    first_row: int = 0
    is_transposed: bool = False

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The matrix as a view [rows, cols] of its tensor.

        Args:
            tensors: by their names in the source.
        """
        whole = tensors[self.tensor]
        for at in self.index:
            whole = whole[at]
        if self.is_transposed:
            whole = whole.transpose(0, 1)
        return whole[self.first_row : self.first_row + self.rows]


def matrix_entries(matrix: Matrix, layout: Layout) -> dict[Part, TensorEntry]:
    """The stored tensors of a matrix in a layout, by part."""
    return {
        part: TensorEntry(f"{matrix.name}.{suffix}", spec.dtype, spec.shape)
        for part, (suffix, spec) in layout.specs(matrix.scheme, matrix.rows, matrix.cols).items()
    }
