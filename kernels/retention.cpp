// Gated retention, chunk by chunk: o_n = q_n R_n with R_n = exp(log_gamma_n) R_(n-1) + d^-1/2 k_n^T v_n, forward and backward.
//
// A chunk stays in the cache from its first product to its last: scores, their decay, their product with the values and with the
// state in one go. A (batch, head) is the unit of work, so results do not depend on the number of threads. Everything is computed in
// float32, whatever the inputs are. Exponents are differences that are at most 0 wherever their result is read, so nothing overflows.
// Sums run in the same order on every path; AVX-512 and AVX2 return the same bits. The base path has no fused multiply-add
// (in software it would be a hundred times slower), so it differs from them by rounding.
#include "common.h"

#include <atomic>
#include <cstdlib>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lmlab {
namespace retention {

struct Tokens {  // [b, h, t, width] whose last axis is contiguous
    const void* data;
    int64_t b, h, t;  // strides, in elements
    template <class T> const T* at(int64_t which, int64_t heads) const { return (const T*)data + which / heads * b + which % heads * h; }
};

struct Call {  // the fields of `_Call` in retention.py; all but Tokens are contiguous
    Tokens q, k, v, dout;
    const float *log_gamma, *state, *dstate_out;  // state may be null
    void *o, *dq, *dk, *dv;
    float *state_out, *dlog_gamma, *dstate;
    int64_t n, h, t, d, e, chunk;  // n: batch times heads
    float scale;
    int32_t half, threads;
};

enum { FULL, BELOW, ABOVE };

LMLAB_INLINE int64_t up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Scratch {  // hands out memory, or without any counts how much is needed
    float* memory;
    int64_t used;
    float* operator()(int64_t n) { float* p = memory + used; used += up(n); return p; }
};

#define ZIP(...) __builtin_shufflevector(a, b, __VA_ARGS__)

namespace base {
constexpr int L = 4, ROWS = 4;
#include "retention.h"
LMLAB_INLINE V madd(V a, V b, V c) { return a * b + c; }
LMLAB_INLINE Pair zip(V a, V b) { return {ZIP(0, 4, 1, 5), ZIP(2, 6, 3, 7)}; }
}  // namespace base

#if defined(__x86_64__)
TARGET_BEGIN("avx2,fma")
namespace avx2 {
constexpr int L = 8, ROWS = 4;
#include "retention.h"
LMLAB_INLINE V madd(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
LMLAB_INLINE Pair zip(V a, V b) { return {ZIP(0, 8, 1, 9, 2, 10, 3, 11), ZIP(4, 12, 5, 13, 6, 14, 7, 15)}; }
}  // namespace avx2
TARGET_END

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
constexpr int L = 16, ROWS = 8;
#include "retention.h"
LMLAB_INLINE V madd(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LMLAB_INLINE Pair zip(V a, V b) {
    return {ZIP(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), ZIP(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
}
}  // namespace avx512
TARGET_END
#define PICK(f) (level == AVX512 ? avx512::f : level == AVX2 ? avx2::f : base::f)
#else
#define PICK(f) base::f
#endif

// Floats that one (batch, head) needs: a few chunks, and for the backward the state before each chunk
static int64_t needed(const Call& c, bool backward) {
    int64_t d = c.d, e = c.e, dp = up(d), ep = up(e), cp = up(c.chunk), chunks = (c.t + c.chunk - 1) / c.chunk;
    int64_t forward = 3 * cp + c.chunk * dp + d * cp + c.chunk * (d + cp) + (d + c.chunk) * ep + c.chunk * ep;
    int64_t rest = 4 * cp + c.chunk * (2 * (e + cp) + d + cp) + 2 * (e + c.chunk) * dp + (d + c.chunk) * ep +
                   (dp > ep ? dp : ep) * (cp + c.chunk) + c.chunk * (cp + dp) + (chunks + 1) * d * ep + 3 * cp;
    return (backward ? rest : forward) + 20 * LANES;  // each piece is rounded up
}

static int run(const Call& c, bool backward) {
    auto one = backward ? (c.half ? PICK(backward_one<bf16>) : PICK(backward_one<float>))
                        : (c.half ? PICK(forward_one<bf16>) : PICK(forward_one<float>));
    size_t bytes = needed(c, backward) * sizeof(float);
    std::atomic<int> failed(0);
#pragma omp parallel num_threads(c.threads) if (c.threads > 1 && c.n > 1)
    {
        float* memory = (float*)calloc(bytes, 1);  // zeros: what pads a row to a full vector must not be a NaN
        if (!memory) failed = 1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.n; i++)
            if (memory) one(c, i, memory);
        free(memory);
    }
    return failed;
}

}  // namespace retention
}  // namespace lmlab

// 0, or 1 when there was no memory for the work; n, t, d and e are at least 1
LMLAB_API int lmlab_retention(const lmlab::retention::Call* c, int backward) { return lmlab::retention::run(*c, backward); }
