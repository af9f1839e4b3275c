/* The CPU's compiled way through a matrix: quantize and pack, compare with what is stored, the largest magnitude,
   statistics of inputs, rounding of inputs.

   Every number is that of the readable PyTorch code (blocks.py, ../quantizers/mse.py, ../calibrate/statistics.py), bit for
   bit: the same float32 operations in the same order, none fused. Compile with -ffp-contract=off, never with
   -ffast-math.

   Work goes in tiles of 16 blocks, turned so that a lane is a block: every step is a plain loop over 16 lanes, which the
   compiler turns into vector instructions. Each function is compiled for several instruction sets; Python picks one.

   Addresses come as integers and the interpreter's lock is released, so that threads can share a matrix. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two 16-bit elements are read as one little-endian word"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#include <math.h>
#define INLINE static inline
#define FMA(a, b, c) fmaf(a, b, c)
#endif

enum { BLOCK = 16, LANES = 16, TILE = BLOCK * LANES };
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static const uint32_t EXPONENT = 0x7F800000, MAGNITUDE = 0x7FFFFFFF, ONE = 0x3F800000, SIX = 0x40C00000;
static const uint32_t MAGIC = (22 << 23) + (1 << 22); /* e2m1.py: rounds to E2M1 when added */
static const uint32_t E4M3_MAGIC = (20 << 23) + (1 << 22), SMALLEST_NORMAL = (127 - 6) << 23; /* scales.py */
static const float TWO_22 = 4194304.0f, TWO_M22 = 1.0f / 4194304.0f;

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

INLINE float magnitude_of(float value) { return float_of(bits_of(value) & MAGNITUDE); }

/* float16 bits to float32, subnormal, infinite and NaN ones too. */
INLINE float float_of_half(uint32_t half) {
    float scaled = float_of((half & 0x7FFF) << 13) * 0x1p112f;
    uint32_t special = (half & 0x7C00) == 0x7C00 ? EXPONENT : 0;
    return float_of(bits_of(scaled) | special | (half & 0x8000) << 16);
}

/* ---- One tile: 16 blocks of 16 elements ---- */

typedef float Lanes[LANES];
typedef int32_t LanesOfInt[LANES];

/* Reads 256 neighbouring elements; element i of block l goes to x[i][l]. */
INLINE void load_tile(const void *source, int dtype, Lanes x[BLOCK]) {
    if (dtype == FLOAT32) {
        uint32_t words[TILE];
        memcpy(words, source, sizeof words);
        for (int i = 0; i < BLOCK; i++)
            for (int l = 0; l < LANES; l++)
                x[i][l] = float_of(words[l * BLOCK + i]);
        return;
    }
    uint32_t pairs[TILE / 2];
    memcpy(pairs, source, sizeof pairs);
    for (int i = 0; i < BLOCK; i += 2)
        for (int l = 0; l < LANES; l++) {
            uint32_t pair = pairs[l * (BLOCK / 2) + i / 2];
            x[i][l] = dtype == BFLOAT16 ? float_of(pair << 16) : float_of_half(pair & 0xFFFF);
            x[i + 1][l] = dtype == BFLOAT16 ? float_of(pair & 0xFFFF0000) : float_of_half(pair >> 16);
        }
}

/* How the tile divides its elements by a step: truly, or by two multiplications with the same rounding to E2M1.

   The quick way takes the reciprocal in two parts, 2^22 / step = high + low, and gets the quotient times 2^22 as
   fma(x, high, x * low). It is not always the rounded quotient, but always falls on the same side of E2M1's seven
   midpoints: exponents do not matter within the range below, and tests/format/test_native.py runs through all 2^23
   mantissas of a step with every x near a midpoint; the one of only ones fails and is left to true division. */
typedef struct {
    Lanes step, high, low;
    int is_quick;
} Divisor;

INLINE void set_divisor(Divisor *by, int has_fma) {
    int32_t outside = !has_fma;
    if (has_fma)
        for (int l = 0; l < LANES; l++) {
            float step = by->step[l];
            float high = TWO_22 / step;
            by->high[l] = high;
            by->low[l] = FMA(-step, high, TWO_22) * (high * TWO_M22);
            int32_t is_far = (bits_of(step) < ONE - (90 << 23)) | (bits_of(step) > ONE + (90 << 23));
            outside |= is_far | ((bits_of(step) & 0x7FFFFF) == 0x7FFFFF);
        }
    by->is_quick = !outside;
}

/* x / step rounded to E2M1, as the float32 sum whose lowest bits count halves of the power of two under it. The power's
   own float32 number is `*magic`. */
INLINE float rounding_sum(float x, const Divisor *by, int l, int is_quick, float *magic) {
    if (is_quick) {
        const uint32_t six = SIX + (22 << 23), one = ONE + (22 << 23);
        uint32_t bits = bits_of(FMA(x, by->high[l], x * by->low[l]));
        bits = bits < six ? bits : six; /* a NaN is an infinity of each sign: a quotient far beyond 6 */
        *magic = float_of(((bits > one ? bits : one) & EXPONENT) | (1 << 22));
        return FMA(float_of(bits), TWO_M22, *magic);
    }
    uint32_t bits = bits_of(x / by->step[l]);
    bits = bits < SIX ? bits : SIX;
    *magic = float_of(((bits > ONE ? bits : ONE) & EXPONENT) + MAGIC);
    return float_of(bits) + *magic;
}

