// Vectors of floats in GCC's and Clang's own notation; bfloat16 is what is loaded and stored, never what is computed.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int V = 16;  // floats in a vector
#else
constexpr int V = 8;
#endif

typedef float vec __attribute__((vector_size(V * 4), aligned(4), may_alias));
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(V * 2), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(V * 4), aligned(4), may_alias));
struct bf16 { uint16_t bits; };

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float* p) { return *(const vec*)p; }
INLINE vec load(const bf16* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
}
INLINE float wide(float v) { return v; }
INLINE float wide(bf16 v) {
    uint32_t b = uint32_t(v.bits) << 16;
    float f;
    memcpy(&f, &b, 4);
    return f;
}
INLINE void store(vec v, float* p) { *(vec*)p = v; }
INLINE void store(float v, float* p) { *p = v; }
// To the nearest, ties to even; NaN stays NaN.
INLINE uint32_t rounded(uint32_t b) { return (b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16; }
INLINE void store(float v, bf16* p) {
    uint32_t b;
    memcpy(&b, &v, 4);
    p->bits = rounded(b);
}
INLINE void store(vec v, bf16* p) {
    words b = (words)v, nan = (words)((b & 0x7fffffff) > 0x7f800000);
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    *(halves*)p = __builtin_convertvector((nan & 0x7fc0) | (~nan & b), halves);
}

template <class A, class B>
INLINE void convert(const A* from, B* to, int64_t count) {
    int64_t i = 0;
    for (; i + V <= count; i += V) store(load(from + i), to + i);
    for (; i < count; i++) store(wide(from[i]), to + i);
}

INLINE vec8 folded(vec v) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    return v;
#endif
}
INLINE vec8 pairs(vec8 a, vec8 b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
// The sums of four vectors' elements.
INLINE vec4 sums(vec a, vec b, vec c, vec d) {
    vec8 s = pairs(pairs(folded(a), folded(b)), pairs(folded(c), folded(d)));
    return __builtin_shufflevector(s, s, 0, 1, 2, 3) + __builtin_shufflevector(s, s, 4, 5, 6, 7);
}
