// Linear layers with ternary weights and int8 activations: y = (W q) * ratio * scale + bias, where q are a token's activations in
// int8, scaled by its largest magnitude, ratio is what one step of q is worth, and W is -1, 0, 1 in 2 or 1.6 bits.
//
// Weights are stored as codes c = w + 1, and sum of w q = sum of c q - sum of q, in int32. No sum can wrap: |q| <= 127, a code is at
// most 2, and at most 128 on a fourth or 162 on a fifth of the inputs where codes are scaled, so sums of K <= 2^18 stay below
// 127 * 33 * 2^18 < 2^31.
#include "tiles.h"

#include <algorithm>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace lmlab {
namespace ternary {

namespace base {  // any machine with a compiler: four lanes in plain C++
constexpr int L = 4, KEPT = 10;
constexpr bool SCALED = false;
#include "ternary.h"
LMLAB_INLINE V dot(V sums, V codes, V x) {
    for (int j = 0; j < 4; j++) sums += (V)((U)codes << (24 - 8 * j) >> 24) * ((V)((U)x << (24 - 8 * j)) >> 24);
    return sums;
}
LMLAB_INLINE Split split(V bytes) { return split_digits(bytes); }
}  // namespace base

#if defined(__x86_64__)

TARGET_BEGIN("avx2")
namespace avx2 {
constexpr int L = 8, KEPT = 10;
constexpr bool SCALED = false;
#include "ternary.h"
LMLAB_INLINE V dot(V sums, V codes, V x) {  // pairs fit int16: codes are at most 2, so |pair| <= 508
    __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
    sums += (V)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    asm("" : "+x"(sums));  // keeps the compiler from regrouping the sums of a step, for which there are not registers enough
    return sums;
}
LMLAB_INLINE Split split(V bytes) { return split_digits(bytes); }
}  // namespace avx2
TARGET_END

#if defined(__clang__) || __GNUC__ >= 11  // older compilers do not know these instructions
#define LMLAB_AVXVNNI
TARGET_BEGIN("avx2,avxvnni")
namespace avxvnni {
constexpr int L = 8, KEPT = 14;
constexpr bool SCALED = true;
#include "ternary.h"
LMLAB_INLINE V dot(V sums, V codes, V x) { return (V)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x); }
LMLAB_INLINE Split split(V bytes) { return split_digits(bytes); }
}  // namespace avxvnni
TARGET_END
#endif

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace avx512 {
constexpr int L = 16, KEPT = 26;
constexpr bool SCALED = true;
#include "ternary.h"
LMLAB_INLINE V dot(V sums, V codes, V x) { return (V)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x); }
LMLAB_INLINE Split split(V bytes) { return split_digits(bytes); }
}  // namespace avx512
TARGET_END

struct Planes { uint8_t of[128]; };
constexpr Planes planes() {  // four base-3 digits as 2-bit codes; entries from 81 are never asked for
    Planes t = {};
    for (int i = 0; i < 81; i++) t.of[i] = i % 3 + i / 3 % 3 * 4 + i / 9 % 3 * 16 + i / 27 * 64;
    return t;
}
alignas(64) constexpr Planes PLANES = planes();

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
namespace avx512vbmi {
constexpr int L = 16, KEPT = 26;
constexpr bool SCALED = true;
#include "ternary.h"
LMLAB_INLINE V dot(V sums, V codes, V x) { return (V)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x); }
LMLAB_INLINE Split split(V bytes) {  // modulo 81 without a comparison: a difference below zero wraps to more than it started from
    B b = (B)bytes, once = b - 81, twice = b - 162;
    B four = (B)_mm512_min_epu8((__m512i)b, _mm512_min_epu8((__m512i)once, (__m512i)twice));
    __m512i low = _mm512_load_si512(PLANES.of), high = _mm512_load_si512(PLANES.of + 64);
    return {(V)_mm512_permutex2var_epi8(low, (__m512i)four, high), (V)(b - four)};
}
static Path better(Path p) {
    p.name = "avx512vbmi";
    add_sums<Trits>(p, std::make_integer_sequence<int, 12>());
    return p;
}
}  // namespace avx512vbmi
TARGET_END

#elif defined(__aarch64__)

#if defined(__clang__)
TARGET_BEGIN("dotprod")
#else
TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
namespace neon {
constexpr int L = 4, KEPT = 28;
constexpr bool SCALED = false;
#include "ternary.h"
LMLAB_INLINE V dot(V sums, V codes, V x) { return (V)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, (int8x16_t)x); }  // codes <= 2
LMLAB_INLINE Split split(V bytes) { return split_digits(bytes); }
}  // namespace neon
TARGET_END

static bool dot_product() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true;  // Apple's processors all have it
#endif
}

#endif

Paths<Path> paths() {
    Paths<Path> p;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level >= AVX512 && __builtin_cpu_supports("avx512vnni")) {  // a table is filled by code that uses what the path uses
        static const Path wide = avx512::path<12>("avx512");
        if (__builtin_cpu_supports("avx512vbmi")) {
            static const Path wider = avx512vbmi::better(wide);
            p.add(wider);
        }
        p.add(wide);
    }
