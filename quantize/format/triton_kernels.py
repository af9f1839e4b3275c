"""Triton code of `kernels.py`, imported only if Triton is installed."""

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


@triton.jit
def round_kernel(inputs, scale_at, rounded, blocks, N: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    at = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (block < blocks)[:, None]
    x = tl.load(inputs + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.broadcast_to(tl.load(scale_at), (N,))
    one = tl.full((N,), 1.0, tl.float32)
    wanted = tl.max(tl.abs(x), axis=1) * tl.div_rn(one, tl.full((N,), 6.0, tl.float32)) * scale
    wanted = tl.minimum(wanted, 448.0)
    power = tl.maximum(wanted.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
    magic = power + ((20 << 23) + (1 << 22))
    eighths = (wanted + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    block_scale = _decode_e4m3(((power - ((127 - 6) << 23)) >> 20) + eighths)
    quotient = tl.div_rn(one, block_scale * tl.div_rn(one, scale))
    inverse = tl.where(block_scale > 0, quotient, 0.0)
    scaled = tl.minimum(tl.abs(x * inverse[:, None]), 6.0)
    magic16 = _e2m1_magic(scaled).to(tl.float32, bitcast=True)
    value = ((scaled + magic16) - magic16) * tl.div_rn(block_scale, scale)[:, None]
    signed = (value.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)).to(
        tl.float32, bitcast=True
    )
    tl.store(rounded + at, signed.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def feed_back_kernel(
    block, rows, upper, row_stride, column_stride, scale_at, first, end, codes, scales, errors, outgrown,
    N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * N + tl.arange(0, N)
    inside = row < rows
    column = tl.arange(0, 16)
    at = column[None, :] * rows + row[:, None]
    x = tl.load(block + at, mask=inside[:, None], other=0.0)
    scale = tl.broadcast_to(tl.load(scale_at), (N,))
    amax = tl.max(tl.abs(x), axis=1)
    wanted = tl.div_rn(amax, tl.full((N,), 6.0, tl.float32)) * scale
    tl.atomic_add(outgrown, tl.sum((wanted > 448.0).to(tl.int32)))
    rounded = tl.minimum(tl.maximum(wanted, 0.001953125), 448.0)
    power = tl.maximum(rounded.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
    magic = power + ((20 << 23) + (1 << 22))
    eighths = (rounded + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    nearest = tl.where(amax == 0.0, 0x20, ((power - ((127 - 6) << 23)) >> 20) + eighths)
    best = tl.full((N,), float("inf"), tl.float32)
    best_code = nearest
    best_codes = tl.zeros((N, 16), tl.int32)
    best_errors = tl.zeros((N, 16), tl.float32)
    for offset in range(first, end):
        code = tl.minimum(tl.maximum(nearest + offset, 1), 0x7E)
        step = tl.div_rn(_decode_e4m3(code), scale)
        left = x
        cost = tl.zeros((N,), tl.float32)
        tried_codes = tl.zeros((N, 16), tl.int32)
        tried_errors = tl.zeros((N, 16), tl.float32)
        for i in tl.static_range(16):
            is_column = column[None, :] == i
            value = tl.sum(tl.where(is_column, left, 0.0), axis=1)
            scaled = tl.minimum(tl.div_rn(tl.abs(value), step), 6.0)
            magic1 = _e2m1_magic(scaled)
            total = (scaled + magic1.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
            sign = value.to(tl.int32, bitcast=True) & -2147483648
            number = (total.to(tl.float32, bitcast=True) - magic1.to(tl.float32, bitcast=True)) * step
            number = (number.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            found = (total - magic1 + ((magic1 - ((22 << 23) + (1 << 22) + 0x3F800000)) >> 22)) | ((sign >> 28) & 8)
            diagonal = tl.load(upper + i * (row_stride + column_stride))
            error = tl.div_rn(value - number, tl.broadcast_to(diagonal, (N,)))
            cost += error * error
            tried_codes = tl.where(is_column, found[:, None], tried_codes)
            tried_errors = tl.where(is_column, error[:, None], tried_errors)
            line = tl.load(upper + i * row_stride + column * column_stride)
            left = left - tl.where(column > i, line, 0.0)[None, :] * error[:, None]
        better = (offset == first) | (cost < best)
        best = tl.where(better, cost, best)
        best_code = tl.where(better, code, best_code)
        best_codes = tl.where(better[:, None], tried_codes, best_codes)
        best_errors = tl.where(better[:, None], tried_errors, best_errors)
    tl.store(codes + at, best_codes.to(tl.uint8), mask=inside[:, None])
    tl.store(errors + at, best_errors, mask=inside[:, None])
    tl.store(scales + row, best_code.to(tl.uint8), mask=inside)


@triton.jit
def _count_blocks(x, counts, is_inside, PATTERNS: tl.constexpr):
    n: tl.constexpr = x.shape[0] // 16
    blocks = tl.max(tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (n, 16)), axis=1)
    pattern = (blocks + (0x7FFF + ((blocks >> 16) & 1))) >> 16
    pattern = tl.where(blocks > 0x7F800000, 0x7FC0, pattern)
    tl.atomic_add(counts + pattern, 1, mask=is_inside, sem="relaxed")
    return blocks


@triton.jit
def gather_kernel(
    inputs, sequence_stride, token_stride, tokens, cols, largest, sums, histogram, copies,
    WANTS_SQUARES: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, PATTERNS: tl.constexpr,
):  # fmt: skip
    group, chunk, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = (sequence * tl.num_programs(1) + chunk) * tl.num_programs(0) + group
    column = group * N + tl.arange(0, N)
    has_block = group * N + tl.arange(0, N // 16) * 16 < cols
    # Neighbouring programs count into different copies, so that they do not wait for each other.
    counts = histogram + (program % copies) * PATTERNS
    at = inputs + sequence.to(tl.int64) * sequence_stride + column
    total = tl.zeros((N,), tl.float32)
    top = tl.zeros((N // 16,), tl.int32)
    for step in range(CHUNK // 4):
        # Four loads under way at once: nothing is loaded ahead of an atomic addition. A token beyond the end adds zero.
        token = chunk * CHUNK + 4 * step
        row = at + token.to(tl.int64) * token_stride
        a = tl.load(row, mask=(column < cols) & (token < tokens), other=0.0).to(tl.float32)
        row += token_stride
        b = tl.load(row, mask=(column < cols) & (token + 1 < tokens), other=0.0).to(tl.float32)
        row += token_stride
        c = tl.load(row, mask=(column < cols) & (token + 2 < tokens), other=0.0).to(tl.float32)
        row += token_stride
        d = tl.load(row, mask=(column < cols) & (token + 3 < tokens), other=0.0).to(tl.float32)
        total += a * a
        total += b * b
        total += c * c
        total += d * d
        top = tl.maximum(top, _count_blocks(a, counts, has_block & (token < tokens), PATTERNS))
        top = tl.maximum(top, _count_blocks(b, counts, has_block & (token + 1 < tokens), PATTERNS))
        top = tl.maximum(top, _count_blocks(c, counts, has_block & (token + 2 < tokens), PATTERNS))
        top = tl.maximum(top, _count_blocks(d, counts, has_block & (token + 3 < tokens), PATTERNS))
    tl.store(largest + program, tl.max(top, axis=0))
    if WANTS_SQUARES:
        chunk_of_all = sequence.to(tl.int64) * tl.num_programs(1) + chunk
        tl.store(sums + chunk_of_all * cols + column, total, mask=column < cols)


@triton.jit
def add_products_kernel(products, sums, size, peak, FRACTION_BITS: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = at < size
    value = tl.load(products + at, mask=inside, other=0.0)
    tl.atomic_max(peak, tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0))
    scaled = value.to(tl.float64) * (1 << FRACTION_BITS)
    magic = 3 << 51  # 1.5 * 2**52: the sum has no room for a fraction
    rounded = tl.where(tl.abs(scaled) < (1 << 51), (scaled + magic) - magic, scaled)
    tl.store(sums + at, tl.load(sums + at, mask=inside, other=0) + rounded.to(tl.int64), mask=inside)


@triton.jit
def add_chunks_kernel(sums, squares, chunks, cols, N: tl.constexpr):
    column = tl.program_id(0) * N + tl.arange(0, N)
    sequence = tl.program_id(1).to(tl.int64)
    total = tl.zeros((N,), tl.float64)
    for chunk in range(chunks):
        total += tl.load(sums + (sequence * chunks + chunk) * cols + column, mask=column < cols, other=0.0).to(
            tl.float64
        )
    tl.store(squares + sequence * cols + column, total, mask=column < cols)
