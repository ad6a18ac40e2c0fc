/* All layers of a language model for a step that decodes, a token of each of up to 32 sequences, in one call.
 *
 * What is computed is what the functions that are called here compute; between them, nothing else runs. In a service every
 * return to Python may have to wait for another thread, as often as a small model takes for a layer.
 */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { ALIGNMENT = 64 };

/* A layer's weights, and its part of the cache. Matrices are packed as `few_rows.c` says; a bias may be missing. */
typedef struct {
    const bf16 *attention_norm, *qkv, *qkv_bias, *out, *out_bias;
    const bf16 *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    bf16 *cache;
} layer;

typedef struct {
    int64_t hidden, intermediate, heads, kv_heads, head_dim, block_size;
} sizes;

static int64_t aligned(int64_t numbers) { return (numbers + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Take `hidden` [rows, hidden size] through the layers and the norm behind them, in place. Row i is the newest token of a sequence of lengths[i],
 * stored at slots[i]; the rest is as for `attend_to_cache` and `rotate`. Returns 1 where memory is out: what is in
 * `hidden` is then of no use. */
int decode_layers(bf16 *hidden, int rows, const layer *layers, int64_t num_layers, const bf16 *last_norm, const sizes *of,
                  float eps, float scale, const bf16 *cosines, const bf16 *sines, const int64_t *slots, const int64_t *lengths,
                  const int64_t *table_starts, const int64_t *tables) {
    const int64_t query_size = of->heads * of->head_dim, known_size = 2 * of->kv_heads * of->head_dim;
    const int64_t qkv_size = query_size + known_size;
    const int64_t counts[] = {rows * of->hidden, rows * qkv_size, rows * query_size, rows * 2 * of->intermediate,
                              rows * of->intermediate};
    int64_t total = 0;
    for (int part = 0; part < 5; part++)
        total += aligned(counts[part]);
    bf16 *scratch = aligned_alloc(ALIGNMENT, total * sizeof(bf16));
    if (!scratch)
        return 1;
    bf16 *normed = scratch, *qkv = normed + aligned(counts[0]), *attended = qkv + aligned(counts[1]);
    bf16 *gates_and_ups = attended + aligned(counts[2]), *activated = gates_and_ups + aligned(counts[3]);
    int failed = 0;
    for (const layer *own = layers; own < layers + num_layers && !failed; own++) {
        rms_norm(hidden, of->hidden, own->attention_norm, eps, normed, rows, of->hidden);
        few_rows_linear(normed, of->hidden, own->qkv, own->qkv_bias, NULL, 0, qkv, qkv_size, rows, (int)qkv_size,
                        (int)of->hidden);
        rotate(qkv, qkv_size, cosines, sines, rows, of->heads + of->kv_heads, of->head_dim / 2);
        for (int row = 0; row < rows; row++)
            memcpy(own->cache + slots[row] * known_size, qkv + row * qkv_size + query_size, known_size * sizeof(bf16));
        failed = attend_to_cache(qkv, qkv_size, own->cache, lengths, table_starts, tables, rows, of->block_size,
                                 of->heads, of->kv_heads, of->head_dim, scale, attended);
        few_rows_linear(attended, query_size, own->out, own->out_bias, hidden, of->hidden, hidden, of->hidden, rows,
                        (int)of->hidden, (int)query_size);
        rms_norm(hidden, of->hidden, own->mlp_norm, eps, normed, rows, of->hidden);
        few_rows_linear(normed, of->hidden, own->gate_up, own->gate_up_bias, NULL, 0, gates_and_ups,
                        2 * of->intermediate, rows, (int)(2 * of->intermediate), (int)of->hidden);
        silu_and_multiply(gates_and_ups, activated, rows, of->intermediate);
        few_rows_linear(activated, of->intermediate, own->down, own->down_bias, hidden, of->hidden, hidden, of->hidden,
                        rows, (int)of->hidden, (int)of->intermediate);
    }
    rms_norm(hidden, of->hidden, last_norm, eps, hidden, rows, of->hidden);
    free(scratch);
    return failed;
}
