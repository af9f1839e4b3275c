"""Numbers that define NVFP4."""

from __future__ import annotations

BLOCK = 16
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
E2M1_MAX = 6.0
SCALE_RANGE = E4M3_MAX * E2M1_MAX  # 2688: the largest value of a block scale times the largest of a code
ZERO_BLOCK_BYTE = 0x20  # 0.125, the scale of a block of zeros
SMALLEST_WEIGHT_AMAX = 1e-33
"""Below it, the product of a matrix's scales leaves the normal numbers of float32, and a server computes zeros."""
