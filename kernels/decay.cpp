// decay_scores: out[i][j] = scores[i][j] * exp(g[i] - g[j]) on and below the diagonal, zero above, for a batch of c x c matrices.
// One pass over memory forward, one backward. The exponential is never taken above the diagonal, where it may overflow.
//
// Backward, with p = dout * out below the diagonal: dscores = dout * exp(g[i] - g[j]), dg[i] = sum_j p[i][j] - sum_k p[k][i].
// The diagonal of p would enter both sums and cancel, so it is left out.
#include "common.h"

#include <algorithm>
#include <vector>

namespace lmlab {

LMLAB_INLINE f32x16 below(f32x16 v, int j, int end) {  // v where j + lane < end, zero elsewhere
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 zero = {};
    return lane < end - j ? v : zero;
}

template <class T>
LMLAB_INLINE void forward_body(const T* s, const float* g, T* out, int c) {
    for (int i = 0; i < c; i++, s += c, out += c) {
        int j = 0;
        for (; j + LANES <= i + 1; j += LANES) store(out + j, load(s + j) * exp(g[i] - load(g + j)));
        if (j <= i) {
            int n = std::min(LANES, c - j);
            store(out + j, below(load(s + j, n) * exp(g[i] - load(g + j, n)), j, i + 1), n);
            j += n;
        }
        memset((void*)(out + j), 0, (c - j) * sizeof(T));
    }
}

template <class T>
LMLAB_INLINE void backward_body(const T* d, const T* out, const float* g, T* ds, float* dg, float* column, int c) {
    memset(column, 0, (c + LANES) * sizeof(float));
    for (int i = 0; i < c; i++, d += c, out += c, ds += c) {
        f32x16 row = {};
        int j = 0;
        for (; j + LANES <= i; j += LANES) {
            f32x16 v = load(d + j), p = v * load(out + j);
            store(ds + j, v * exp(g[i] - load(g + j)));
            row += p;
            store(column + j, load(column + j) + p);
        }
        int n = std::min(LANES, c - j);  // the block that holds the diagonal
        f32x16 v = load(d + j, n), p = below(v * load(out + j, n), j, i);
        store(ds + j, below(v * exp(g[i] - load(g + j, n)), j, i + 1), n);
        row += p;
        store(column + j, load(column + j) + p);
        j += n;
        memset((void*)(ds + j), 0, (c - j) * sizeof(T));
        float sum = 0;
        for (int l = 0; l < LANES; l++) sum += row[l];
        dg[i] = sum;
    }
    for (int i = 0; i < c; i++) dg[i] -= column[i];
}

LMLAB_DISPATCH(forward, (const T* s, const float* g, T* out, int c), (s, g, out, c))
LMLAB_DISPATCH(backward, (const T* d, const T* out, const float* g, T* ds, float* dg, float* column, int c), (d, out, g, ds, dg, column, c))

// One matrix is the unit of work, so the result does not depend on the number of threads.
template <class T> static void forward_all(const void* scores, const float* g, void* out, int64_t n, int c, int threads) {
    auto f = forward_pick<T>();
    int64_t size = (int64_t)c * c;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > 1)
    for (int64_t m = 0; m < n; m++) f((const T*)scores + m * size, g + m * c, (T*)out + m * size, c);
}

template <class T>
static void backward_all(const void* d, const void* out, const float* g, void* ds, float* dg, int64_t n, int c, int threads) {
    auto f = backward_pick<T>();
    int64_t size = (int64_t)c * c;
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1)
    {
        std::vector<float> column(c + LANES);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < n; m++)
            f((const T*)d + m * size, (const T*)out + m * size, g + m * c, (T*)ds + m * size, dg + m * c, column.data(), c);
    }
}

}  // namespace lmlab

// scores, out: n x c x c, float32 (half = 0) or bfloat16 (half = 1); g: n x c float32; out does not overlap its inputs
LMLAB_API void lmlab_decay_forward(const void* scores, const float* g, void* out, int64_t n, int c, int half, int threads) {
    (half ? lmlab::forward_all<lmlab::bf16> : lmlab::forward_all<float>)(scores, g, out, n, c, threads);
}

// d, out, ds: like out above; dg: n x c float32
LMLAB_API void lmlab_decay_backward(const void* d, const void* out, const float* g, void* ds, float* dg, int64_t n, int c, int half, int threads) {
    (half ? lmlab::backward_all<lmlab::bf16> : lmlab::backward_all<float>)(d, out, g, ds, dg, n, c, threads);
}
