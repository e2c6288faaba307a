// Grouped GEMM for few rows per expert: every expert's rows times its own weight, read once, in one parallel region.
//
//   linear   y[r,n]  = b[e,n] + sum_k x[r,k] * w[e,n,k]     rows r of expert e; the weight contiguous along k or along n
//   outer    dw[e,n,k] = sum_r dy[r,n] * x[r,k]             zero for an expert without rows
//
// x and dy are float32; weights, bias and results float32 or bfloat16; sums are float32 whatever they are.  A library
// GEMM packs the weight first, which costs more than the product where an expert has few rows, and for bfloat16 without
// native instructions converts it inside; here a panel of four weight rows stays in the first cache for all rows.
// The order of every sum is fixed: results do not depend on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
constexpr int V = 16, MB = 6, PB = 12;  // floats in a vector; register tiles: MB x NB and 2 V x PB sums
#else
constexpr int V = 8, MB = 3, PB = 6;
#endif
constexpr int NB = 4;
constexpr int DOTS = V == 8 ? 9 : 12;  // rows up to which dot products are faster than strips: whole tiles of MB
constexpr int STRIP = 2 * V;          // rows whose elements lie side by side in packed x
constexpr int ROWS = 8 * STRIP, COLS = 96;  // of a block that one thread computes, in its second cache
constexpr int64_t DEPTH = 512;        // of a panel: PB weight rows stay in the first cache
constexpr int WIDE = 256, LINES = 128;  // of a weight that is contiguous along the result: a block that is packed at once
constexpr int64_t LITTLE = 1 << 16;   // floats of x that one thread packs alone
constexpr int FEW = 4;                // rows up to which it is not: they are summed in place

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

// What comes next from memory, fetched while this panel is computed: hardware does not look beyond a page.
struct Ahead {
    const char *at, *end;
    inline __attribute__((always_inline)) void line() {
        if (at < end) {
            __builtin_prefetch(at);
            at += 64;
        }
    }
};

// out[m][n] (+)= x[m] . w[n] for M rows and N <= NB columns.
template <int M, int N, class W>
INLINE void dots(const float* const* x, const W* w, int64_t ldw, int64_t depth, float* out, bool first, Ahead& ahead) {
    vec acc[M][NB] = {};
    int64_t k = 0;
    for (; k + V <= depth; k += V) {
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
            for (int64_t j = k; j < depth; j++) v += x[m][j] * wide(w[n * ldw + j]);
            float* to = out + m * COLS + n;
            *to = first ? v : *to + v;
        }
    }
}

template <int M, class W>
void dots_of(int N, const float* const* x, const W* w, int64_t ldw, int64_t depth, float* out, bool first, Ahead& ahead) {
    if (N == 4) return dots<M, 4>(x, w, ldw, depth, out, first, ahead);
    if (N == 3) return dots<M, 3>(x, w, ldw, depth, out, first, ahead);
    if (N == 2) return dots<M, 2>(x, w, ldw, depth, out, first, ahead);
    return dots<M, 1>(x, w, ldw, depth, out, first, ahead);
}

template <class W>
void dots_of(int M, int N, const float* const* x, const W* w, int64_t ldw, int64_t depth, float* out, bool first, Ahead& ahead) {
    switch (M) {
        case 1: return dots_of<1>(N, x, w, ldw, depth, out, first, ahead);
        case 2: return dots_of<2>(N, x, w, ldw, depth, out, first, ahead);
        case 3: return dots_of<3>(N, x, w, ldw, depth, out, first, ahead);
#if defined(__AVX512F__)
        case 4: return dots_of<4>(N, x, w, ldw, depth, out, first, ahead);
        case 5: return dots_of<5>(N, x, w, ldw, depth, out, first, ahead);
        default: return dots_of<6>(N, x, w, ldw, depth, out, first, ahead);
#endif
    }
}

// One operand of `strip`: elements at [n * by_n + k * by_k].
struct Scalars { const float* at; int64_t by_n, by_k; };

