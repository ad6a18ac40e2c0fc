/* What a language model's layer does besides multiplying by matrices, in bfloat16, for x86-64 processors with AVX-512.
 *
 * A step that decodes has a row or some, so that its arithmetic is nothing and calling the operators is all: each of
 * these functions takes the place of several. Roundings are where torch's operators have theirs.
 */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "kernels.h"
#include "tiles.h"

/* Fewer numbers than this are done before other threads have been woken up. */
enum { WORTH_SHARING = 1 << 15, WORTH_SHARING_CACHE = 1 << 19, WINDOW = 1 << 10 };

/* outputs [rows, size] = round(round(inputs / sqrt(mean(inputs^2) + eps)) * weight) */
void rms_norm(const bf16 *inputs, int64_t stride, const bf16 *weight, float eps, bf16 *outputs, int64_t rows,
              int64_t size) {
#pragma omp parallel for if (rows * size >= WORTH_SHARING)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = inputs + row * stride;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t at = 0; at < size; at += LANES) {
            const __m512 numbers = widened(lanes_of(size - at), from + at);
            squares = _mm512_fmadd_ps(numbers, numbers, squares);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)size + eps));
        for (int64_t at = 0; at < size; at += LANES) {
            const __mmask16 mask = lanes_of(size - at);
            const __m512 normed = rounded_and_widened(_mm512_mul_ps(widened(mask, from + at), factor));
            const __m512 scaled = _mm512_mul_ps(normed, widened(mask, weight + at));
            _mm256_mask_storeu_epi16(outputs + row * size + at, mask, rounded(scaled));
        }
    }
}

/* outputs [rows, size] = round(round(silu(gates)) * ups) of inputs [rows, 2 * size], gates first */
void silu_and_multiply(const bf16 *inputs, bf16 *outputs, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows * size >= WORTH_SHARING)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gates = inputs + row * 2 * size, *ups = gates + size;
        for (int64_t at = 0; at < size; at += LANES) {
            const __mmask16 mask = lanes_of(size - at);
            const __m512 gate = widened(mask, gates + at), one = _mm512_set1_ps(1.0f);
            const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
            const __m512 activated = rounded_and_widened(_mm512_div_ps(gate, below));
            const __m512 product = _mm512_mul_ps(activated, widened(mask, ups + at));
            _mm256_mask_storeu_epi16(outputs + row * size + at, mask, rounded(product));
        }
    }
}

/* Rotate states [rows, heads, 2, half] in place: round(round(own * cos) + other half * sin).
 *
 * cosines and sines are [rows, 2, half], the sines negative in the first half. */
void rotate(bf16 *states, int64_t stride, const bf16 *cosines, const bf16 *sines, int64_t rows, int64_t heads,
            int64_t half) {
#pragma omp parallel for if (rows * heads * half >= WORTH_SHARING)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *cosine = cosines + row * 2 * half, *sine = sines + row * 2 * half;
        for (int64_t head = 0; head < heads; head++) {
            bf16 *first = states + row * stride + head * 2 * half, *second = first + half;
            for (int64_t at = 0; at < half; at += LANES) {
                const __mmask16 mask = lanes_of(half - at);
                const __m512 a = widened(mask, first + at), b = widened(mask, second + at);
                const __m512 own_a = rounded_and_widened(_mm512_mul_ps(a, widened(mask, cosine + at)));
                const __m512 own_b = rounded_and_widened(_mm512_mul_ps(b, widened(mask, cosine + half + at)));
                const __m512 other_a = _mm512_mul_ps(b, widened(mask, sine + at));
                const __m512 other_b = _mm512_mul_ps(a, widened(mask, sine + half + at));
                _mm256_mask_storeu_epi16(first + at, mask, rounded(_mm512_add_ps(own_a, other_a)));
                _mm256_mask_storeu_epi16(second + at, mask, rounded(_mm512_add_ps(own_b, other_b)));
            }
        }
    }
}

