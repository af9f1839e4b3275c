"""Triton code of `kernels.py`; imported only where Triton is."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, D103

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _e2m1_magic(magnitude):
    power = magnitude.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(power, 0x3F800000), 0x40800000) + ((22 << 23) + (1 << 22))


@triton.jit
def _decode_e4m3(code):
    normal = (((code >> 3) + 120) << 23) | ((code & 7) << 20)
    return tl.where(code >= 8, normal.to(tl.float32, bitcast=True), code.to(tl.float32) * 0.001953125)


@triton.jit
def _weighted_error(magnitude, step, weights):
    scaled = tl.minimum(tl.div_rn(magnitude, tl.broadcast_to(step[:, None], magnitude.shape)), 6.0)
    magic = _e2m1_magic(scaled).to(tl.float32, bitcast=True)
    error = ((scaled + magic) - magic) * step[:, None] - magnitude
    error = error * error * weights
    n: tl.constexpr = magnitude.shape[0]
    even, odd = tl.split(tl.reshape(error, (n, 8, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (n, 4, 2)))
    even, odd = tl.split(tl.reshape(even + odd, (n, 2, 2)))
    even, odd = tl.split(even + odd)
    return even + odd


@triton.jit
def quantize_kernel(
    weight, scale_at, importance, packed, scales, blocks, blocks_in_row, lowest, highest, first, end,
    IS_SWEEP: tl.constexpr, IS_WEIGHTED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = block < blocks
    column = tl.arange(0, 16)
    x = tl.load(weight + block[:, None] * 16 + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    magnitude = tl.abs(x)
    scale = tl.load(scale_at)
    amax = tl.max(magnitude, axis=1)
    wanted = tl.div_rn(amax, tl.full((N,), 6.0, tl.float32)) * scale
    rounded = tl.minimum(tl.maximum(wanted, 0.001953125), 448.0)
    power = tl.maximum(rounded.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
    magic = power + ((20 << 23) + (1 << 22))
    eighths = (rounded + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    nearest = tl.where(amax == 0.0, 0x20, ((power - ((127 - 6) << 23)) >> 20) + eighths)
    chosen = nearest
    if IS_SWEEP:
        weights = tl.full((N, 16), 1.0, tl.float32)
        if IS_WEIGHTED:
            at = (block % blocks_in_row)[:, None] * 16 + column[None, :]
            weights = tl.load(importance + at, mask=inside[:, None], other=1.0)
        low = tl.maximum(wanted * lowest, 0.001953125)
        high = tl.minimum(wanted * highest, 448.0)
        best = tl.full((N,), float("inf"), tl.float32)
        for offset in range(first, end):
            code = tl.minimum(tl.maximum(nearest + offset, 1), 0x7E)
            value = _decode_e4m3(code)
            error = _weighted_error(magnitude, tl.div_rn(value, tl.broadcast_to(scale, (N,))), weights)
            better = ((offset == 0) | ((value >= low) & (value <= high))) & (error < best)
            chosen = tl.where(better, code, chosen)
            best = tl.where(better, error, best)
    step = tl.div_rn(_decode_e4m3(chosen), tl.broadcast_to(scale, (N,)))
    scaled = tl.minimum(tl.div_rn(magnitude, tl.broadcast_to(step[:, None], (N, 16))), 6.0)
    magic16 = _e2m1_magic(scaled)
    steps = (scaled + magic16.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic16
    codes = steps + ((magic16 - ((22 << 23) + (1 << 22) + 0x3F800000)) >> 22)
    codes = codes | ((x.to(tl.int32, bitcast=True) >> 28) & 8)
    low_nibble, high_nibble = tl.split(tl.reshape(codes, (N, 8, 2)))
    pairs = tl.arange(0, 8)
    tl.store(
        packed + block[:, None] * 8 + pairs[None, :],
        (low_nibble | (high_nibble << 4)).to(tl.uint8),
        mask=inside[:, None],
    )
    tl.store(scales + block, chosen.to(tl.uint8), mask=inside)
