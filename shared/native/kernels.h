/* The functions that Python calls and that call one another; each is explained where it is. */
#ifndef INTERNVL_KERNELS_H
#define INTERNVL_KERNELS_H

#include <stdint.h>

#include "bfloat16.h"

void few_rows_linear(const bf16 *inputs, int64_t input_stride, const bf16 *matrix, const bf16 *bias, const bf16 *added,
                     int64_t added_stride, bf16 *outputs, int64_t output_stride, int rows, int num_outputs,
                     int num_inputs);

void rms_norm(const bf16 *inputs, int64_t stride, const bf16 *weight, float eps, bf16 *outputs, int64_t rows,
              int64_t size);

void silu_and_multiply(const bf16 *inputs, bf16 *outputs, int64_t rows, int64_t size);

void rotate(bf16 *states, int64_t stride, const bf16 *cosines, const bf16 *sines, int64_t rows, int64_t heads,
            int64_t half);

int attend_to_cache(const bf16 *queries, int64_t query_stride, const bf16 *cache, const int64_t *lengths,
                    const int64_t *table_starts, const int64_t *tables, int64_t count, int64_t block_size,
                    int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, bf16 *outputs);

#endif