/* Byte of an E2M1 pair, the first element in the low nibble. The sum's bits >> 22 are 299 + 2 log2(power). */
INLINE uint32_t code_of(float x, const Divisor *by, int l, int is_quick) {
    float magic;
    uint32_t bits = bits_of(rounding_sum(magnitude_of(x), by, l, is_quick, &magic));
    return ((bits + (bits >> 22) + 5) & 15) | (bits_of(x) >> 28 & 8);
}

INLINE void pack_codes(Lanes x[BLOCK], const Divisor *by, int is_quick, uint32_t *packed) {
    for (int l = 0; l < LANES; l++) {
#define CODE(i) (code_of(x[i][l], by, l, is_quick) << 4 * ((i) % 8))
        packed[2 * l] = CODE(0) | CODE(1) | CODE(2) | CODE(3) | CODE(4) | CODE(5) | CODE(6) | CODE(7);
        packed[2 * l + 1] = CODE(8) | CODE(9) | CODE(10) | CODE(11) | CODE(12) | CODE(13) | CODE(14) | CODE(15);
#undef CODE
    }
}

/* Codes of a tile under the steps in `by`. */
INLINE void encode_tile(Lanes x[BLOCK], Divisor *by, uint32_t packed[2 * LANES], int has_fma) {
    set_divisor(by, has_fma);
    if (by->is_quick)
        pack_codes(x, by, 1, packed);
    else
        pack_codes(x, by, 0, packed);
}

INLINE float squared_error(float x, const Divisor *by, int l, int is_quick) {
    float magic;
    float sum = rounding_sum(x, by, l, is_quick, &magic);
    float error = (sum - magic) * by->step[l] - x;
    return error * error;
}

/* Half of a block's error: elements `from` to `from + 7`, neighbouring pairs added first. */
INLINE void add_errors(
    Lanes x[BLOCK], const Divisor *by, int is_quick, const float *weights, int64_t stride, int from, Lanes sums) {
    for (int l = 0; l < LANES; l++) {
#define ERROR(i) \
    (weights ? squared_error(x[from + i][l], by, l, is_quick) * weights[(from + i) * stride + l] \
             : squared_error(x[from + i][l], by, l, is_quick))
        sums[l] = ((ERROR(0) + ERROR(1)) + (ERROR(2) + ERROR(3))) + ((ERROR(4) + ERROR(5)) + (ERROR(6) + ERROR(7)));
#undef ERROR
    }
}

INLINE float decode_e4m3(int32_t code) {
    float normal = float_of((uint32_t)((code >> 3) + 120) << 23 | (uint32_t)(code & 7) << 20);
    return code >= 8 ? normal : (float)code * 0x1p-9f;
}

/* ---- Quantizing a run of blocks ---- */

typedef struct {
    const char *source;
    int dtype;
    int64_t first_block, blocks, blocks_in_row;
    float scale;
    int is_sweep; /* over E4M3 scales near amax / 6 */
    float lowest, highest;
    int first_offset, last_offset;
    const float *weights; /* [16, weight_stride], of a row's blocks, the first 16 once more behind the last; or NULL */
    int64_t weight_stride;
    unsigned char *packed, *scales;
} Job;

INLINE void choose_nearest(Lanes x[BLOCK], float scale, Lanes wanted, LanesOfInt nearest) {
    for (int l = 0; l < LANES; l++) {
        float amax = 0;
        for (int i = 0; i < BLOCK; i++) {
            float magnitude = magnitude_of(x[i][l]);
            amax = magnitude > amax ? magnitude : amax;
        }
        wanted[l] = amax / 6.0f * scale;
        float rounded = wanted[l] < 0x1p-9f ? 0x1p-9f : wanted[l];
        rounded = rounded > 448.0f ? 448.0f : rounded;
        int32_t power = (int32_t)(bits_of(rounded) & EXPONENT);
        power = power > (int32_t)SMALLEST_NORMAL ? power : (int32_t)SMALLEST_NORMAL;
        int32_t magic = power + (int32_t)E4M3_MAGIC;
        int32_t eighths = (int32_t)bits_of(rounded + float_of((uint32_t)magic)) - magic;
        nearest[l] = amax == 0 ? 0x20 : ((power - (int32_t)SMALLEST_NORMAL) >> 20) + eighths;
    }
}

/* The scale of the least error among nearest + offset, ties to the smaller. Offset 0 goes first: against its error a
   candidate that is already worse after eight elements needs no other eight. */
