/* bfloat16 numbers in registers of 16 float32 numbers. */
#ifndef INTERNVL_BFLOAT16_H
#define INTERNVL_BFLOAT16_H

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

enum { LANES = 16 };

/* Lanes that hold numbers where `left` are left. */
static inline __mmask16 lanes_of(int64_t left) {
    return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
}

static inline __m512 widened(__mmask16 mask, const bf16 *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

/* To the nearest, ties to even. */
static inline __m256i rounded(__m512 numbers) { return (__m256i)_mm512_cvtneps_pbh(numbers); }

static inline __m512 rounded_and_widened(__m512 numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(numbers)), 16));
}

/* Within 2 units in the last place; what is no number stays none. */
static inline __m512 exponential(__m512 x) {
    /* The second operand comes back where one is no number. */
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

#endif
