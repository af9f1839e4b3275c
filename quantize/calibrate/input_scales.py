"""The amax behind a stored input scale, from what calibration observed."""

from __future__ import annotations

from ..format.schemes import Scheme
from .statistics.ranges import calibrated_amax


def stored_amax(scheme: Scheme, amax: float, low: float, headroom: str | float) -> float:
    """The amax that the input scale of a scheme is made of: the observed one times a power of two.

    Args:
        amax: the largest magnitude observed.
        low: the first percentile of the largest magnitudes of non-zero blocks.
        headroom: of the recipe, `auto` or a factor.
    """
    if isinstance(headroom, str) and scheme.headroom is not None:
        return amax * scheme.headroom
    return calibrated_amax(amax, low, headroom)