// out[n][0..STRIP) (+)= sum_k c[n, k] * b[k][0..STRIP): N x 2 vectors of sums.
template <int N>
INLINE void strip(const float* b, Scalars c, int64_t depth, float* out, int64_t ldo, bool first) {
    vec acc[N][2];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) acc[n][q] = first ? vec{} : load(out + n * ldo + q * V);
    for (int64_t k = 0; k < depth; k++, b += STRIP, c.at += c.by_k) {
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

template <int N = PB>
void strip_of(int n, const float* b, Scalars c, int64_t depth, float* out, int64_t ldo, bool first) {
    if (n == N) return strip<N>(b, c, depth, out, ldo, first);
    if constexpr (N > 1) return strip_of<N - 1>(n, b, c, depth, out, ldo, first);
}

// kept[m][0..cols) += sum_j c(m, j) * b[j][0..cols), c(m, j) = c[m*cm + j*cj], for M rows and J <= 4 of the summed index.
template <int M, int J>
INLINE void update(float* kept, int64_t cols, const float* b, int64_t ldb, const float* c, int64_t cm, int64_t cj) {
    vec s[M][J];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int j = 0; j < J; j++) s[m][j] = c[m * cm + j * cj] - (vec){};
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
            for (int j = 0; j < J; j++) kept[m * WIDE + i] += c[m * cm + j * cj] * b[j * ldb + i];
}

template <int J>
INLINE void updates(float* kept, int64_t rows, int64_t cols, const float* b, int64_t ldb, const float* c, int64_t cm) {
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2) update<2, J>(kept + m * WIDE, cols, b, ldb, c + m * cm, cm, 1);
    if (m < rows) update<1, J>(kept + m * WIDE, cols, b, ldb, c + m * cm, cm, 1);
}

struct Run { int64_t expert, low, high; };  // consecutive rows of one expert

extern "C" {
struct Linear {
    const void* x; int64_t ldx;
    const int64_t* take;                            // row of x of each row, or null: as they stand
    float* packed;                                  // room for x in float32, R rounded up for each expert
    const void* w; int64_t w_expert, w_row, w_col;  // [E, N, K]; w_row or w_col is 1
    const void* bias;                               // [E, N] or null
    void* y; int64_t ldy;
    const int32_t* offsets;                         // end of each expert's rows, or null:
    const int64_t* experts;                         // the expert of each row
    int64_t R, E, N, K;
    int64_t most;                                   // experts with more rows are left to the caller
    int64_t threads, is_bf16;
};
struct Outer {
    const void* dy; int64_t ldy;
    const void* x; int64_t ldx;
    float* packed;                                  // room for R rows of x in float32, K rounded up to a strip
    void* dw;                                       // [E, N, K]
    const int32_t* offsets;
    int64_t E, N, K, most, threads, is_bf16;
};
}

static std::vector<Run> runs(const Linear& a) {
    std::vector<Run> found;
    if (a.offsets) {
        for (int64_t e = 0, low = 0; e < a.E; low = a.offsets[e++])
            if (a.offsets[e] > low && a.offsets[e] - low <= a.most) found.push_back({e, low, a.offsets[e]});
    } else {
        for (int64_t r = 0; r < a.R; r++)
            if (a.experts[r] >= 0 && a.experts[r] < a.E) found.push_back({a.experts[r], r, r + 1});
    }
    return found;
}

template <class W>
static void finish(const Linear& a, int64_t expert, const float* out, int64_t om, int64_t on, int64_t row, int64_t rows, int64_t n, int64_t cols) {
    const W* bias = a.bias ? (const W*)a.bias + expert * a.N + n : nullptr;
    float line[WIDE];
    for (int64_t m = 0; m < rows; m++) {
        for (int64_t i = 0; i < cols; i++) line[i] = out[m * om + i * on] + (bias ? wide(bias[i]) : 0.0f);
        convert(line, (W*)a.y + (row + m) * a.ldy + n, cols);
    }
}