#ifdef LMLAB_AVXVNNI
    if (level >= AVX2 && __builtin_cpu_supports("avxvnni")) {
        static const Path vnni = avxvnni::path<6>("avxvnni");
        p.add(vnni);
    }
#endif
    if (level >= AVX2) {
        static const Path plain = avx2::path<4>("avx2");
        p.add(plain);
    }
#elif defined(__aarch64__)
    if (dot_product()) {
        static const Path dotprod = neon::path<6>("neon");
        p.add(dotprod);
    }
#endif
    static const Path any = base::path<4>("base");
    p.add(any);
    return p;
}

static thread_local Scratch scratch;

constexpr int64_t CHUNK = 1 << 20;   // bytes of int8 activations that are worked on at a time, to find them in the cache again
constexpr int64_t SERIAL = 1 << 18;  // products below which another thread costs more than it brings

template <class T> struct Call {  // layers that read the same activations
    const Path& path;
    const Matrix* layers;
    int count;
    int64_t k, padded;
    const T* x;
    Token* tokens;  // of a chunk
    int8_t* q;      // of a chunk
    decltype(quantize_pick<T>()) quantize = quantize_pick<T>();
    decltype(finish_pick<T>()) finish = finish_pick<T>();

    int64_t tiles(int layer) const { return (layers[layer].rows + ROWS - 1) / ROWS; }

    void one_token(const Blocks& blocks, int64_t start, int64_t t) const {
        int64_t first = blocks.first(blocks.of(t)), size = blocks.first(blocks.of(t) + 1) - first;
        quantize(x + (start + t) * k, k, padded, q + first * padded + 4 * (t - first), 4 * size, tokens + t);
    }

    void one_tile(const Blocks& blocks, int64_t start, int64_t tile, int64_t block) const {
        int l = 0;
        for (; tile >= tiles(l); l++) tile -= tiles(l);
        const Matrix& m = layers[l];
        int64_t steps = (k + STEP[m.trits] - 1) / STEP[m.trits], first = blocks.first(block);
        int size = blocks.first(block + 1) - first;
        alignas(64) int32_t sums[ROWS * MOST];
        path.sums[m.trits][size - 1](m.codes + tile * steps * 4 * ROWS, q + first * padded, steps, sums);
        finish(sums, tokens + first, size, m, tile * ROWS, (T*)m.y + (start + first) * m.rows + tile * ROWS, m.rows);
    }

    void chunk(int64_t start, int64_t n, int threads) const {
        Blocks blocks = {n, (n + path.tokens - 1) / path.tokens};
        int64_t all = 0;
        for (int l = 0; l < count; l++) all += tiles(l);
        if (n == 1) one_token(blocks, start, 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            if (n > 1) {
#pragma omp for schedule(static)
                for (int64_t t = 0; t < n; t++) one_token(blocks, start, t);
            }
            // The blocks of a tile follow one another: a thread finds its codes in the cache for all but the first.
#pragma omp for schedule(static)
            for (int64_t i = 0; i < all * blocks.count; i++) one_tile(blocks, start, i / blocks.count, i % blocks.count);
        }
    }
};

template <class T> static int run(const Path& path, const Matrix* layers, int count, const void* x, int64_t n, int64_t k, int threads) {
    int64_t rows = 0, padded = std::max((k + STEP[0] - 1) / STEP[0] * STEP[0], (k + STEP[1] - 1) / STEP[1] * STEP[1]);
    for (int l = 0; l < count; l++) rows += layers[l].rows;
    if (!n || !rows) return 0;
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, n * rows * k / SERIAL));
    int64_t chunk = std::min(n, std::max<int64_t>(8, CHUNK / (padded + 1) / path.tokens) * path.tokens);
    int64_t head = (chunk * sizeof(Token) + 63) & ~63;
    char* memory = scratch.get(head + chunk * padded);
    if (!memory) return -2;
    Call<T> call = {path, layers, count, k, padded, (const T*)x, (Token*)memory, (int8_t*)memory + head};
    for (int64_t start = 0; start < n; start += chunk) call.chunk(start, std::min(chunk, n - start), threads);
    return 0;
}

}  // namespace ternary
}  // namespace lmlab

using namespace lmlab;

LMLAB_API const char* lmlab_ternary_paths() { return ternary::paths().names(); }

// x: n x k float (half = 0) or bf16 (half = 1), as every y is; `count` layers read it. path: null for the best.
// 0: done; -1: this machine has no such path; -2: no memory
LMLAB_API int lmlab_ternary_linear(const void* x, int64_t n, int64_t k, int half, const void* matrices, int count, int threads, const char* path) {
    const ternary::Path* p = ternary::paths().named(path);
    if (!p) return -1;
    return (half ? ternary::run<bf16> : ternary::run<float>)(*p, (const ternary::Matrix*)matrices, count, x, n, k, threads);
}