INLINE void sweep(
    Lanes x[BLOCK], const Job *job, const float *weights, Lanes wanted, LanesOfInt nearest, LanesOfInt chosen,
    int has_fma) {
    Lanes magnitude[BLOCK], best, low, high, half, other;
    for (int i = 0; i < BLOCK; i++)
        for (int l = 0; l < LANES; l++)
            magnitude[i][l] = magnitude_of(x[i][l]);
    for (int l = 0; l < LANES; l++) {
        float lowest = wanted[l] * job->lowest, highest = wanted[l] * job->highest;
        low[l] = lowest < 0x1p-9f ? 0x1p-9f : lowest;
        high[l] = highest > 448.0f ? 448.0f : highest;
        best[l] = float_of(EXPONENT);
        chosen[l] = nearest[l];
    }
    for (int turn = job->first_offset - 1; turn <= job->last_offset; turn++) {
        int offset = turn < job->first_offset ? 0 : turn;
        if (offset == 0 && turn == 0)
            continue; /* came first */
        Divisor by;
        LanesOfInt code, allowed;
        int32_t any = 0;
        for (int l = 0; l < LANES; l++) {
            code[l] = smaller(larger(nearest[l] + offset, 1), 0x7E);
            float value = decode_e4m3(code[l]);
            /* The bits of floats that are not negative compare as the floats do. */
            int32_t above = (int32_t)bits_of(value) >= (int32_t)bits_of(low[l]);
            int32_t below = (int32_t)bits_of(value) <= (int32_t)bits_of(high[l]);
            allowed[l] = (offset == 0) | (above & below);
            any |= allowed[l];
            by.step[l] = value / job->scale;
        }
        if (!any)
            continue;
        set_divisor(&by, has_fma);
#define HALF(from, sums) \
    if (by.is_quick && weights) add_errors(magnitude, &by, 1, weights, job->weight_stride, from, sums); \
    else if (by.is_quick) add_errors(magnitude, &by, 1, NULL, 0, from, sums); \
    else if (weights) add_errors(magnitude, &by, 0, weights, job->weight_stride, from, sums); \
    else add_errors(magnitude, &by, 0, NULL, 0, from, sums)
        HALF(0, half);
        int32_t open = 0;
#pragma GCC unroll 1
        for (int l = 0; l < LANES; l++)
            open |= allowed[l] & ((int32_t)bits_of(half[l]) <= (int32_t)bits_of(best[l]));
        if (!open)
            continue;
        HALF(8, other);
#undef HALF
        for (int l = 0; l < LANES; l++) {
            float error = half[l] + other[l];
            int32_t is_less = error < best[l], is_equal = error == best[l], is_smaller = code[l] < chosen[l];
            int32_t is_finite = bits_of(error) < EXPONENT; /* where all overflow the nearest stays */
            int32_t better = allowed[l] & (is_less | (is_equal & is_smaller & is_finite));
            chosen[l] = better ? code[l] : chosen[l];
            best[l] = better ? error : best[l];
        }
    }
}

INLINE void quantize_tile(
    const void *source, int dtype, const Job *job, const float *weights, uint32_t packed[2 * LANES],
    unsigned char scales[LANES], int has_fma) {
    Lanes x[BLOCK], wanted;
    LanesOfInt nearest, chosen;
    load_tile(source, dtype, x);
    choose_nearest(x, job->scale, wanted, nearest);
    if (job->is_sweep)
        sweep(x, job, weights, wanted, nearest, chosen, has_fma);
    else
        memcpy(chosen, nearest, sizeof chosen);
    Divisor by;
    for (int l = 0; l < LANES; l++) {
        by.step[l] = decode_e4m3(chosen[l]) / job->scale;
        scales[l] = (unsigned char)chosen[l];
    }
    encode_tile(x, &by, packed, has_fma);
}

/* Up to 16 blocks as a whole tile: what is missing at a run's end is made of zeros in `room`. */
INLINE const void *whole_tile(const char *source, int64_t count, int64_t block_bytes, uint32_t room[TILE]) {
    if (count == LANES)
        return source;
    memset(room, 0, TILE * sizeof *room);
    memcpy(room, source, (size_t)(count * block_bytes));
    return room;
}

INLINE void quantize_run(const Job *job, int dtype, int has_fma) {
    const int64_t block_bytes = BLOCK * (dtype == FLOAT32 ? 4 : 2);
    for (int64_t done = 0; done < job->blocks; done += LANES) {
        int64_t at = job->first_block + done;
        int64_t count = job->blocks - done < LANES ? job->blocks - done : LANES;
        const float *weights = job->weights ? job->weights + at % job->blocks_in_row : NULL;
        uint32_t packed[2 * LANES], room[TILE];
        unsigned char scales[LANES];
        const void *source = whole_tile(job->source + at * block_bytes, count, block_bytes, room);
        quantize_tile(source, dtype, job, weights, packed, scales, has_fma);
        memcpy(job->packed + at * (BLOCK / 2), packed, (size_t)(count * (BLOCK / 2)));
        memcpy(job->scales + at, scales, (size_t)count);
    }
}

INLINE void quantize_any(const Job *job, int has_fma) {
    if (job->dtype == FLOAT32)
        quantize_run(job, FLOAT32, has_fma);
    else if (job->dtype == BFLOAT16)
        quantize_run(job, BFLOAT16, has_fma);
    else
        quantize_run(job, FLOAT16, has_fma);
}