// How a run's rows are computed: in strips, the last filled up with rows of zeros, or, the few that are left, by dots.
struct Split {
    int64_t strips, dots;
    explicit Split(int64_t rows) {
        const int64_t left = rows % STRIP;
        strips = rows / STRIP + (left > DOTS), dots = left <= DOTS ? left : 0;
    }
    int64_t packed() const { return strips * STRIP; }
    int64_t parts() const { return strips + (dots > 0); }
    int64_t floats(int64_t K) const { return (packed() + dots) * K; }
};

// Rows [row, row + STRIP) of x side by side: to[k][m], zero from row `high` on.
template <class X>
static void pack(const Linear& a, int64_t row, int64_t high, float* to) {
    for (int64_t m = 0; m < STRIP; m++) {
        if (row + m >= high) { for (int64_t k = 0; k < a.K; k++) to[k * STRIP + m] = 0; continue; }
        const X* from = (const X*)a.x + (a.take ? a.take[row + m] : row + m) * a.ldx;
        for (int64_t k = 0; k < a.K; k++) to[k * STRIP + m] = wide(from[k]);
    }
}

template <class X>
static void widen(const Linear& a, int64_t row, int64_t rows, float* to) {
    for (int64_t m = 0; m < rows; m++) convert((const X*)a.x + (a.take ? a.take[row + m] : row + m) * a.ldx, to + m * a.K, a.K);
}

// A run's x as `linear_rows` wants it: strip by strip, then the rows of dot products.
template <class X>
static void prepare(const Linear& a, const Run& run, int64_t part, float* to) {
    const Split split(run.high - run.low);
    const int64_t row = run.low + part * STRIP;
    to += part * STRIP * a.K;
    if (part < split.strips) return pack<X>(a, row, run.high, to);
    widen<X>(a, row, split.dots, to);
}

// Columns [n0, n0 + COLS) of a run's result, for a weight whose rows are contiguous along the summed index.
template <class W>
static void linear_rows(const Linear& a, const Run& run, int64_t n0, const float* x, float* out, float* scratch) {
    const W* w = (const W*)a.w + run.expert * a.w_expert + n0 * a.w_row;
    const int64_t cols = std::min<int64_t>(COLS, a.N - n0), ldw = a.w_row;
    const Split split(run.high - run.low);
    for (int64_t r = 0; r < split.packed(); r += ROWS) {
        const int64_t width = std::min<int64_t>(ROWS, split.packed() - r);
        for (int64_t k = 0; k < a.K; k += DEPTH) {
            const int64_t depth = std::min(DEPTH, a.K - k);
            for (int64_t n = 0; n < cols; n += PB) {
                const int N = std::min<int64_t>(PB, cols - n);
                const W* here = w + n * ldw + k;
                const float* b = (const float*)here;
                int64_t ldb = ldw;
                if (sizeof(W) == 2) {
                    for (int j = 0; j < N; j++) convert(here + j * ldw, scratch + j * DEPTH, depth);
                    b = scratch, ldb = DEPTH;
                }
                for (int64_t m = 0; m < width; m += STRIP) {
                    const float* xs = x + (r + m) * a.K;
                    float* to = out + n * ROWS + m;
                    strip_of(N, xs + k * STRIP, {b, ldb, 1}, depth, to, ROWS, k == 0);
                }
            }
        }
        const int64_t rows = std::min(width, run.high - run.low - r);
        finish<W>(a, run.expert, out, 1, ROWS, run.low + r, rows, n0, cols);
    }
    if (!split.dots) return;
    const float* rows[DOTS];
    for (int64_t m = 0; m < split.dots; m++) rows[m] = x + (split.packed() + m) * a.K;
    for (int64_t m = 0; m < split.dots; m += MB)
        for (int64_t n = 0; n < cols; n += NB) {
            const int N = std::min<int64_t>(NB, cols - n);
            const char* next = (const char*)(w + (n + NB) * ldw);
            const bool ahead_of_us = !m && !split.packed() && ldw == a.K && n + 2 * NB <= cols;
            Ahead ahead = {next, ahead_of_us ? next + NB * a.K * sizeof(W) : next};
            dots_of(std::min<int64_t>(MB, split.dots - m), N, rows + m, w + n * ldw, ldw, a.K, out + m * COLS + n, true, ahead);
        }
    finish<W>(a, run.expert, out, COLS, 1, run.high - split.dots, split.dots, n0, cols);
}

