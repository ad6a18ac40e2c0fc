/* Attention of many rows in bfloat16: all tokens of a picture's tile to each other, or a chunk of a prompt to all before
 * it, for x86-64 processors with matrix units (AMX).
 *
 * Keys and values are packed once, so that tiles of them are runs of memory. Then every 32 queries of a head are
 * multiplied by all keys they see, and their weights by the values, a thousand keys at a time: the weights never leave
 * the cache. Scores and sums are in float32; weights are rounded once, after their sum was taken.
 */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "bfloat16.h"
#include "tiles.h"

enum {
    STEP = 32,        /* what a tile's row holds: numbers of a head, or weights */
    QUERIES = 32,     /* two tiles high */
    STRETCH = 1056,   /* keys at a time, a multiple of STEP: a picture's tile has 1025 */
    TILE = 16 * STEP, /* numbers of a tile */
};

/* Row i of `num_queries` sees `num_keys` keys, or, where `is_causal`, all but the last num_queries - 1 - i. Query head h
 * has the keys of head h / (heads / kv_heads). Keys and values lie in rows, one after another or with a `table` by blocks
 * of `block_size` rows; strides are in numbers. head_dim is a multiple of 32. */
typedef struct {
    const bf16 *queries;
    int64_t query_stride;
    const bf16 *keys;
    int64_t key_stride;
    const bf16 *values;
    int64_t value_stride;
    const int64_t *table;
    int64_t block_size;
    int64_t num_queries, num_keys, heads, kv_heads, head_dim;
    int is_causal;
    float scale;
    bf16 *outputs; /* [num_queries, heads * head_dim] */
    /* Packed, per head of keys: [num_keys / 32][tiles of 16 keys by 32 pairs ...]; see `pack`. */
    bf16 *packed_keys, *packed_values;
    int64_t padded;
} attention;

/* A thread's own memory. */
typedef struct {
    bf16 queries[8][QUERIES * STEP]; /* by steps of a head of up to 256 numbers */
    float scores[QUERIES * STRETCH];
    bf16 weights[QUERIES * STRETCH];
    float sums[QUERIES * 256];
    float most[QUERIES], total[QUERIES];
} scratch;

static inline int64_t row_of(const attention *of, int64_t key) {
    return of->table ? of->table[key / of->block_size] * of->block_size + key % of->block_size : key;
}

/* Transpose 16 rows of 16 numbers of 32 bits: within quarters of a register, then the quarters. */
static inline void transpose(__m512i rows[LANES]) {
    __m512i other[LANES];
    for (int i = 0; i < LANES; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
    }
}

/* Pack 32 keys and values of a head: keys as tiles [16 pairs of numbers][16 keys][2] by steps, the left 16 keys and then
 * the right ones; values as tiles [16 pairs of keys][16 numbers][2]. Those behind the last are zero. */
static void pack(const attention *of, int64_t kv_head, int64_t first) {
    const int64_t head_dim = of->head_dim;
    bf16 *packed_keys = of->packed_keys + (kv_head * of->padded + first) * head_dim;
    bf16 *packed_values = of->packed_values + (kv_head * of->padded + first) * head_dim;
    const int64_t count = of->num_keys - first < STEP ? of->num_keys - first : STEP;
    const bf16 *keys[STEP], *values[STEP];
    for (int64_t key = 0; key < count; key++) {
        const int64_t row = row_of(of, first + key);
        keys[key] = of->keys + row * of->key_stride + kv_head * head_dim;
        values[key] = of->values + row * of->value_stride + kv_head * head_dim;
    }
    for (int64_t at = 0; at < head_dim; at += STEP)
        for (int64_t side = 0; side < STEP; side += LANES) {
            __m512i rows[LANES];
            for (int64_t row = 0; row < LANES; row++)
                rows[row] = side + row < count ? _mm512_loadu_si512(keys[side + row] + at) : _mm512_setzero_si512();
            transpose(rows);
            bf16 *tile = packed_keys + at / STEP * 2 * TILE + side / LANES * TILE;
            for (int64_t row = 0; row < LANES; row++)
                _mm512_store_si512(tile + row * STEP, rows[row]);
        }
    for (int64_t at = 0; at < head_dim; at += LANES)
        for (int64_t key = 0; key < STEP; key += 2) {
            __m512i pair = _mm512_setzero_si512();
            if (key < count)
                pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[key] + at)));
            if (key + 1 < count) {
                const __m512i next = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(values[key + 1] + at)));
                pair = _mm512_or_si512(pair, _mm512_slli_epi32(next, 16));
            }
            _mm512_store_si512(packed_values + at / LANES * TILE + key / 2 * STEP, pair);
        }
}

static inline __m512 power_of_two(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), r = _mm512_sub_ps(x, n);
    /* Within 4e-6: less than a hundredth of what rounding to bfloat16 adds. */
    __m512 sum = _mm512_set1_ps(9.6181291e-3f);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.5503303e-2f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

/* Tile registers: sums from 0 on; queries or weights of the upper and lower 16 rows; what they are multiplied by. */
#define UPPER 4
#define LOWER 5
#define LEFT 6
#define RIGHT 7

