// What follows the two maps of differential attention: their difference, RMSNorm over a head, gain and scale, in one pass and in float32.
#include "common.h"

#include <cmath>

namespace lmlab {

// out[j] = r weight[j] (a[j] - lam b[j]), with r = factor / sqrt(mean of squares + eps), or 1 where there is no norm
template <class T>
LMLAB_INLINE void difference_body(const float* a, const float* b, const float* weight, T* out, int64_t e, float lam, float factor, float eps, int norm) {
    f32x16 squares = {};
    for (int64_t j = 0; norm && j < e; j += LANES) {
        const int n = e - j < LANES ? e - j : LANES;
        f32x16 x = n == LANES ? load(a + j) - lam * load(b + j) : load(a + j, n) - lam * load(b + j, n);
        squares += x * x;
    }
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += squares[l];
    const float r = norm ? factor / std::sqrt(sum / e + eps) : 1.f;
    for (int64_t j = 0; j < e; j += LANES) {
        const int n = e - j < LANES ? e - j : LANES;
        f32x16 x = r * (n == LANES ? load(a + j) - lam * load(b + j) : load(a + j, n) - lam * load(b + j, n));
        if (weight) x *= load(weight + j, n);
        n == LANES ? store(out + j, x) : store(out + j, x, n);
    }
}

LMLAB_DISPATCH(difference, (const float* a, const float* b, const float* weight, T* out, int64_t e, float lam, float factor, float eps, int norm),
               (a, b, weight, out, e, lam, factor, eps, norm))

template <class T>
static void differences(const float* a, const float* b, const float* weight, T* out, int64_t rows, int64_t e, int64_t stride, float lam, float factor, float eps, int norm, int threads) {
    auto f = difference_pick<T>();
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * e > 1 << 15)
    for (int64_t i = 0; i < rows; i++) f(a + i * stride, b + i * stride, weight, out + i * e, e, lam, factor, eps, norm);
}

}  // namespace lmlab

// a, b: rows of e floats, `stride` apart; weight: e, or null; out: rows x e, contiguous, float32 (half = 0) or bfloat16 (half = 1)
LMLAB_API void lmlab_differential(const float* a, const float* b, const float* weight, void* out, int64_t rows, int64_t e, int64_t stride, float lam, float factor, float eps, int norm, int half, int threads) {
    if (half) lmlab::differences(a, b, weight, (lmlab::bf16*)out, rows, e, stride, lam, factor, eps, norm, threads);
    else lmlab::differences(a, b, weight, (float*)out, rows, e, stride, lam, factor, eps, norm, threads);
}
