/* Products of bfloat16 matrices with few rows, for x86-64 processors with matrix units (AMX).
 *
 * A language model that decodes multiplies each of its matrices by a row or some, so reading the matrices is all that
 * takes time. The kernel streams one matrix from its first byte to its last, asks for what comes some steps ahead, and
 * does the arithmetic meanwhile.
 *
 * The matrix lies as oneDNN packs it: blocks of 32 outputs, in each block pairs of inputs, in each pair the outputs one
 * after another: [outputs / 32][inputs / 2][32][2], both padded with zeros to multiples of 32. So a block is one run of
 * memory, and 16 pairs by 16 outputs are what a tile register takes.
 *
 * Sums are in float32, inputs in order, then the bias, then what is to be added; rounded once. These are oneDNN's
 * bits where the inputs are a multiple of 32, as those of models are; it adds the rest of others in another order.
 *
 * GNU's OpenMP is not linked: its functions are found in the library that torch has loaded, so that both share one pool
 * of threads.
 */
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels.h"
#include "tiles.h"

enum {
    BLOCK = 32,     /* outputs of a block, and inputs of a step */
    MOST_ROWS = 32, /* two tiles of sums high */
    AHEAD = 8192,   /* bytes between what is multiplied and what is asked for: some 400 ns at 20 GB/s */
    LINE = 64,
};

/* Tile registers: sums by rows (upper, lower) and outputs (left, right); inputs; the matrix. */
#define SUM_UPPER_LEFT 0
#define SUM_UPPER_RIGHT 1
#define SUM_LOWER_LEFT 2
#define SUM_LOWER_RIGHT 3
#define INPUT_UPPER 4
#define INPUT_LOWER 5
#define MATRIX_LEFT 6
#define MATRIX_RIGHT 7

/* A product: `outputs` [rows, num_outputs] of `inputs` [rows, num_inputs]. Strides are in numbers, from row to row. */
typedef struct {
    const bf16 *inputs;
    int64_t input_stride;
    const bf16 *bias;  /* [num_outputs], or none */
    const bf16 *added; /* [rows, num_outputs], or none */
    int64_t added_stride;
    bf16 *outputs;
    int64_t output_stride;
    int rows;
    int num_outputs;
    int num_inputs;
} product;

/* Ask the operating system for the tile registers; 0 when the process may use them. */
int allow_tiles(void) {
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static void configure(int rows) {
    const uint8_t upper = rows < LANES ? rows : LANES, lower = rows > LANES ? rows - LANES : 1;
    const uint8_t by_tile[8] = {upper, upper, lower, lower, upper, lower, LANES, LANES};
    configure_tiles(by_tile);
}

/* Round a tile of sums into the outputs from `row` and `column` on. */
static inline void store(const product *of, const float *sums, int row, int rows, int column) {
    const int left = of->num_outputs - column;
    if (left <= 0)
        return;
    const __mmask16 mask = lanes_of(left);
    const __m512 bias = of->bias ? widened(mask, of->bias + column) : _mm512_setzero_ps();
    for (int r = 0; r < rows; r++) {
        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums + r * LANES), bias);
        if (of->added)
            sum = _mm512_add_ps(sum, widened(mask, of->added + (row + r) * of->added_stride + column));
        bf16 *to = of->outputs + (row + r) * of->output_stride + column;
        _mm256_mask_storeu_epi16(to, mask, rounded(sum));
    }
}