// kept[m][0..cols) += sum_k x[m][k] * w[k][0..cols): the weight is read once and not packed.
template <class W>
INLINE void in_place(const W* w, int64_t ldw, int64_t depth, int64_t cols, const float* x, int64_t ldx, int64_t rows, float* kept, float* scratch) {
    for (int64_t k = 0; k < depth; k += 4) {
        const int64_t J = std::min<int64_t>(4, depth - k);
        const float* b = (const float*)(w + k * ldw);
        int64_t ldb = ldw;
        if (sizeof(W) == 2) {
            for (int64_t j = 0; j < J; j++) convert(w + (k + j) * ldw, scratch + j * WIDE, cols);
            b = scratch, ldb = WIDE;
        }
        if (J == 4) { updates<4>(kept, rows, cols, b, ldb, x + k, ldx); continue; }
        for (int64_t j = 0; j < J; j++) updates<1>(kept, rows, cols, b + j * ldb, ldb, x + k + j, ldx);
    }
}

// Columns [n, n + WIDE) of a run's result, for a weight that is contiguous along the result's columns; x is [rows, K].
template <class W>
static void linear_columns(const Linear& a, const Run& run, int64_t n, const float* x, float* out, float* scratch) {
    const W* w = (const W*)a.w + run.expert * a.w_expert + n;
    const int64_t cols = std::min<int64_t>(WIDE, a.N - n), count = run.high - run.low;
    for (int64_t r = 0; r < count; r += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, count - r);
        if (count <= FEW) memset(out, 0, sizeof(float) * rows * WIDE);
        for (int64_t k = 0; k < a.K; k += LINES) {
            const int64_t depth = std::min<int64_t>(LINES, a.K - k);
            const float* xs = x + r * a.K + k;
            if (count <= FEW) {
                in_place(w + k * a.w_col, a.w_col, depth, cols, xs, a.K, rows, out, scratch);
                continue;
            }
            for (int64_t j = 0; j < depth; j++)  // strip by strip; what stands behind the last column is not looked at
                for (int64_t s = 0; s < cols; s += STRIP)
                    convert(w + (k + j) * a.w_col + s, scratch + s * LINES + j * STRIP, std::min<int64_t>(STRIP, cols - s));
            for (int64_t s = 0; s < cols; s += STRIP)
                for (int64_t m = 0; m < rows; m += PB)
                    strip_of(std::min<int64_t>(PB, rows - m), scratch + s * LINES, {xs + m * a.K, a.K, 1}, depth,
                                out + m * WIDE + s, WIDE, k == 0);
        }
        finish<W>(a, run.expert, out, WIDE, 1, run.low + r, rows, n, cols);
    }
}

// A thread's own buffer, kept from call to call: a fresh one of this size faults its pages in every time.
template <int which>
static float* room(int64_t floats) {
    static thread_local std::vector<float> kept;
    if ((int64_t)kept.size() < floats) kept.resize(floats);
    return kept.data();
}