/* Scores of 32 queries and `count` keys from `first` on, a row of STRETCH for each query. */
static void score(const attention *of, scratch *own, int64_t kv_head, int64_t first, int64_t count) {
    const int64_t steps = of->head_dim / STEP;
    const bf16 *keys = of->packed_keys + (kv_head * of->padded + first) * of->head_dim;
    for (int64_t key = 0; key < count; key += LANES) {
        const bf16 *tiles = keys + key / STEP * STEP * of->head_dim + key % STEP / LANES * TILE;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t step = 0; step < steps; step++) {
            LOAD_TILE(LEFT, tiles + step * 2 * TILE, TILE_ROW_BYTES);
            LOAD_TILE(UPPER, own->queries[step], TILE_ROW_BYTES);
            _tile_dpbf16ps(0, UPPER, LEFT);
            LOAD_TILE(LOWER, own->queries[step] + TILE, TILE_ROW_BYTES);
            _tile_dpbf16ps(1, LOWER, LEFT);
        }
        _tile_stored(0, own->scores + key, STRETCH * sizeof(float));
        _tile_stored(1, own->scores + LANES * STRETCH + key, STRETCH * sizeof(float));
    }
}

/* Turn a query's scores of `seen` keys into weights, zero for those behind up to `count`; return by how much smaller
 * the weights and sums of earlier stretches have become. */
static float weigh(scratch *own, int64_t query, int64_t seen, int64_t count, float scale, int is_first) {
    const float *scores = own->scores + query * STRETCH;
    bf16 *weights = own->weights + query * STRETCH;
    const float before = is_first ? -INFINITY : own->most[query];
    /* Four at a time: one would wait for the other. */
    __m512 most[4];
    for (int i = 0; i < 4; i++)
        most[i] = _mm512_set1_ps(-INFINITY);
    int64_t at = 0;
    for (; at + 4 * LANES <= seen; at += 4 * LANES)
        for (int i = 0; i < 4; i++)
            most[i] = _mm512_max_ps(most[i], _mm512_load_ps(scores + at + i * LANES));
    for (; at < seen; at += LANES)
        most[0] = _mm512_mask_max_ps(most[0], lanes_of(seen - at), most[0], _mm512_load_ps(scores + at));
    most[0] = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    float largest = _mm512_reduce_max_ps(most[0]) * scale;
    if (!(largest > before))
        largest = before; /* nothing was seen here, or nothing as large */
    const float rest = largest == -INFINITY ? 0.0f : largest;
    const __m512 factor = _mm512_set1_ps(scale), less = _mm512_set1_ps(-rest);
    __m512 sum = _mm512_setzero_ps();
    for (at = 0; at + LANES <= seen; at += LANES) {
        const __m512 weight = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + at), factor, less));
        sum = _mm512_add_ps(sum, weight);
        _mm256_store_si256((__m256i *)(weights + at), rounded(weight));
    }
    for (; at < count; at += LANES) {
        __m512 weight = _mm512_setzero_ps();
        if (at < seen)
            weight = _mm512_maskz_mov_ps(lanes_of(seen - at),
                                         power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + at), factor, less)));
        sum = _mm512_add_ps(sum, weight);
        _mm256_store_si256((__m256i *)(weights + at), rounded(weight));
    }
    const float shrunk = is_first ? 0.0f : exp2f(before - rest);
    own->most[query] = largest;
    own->total[query] = (is_first ? 0.0f : own->total[query] * shrunk) + _mm512_reduce_add_ps(sum);
    return shrunk;
}

/* Add the weighted values of `count` keys from `first` on to the sums [32, head_dim]. */
static void sum_up(const attention *of, scratch *own, int64_t kv_head, int64_t first, int64_t count, int is_first) {
    const int64_t head_dim = of->head_dim, bytes = head_dim * (int64_t)sizeof(float);
    const bf16 *values = of->packed_values + (kv_head * of->padded + first) * head_dim;
    for (int64_t at = 0; at < head_dim; at += STEP) {
        float *sums = own->sums + at;
        if (is_first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            LOAD_TILE(0, sums, bytes);
            LOAD_TILE(1, sums + LANES, bytes);
            LOAD_TILE(2, sums + LANES * head_dim, bytes);
            LOAD_TILE(3, sums + LANES * head_dim + LANES, bytes);
        }
        for (int64_t key = 0; key < count; key += STEP) {
            const bf16 *tiles = values + key * head_dim + at / LANES * TILE;
            LOAD_TILE(UPPER, own->weights + key, STRETCH * sizeof(bf16));
            LOAD_TILE(LEFT, tiles, TILE_ROW_BYTES);
            _tile_dpbf16ps(0, UPPER, LEFT);
            LOAD_TILE(RIGHT, tiles + TILE, TILE_ROW_BYTES);
            _tile_dpbf16ps(1, UPPER, RIGHT);
            LOAD_TILE(LOWER, own->weights + LANES * STRETCH + key, STRETCH * sizeof(bf16));
            _tile_dpbf16ps(2, LOWER, LEFT);
            _tile_dpbf16ps(3, LOWER, RIGHT);
        }
        _tile_stored(0, sums, bytes);
        _tile_stored(1, sums + LANES, bytes);
        _tile_stored(2, sums + LANES * head_dim, bytes);
        _tile_stored(3, sums + LANES * head_dim + LANES, bytes);
    }
}

