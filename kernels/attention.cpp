// Softmax attention in blocks: softmax(scale q k' + mask) v without the matrix of scores ever leaving the cache.
//
// A tile of queries meets one block of keys after the other. Each query keeps the largest score so far, the sum of its weights and its
// weighted values; a block with a larger score fades what came before (online softmax). Causal tiles end with the last key that they may
// see, so half the blocks are never touched, and only blocks that some query sees in part are masked. Keys and values are packed once
// for all tiles and for all query heads that share them. With one query there is nothing to share: keys and values are read as they
// stand, in parts that threads take independently and that are joined in the end.
#include "common.h"

#include <algorithm>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lmlab {
namespace attention {

struct Call {  // as the caller lays it out; the fields of `_Call` in attention.py
    const void *q, *k, *v;            // b h n d, b hk m d, b hk m dv
    void* out;                        // b h n dv
    const int64_t *start, *stop;      // b: keys from start up to stop may be seen; null for all
    int64_t b, h, hk, n, m, d, dv;
    int64_t qs[3], ks[3], vs[3], os[3];  // strides in numbers of b, h, n; the last axis has stride 1
    float scale;
    int32_t causal, half, wide;       // the last query sees up to the last key; bf16 instead of float; out is float all the same
    int64_t twin;                     // with one query: numbers from a key head to the one that odd query heads read, 0 for none

    // Weights are powers of two, and the largest score must have the largest weight: the sign of the scale goes to the queries.
    float factor() const { return scale == 0 ? 1.f : (scale < 0 ? -scale : scale) * 1.44269504088896341f; }
    float sign() const { return scale < 0 ? -1.f : scale == 0 ? 0.f : 1.f; }
    int64_t first(int64_t row) const { return start ? std::min(std::max<int64_t>(start[row], 0), m) : 0; }
    int64_t last(int64_t row) const { return stop ? std::min(std::max<int64_t>(stop[row], 0), m) : m; }
    int64_t limit(int64_t row, int64_t i) const { return causal ? std::min(last(row), m - n + i + 1) : last(row); }  // of query i
};

constexpr int64_t BLOCK = 128;  // keys
constexpr int64_t TILE = 96;    // queries, of all heads that share their keys
constexpr int64_t AHEAD = 12;   // keys that are fetched ahead when they are read as they stand

struct Packed { float *k, *v; bool* finite; };  // by blocks of keys

struct Kernels {  // of one instruction set and dtype
    void (*tile)(const Call&, int64_t b, int64_t head, int64_t row, int64_t count, Packed, bool ready, char* scratch);
    void (*pack)(const Call&, int64_t b, int64_t head, int64_t block, Packed);
    int64_t (*tile_bytes)(const Call&);
    int64_t (*key_floats)(const Call&);
    int64_t (*value_floats)(const Call&);
    void (*single_part)(const Call&, int64_t b, int64_t head, int64_t from, int64_t n, float* q, float* part);
    void (*single_join)(const Call&, int64_t b, int64_t head, int64_t parts, float* part);
    int64_t (*single_wide)(const Call&);
    int64_t (*single_size)(const Call&);
};
struct Path { const char* name; Kernels of[2]; };  // float, bf16

namespace base {  // any machine with a compiler: four lanes in plain C++
constexpr int L = 4, ROWS = 3, WIDE = 4, STEP = 1, KEPT = 10;
#include "attention.h"
LMLAB_INLINE V fma(V a, V b, V c) { return a * b + c; }
LMLAB_INLINE V dot(V sums, V a, V b) { return sums + a * b; }
LMLAB_INLINE V larger(V a, V b) { return a > b ? a : b; }
LMLAB_INLINE V exp2(V t) { return exp2_steps(t); }
}  // namespace base

#if defined(__x86_64__)

TARGET_BEGIN("avx2,fma")
namespace avx2 {
constexpr int L = 8, ROWS = 6, WIDE = 2, STEP = 1, KEPT = 10;
#include "attention.h"
LMLAB_INLINE V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
LMLAB_INLINE V dot(V sums, V a, V b) { return fma(a, b, sums); }
LMLAB_INLINE V larger(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
LMLAB_INLINE V exp2(V t) { return exp2_steps(t); }
}  // namespace avx2
TARGET_END

#define EXP2_AVX512(degree)                                                                                              \
    LMLAB_INLINE V exp2(V t) {                                                                                           \
        t = (V)_mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)t); /* a NaN comes through as the second */                 \
        V n = (V)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);                         \
        return (V)_mm512_scalef_ps((__m512)polynomial<degree>(t - n), (__m512)n);                                        \
    }

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
constexpr int L = 16, ROWS = 12, WIDE = 2, STEP = 1, KEPT = 26;
#include "attention.h"
LMLAB_INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LMLAB_INLINE V dot(V sums, V a, V b) { return fma(a, b, sums); }
LMLAB_INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
EXP2_AVX512(6)
}  // namespace avx512
TARGET_END

