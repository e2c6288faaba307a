// Grouped GEMM for few rows per expert: every expert's rows times its own weight, read once, in one parallel region.
//
//   linear   y[r,n]  = b[e,n] + sum_k x[r,k] * w[e,n,k]     rows r of expert e; the weight contiguous along k or along n
//   outer    dw[e,n,k] = sum_r dy[r,n] * x[r,k]             zero for an expert without rows
//   sort     the rows by expert, stable, in two passes over them
//
// All float32, or all bfloat16 with sums in float32.  A library GEMM packs the weight first, which costs more than the
// product where an expert has few rows, and for bfloat16 without native instructions converts it inside; here the rows
// are packed, once, and panels of the weight stay in the first cache for all of them.
// The order of every sum is fixed: results do not depend on the number of threads.

#include <vector>

#include "tiles.h"

constexpr int64_t LITTLE = 1 << 16;  // floats of x that one thread packs alone
constexpr int FEW = 4;               // rows up to which a weight that is contiguous along the result is not packed

struct Run { int64_t expert, low, high; };  // consecutive rows of one expert

extern "C" {
struct Linear {
    const void* x; int64_t ldx;
    const int64_t* take; int64_t per;               // row r is row take[r] / per of x; null: row r
    float* packed; int64_t room;                    // for x in float32: so many numbers
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
    const int64_t* take; int64_t per;               // as above
    float* packed;                                  // room for R rows of x in float32, K rounded up to a strip
    void* dw;                                       // [E, N, K]
    const int32_t* offsets;
    int64_t E, N, K, most, threads, is_bf16;
};
struct Sort {
    const void* experts; int64_t is_int32, R, E;
    int64_t *order, *inverse;
    int32_t* offsets;
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

// Where row r of x begins.
template <class X, class Task>
INLINE const X* row_of(const Task& a, int64_t r) { return (const X*)a.x + (a.take ? a.take[r] / a.per : r) * a.ldx; }

// Rows of nobody are zero.
template <class W>
static void clear(const Linear& a) {
    for (int64_t r = a.offsets && a.E ? a.offsets[a.E - 1] : 0; r < a.R; r++)
        if (a.offsets || a.experts[r] < 0 || a.experts[r] >= a.E) memset((void*)((W*)a.y + r * a.ldy), 0, sizeof(W) * a.N);
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
    int64_t floats(int64_t K) const { return packed() * K + dots * apart(K); }
    // Rows of dot products: powers of two apart, they and the weight's would share few sets of the first cache.
    static int64_t apart(int64_t K) { return K + SPREAD; }
};

// Rows [row, row + STRIP) of x side by side: to[k][m], zero from row `high` on.
template <class X>
static void pack(const Linear& a, int64_t row, int64_t high, float* to) {
    for (int64_t m = 0; m < STRIP; m++) {
        if (row + m >= high) { for (int64_t k = 0; k < a.K; k++) to[k * STRIP + m] = 0; continue; }
        const X* from = row_of<X>(a, row + m);
        for (int64_t k = 0; k < a.K; k++) to[k * STRIP + m] = wide(from[k]);
    }
}

template <class X>
static void widen(const Linear& a, int64_t row, int64_t rows, float* to, int64_t apart) {
    for (int64_t m = 0; m < rows; m++) convert(row_of<X>(a, row + m), to + m * apart, a.K);
}

// A run's x as `linear_rows` wants it: strip by strip, then the rows of dot products.
template <class X>
static void prepare(const Linear& a, const Run& run, int64_t part, float* to) {
    const Split split(run.high - run.low);
    const int64_t row = run.low + part * STRIP;
    to += part * STRIP * a.K;
    if (part < split.strips) return pack<X>(a, row, run.high, to);
    widen<X>(a, row, split.dots, to, Split::apart(a.K));
}

// PB rows of an expert's weight from w on, ldw apart, times a strip of x, `depth` of the summed index: to[n][m].
// `kept`, where it is given, is those rows in float32.  `fresh`: for the first time, so `kept` is filled, and the next panel
// of the `cols` rows that are left is fetched.
template <class W>
INLINE void panel(const W* w, int64_t ldw, int64_t cols, int64_t depth, const float* xs, float* to, bool first, float* kept, bool fresh) {
    const int64_t N = std::min<int64_t>(PB, cols), pitch = depth + STRIP;
    Scalars c = {(const float*)w, ldw, 1};
    if (kept) {
        if (fresh) for (int64_t j = 0; j < N; j++) convert(w + j * ldw, kept + j * pitch, depth);
        c = {kept, pitch, 1};
    }
    if (!fresh) return strip_of(N, xs, c, depth, to, ROWS, first);
    Ahead ahead;
    if (cols >= 2 * PB) ahead = Ahead(w + PB * ldw, PB, depth * sizeof(W), ldw * sizeof(W));
    strip_of<true>(N, xs, c, depth, to, ROWS, first, ahead);
}

// Columns [0, cols) of `width` rows' result, in strips.  Few strips: panel by panel, as memory delivers the weight.  Many:
// strip by strip, each in the first cache while the weight's panels, copied to `scratch`, pass by in the second.
template <class W>
static void strips(const Linear& a, const W* w, int64_t cols, const float* x, int64_t width, float* out, float* scratch) {
    const bool few = width <= FEW_STRIPS * STRIP;
    const int64_t most = few ? LONG : DEPTH;
    for (int64_t k = 0; k < a.K; k += most) {
        const int64_t depth = std::min(most, a.K - k);
        const auto at = [&](int64_t n, int64_t m, float* kept) {
            const float* xs = x + m * a.K + k * STRIP;
            panel(w + n * a.w_row + k, a.w_row, cols - n, depth, xs, out + n * ROWS + m, k == 0, kept, m == 0);
        };
        if (few) {
            for (int64_t n = 0; n < cols; n += PB)
                for (int64_t m = 0; m < width; m += STRIP) at(n, m, sizeof(W) == 2 ? scratch : nullptr);
            continue;
        }
        for (int64_t m = 0; m < width; m += STRIP)
            for (int64_t n = 0; n < cols; n += PB) at(n, m, scratch + n * (depth + STRIP));
    }
}

// Columns [n0, n0 + COLS) of a run's result, for a weight whose rows are contiguous along the summed index.
template <class W>
static void linear_rows(const Linear& a, const Run& run, int64_t n0, const float* x, float* out, float* scratch) {
    const W* w = (const W*)a.w + run.expert * a.w_expert + n0 * a.w_row;
    const int64_t cols = std::min<int64_t>(COLS, a.N - n0), ldw = a.w_row;
    const Split split(run.high - run.low);
    for (int64_t r = 0; r < split.packed(); r += ROWS) {
        const int64_t width = std::min<int64_t>(ROWS, split.packed() - r);
        strips(a, w, cols, x + r * a.K, width, out, scratch);
        const int64_t rows = std::min(width, run.high - run.low - r);
        finish<W>(a, run.expert, out, 1, ROWS, run.low + r, rows, n0, cols);
    }
    if (!split.dots) return;
    const float* rows[DOTS];
    for (int64_t m = 0; m < split.dots; m++) rows[m] = x + split.packed() * a.K + m * Split::apart(a.K);
    const int64_t tiles = (split.dots + MB - 1) / MB, taken = tiles == 1 || sizeof(W) == 2 ? a.K : SPREAD;
    const bool contiguous = !split.packed() && ldw == a.K;  // otherwise the strips have brought it here
    for (int64_t n = 0; n < cols; n += NB) {
        const int N = std::min<int64_t>(NB, cols - n);
        Ahead ahead;
        if (contiguous && n + 2 * NB <= cols) ahead = Ahead(w + (n + NB) * ldw, 1, NB * a.K * sizeof(W), NB * a.K * sizeof(W));
        for (int64_t k = 0; k < a.K; k += taken)
            for (int64_t m = 0; m < split.dots; m += MB)
                dots_of(std::min<int64_t>(MB, split.dots - m), N, rows + m, w + n * ldw, ldw, k, std::min(k + taken, a.K), out + m * COLS + n, ahead);
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

// False: `packed` has too little room, and nothing was done.
template <class W>
static bool linear(const Linear& a) {
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
    if (floats > a.room) return false;
    clear<W>(a);
    const auto arrange = [&](int64_t i) {
        const int64_t j = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1, part = i - first[j];
        const Run& run = todo[j];
        if (by_row) return prepare<W>(a, run, part, a.packed + start[j]);
        const int64_t row = run.low + part * ROWS;
        widen<W>(a, row, std::min<int64_t>(ROWS, run.high - row), a.packed + start[j] + part * ROWS * a.K, a.K);
    };
    const bool little = floats <= LITTLE;  // a barrier between threads costs more
    if (little) for (int64_t i = 0; i < parts; i++) arrange(i);
#pragma omp parallel num_threads(a.threads)
    {
        float* out = room<0>(ROWS * WIDE);
        float* scratch = room<1>(std::max<int64_t>({COLS * (DEPTH + STRIP), PB * (LONG + STRIP), LINES * WIDE}));
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
    return true;
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
                convert(row_of<W>(a, r) + k, to, std::min<int64_t>(STRIP, a.K - k));
        }
#pragma omp for schedule(dynamic, 4) nowait
        for (int64_t i = 0; i < a.E * parts; i++) {
            const int64_t e = i / parts, high = a.offsets[e];
            if (high - low[e] <= a.most) outer_rows<W>(a, e, low[e], high, i % parts * PB, scalars, out);
        }
    }
}

// Stable: rows of one expert stay in order.  Rows of nobody come last, and their `inverse` is the last position.
template <class I>
static void sort(const Sort& a) {
    const I* expert = (const I*)a.experts;
    const auto bin = [&](int64_t r) { return expert[r] < 0 || expert[r] >= a.E ? a.E : (int64_t)expert[r]; };
    std::vector<int64_t> next(a.E + 2);  // where the next row of each expert goes
    for (int64_t r = 0; r < a.R; r++) next[bin(r) + 1]++;
    for (int64_t e = 0; e < a.E; e++) a.offsets[e] = next[e + 1] += next[e];
    for (int64_t r = 0; r < a.R; r++) {
        const int64_t e = bin(r), position = next[e]++;
        a.order[position] = r;
        a.inverse[r] = e < a.E ? position : a.R - 1;
    }
}

extern "C" int moepass_linear(const Linear* a) { return a->is_bf16 ? linear<bf16>(*a) : linear<float>(*a); }
extern "C" void moepass_outer(const Outer* a) { a->is_bf16 ? outer<bf16>(*a) : outer<float>(*a); }
extern "C" void moepass_sort(const Sort* a) { a->is_int32 ? sort<int32_t>(*a) : sort<int64_t>(*a); }
