// What one core computes from its first cache: tiles of sums that live in registers.
//
//   dots     rows of both operands are contiguous along the summed index: nothing is packed, each weight is read once
//   strip    one operand packed, STRIP numbers side by side; of the other, single numbers: many sums for few loads
//   update   sums that stay in the first cache while lines of the weight pass by
#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int NB = 4;
constexpr int MB = V == 8 ? 3 : 6, PB = V == 8 ? 6 : 12;  // tiles of MB x NB vectors (dots) and PB x 2 (strip)
constexpr int DOTS = V == 8 ? 9 : 12;       // rows up to which dots are faster than strips: whole tiles of MB
constexpr int STRIP = 2 * V;
constexpr int ROWS = 8 * STRIP, COLS = 96;  // of a block that one thread computes, in its second cache
constexpr int64_t SPREAD = 256;             // of the summed index that dots take at a time, and what keeps their rows apart
constexpr int64_t DEPTH = 512;              // of a panel: PB weight rows stay in the first cache
constexpr int64_t FEW_STRIPS = 2, LONG = 2048;  // up to so many strips, panels are so deep: memory is read in long stretches
constexpr int WIDE = 256, LINES = 128;      // of a weight contiguous along the result: a block that is packed at once

// What comes next from memory, fetched into the caches while this panel is computed: hardware does not look beyond a page,
// and without it a core waits for memory, then computes, then waits.  Rows of `bytes`, `pitch` apart, up to `end`.
struct Ahead {
    const char *at = nullptr, *end = nullptr, *stop = nullptr;
    int64_t bytes = 0, rest = 0;
    Ahead() = default;
    Ahead(const void* from, int64_t rows, int64_t bytes, int64_t pitch)
        : at((const char*)from), end(at + rows * pitch), stop(at + bytes), bytes(bytes), rest(pitch - bytes) {}
    inline __attribute__((always_inline)) void line() {
        if (at >= end) return;
        __builtin_prefetch(at);
        at += 64;
        if (at >= stop) at = stop + rest, stop = at + bytes;
    }
};

// out[m][n] (+)= x[m][k..] . w[n][k..] over [from, to) for M rows and N <= NB columns.
template <int M, int N, class W>
INLINE void dots(const float* const* x, const W* w, int64_t ldw, int64_t from, int64_t to, float* out, Ahead& ahead) {
    vec acc[M][NB] = {};
    int64_t k = from;
    for (; k + V <= to; k += V) {
        vec a[M];
        ahead.line();
        if (M == 1) ahead.line();
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) a[m] = load(x[m] + k);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            vec b = load(w + n * ldw + k);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) acc[m][n] += a[m] * b;
        }
    }
    for (int m = 0; m < M; m++) {
        vec4 s = sums(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
        for (int n = 0; n < N; n++) {
            float v = s[n];
            for (int64_t j = k; j < to; j++) v += x[m][j] * wide(w[n * ldw + j]);
            float* sum = out + m * COLS + n;
            *sum = from ? *sum + v : v;
        }
    }
}

template <int M, class W>
void dots_of(int N, const float* const* x, const W* w, int64_t ldw, int64_t from, int64_t to, float* out, Ahead& ahead) {
    if (N == 4) return dots<M, 4>(x, w, ldw, from, to, out, ahead);
    if (N == 3) return dots<M, 3>(x, w, ldw, from, to, out, ahead);
    if (N == 2) return dots<M, 2>(x, w, ldw, from, to, out, ahead);
    return dots<M, 1>(x, w, ldw, from, to, out, ahead);
}

template <class W>
void dots_of(int M, int N, const float* const* x, const W* w, int64_t ldw, int64_t from, int64_t to, float* out, Ahead& ahead) {
    switch (M) {
        case 1: return dots_of<1>(N, x, w, ldw, from, to, out, ahead);
        case 2: return dots_of<2>(N, x, w, ldw, from, to, out, ahead);
        case 3: return dots_of<3>(N, x, w, ldw, from, to, out, ahead);
#if defined(__AVX512F__)
        case 4: return dots_of<4>(N, x, w, ldw, from, to, out, ahead);
        case 5: return dots_of<5>(N, x, w, ldw, from, to, out, ahead);
        default: return dots_of<6>(N, x, w, ldw, from, to, out, ahead);
#endif
    }
}

// One operand of `strip`: elements at [n * by_n + k * by_k].
struct Scalars { const float* at; int64_t by_n, by_k; };

// out[n][0..STRIP) (+)= sum_k c[n, k] * b[k][0..STRIP): N x 2 vectors of sums.
template <int N, bool FETCH>
INLINE void strip(const float* b, Scalars c, int64_t depth, float* out, int64_t ldo, bool first, Ahead& ahead) {
    vec acc[N][2];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) acc[n][q] = first ? vec{} : load(out + n * ldo + q * V);
    for (int64_t k = 0; k < depth; k++, b += STRIP, c.at += c.by_k) {
        if (FETCH && k % 2 == 0) ahead.line();
        const vec low = load(b), high = load(b + V);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vec s = c.at[n * c.by_n] - vec{};
            acc[n][0] += low * s, acc[n][1] += high * s;
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) store(acc[n][q], out + n * ldo + q * V);
}

template <bool FETCH, int N = PB>
void strip_of(int n, const float* b, Scalars c, int64_t depth, float* out, int64_t ldo, bool first, Ahead& ahead) {
    if (n == N) return strip<N, FETCH>(b, c, depth, out, ldo, first, ahead);
    if constexpr (N > 1) return strip_of<FETCH, N - 1>(n, b, c, depth, out, ldo, first, ahead);
}
inline void strip_of(int n, const float* b, Scalars c, int64_t depth, float* out, int64_t ldo, bool first) {
    Ahead nothing;
    strip_of<false>(n, b, c, depth, out, ldo, first, nothing);
}

// kept[m][0..cols) += sum_j c(m, j) * b[j][0..cols), c(m, j) = c[m*cm + j], for M rows and J <= 4 of the summed index.
template <int M, int J>
INLINE void update(float* kept, int64_t cols, const float* b, int64_t ldb, const float* c, int64_t cm) {
    vec s[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) s[m][j] = c[m * cm + j] - (vec){};
    int64_t i = 0;
    for (; i + V <= cols; i += V) {
        vec a[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) a[m] = load(kept + m * WIDE + i);
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) {
            vec v = load(b + j * ldb + i);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) a[m] += s[m][j] * v;
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) store(a[m], kept + m * WIDE + i);
    }
    for (; i < cols; i++)
        for (int m = 0; m < M; m++)
            for (int j = 0; j < J; j++) kept[m * WIDE + i] += c[m * cm + j] * b[j * ldb + i];
}

template <int J>
INLINE void updates(float* kept, int64_t rows, int64_t cols, const float* b, int64_t ldb, const float* c, int64_t cm) {
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) update<2, J>(kept + m * WIDE, cols, b, ldb, c + m * cm, cm);
    if (m < rows) update<1, J>(kept + m * WIDE, cols, b, ldb, c + m * cm, cm);
}
