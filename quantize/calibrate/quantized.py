"""A layer in the quantized path: its matrices as a server decodes them, its inputs as a server rounds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..format.layouts import Layout
from ..format.schemes import INPUT_PARTS, Part, Scheme
from ..recipe.groups import FusedGroup
from ..recipe.matrices import Matrix
from ..stream.manifest import GroupRecord
from ..stream.scalars import scalar_values
from .taps import LinearTap

Rounding = tuple[Scheme, Mapping[Part, Tensor]]


class QuantizedLayer:
    """A layer whose fused groups are quantized one after the other.

    Attributes:
        tensors: the layer's tensors by their names in the source. Those of quantized groups are decoded.

    Args:
        tensors: of the source, on the device. They are not changed.
        prefix: precedes the names of the layer's modules, with a final dot.
        dtype: of decoded matrices.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, layout: Layout, dtype: torch.dtype) -> None:
        self.tensors = dict(tensors)
        self._prefix, self._layout, self._dtype = prefix, layout, dtype
        self._copied: set[str] = set()
        self._groups: dict[str, FusedGroup] = {}
        self._roundings: dict[str, Rounding] = {}

    def put(
        self,
        group: FusedGroup,
        matrices: Sequence[Matrix],
        parts: Mapping[str, Mapping[Part, Tensor]],
        record: GroupRecord,
        headroom: float,
    ) -> None:
        """Replace the matrices of a group by their quantized values, and round its inputs from now on.

        Args:
            parts: of each matrix, by name, its tensors but for scalars, on the device.
            record: gives the scalars, with the headroom of the quantizer's claim.
        """
        scheme = matrices[0].scheme
        stored = scalar_values(self._layout, scheme, record, headroom)
        for matrix in matrices:
            own = parts[matrix.name]
            device = own["codes"].device
            scalars = {part: self._layout.canonical(part, value).to(device) for part, value in stored.items()}
            self._slot(matrix).copy_(scheme.decode({**own, **scalars}, self._dtype))
        self._groups[group.name] = group
        device = next(iter(self.tensors.values())).device
        amax = None if record.input is None else record.input.calibrated_amax
        self._roundings[group.name] = scheme, input_scales(self._layout, scheme, amax, device)

    def _slot(self, matrix: Matrix) -> Tensor:
        """The matrix as a view of a tensor that is the layer's own, in the dtype of decoded matrices."""
        if matrix.tensor not in self._copied:
            source = self.tensors[matrix.tensor]
            is_whole = matrix.rows * matrix.cols == source.numel()
            own = torch.empty_like(source, dtype=self._dtype) if is_whole else source.to(self._dtype, copy=True)
            self.tensors[matrix.tensor] = own
            self._copied.add(matrix.tensor)
        return matrix.of(self.tensors)

    @property
    def tap(self) -> LinearTap:
        """The sites whose inputs a server rounds."""
        rounded = [group for name, group in self._groups.items() if self._roundings[name][0].inputs != "unchanged"]
        return LinearTap.of_groups(rounded, self._prefix)

    def round_inputs(self, site: str, inputs: Tensor) -> Tensor | None:
        """A `Handle`: the input of a quantized group as a server rounds it. Other inputs pass."""
        if site not in self._roundings:
            return None
        scheme, scales = self._roundings[site]
        return scheme.round_inputs(inputs, scales)


def input_scales(layout: Layout, scheme: Scheme, amax: float | None, device: torch.device) -> dict[Part, Tensor]:
    """The stored scales by which a server rounds the inputs of a matrix, as `Scheme.round_inputs` takes them.

    Args:
        amax: the calibrated one. None if the scheme stores no such scale.
    """
    parts = [part for part in scheme.shared if part in INPUT_PARTS and amax is not None]
    return {part: layout.canonical(part, layout.stored_scalar(part, amax or 0.0)).to(device) for part in parts}
