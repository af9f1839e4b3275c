"""The interface of a quantizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from ..calibrate.statistics.moments import Moments
from ..calibrate.statistics.ranges import InputStatistics
from ..format.schemes import Part
from ..recipe.matrices import Matrix
from ..stream.manifest import CastRecord, FeedbackRecord

Need = Literal["mean_square", "moments"]
"""A statistic of the inputs: the mean square of each column, or see `Moments`."""


@dataclass(frozen=True)
class GroupInputs:
    """The statistics of the input that a fused group shares.

    Attributes:
        ranges: in the lane `source`.
        moments: None where the quantizer does not need them.
    """

    ranges: InputStatistics
    moments: Moments | None = None


@dataclass(frozen=True)
class Claim:
    """The choices of a quantizer that verification recomputes from the source.

    Attributes:
        headroom: factor by which block scales may exceed amax / 6, applied to the global scale (a power of two).
        scale_offsets: allowed distances of a block scale's E4M3 byte from that of round-to-nearest. None for any.
        codes: `nearest` if every code is the nearest one under its stored scale.
    """

    headroom: float
    scale_offsets: range | None
    codes: Literal["nearest", "any"] = "nearest"


@dataclass(frozen=True)
class QuantizedGroup:
    """The matrices of a fused group.

    Attributes:
        amax: the largest magnitude of the group's weights, from which all shared scales follow.
        parts: for each matrix, by name, its tensors that no record of the run holds: all but scalars. They are on the
            weights' device.
        feedback: the course of error feedback, where the quantizer has any.
        cast: where the codes are the source's.
    """

    amax: float
    parts: Mapping[str, Mapping[Part, Tensor]]
    feedback: FeedbackRecord | None = None
    cast: CastRecord | None = None


class Quantizer(Protocol):
    """Turns the matrices of a fused group into codes and scales.

    Attributes:
        name: its name in recipes and for `--quantizer`.
        schemes: names of the schemes that it can quantize to.
        needs: the statistics of the inputs that `quantize` uses.
        lane: whose inputs the statistics are of.
        by_site: whether the inputs of a group depend on the quantized groups before it in the same layer.
        folds: whether exact folds are made before it, unless the recipe or the user decides otherwise.
        claim: see `Claim`. Of `quantize`.
        rows_claim: of `quantize_rows`.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def schemes(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """See the class."""
        ...

    @property
    def lane(self) -> Literal["source", "quantized"]:
        """See the class."""
        ...

    @property
    def by_site(self) -> bool:
        """See the class."""
        ...

    @property
    def folds(self) -> bool:
        """See the class."""
        ...

    @property
    def claim(self) -> Claim:
        """See the class."""
        ...

    @property
    def rows_claim(self) -> Claim:
        """See the class."""
        ...

    def quantize(
        self, group: Sequence[Matrix], weights: Sequence[Tensor], inputs: GroupInputs | None
    ) -> QuantizedGroup:
        """Quantize a fused group.

        Args:
            group: its matrices, all in one scheme.
            weights: of each matrix, [rows, cols], bfloat16, float16 or float32, on one device.
            inputs: statistics of the shared input, or None without calibration.
        Raises:
            NonFiniteError: a NaN or an infinity in a weight.
            InputError: weights that the scheme or the quantizer cannot represent.
        """
        ...

    def quantize_rows(self, matrix: Matrix, weight: Tensor, amax: Tensor) -> Mapping[Part, Tensor]:
        """Quantize some rows of a matrix that stands alone, without statistics of its inputs. Every row depends on
        itself and `amax` alone.

        Args:
            weight: [some rows, cols], finite, bfloat16, float16 or float32.
            amax: the largest magnitude of the complete matrix, float32 scalar on the weight's device.
        Raises:
            InputError: see `quantize`.
        """
        ...