/* Codes of x[tile][i][l] / step[tile][l]: what tests hold against true division. */
INLINE void encode_any(const float *x, const float *step, int64_t tiles, uint32_t *packed, int has_fma) {
    for (int64_t tile = 0; tile < tiles; tile++) {
        Lanes turned[BLOCK];
        Divisor by;
        memcpy(turned, x + tile * TILE, sizeof turned);
        memcpy(by.step, step + tile * LANES, sizeof by.step);
        encode_tile(turned, &by, packed + tile * 2 * LANES, has_fma);
    }
}

/* ---- Comparing stored blocks with the weights that they were made from ---- */

typedef struct {
    const char *source;
    int dtype;
    int64_t blocks;
    const unsigned char *packed, *scales;
    float divisor, made_from; /* the stored one; the one that a rule's block scales and codes come from */
    int has_rule, first_offset, last_offset;
    float most_error, least_gain, most_gain; /* of a block, the error as a share of its energy */
} Comparison;

typedef struct {
    double error, energy, product;
    uint32_t largest;        /* bits of the source's amax */
    int64_t poor, unsettled; /* blocks beyond the bounds; blocks that the reference has to look at */
} Sums;

INLINE float value_of_code(uint32_t code) {
    uint32_t level = code & 7;
    float normal = float_of(((level >> 1) + 126) << 23 | (level & 1) << 22);
    float value = level < 2 ? (float)level * 0.5f : normal;
    return float_of(bits_of(value) | (code & 8) << 28);
}

INLINE void compare_tile(
    const void *source, int dtype, const Comparison *job, const uint32_t packed[2 * LANES],
    const unsigned char scales[LANES], Sums *sums, int has_fma) {
    Lanes x[BLOCK], error, energy, product;
    LanesOfInt is_open;
    Divisor made;
    Lanes step;
    load_tile(source, dtype, x);
    for (int l = 0; l < LANES; l++) {
        float scale = decode_e4m3(scales[l] & 0x7F);
        is_open[l] = scales[l] > 0x7E; /* negative, or a NaN */
        step[l] = scale / job->divisor;
        made.step[l] = scale / job->made_from;
        error[l] = energy[l] = product[l] = 0;
    }
    for (int i = 0; i < BLOCK; i++)
        for (int l = 0; l < LANES; l++) {
            float stored = value_of_code(packed[2 * l + i / 8] >> 4 * (i % 8) & 15) * step[l];
            float difference = stored - x[i][l];
            energy[l] += x[i][l] * x[i][l];
            product[l] += stored * x[i][l];
            error[l] += difference * difference;
        }
    if (job->has_rule) {
        Lanes wanted;
        LanesOfInt nearest;
        uint32_t again[2 * LANES];
        choose_nearest(x, job->made_from, wanted, nearest);
        encode_tile(x, &made, again, has_fma);
        for (int l = 0; l < LANES; l++) {
            int32_t offset = scales[l] - nearest[l], is_zero = energy[l] == 0;
            int32_t is_within = (offset >= job->first_offset) & (offset <= job->last_offset) & !is_zero;
            is_open[l] |= !((offset == 0) | is_within);
            is_open[l] |= (again[2 * l] != packed[2 * l]) | (again[2 * l + 1] != packed[2 * l + 1]);
        }
    }
    for (int i = 0; i < BLOCK; i++)
        for (int l = 0; l < LANES; l++) {
            uint32_t bits = bits_of(x[i][l]) & MAGNITUDE;
            sums->largest = bits > sums->largest ? bits : sums->largest;
        }
    for (int l = 0; l < LANES; l++) {
        int32_t is_good = (error[l] <= energy[l] * job->most_error) & (product[l] >= energy[l] * job->least_gain) &
                          (product[l] <= energy[l] * job->most_gain);
        sums->poor += !is_good;
        sums->unsettled += is_open[l] | !(error[l] < float_of(EXPONENT)) | !(energy[l] < float_of(EXPONENT));
        sums->error += (double)error[l];
        sums->energy += (double)energy[l];
        sums->product += (double)product[l];
    }
}

INLINE void compare_run(const Comparison *job, int dtype, Sums *sums, int has_fma) {
    const int64_t block_bytes = BLOCK * (dtype == FLOAT32 ? 4 : 2);
    for (int64_t at = 0; at < job->blocks; at += LANES) {
        int64_t count = job->blocks - at < LANES ? job->blocks - at : LANES;
        uint32_t packed[2 * LANES] = {0}, room[TILE];
        unsigned char scales[LANES];
        const void *source = whole_tile(job->source + at * block_bytes, count, block_bytes, room);
        memset(scales, 0x20, sizeof scales); /* missing blocks are zeros, and stored as such */
        memcpy(packed, job->packed + at * (BLOCK / 2), (size_t)(count * (BLOCK / 2)));
        memcpy(scales, job->scales + at, (size_t)count);
        compare_tile(source, dtype, job, packed, scales, sums, has_fma);
    }
}

