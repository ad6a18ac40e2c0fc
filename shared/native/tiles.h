/* The tile registers of AMX: eight of up to 16 rows of 64 bytes, in an order that a configuration says. */
#ifndef INTERNVL_TILES_H
#define INTERNVL_TILES_H

#include <immintrin.h>
#include <pmmintrin.h>
#include <stdint.h>
#include <string.h>

enum { TILE_ROW_BYTES = 64 };

/* What `ldtilecfg` reads. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* Not by the intrinsics of GCC 12, which do not say what memory is read: that a configuration has more than eight bytes,
 * and that a tile is read from memory at all. What was written there just before might come too late. */
static inline void load_tile_config(const tile_config *config) { __asm__ volatile("ldtilecfg %0" : : "m"(*config)); }

#define LOAD_TILE(tile, from, stride) LOAD_NUMBERED_TILE(tile, from, stride)
#define LOAD_NUMBERED_TILE(tile, from, stride)                                                                         \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile                                                                \
                     :                                                                                                 \
                     : "r"((const void *)(from)), "r"((int64_t)(stride))                                               \
                     : "memory")

/* oneDNN's kernels use the same registers in the same threads: `take_tiles` notes what it finds, and `give_tiles_back`
 * leaves it so. */
static inline void take_tiles(tile_config *found) { __asm__ volatile("sttilecfg %0" : "=m"(*found)); }

static inline void give_tiles_back(const tile_config *found) {
    if (found->palette)
        load_tile_config(found);
    else
        _tile_release();
}

/* What a thread had set when it began to attend. */
typedef struct {
    tile_config tiles;
    unsigned int modes;
} thread_settings;

static inline void configure_tiles(const uint8_t rows[8]) {
    tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = TILE_ROW_BYTES;
        config.rows[tile] = rows[tile];
    }
    load_tile_config(&config);
}

/* Configure the tiles, and have numbers of next to nothing be nothing, as weights of attention often are: arithmetic on
 * them takes a hundred times as long. `end_attending` leaves the thread as it was. */
static inline thread_settings begin_attending(const uint8_t rows[8]) {
    thread_settings found;
    take_tiles(&found.tiles);
    found.modes = _mm_getcsr();
    _mm_setcsr(found.modes | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    configure_tiles(rows);
    return found;
}

static inline void end_attending(const thread_settings *found) {
    _mm_setcsr(found->modes);
    give_tiles_back(&found->tiles);
}

#endif