/* LANES numbers from `at` on, as float32; minus infinity where the mask has none. */
static __m512 loaded(const void *numbers, int wide, __mmask16 mask, int64_t at) {
    const __m512 none = _mm512_set1_ps(-INFINITY);
    return wide ? _mm512_mask_loadu_ps(none, mask, (const float *)numbers + at)
                : _mm512_mask_mov_ps(none, mask, widened(mask, (const bf16 *)numbers + at));
}

/* Of each row of logits [rows, size], float32 where they are `wide`, the largest number and where that first is; NaN and
 * 0 where it holds a NaN.
 *
 * Places are sought in one window of a row alone: numbers without their places are compared twice as fast. */
void largest(const void *logits, int wide, int64_t stride, int64_t rows, int64_t size, float *values, int64_t *places) {
#pragma omp parallel for if (rows * size >= WORTH_SHARING_CACHE)
    for (int64_t row = 0; row < rows; row++) {
        const void *from = (const char *)logits + row * stride * (int64_t)(wide ? sizeof(float) : sizeof(bf16));
        __mmask16 no_numbers = 0;
        float value = -INFINITY;
        int64_t place = 0;
        for (int64_t start = 0; start < size; start += WINDOW) {
            const int64_t end = start + WINDOW < size ? start + WINDOW : size;
            __m512 peaks = _mm512_set1_ps(-INFINITY);
            for (int64_t at = start; at < end; at += LANES) {
                const __m512 numbers = loaded(from, wide, lanes_of(end - at), at);
                no_numbers |= _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
                peaks = _mm512_max_ps(peaks, numbers);
            }
            const float peak = _mm512_reduce_max_ps(peaks);
            if (peak > value) {
                value = peak;
                place = start;
            }
        }
        values[row] = no_numbers ? NAN : value;
        places[row] = 0;
        for (__mmask16 here = 0; !no_numbers && !here; place += LANES) {
            const __mmask16 mask = lanes_of(size - place);
            here = _mm512_mask_cmp_ps_mask(mask, loaded(from, wide, mask, place), _mm512_set1_ps(value), _CMP_EQ_OQ);
            if (here)
                places[row] = place + __builtin_ctz(here);
        }
    }
}

/* Tile registers of attention: scores [16 tokens, 16 heads], keys [16 tokens, 32], queries [16 pairs, 16 heads, 2]. */
#define SCORES 0
#define KEYS 1
#define QUERIES 2

enum {
    STEP = 32,      /* numbers of a head that a tile takes */
    WIDTH = 64,     /* numbers of a head whose weighted sums are kept in registers, */
    TOGETHER = 6,   /* for so many heads at a time */
    TILE_ROWS = 16, /* tokens of a tile, all in one block of the cache */
    AHEAD = 32,     /* tokens between those that are read and those that are asked for */
};

/* One new token of each of several sequences, which attends to all that its sequence has in the paged cache.
 *
 * The cache holds rows [keys, values] of kv_heads * head_dim numbers each, a row per slot; block b has the slots from
 * b * block_size on, and block_size is a multiple of 16. Sequence i has row i of `queries` and of `outputs`; its blocks
 * are tables[table_starts[i]] and so on. A key has at most 16 heads; head_dim is a multiple of 32. */
typedef struct {
    const bf16 *queries;
    int64_t query_stride;
    const bf16 *cache;
    const int64_t *lengths, *table_starts, *tables;
    int64_t block_size, heads, kv_heads, head_dim;
    float scale;
    bf16 *outputs; /* [sequences, heads * head_dim] */
} attention;

static inline const bf16 *slot_of(const attention *of, const int64_t *table, int64_t token) {
    const int64_t slot = table[token / of->block_size] * of->block_size + token % of->block_size;
    return of->cache + slot * 2 * of->kv_heads * of->head_dim;
}