static void attend_block(const attention *of, scratch *own, int64_t head, int64_t first_query) {
    const int64_t head_dim = of->head_dim, kv_head = head / (of->heads / of->kv_heads);
    const int64_t count = of->num_queries - first_query < QUERIES ? of->num_queries - first_query : QUERIES;
    for (int64_t step = 0; step < head_dim / STEP; step++)
        for (int64_t row = 0; row < QUERIES; row++) {
            bf16 *to = own->queries[step] + row * STEP;
            if (row < count)
                memcpy(to, of->queries + (first_query + row) * of->query_stride + head * head_dim + step * STEP,
                       STEP * sizeof(bf16));
            else
                memset(to, 0, STEP * sizeof(bf16));
        }
    const int64_t hidden = of->is_causal ? of->num_queries - first_query - 1 : 0; /* from the first of these queries */
    const int64_t limit = of->is_causal ? of->num_keys - hidden + count - 1 : of->num_keys;
    for (int64_t first = 0; first < limit; first += STRETCH) {
        const int64_t left = limit - first < STRETCH ? limit - first : STRETCH;
        const int64_t whole = (left + STEP - 1) / STEP * STEP;
        score(of, own, kv_head, first, whole);
        for (int64_t row = 0; row < QUERIES; row++) {
            int64_t seen = of->is_causal && row < count ? of->num_keys - hidden + row - first : left;
            seen = seen < 0 ? 0 : seen > left ? left : seen;
            const float shrunk = weigh(own, row, seen, whole, of->scale, first == 0);
            if (first && shrunk != 1.0f)
                for (int64_t at = 0; at < head_dim; at += LANES) {
                    float *sums = own->sums + row * head_dim + at;
                    _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(shrunk)));
                }
        }
        sum_up(of, own, kv_head, first, whole, first == 0);
    }
    for (int64_t row = 0; row < count; row++) {
        const __m512 total = _mm512_set1_ps(own->total[row]);
        bf16 *to = of->outputs + ((first_query + row) * of->heads + head) * head_dim;
        for (int64_t at = 0; at < head_dim; at += LANES)
            _mm256_storeu_si256((__m256i *)(to + at),
                                rounded(_mm512_div_ps(_mm512_load_ps(own->sums + row * head_dim + at), total)));
    }
}

/* Returns 1, with nothing done, where memory is out. `scale` is of the scores. */
int attend(const bf16 *queries, int64_t query_stride, const bf16 *keys, int64_t key_stride, const bf16 *values,
           int64_t value_stride, const int64_t *table, int64_t block_size, int64_t num_queries, int64_t num_keys,
           int64_t heads, int64_t kv_heads, int64_t head_dim, int is_causal, float scale, bf16 *outputs) {
    const int64_t padded = (num_keys + STEP - 1) / STEP * STEP, size = kv_heads * padded * head_dim;
    const size_t own_size = (sizeof(scratch) + 63) / 64 * 64;
    const size_t packed_size = ((size_t)size * sizeof(bf16) + 63) / 64 * 64;
    char *memory = aligned_alloc(64, 2 * packed_size + (size_t)omp_get_max_threads() * own_size);
    if (!memory)
        return 1;
    const attention of = {
        .queries = queries,
        .query_stride = query_stride,
        .keys = keys,
        .key_stride = key_stride,
        .values = values,
        .value_stride = value_stride,
        .table = table,
        .block_size = block_size,
        .num_queries = num_queries,
        .num_keys = num_keys,
        .heads = heads,
        .kv_heads = kv_heads,
        .head_dim = head_dim,
        .is_causal = is_causal,
        .scale = scale * 1.44269504f, /* powers of two, not of e */
        .outputs = outputs,
        .packed_keys = (bf16 *)memory,
        .packed_values = (bf16 *)(memory + packed_size),
        .padded = padded,
    };
    const int64_t blocks = (num_queries + QUERIES - 1) / QUERIES;
#pragma omp parallel
    {
        scratch *own = (scratch *)(memory + 2 * packed_size + omp_get_thread_num() * own_size);
        const uint8_t by_tile[8] = {16, 16, 16, 16, 16, 16, 16, 16};
        const thread_settings found = begin_attending(by_tile);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < kv_heads * (padded / STEP); item++)
            pack(&of, item / (padded / STEP), item % (padded / STEP) * STEP);
        /* The last blocks of a chunk see the most. */
#pragma omp for schedule(dynamic)
        for (int64_t item = heads * blocks - 1; item >= 0; item--)
            attend_block(&of, own, item / blocks, item % blocks * QUERIES);
        end_attending(&found);
    }
    free(memory);
    return 0;
}