template <class W>
static void linear(const Linear& a) {
    const bool by_row = a.w_col == 1;
    const std::vector<Run> todo = runs(a);
    std::vector<int64_t> start, first;  // of each run: where its x begins in `packed`, and which part of all it is
    int64_t floats = 0, parts = 0;
    for (const Run& run : todo) {
        const int64_t rows = run.high - run.low;
        const Split split(rows);
        start.push_back(floats), first.push_back(parts);
        floats += by_row ? split.floats(a.K) : rows * a.K;
        parts += by_row ? split.parts() : (rows + ROWS - 1) / ROWS;
    }
    const int64_t step = by_row ? COLS : WIDE, blocks = (a.N + step - 1) / step;
    const auto arrange = [&](int64_t i) {
        const int64_t j = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1, part = i - first[j];
        const Run& run = todo[j];
        if (by_row) return prepare<W>(a, run, part, a.packed + start[j]);
        const int64_t row = run.low + part * ROWS;
        widen<W>(a, row, std::min<int64_t>(ROWS, run.high - row), a.packed + start[j] + part * ROWS * a.K);
    };
    const bool little = floats <= LITTLE;  // a barrier between threads costs more
    if (little) for (int64_t i = 0; i < parts; i++) arrange(i);
#pragma omp parallel num_threads(a.threads)
    {
        float* out = room<0>(ROWS * WIDE);
        float* scratch = room<1>(std::max<int64_t>(PB * DEPTH, LINES * WIDE));
        if (!little) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < parts; i++) arrange(i);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < (int64_t)todo.size() * blocks; i++) {
            const Run& run = todo[i / blocks];
            const float* x = a.packed + start[i / blocks];
            const int64_t n = i % blocks * step;
            if (by_row) linear_rows<W>(a, run, n, x, out, scratch);
            else linear_columns<W>(a, run, n, x, out, scratch);
        }
    }
}

INLINE void stream(const float* from, float* to, int64_t count) {
    int64_t i = 0;
    if ((uintptr_t)to % 32 == 0)  // past the caches: the old content is not read
        for (; i + 8 <= count; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(from + i));
    convert(from + i, to + i, count - i);
}
INLINE void stream(const float* from, bf16* to, int64_t count) { convert(from, to, count); }

// Rows [n, n + PB) of one expert's gradient; x is packed in strips: [K / STRIP][rows][STRIP].
template <class W>
static void outer_rows(const Outer& a, int64_t e, int64_t low, int64_t high, int64_t n, std::vector<float>& scalars, float* out) {
    const int64_t rows = high - low, N = std::min<int64_t>(PB, a.N - n), width = (a.K + STRIP - 1) / STRIP * STRIP;
    W* dw = (W*)a.dw + (e * a.N + n) * a.K;
    if (rows <= 0) { memset((void*)dw, 0, sizeof(W) * N * a.K); return; }
    scalars.resize(std::max<size_t>(scalars.size(), rows * PB));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < N; j++) scalars[r * PB + j] = wide(((const W*)a.dy)[(low + r) * a.ldy + n + j]);
    const float* x = a.packed + low * width;
    for (int64_t k = 0; k < width; k += STRIP) strip_of(N, x + k * rows, {scalars.data(), 1, PB}, rows, out + k, width, true);
    for (int64_t j = 0; j < N; j++) stream(out + j * width, dw + j * a.K, a.K);
}

template <class W>
static void outer(const Outer& a) {
    const int64_t parts = (a.N + PB - 1) / PB, width = (a.K + STRIP - 1) / STRIP * STRIP, R = a.E ? a.offsets[a.E - 1] : 0;
    std::vector<int64_t> low(a.E), of(R);
    for (int64_t e = 0; e < a.E; e++) {
        low[e] = e ? a.offsets[e - 1] : 0;
        for (int64_t r = low[e]; r < a.offsets[e]; r++) of[r] = e;
    }
#pragma omp parallel num_threads(a.threads)
    {
        float* out = room<0>(PB * width);
        std::vector<float> scalars;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < R; r++) {
            const int64_t e = of[r], rows = a.offsets[e] - low[e];
            if (rows > a.most) continue;
            float* to = a.packed + low[e] * width + (r - low[e]) * STRIP;
            for (int64_t k = 0; k < a.K; k += STRIP, to += rows * STRIP)
                convert((const W*)a.x + r * a.ldx + k, to, std::min<int64_t>(STRIP, a.K - k));
        }
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < a.E * parts; i++) {
            const int64_t e = i / parts, high = a.offsets[e];
            if (high - low[e] <= a.most) outer_rows<W>(a, e, low[e], high, i % parts * PB, scalars, out);
        }
    }
}

extern "C" void moepass_linear(const Linear* a) { a->is_bf16 ? linear<bf16>(*a) : linear<float>(*a); }
extern "C" void moepass_outer(const Outer* a) { a->is_bf16 ? outer<bf16>(*a) : outer<float>(*a); }
