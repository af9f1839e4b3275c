"""A decoder layer with some of its fused groups as a server computes them, and everything else as in the source.

Folds are taken back after the rounding: weights are quantized in their folded scale and returned to that of the source,
and inputs are rounded likewise. Folds are exact, so this is the served computation, and no other tensor changes.
"""

from __future__ import annotations

from torch import Tensor

from ..calibrate.lanes import Lane, LayerPass
from ..calibrate.statistics.ranges import InputStatistics
from ..calibrate.taps import LinearTap
from ..convert.matrices import quantize_group
from ..convert.walking import CalibrationWalk
from ..plan.plan import Plan
from ..quantizers import quantizer_for
from ..quantizers.base import GroupInputs, Quantizer
from ..recipe.groups import FusedGroup
from ..reshape.reshaping import Reshaping
from ..stream.memory import telling_of_full_gpu
from ..stream.reading import LoadedLayer


class ServedLayer:
    """A layer of which nothing is quantized yet.

    Args:
        plan: gives the scheme of each matrix.
        walk: in front of the layer or behind it.
        reshaping: folds of the layer.
    """

    def __init__(self, plan: Plan, walk: CalibrationWalk, loaded: LoadedLayer, reshaping: Reshaping) -> None:
        self._plan, self._tensors, self._reshaping = plan, loaded.tensors, reshaping
        self._layer = walk.quantized_layer(plan, loaded.layer, loaded.tensors)

    def put(self, group: FusedGroup, seen: InputStatistics, quantizer: Quantizer) -> None:
        """Quantize a group, and round its inputs from now on.

        Args:
            seen: of the group's input after the folds.
            quantizer: of the run.
        Raises:
            NonFiniteError, InputError: see `quantize_group`.
        """
        plan, reshaping = self._plan, self._reshaping
        matrices = [plan.matrices[module] for module in group.members]
        scheme = matrices[0].scheme
        inputs = GroupInputs(seen) if scheme.inputs == "calibrated" else None
        headroom = quantizer_for(scheme.name, quantizer).claim.headroom
        with telling_of_full_gpu(f"the quantization of {group.name}"):
            made = quantize_group(plan, group, self._tensors, inputs, quantizer, reshaping)
            self._layer.put(group, matrices, made.parts, made.record, headroom)
        for matrix in matrices:
            if reshaping.changes(matrix.name):
                own = matrix.of(self._layer.tensors)
                own.copy_(reshaping.unfolded(matrix.name, own))

    def on(self, lane: Lane) -> LayerPass:
        """The way of a lane through the layer."""
        return LayerPass(lane, self._layer.tensors, self._rounded)

    @property
    def tap(self) -> LinearTap:
        """The sites whose inputs a server rounds."""
        return self._layer.tap

    def _rounded(self, site: str, inputs: Tensor) -> Tensor | None:
        factor = self._reshaping.input_factor(site)
        if factor is None:
            return self._layer.round_inputs(site, inputs)
        own = factor.to(inputs.device)
        rounded = self._layer.round_inputs(site, (inputs.float() * own).to(inputs.dtype))
        return None if rounded is None else (rounded.float() / own).to(inputs.dtype)