/* Multiply the rows by one block of the matrix. `rest` are the inputs behind the last whole step, padded with zeros. */
static inline void multiply(const product *of, const bf16 *block, int first_output, const bf16 *rest) {
    float sums[4][LANES * LANES] __attribute__((aligned(LINE)));
    const int upper = of->rows < LANES ? of->rows : LANES, lower = of->rows - upper;
    const int whole = of->num_inputs / BLOCK * BLOCK;
    _tile_zero(SUM_UPPER_LEFT);
    _tile_zero(SUM_UPPER_RIGHT);
    if (lower) {
        _tile_zero(SUM_LOWER_LEFT);
        _tile_zero(SUM_LOWER_RIGHT);
    }
    for (int at = 0; at < of->num_inputs; at += BLOCK) {
        const bf16 *pairs = block + (int64_t)at * BLOCK;
        for (int line = 0; line < BLOCK * BLOCK * (int)sizeof(bf16); line += LINE)
            _mm_prefetch((const char *)pairs + AHEAD + line, _MM_HINT_T0);
        const bf16 *inputs = at < whole ? of->inputs + at : rest;
        const int64_t stride = (at < whole ? of->input_stride : BLOCK) * (int64_t)sizeof(bf16);
        LOAD_TILE(MATRIX_LEFT, pairs, 2 * LINE);
        LOAD_TILE(INPUT_UPPER, inputs, stride);
        _tile_dpbf16ps(SUM_UPPER_LEFT, INPUT_UPPER, MATRIX_LEFT);
        LOAD_TILE(MATRIX_RIGHT, pairs + BLOCK, 2 * LINE);
        _tile_dpbf16ps(SUM_UPPER_RIGHT, INPUT_UPPER, MATRIX_RIGHT);
        if (lower) {
            LOAD_TILE(INPUT_LOWER, (const char *)inputs + LANES * stride, stride);
            _tile_dpbf16ps(SUM_LOWER_LEFT, INPUT_LOWER, MATRIX_LEFT);
            _tile_dpbf16ps(SUM_LOWER_RIGHT, INPUT_LOWER, MATRIX_RIGHT);
        }
    }
    _tile_stored(SUM_UPPER_LEFT, sums[0], LINE);
    _tile_stored(SUM_UPPER_RIGHT, sums[1], LINE);
    store(of, sums[0], 0, upper, first_output);
    store(of, sums[1], 0, upper, first_output + LANES);
    if (lower) {
        _tile_stored(SUM_LOWER_LEFT, sums[2], LINE);
        _tile_stored(SUM_LOWER_RIGHT, sums[3], LINE);
        store(of, sums[2], LANES, lower, first_output);
        store(of, sums[3], LANES, lower, first_output + LANES);
    }
}

/* A matrix of fewer numbers than this (1.5 MB) is multiplied before another thread has come to help: all wait for the last
 * one, and beside a service's other threads and processes a core may be long in coming. */
enum { WORTH_SHARING = 3 << 18 };

/* Compute a product of 1 to 32 rows. Blocks of outputs are shared out among OpenMP's threads. */
void few_rows_linear(const bf16 *inputs, int64_t input_stride, const bf16 *matrix, const bf16 *bias, const bf16 *added,
                     int64_t added_stride, bf16 *outputs, int64_t output_stride, int rows, int num_outputs,
                     int num_inputs) {
    const product of = {inputs,        input_stride, bias,        added,     added_stride, outputs,
                        output_stride, rows,         num_outputs, num_inputs};
    const int num_blocks = (num_outputs + BLOCK - 1) / BLOCK;
    const int64_t block_size = (int64_t)(num_inputs + BLOCK - 1) / BLOCK * BLOCK * BLOCK;
    bf16 rest[MOST_ROWS * BLOCK] __attribute__((aligned(LINE)));
    const int whole = num_inputs / BLOCK * BLOCK;
    if (whole < num_inputs) {
        memset(rest, 0, sizeof rest);
        for (int row = 0; row < rows; row++)
            memcpy(rest + row * BLOCK, inputs + row * input_stride + whole, (num_inputs - whole) * sizeof(bf16));
    }
#pragma omp parallel if ((int64_t)num_outputs * num_inputs >= WORTH_SHARING)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int end = (int)(num_blocks * (thread + 1) / threads);
        tile_config found;
        take_tiles(&found);
        configure(rows);
        for (int block = (int)(num_blocks * thread / threads); block < end; block++)
            multiply(&of, matrix + block * block_size, block * BLOCK, rest);
        give_tiles_back(&found);
    }
}
