/* The tile registers of AMX: eight of up to 16 rows of 64 bytes, in an order that a configuration says. */
#ifndef INTERNVL_TILES_H
#define INTERNVL_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { TILE_ROW_BYTES = 64 };

/* What `ldtilecfg` reads. */
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

/* oneDNN's kernels use the same registers in the same threads: `take_tiles` notes what it finds, and `give_tiles_back`
 * leaves it so. */
static inline void take_tiles(tile_config *found) { _tile_storeconfig(found); }

static inline void give_tiles_back(const tile_config *found) {
    if (found->palette)
        _tile_loadconfig(found);
    else
        _tile_release();
}

static inline void configure_tiles(const uint8_t rows[8]) {
    tile_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = TILE_ROW_BYTES;
        config.rows[tile] = rows[tile];
    }
    _tile_loadconfig(&config);
}

#endif