INLINE void compare_any(const Comparison *job, Sums *sums, int has_fma) {
    if (job->dtype == FLOAT32)
        compare_run(job, FLOAT32, sums, has_fma);
    else if (job->dtype == BFLOAT16)
        compare_run(job, BFLOAT16, sums, has_fma);
    else
        compare_run(job, FLOAT16, sums, has_fma);
}

/* ---- The largest magnitude, as bits: what is not finite is larger than all that is ---- */

INLINE uint32_t largest_bits(const void *source, int dtype, int64_t count) {
    uint32_t largest = 0;
    if (dtype == FLOAT32) {
        const uint32_t *words = source;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = words[i] & MAGNITUDE;
            largest = bits > largest ? bits : largest;
        }
        return largest;
    }
    const uint16_t *halves = source;
    uint16_t half = 0;
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits = halves[i] & 0x7FFF;
        half = bits > half ? bits : half;
    }
    return half;
}

/* ---- Statistics of inputs ---- */

enum { STRIP = 512, CHUNK = 64, PATTERNS = 1 << 15 };

typedef struct {
    const char *source; /* first element of the strip in the sequence's first row */
    int dtype;
    int64_t rows, row_bytes, cols; /* cols: of the strip, at most 512, whole blocks */
    double *squares;               /* [cols] or NULL */
    int32_t *histogram;            /* [32768] */
} Strip;

/* Bits of a magnitude rounded to bfloat16, nearest even; every NaN becomes one. */
INLINE uint32_t bfloat16_of(uint32_t bits) {
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return bits > EXPONENT ? 0x7FC0 : rounded;
}

INLINE const float *load_row(const char *source, int dtype, int64_t cols, float *buffer) {
    if (dtype == FLOAT32)
        return (const float *)source;
    const uint16_t *halves = (const uint16_t *)source;
    for (int64_t c = 0; c < cols; c++)
        buffer[c] = dtype == BFLOAT16 ? float_of((uint32_t)halves[c] << 16) : float_of_half(halves[c]);
    return buffer;
}

/* Counts the block amaxes of a row of `cols` magnitudes by their bfloat16 pattern; returns the largest's bits. */
INLINE uint32_t count_blocks(const float *x, int64_t cols, int32_t *histogram) {
    uint32_t a[STRIP / 2], b[STRIP / 4], largest = 0;
    for (int64_t i = 0; i < cols / 2; i++) {
        uint32_t even = bits_of(x[2 * i]) & MAGNITUDE, odd = bits_of(x[2 * i + 1]) & MAGNITUDE;
        a[i] = even > odd ? even : odd;
    }
    for (int64_t i = 0; i < cols / 4; i++)
        b[i] = a[2 * i] > a[2 * i + 1] ? a[2 * i] : a[2 * i + 1];
    for (int64_t i = 0; i < cols / 8; i++)
        a[i] = b[2 * i] > b[2 * i + 1] ? b[2 * i] : b[2 * i + 1];
    for (int64_t i = 0; i < cols / 16; i++) {
        uint32_t bits = a[2 * i] > a[2 * i + 1] ? a[2 * i] : a[2 * i + 1];
        largest = bits > largest ? bits : largest;
        b[i] = bfloat16_of(bits);
    }
    for (int64_t i = 0; i < cols / 16; i++)
        histogram[b[i]]++;
    return largest;
}

INLINE uint32_t gather_strip(const Strip *strip, int dtype) {
    float buffer[STRIP], sums[STRIP];
    uint32_t largest = 0;
    for (int64_t begin = 0; begin < strip->rows; begin += CHUNK) {
        int64_t end = begin + CHUNK < strip->rows ? begin + CHUNK : strip->rows;
        memset(sums, 0, sizeof sums);
        for (int64_t row = begin; row < end; row++) {
            const float *x = load_row(strip->source + row * strip->row_bytes, dtype, strip->cols, buffer);
            if (strip->squares)
                for (int64_t c = 0; c < strip->cols; c++)
                    sums[c] += x[c] * x[c];
            uint32_t bits = count_blocks(x, strip->cols, strip->histogram);
            largest = bits > largest ? bits : largest;
        }
        if (strip->squares)
            for (int64_t c = 0; c < strip->cols; c++)
                strip->squares[c] += (double)sums[c];
    }
    return largest;
}

INLINE uint32_t gather_any(const Strip *strip) {
    if (strip->dtype == FLOAT32)
        return gather_strip(strip, FLOAT32);
    return strip->dtype == BFLOAT16 ? gather_strip(strip, BFLOAT16) : gather_strip(strip, FLOAT16);
}

/* ---- Rounding a block column after column, with error feedback (../quantizers/error_feedback.py) ---- */

typedef struct {
    const float *block; /* [16, stride], a lane is a row of the matrix */
    int64_t rows, stride;
    const float *upper; /* [16, 16] */
    float scale;
    int first_offset, last_offset;
    unsigned char *codes, *scales; /* [16, stride] and [rows] */
    float *errors;                 /* [16, stride] */
} Feedback;

typedef struct {
    Lanes errors[BLOCK], cost;
    LanesOfInt codes[BLOCK], scale;
} Rounded;