/* Ask for the keys and values of 16 tokens that will soon be read: in the cache they lie too far apart to be foreseen. */
static inline void expect(const attention *of, const int64_t *table, int64_t token, int64_t kv_head) {
    const int64_t size = of->kv_heads * of->head_dim;
    const bf16 *keys = slot_of(of, table, token) + kv_head * of->head_dim;
    for (int64_t row = 0; row < TILE_ROWS; row++, keys += 2 * size)
        for (int64_t at = 0; at < of->head_dim; at += STEP) {
            _mm_prefetch(keys + at, _MM_HINT_T0);
            _mm_prefetch(keys + size + at, _MM_HINT_T1);
        }
}

/* Write weights [length, 16 heads] of one sequence's tokens, not yet divided by their sums, which are returned. */
static inline __m512 weigh(const attention *of, int64_t sequence, int64_t kv_head, float *weights) {
    const int64_t group = of->heads / of->kv_heads, head_dim = of->head_dim, length = of->lengths[sequence];
    const int64_t *table = of->tables + of->table_starts[sequence];
    const bf16 *queries = of->queries + sequence * of->query_stride + kv_head * group * head_dim;
    bf16 pairs[head_dim / 2][LANES][2] __attribute__((aligned(64)));
    memset(pairs, 0, sizeof pairs);
    for (int64_t head = 0; head < group; head++)
        for (int64_t at = 0; at < head_dim; at++)
            pairs[at / 2][head][at % 2] = queries[head * head_dim + at];
    const int64_t row_bytes = 2 * of->kv_heads * head_dim * (int64_t)sizeof(bf16);
    const __m512 scale = _mm512_set1_ps(of->scale);
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int64_t token = 0; token < length; token += TILE_ROWS) {
        const bf16 *keys = slot_of(of, table, token) + kv_head * head_dim;
        if (token + AHEAD < length)
            expect(of, table, token + AHEAD, kv_head);
        _tile_zero(SCORES);
        for (int64_t at = 0; at < head_dim; at += STEP) {
            LOAD_TILE(KEYS, keys + at, row_bytes);
            LOAD_TILE(QUERIES, pairs[at / 2], TILE_ROW_BYTES);
            _tile_dpbf16ps(SCORES, KEYS, QUERIES);
        }
        float *own = weights + token * LANES;
        _tile_stored(SCORES, own, TILE_ROW_BYTES);
        /* What lies behind the last token in its block is another's, or nothing. */
        const int64_t count = length - token < TILE_ROWS ? length - token : TILE_ROWS;
        for (int64_t row = 0; row < count; row++) {
            const __m512 score = _mm512_mul_ps(_mm512_load_ps(own + row * LANES), scale);
            _mm512_store_ps(own + row * LANES, score);
            most = _mm512_max_ps(most, score);
        }
    }
    __m512 sums = _mm512_setzero_ps();
    for (int64_t token = 0; token < length; token++) {
        const __m512 weight = exponential(_mm512_sub_ps(_mm512_load_ps(weights + token * LANES), most));
        _mm512_store_ps(weights + token * LANES, weight);
        sums = _mm512_add_ps(sums, weight);
    }
    return sums;
}

/* Write the weighted sums of 64 (or what is left) of the numbers of `count` heads' values; `count` is a constant. */
static inline __attribute__((always_inline)) void sum_up(const attention *of, int64_t sequence, int64_t offset,
                                                         const float *weights, const float *sums, int count,
                                                         int vectors, bf16 *outputs) {
    const int64_t *table = of->tables + of->table_starts[sequence];
    const int64_t length = of->lengths[sequence], row_size = 2 * of->kv_heads * of->head_dim;
    __m512 sum[TOGETHER][WIDTH / LANES];
    for (int head = 0; head < count; head++)
        for (int vector = 0; vector < vectors; vector++)
            sum[head][vector] = _mm512_setzero_ps();
    for (int64_t token = 0; token < length; token += TILE_ROWS) {
        const bf16 *values = slot_of(of, table, token) + offset;
        const int64_t end = length - token < TILE_ROWS ? length - token : TILE_ROWS;
        for (int64_t row = 0; row < end; row++) {
            __m512 value[WIDTH / LANES];
            for (int vector = 0; vector < vectors; vector++)
                value[vector] = widened(0xffff, values + row * row_size + vector * LANES);
            for (int head = 0; head < count; head++) {
                const __m512 weight = _mm512_set1_ps(weights[(token + row) * LANES + head]);
                for (int vector = 0; vector < vectors; vector++)
                    sum[head][vector] = _mm512_fmadd_ps(weight, value[vector], sum[head][vector]);
            }
        }
    }
    for (int head = 0; head < count; head++) {
        const __m512 whole = _mm512_set1_ps(sums[head]);
        for (int vector = 0; vector < vectors; vector++)
            _mm256_storeu_si256((__m256i *)(outputs + head * of->head_dim + vector * LANES),
                                rounded(_mm512_div_ps(sum[head][vector], whole)));
    }
}