#if defined(__clang__) || __GNUC__ >= 10  // older compilers do not know these instructions
#define LMLAB_AVX512BF16
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512bf16 {
constexpr int L = 16, ROWS = 12, WIDE = 2, STEP = 2, KEPT = 26;
#include "attention.h"
LMLAB_INLINE V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LMLAB_INLINE V dot(V sums, V a, V b) { return (V)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b); }
LMLAB_INLINE V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
LMLAB_INLINE V pairs(V a, V b) { return (V)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
LMLAB_INLINE V low_pairs(V a, V b) { return (V)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
LMLAB_INLINE V high_pairs(V a, V b) { return (V)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
EXP2_AVX512(4)  // weights are rounded to 8 bits
}  // namespace avx512bf16
TARGET_END
#endif

#elif defined(__aarch64__)

namespace neon {
constexpr int L = 4, ROWS = 3, WIDE = 4, STEP = 1, KEPT = 26;
#include "attention.h"
LMLAB_INLINE V fma(V a, V b, V c) { return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
LMLAB_INLINE V dot(V sums, V a, V b) { return fma(a, b, sums); }
LMLAB_INLINE V larger(V a, V b) { return a > b ? a : b; }
LMLAB_INLINE V exp2(V t) { return exp2_steps(t); }
}  // namespace neon

#endif

static Paths<Path> paths() {
    Paths<Path> p;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level >= AVX512) {  // a table is filled by code that uses what the path uses
#ifdef LMLAB_AVX512BF16
        if (__builtin_cpu_supports("avx512bf16")) {
            static const Path pairs = {"avx512bf16", {avx512::kernels<float>(), avx512bf16::kernels<bf16>()}};
            p.add(pairs);
        }
#endif
        static const Path wide = {"avx512", {avx512::kernels<float>(), avx512::kernels<bf16>()}};
        p.add(wide);
    }
    if (level >= AVX2) {
        static const Path plain = {"avx2", {avx2::kernels<float>(), avx2::kernels<bf16>()}};
        p.add(plain);
    }
#elif defined(__aarch64__)
    static const Path neon = {"neon", {neon::kernels<float>(), neon::kernels<bf16>()}};
    p.add(neon);
#endif
    static const Path any = {"base", {base::kernels<float>(), base::kernels<bf16>()}};
    p.add(any);
    return p;
}

static thread_local Scratch scratch;

constexpr int64_t TOGETHER = 1 << 23;  // bytes of packed keys and values that are worked on at a time, to find them in the cache again
constexpr int64_t SERIAL = 1 << 16;    // products below which another thread costs more than it brings

static int64_t lines(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

static int several(const Call& a, const Kernels& f, int threads) {  // queries
    const int64_t blocks = (a.m + BLOCK - 1) / BLOCK, rows = a.n * (a.h / a.hk), tiles = (rows + TILE - 1) / TILE, heads = a.b * a.hk;
    const bool share = tiles > 1;  // one tile packs for itself
    const int64_t kept = share ? blocks : 1;
    const int64_t k = lines(4 * kept * f.key_floats(a)), v = lines(4 * kept * f.value_floats(a)), bytes = k + v + lines(kept);
    const int64_t own = lines(f.tile_bytes(a)) + (share ? 0 : bytes);
    const int64_t together = share ? std::min(heads, std::max<int64_t>(1, TOGETHER / bytes)) : heads;
    char* memory = scratch.get(own * threads + (share ? together * bytes : 0));
    if (!memory) return -2;
    auto packed = [=](char* at) { return Packed{(float*)at, (float*)(at + k), (bool*)(at + k + v)}; };
    for (int64_t from = 0; from < heads; from += together) {
        const int64_t count = std::min(together, heads - from);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#ifdef _OPENMP
            char* mine = memory + own * omp_get_thread_num();
#else
            char* mine = memory;
#endif
            char* all = memory + own * threads;
            if (share) {
#pragma omp for schedule(dynamic, 4)
                for (int64_t i = 0; i < count * blocks; i++)
                    f.pack(a, (from + i / blocks) / a.hk, (from + i / blocks) % a.hk, i % blocks, packed(all + i / blocks * bytes));
            }
            // The longest tiles first: what is left at the end is short.
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count * tiles; i++) {
                const int64_t t = tiles - 1 - i / count, head = i % count, first = rows * t / tiles, last = rows * (t + 1) / tiles;
                char* at = share ? all + head * bytes : mine + lines(f.tile_bytes(a));
                f.tile(a, (from + head) / a.hk, (from + head) % a.hk, first, last - first, packed(at), share, mine);
            }
        }
    }
    return 0;
}

static int single(const Call& a, const Kernels& f, int threads) {  // query
    const int64_t heads = a.b * a.hk, group = a.h / a.hk, parts = (a.m + BLOCK - 1) / BLOCK;
    const int64_t query = lines(4 * group * f.single_wide(a)), part = group * f.single_size(a);
    char* memory = scratch.get(threads * query + 4 * heads * parts * part + 64);
    if (!memory) return -2;
    float* all = (float*)(memory + threads * query);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#ifdef _OPENMP
        float* q = (float*)(memory + query * omp_get_thread_num());
#else
        float* q = (float*)memory;
#endif
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * parts; i++) {
            const int64_t head = i / parts, row = head / a.hk, at = i % parts * BLOCK;
            const int64_t from = std::max(at, a.first(row)), to = std::min(at + BLOCK, a.limit(row, 0));
            if (from < to) f.single_part(a, row, head % a.hk, from, to - from, q, all + i * part);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads; i++) {
            const int64_t row = i / a.hk, from = a.first(row), to = a.limit(row, 0);
            const int64_t first = from / BLOCK, last = from < to ? (to + BLOCK - 1) / BLOCK : first;
            f.single_join(a, row, i % a.hk, last - first, all + (i * parts + first) * part);
        }
    }
    return 0;
}

}  // namespace attention
}  // namespace lmlab

using namespace lmlab;

LMLAB_API const char* lmlab_attention_paths() { return attention::paths().names(); }

// path: null for the best. 0: done; -1: this machine has no such path; -2: no memory
LMLAB_API int lmlab_attention(const void* call, int threads, const char* path) {
    const attention::Call& a = *(const attention::Call*)call;
    const attention::Path* p = attention::paths().named(path);
    if (!p) return -1;
    if (!a.b || !a.h || !a.n || !a.dv) return 0;
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, a.b * a.h * a.n * a.m * (a.d + a.dv) / attention::SERIAL));
    const attention::Kernels& f = p->of[a.half];
    return a.n == 1 ? attention::single(a, f, threads) : attention::several(a, f, threads);
}