INLINE void feed_back(Lanes x[BLOCK], const Feedback *job, const Divisor *by, int is_quick, Rounded *made) {
    Lanes left[BLOCK];
    memcpy(left, x, sizeof left);
    memset(made->cost, 0, sizeof made->cost);
    for (int i = 0; i < BLOCK; i++) {
        const float *upper = job->upper + i * BLOCK;
        for (int l = 0; l < LANES; l++) {
            float magic, value = left[i][l];
            float sum = rounding_sum(magnitude_of(value), by, l, is_quick, &magic);
            float rounded = (sum - magic) * by->step[l];
            rounded = float_of(bits_of(rounded) | (bits_of(value) & ~MAGNITUDE));
            made->codes[i][l] = (int32_t)((bits_of(sum) + (bits_of(sum) >> 22) + 5) & 15) | (int32_t)(bits_of(value) >> 28 & 8);
            float error = (value - rounded) / upper[i];
            made->errors[i][l] = error;
            made->cost[l] += error * error;
        }
        for (int k = i + 1; k < BLOCK; k++)
            for (int l = 0; l < LANES; l++)
                left[k][l] -= upper[k] * made->errors[i][l];
    }
}

/* Returns the number of rows whose largest magnitude outgrew the largest block scale. */
INLINE int64_t feed_back_tile(Lanes x[BLOCK], const Feedback *job, int64_t count, Rounded *best, int has_fma) {
    Lanes wanted;
    LanesOfInt nearest;
    Rounded tried;
    int64_t outgrown = 0;
    choose_nearest(x, job->scale, wanted, nearest);
    for (int l = 0; l < count; l++)
        outgrown += wanted[l] > 448.0f;
    for (int l = 0; l < LANES; l++)
        best->cost[l] = float_of(EXPONENT);
    for (int offset = job->first_offset; offset <= job->last_offset; offset++) {
        Divisor by;
        LanesOfInt better;
        for (int l = 0; l < LANES; l++) {
            tried.scale[l] = smaller(larger(nearest[l] + offset, 1), 0x7E);
            by.step[l] = decode_e4m3(tried.scale[l]) / job->scale;
        }
        set_divisor(&by, has_fma);
        if (by.is_quick)
            feed_back(x, job, &by, 1, &tried);
        else
            feed_back(x, job, &by, 0, &tried);
        for (int l = 0; l < LANES; l++)
            better[l] = offset == job->first_offset || tried.cost[l] < best->cost[l];
        for (int l = 0; l < LANES; l++) {
            best->cost[l] = better[l] ? tried.cost[l] : best->cost[l];
            best->scale[l] = better[l] ? tried.scale[l] : best->scale[l];
        }
        for (int i = 0; i < BLOCK; i++)
            for (int l = 0; l < LANES; l++) {
                best->errors[i][l] = better[l] ? tried.errors[i][l] : best->errors[i][l];
                best->codes[i][l] = better[l] ? tried.codes[i][l] : best->codes[i][l];
            }
    }
    return outgrown;
}

INLINE int64_t feed_back_any(const Feedback *job, int has_fma) {
    int64_t outgrown = 0;
    for (int64_t at = 0; at < job->rows; at += LANES) {
        int64_t count = job->rows - at < LANES ? job->rows - at : LANES;
        Lanes x[BLOCK];
        Rounded best;
        memset(x, 0, sizeof x);
        for (int i = 0; i < BLOCK; i++)
            memcpy(x[i], job->block + i * job->stride + at, (size_t)count * sizeof(float));
        outgrown += feed_back_tile(x, job, count, &best, has_fma);
        for (int i = 0; i < BLOCK; i++) {
            memcpy(job->errors + i * job->stride + at, best.errors[i], (size_t)count * sizeof(float));
            for (int l = 0; l < count; l++)
                job->codes[i * job->stride + at + l] = (unsigned char)best.codes[i][l];
        }
        for (int l = 0; l < count; l++)
            job->scales[at + l] = (unsigned char)best.scale[l];
    }
    return outgrown;
}

/* ---- Rounding inputs as a server does (activations.py) ---- */

typedef struct {
    const char *source;
    int dtype;
    int64_t blocks;
    float scale;
    float *rounded;
} Inputs;

INLINE void round_tile(const void *source, int dtype, float scale, float rounded[TILE]) {
    Lanes x[BLOCK], inverse, step;
    const float sixth = 1.0f / 6.0f, unit = 1.0f / scale;
    load_tile(source, dtype, x);
    for (int l = 0; l < LANES; l++) {
        float amax = 0;
        for (int i = 0; i < BLOCK; i++) {
            float magnitude = magnitude_of(x[i][l]);
            amax = magnitude > amax ? magnitude : amax;
        }
        float wanted = amax * sixth * scale;
        wanted = wanted > 448.0f ? 448.0f : wanted;
        int32_t power = (int32_t)(bits_of(wanted) & EXPONENT);
        power = power > (int32_t)SMALLEST_NORMAL ? power : (int32_t)SMALLEST_NORMAL;
        int32_t magic = power + (int32_t)E4M3_MAGIC;
        int32_t eighths = (int32_t)bits_of(wanted + float_of((uint32_t)magic)) - magic;
        float block_scale = decode_e4m3(((power - (int32_t)SMALLEST_NORMAL) >> 20) + eighths);
        float quotient = 1.0f / (block_scale * unit);
        inverse[l] = block_scale > 0 ? quotient : 0;
        step[l] = block_scale / scale;
    }
    for (int i = 0; i < BLOCK; i++)
        for (int l = 0; l < LANES; l++) {
            float scaled = magnitude_of(x[i][l] * inverse[l]);
            scaled = scaled > 6.0f ? 6.0f : scaled;
            uint32_t bits = bits_of(scaled);
            float magic = float_of(((bits > ONE ? bits : ONE) & EXPONENT) + MAGIC);
            float value = ((scaled + magic) - magic) * step[l];
            rounded[l * BLOCK + i] = float_of(bits_of(value) | (bits_of(x[i][l]) & ~MAGNITUDE));
        }
}