static void attend_one(const attention *of, int64_t sequence, int64_t kv_head, float *weights) {
    const int64_t group = of->heads / of->kv_heads;
    float sums[LANES];
    _mm512_storeu_ps(sums, weigh(of, sequence, kv_head, weights));
    bf16 *outputs = of->outputs + (sequence * of->heads + kv_head * group) * of->head_dim;
    for (int64_t at = 0; at < of->head_dim; at += WIDTH) {
        const int64_t offset = (of->kv_heads + kv_head) * of->head_dim + at;
        const int vectors = of->head_dim - at < WIDTH ? STEP / LANES : WIDTH / LANES;
        for (int64_t head = 0; head < group;) {
            const int64_t left = group - head;
            const float *own = weights + head;
            bf16 *to = outputs + head * of->head_dim + at;
#define SUM_UP(count, vectors) sum_up(of, sequence, offset, own, sums + head, count, vectors, to)
#define SUM_UP_HEADS(count)                                                                                            \
    do {                                                                                                               \
        if (vectors == WIDTH / LANES)                                                                                  \
            SUM_UP(count, WIDTH / LANES);                                                                              \
        else                                                                                                           \
            SUM_UP(count, STEP / LANES);                                                                               \
        head += count;                                                                                                 \
    } while (0)
            /* Four and three rather than six and one: each call reads the values once more. */
            if (left >= TOGETHER && left != TOGETHER + 1)
                SUM_UP_HEADS(TOGETHER);
            else if (left >= 4)
                SUM_UP_HEADS(4);
            else if (left == 3)
                SUM_UP_HEADS(3);
            else if (left == 2)
                SUM_UP_HEADS(2);
            else
                SUM_UP_HEADS(1);
        }
    }
}

/* Sequences and heads are shared out among OpenMP's threads. Returns 1, with nothing done, where memory is out. */
int attend_to_cache(const bf16 *queries, int64_t query_stride, const bf16 *cache, const int64_t *lengths,
                    const int64_t *table_starts, const int64_t *tables, int64_t count, int64_t block_size,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, bf16 *outputs) {
    const attention of = {queries,    query_stride, cache,    lengths,  table_starts, tables,
                          block_size, heads,        kv_heads, head_dim, scale,        outputs};
    int64_t longest = 0, total = 0;
    for (int64_t sequence = 0; sequence < count; sequence++) {
        longest = lengths[sequence] > longest ? lengths[sequence] : longest;
        total += lengths[sequence];
    }
    const int64_t scratch = (longest + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * LANES;
    float *weights = aligned_alloc(64, (size_t)omp_get_max_threads() * scratch * sizeof(float));
    if (!weights)
        return 1;
#pragma omp parallel if (total * kv_heads * head_dim >= WORTH_SHARING_CACHE)
    {
        const uint8_t by_tile[8] = {TILE_ROWS, TILE_ROWS, LANES, 1, 1, 1, 1, 1};
        const thread_settings found = begin_attending(by_tile);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < count * kv_heads; item++)
            attend_one(&of, item / kv_heads, item % kv_heads, weights + omp_get_thread_num() * scratch);
        end_attending(&found);
    }
    free(weights);
    return 0;
}