INLINE void round_run(const Inputs *job, int dtype) {
    const int64_t block_bytes = BLOCK * (dtype == FLOAT32 ? 4 : 2);
    for (int64_t at = 0; at < job->blocks; at += LANES) {
        int64_t count = job->blocks - at < LANES ? job->blocks - at : LANES;
        uint32_t room[TILE];
        float rounded[TILE];
        round_tile(whole_tile(job->source + at * block_bytes, count, block_bytes, room), dtype, job->scale, rounded);
        memcpy(job->rounded + at * BLOCK, rounded, (size_t)(count * BLOCK) * sizeof *rounded);
    }
}

INLINE void round_any(const Inputs *job) {
    if (job->dtype == FLOAT32)
        round_run(job, FLOAT32);
    else if (job->dtype == BFLOAT16)
        round_run(job, BFLOAT16);
    else
        round_run(job, FLOAT16);
}

/* ---- The same functions for several instruction sets; the last one that the processor has is the fastest ---- */

typedef struct {
    void (*quantize)(const Job *);
    uint32_t (*largest)(const void *, int, int64_t);
    uint32_t (*gather)(const Strip *);
    void (*encode)(const float *, const float *, int64_t, uint32_t *);
    void (*compare)(const Comparison *, Sums *);
    void (*round)(const Inputs *);
    int64_t (*feed_back)(const Feedback *);
} Target;

#define DEFINE_TARGET(name, attribute, has_fma) \
    attribute static void quantize_##name(const Job *job) { quantize_any(job, has_fma); } \
    attribute static uint32_t largest_##name(const void *source, int dtype, int64_t count) { \
        return largest_bits(source, dtype, count); \
    } \
    attribute static uint32_t gather_##name(const Strip *strip) { return gather_any(strip); } \
    attribute static void encode_##name(const float *x, const float *step, int64_t tiles, uint32_t *packed) { \
        encode_any(x, step, tiles, packed, has_fma); \
    } \
    attribute static void compare_##name(const Comparison *job, Sums *sums) { compare_any(job, sums, has_fma); } \
    attribute static void round_##name(const Inputs *job) { round_any(job); } \
    attribute static int64_t feed_back_##name(const Feedback *job) { return feed_back_any(job, has_fma); }
#define TARGET(name) \
    {quantize_##name, largest_##name, gather_##name, encode_##name, compare_##name, round_##name, feed_back_##name}

#if defined(__aarch64__) || defined(__FMA__)
DEFINE_TARGET(plain, , 1)
#else
DEFINE_TARGET(plain, , 0)
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
DEFINE_TARGET(avx2, __attribute__((target("avx2,fma"))), 1)
DEFINE_TARGET(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), 1)
static const Target TARGETS[] = {TARGET(plain), TARGET(avx2), TARGET(avx512)};

static int count_targets(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? 3
               : 2;
}
#else
static const Target TARGETS[] = {TARGET(plain)};

static int count_targets(void) { return 1; }
#endif

/* ---- Python's side: numbers in, numbers out; native.py checks them ---- */

static PyObject *py_targets(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(count_targets());
}

static PyObject *py_quantize(PyObject *self, PyObject *args) {
    (void)self;
    Job job;
    int target;
    unsigned long long source, weights, packed, scales;
    long long first_block, blocks, blocks_in_row, stride;
    if (!PyArg_ParseTuple(
            args, "iKiLLLfpffiiKLKK", &target, &source, &job.dtype, &first_block, &blocks, &blocks_in_row, &job.scale,
            &job.is_sweep, &job.lowest, &job.highest, &job.first_offset, &job.last_offset, &weights, &stride, &packed,
            &scales))
        return NULL;
    job.source = (const char *)(uintptr_t)source;
    job.first_block = first_block, job.blocks = blocks, job.blocks_in_row = blocks_in_row;
    job.weights = (const float *)(uintptr_t)weights;
    job.weight_stride = stride;
    job.packed = (unsigned char *)(uintptr_t)packed;
    job.scales = (unsigned char *)(uintptr_t)scales;
    Py_BEGIN_ALLOW_THREADS
    TARGETS[target].quantize(&job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_compare(PyObject *self, PyObject *args) {
    (void)self;
    Comparison job;
    Sums sums = {0};
    int target;
    unsigned long long source, packed, scales;
    long long blocks;
    if (!PyArg_ParseTuple(
            args, "iKiLKKffpiifff", &target, &source, &job.dtype, &blocks, &packed, &scales, &job.divisor,
            &job.made_from, &job.has_rule, &job.first_offset, &job.last_offset, &job.most_error, &job.least_gain,
            &job.most_gain))
        return NULL;
    job.source = (const char *)(uintptr_t)source;
    job.packed = (const unsigned char *)(uintptr_t)packed;
    job.scales = (const unsigned char *)(uintptr_t)scales;
    job.blocks = blocks;
    Py_BEGIN_ALLOW_THREADS
    TARGETS[target].compare(&job, &sums);
    Py_END_ALLOW_THREADS
    return Py_BuildValue(
        "(dddfLL)", sums.error, sums.energy, sums.product, (double)float_of(sums.largest), (long long)sums.poor,
        (long long)sums.unsettled);
}

static PyObject *py_largest(PyObject *self, PyObject *args) {
    (void)self;
    int target, dtype;
    unsigned long long source;
    long long count;
    uint32_t largest;
    if (!PyArg_ParseTuple(args, "iKiL", &target, &source, &dtype, &count))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    largest = TARGETS[target].largest((const void *)(uintptr_t)source, dtype, count);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(largest);
}

static PyObject *py_gather(PyObject *self, PyObject *args) {
    (void)self;
    Strip strip;
    int target;
    unsigned long long source, squares, histogram;
    long long rows, row_bytes, cols;
    uint32_t largest;
    if (!PyArg_ParseTuple(
            args, "iKiLLLKK", &target, &source, &strip.dtype, &rows, &row_bytes, &cols, &squares, &histogram))
        return NULL;
    strip.source = (const char *)(uintptr_t)source;
    strip.rows = rows, strip.row_bytes = row_bytes, strip.cols = cols;
    strip.squares = (double *)(uintptr_t)squares;
    strip.histogram = (int32_t *)(uintptr_t)histogram;
    Py_BEGIN_ALLOW_THREADS
    largest = TARGETS[target].gather(&strip);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLong(largest);
}

static PyObject *py_encode(PyObject *self, PyObject *args) {
    (void)self;
    int target;
    unsigned long long x, step, packed;
    long long tiles;
    if (!PyArg_ParseTuple(args, "iKKLK", &target, &x, &step, &tiles, &packed))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    TARGETS[target].encode(
        (const float *)(uintptr_t)x, (const float *)(uintptr_t)step, tiles, (uint32_t *)(uintptr_t)packed);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_round(PyObject *self, PyObject *args) {
    (void)self;
    Inputs job;
    int target;
    unsigned long long source, rounded;
    long long blocks;
    if (!PyArg_ParseTuple(args, "iKiLfK", &target, &source, &job.dtype, &blocks, &job.scale, &rounded))
        return NULL;
    job.source = (const char *)(uintptr_t)source;
    job.blocks = blocks;
    job.rounded = (float *)(uintptr_t)rounded;
    Py_BEGIN_ALLOW_THREADS
    TARGETS[target].round(&job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_feed_back(PyObject *self, PyObject *args) {
    (void)self;
    Feedback job;
    int target;
    unsigned long long block, upper, codes, scales, errors;
    long long rows, stride, outgrown;
    if (!PyArg_ParseTuple(
            args, "iKLLKfiiKKK", &target, &block, &rows, &stride, &upper, &job.scale, &job.first_offset,
            &job.last_offset, &codes, &scales, &errors))
        return NULL;
    job.block = (const float *)(uintptr_t)block;
    job.rows = rows, job.stride = stride;
    job.upper = (const float *)(uintptr_t)upper;
    job.codes = (unsigned char *)(uintptr_t)codes;
    job.scales = (unsigned char *)(uintptr_t)scales;
    job.errors = (float *)(uintptr_t)errors;
    Py_BEGIN_ALLOW_THREADS
    outgrown = TARGETS[target].feed_back(&job);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(outgrown);
}

static PyMethodDef METHODS[] = {
    {"targets", py_targets, METH_NOARGS, "Number of instruction sets that this processor has code for here."},
    {"quantize", py_quantize, METH_VARARGS, "Quantize and pack a run of blocks."},
    {"compare", py_compare, METH_VARARGS, "Compare a run of stored blocks with the weights that they were made from."},
    {"largest", py_largest, METH_VARARGS, "Bits of the largest magnitude of a run of elements."},
    {"gather", py_gather, METH_VARARGS, "Statistics of a strip of columns; returns the largest magnitude's bits."},
    {"encode", py_encode, METH_VARARGS, "Codes of elements divided by steps, a tile of 16 x 16 at a time."},
    {"feed_back", py_feed_back, METH_VARARGS, "Round a block with error feedback; returns the rows that outgrew its scales."},
    {"round", py_round, METH_VARARGS, "Round a run of blocks of inputs to NVFP4 and back."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", NULL, -1, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&MODULE); }
