// What the machine can do: the instruction sets it has, how fast it reads memory, how fast it multiplies and adds.
// The loops here are ceilings to hold kernels against, and the plain read is also the smallest example of a kernel.
#include "common.h"

#include <algorithm>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lmlab {

static bool has(Level l) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (l == AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    if (l == AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return l == BASE;
}

static const char* names[] = {"base", "avx2", "avx512"};
static int best() { return has(AVX512) ? AVX512 : has(AVX2) ? AVX2 : BASE; }
int level = best();

static bool supports(const char* feature) {
    std::string f = feature;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (f == "fma") return has(AVX2);
    if (f == "avx512_vnni") return has(AVX512) && __builtin_cpu_supports("avx512vnni");
    if (f == "avx512_bf16") return has(AVX512) && __builtin_cpu_supports("avx512bf16");
    if (f == "avx512_vbmi") return has(AVX512) && __builtin_cpu_supports("avx512vbmi");
#elif defined(__aarch64__)
    if (f == "neon") return true;
#endif
    return false;
}

static const char* features[] = {"fma", "avx512_vnni", "avx512_bf16", "avx512_vbmi", "neon"};

// The sum of n 64-bit words: touches every byte once, and says whether it did. The words may start at any address.
// Four streams at once keep more of the memory's banks and the hardware's prefetchers busy than one does (1.15 times as fast
// where this was measured), and software prefetch adds nothing to that.
template <class T> LMLAB_INLINE void read_body(const char* p, int64_t n, T* result) {
    typedef T vec __attribute__((vector_size(64)));
    vec a = {}, b = {}, c = {}, d = {}, v;
    int64_t part = n * sizeof(T) / 4 & ~(int64_t)255;
    for (const char *q = p, *end = p + part; q < end; q += 256)
#pragma GCC unroll 4
        for (int stream = 0; stream < 4; stream++) {
            const char* s = q + stream * part;
            memcpy(&v, s, 64); a += v;
            memcpy(&v, s + 64, 64); b += v;
            memcpy(&v, s + 128, 64); c += v;
            memcpy(&v, s + 192, 64); d += v;
        }
    a += b + c + d;
    T sum = 0, word;
    for (unsigned l = 0; l < 64 / sizeof(T); l++) sum += a[l];
    for (const char *q = p + 4 * part, *end = p + n * sizeof(T); q < end; q += sizeof(T)) { memcpy(&word, q, sizeof word); sum += word; }
    *result = sum;
}
LMLAB_DISPATCH(read, (const char* p, int64_t n, T* result), (p, n, result))

// Peaks: twelve independent accumulators hide the latency; named, so that no compiler keeps them in memory.
#define TIMES12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define LMLAB_PEAK(name, features, vec, start, step)                                                                    \
    features static float name(int64_t n) {                                                                             \
        vec a0 = start(0), a1 = start(1), a2 = start(2), a3 = start(3), a4 = start(4), a5 = start(5), a6 = start(6),    \
            a7 = start(7), a8 = start(8), a9 = start(9), a10 = start(10), a11 = start(11);                              \
        for (int64_t i = 0; i < n; i++) { TIMES12(step) }                                                               \
        vec s = (a0 + a1 + a2 + a3) + (a4 + a5 + a6 + a7) + (a8 + a9 + a10 + a11);                                      \
        return (float)s[0];                                                                                             \
    }

#if defined(__x86_64__)
#define STEP(k) a##k = _mm512_fmadd_ps(a##k, _mm512_set1_ps(0.999f), _mm512_set1_ps(0.001f));
LMLAB_PEAK(fma_avx512, __attribute__((target("avx512f"))), __m512, _mm512_set1_ps, STEP)
#undef STEP
#define STEP(k) a##k = _mm256_fmadd_ps(a##k, _mm256_set1_ps(0.999f), _mm256_set1_ps(0.001f));
LMLAB_PEAK(fma_avx2, __attribute__((target("avx2,fma"))), __m256, _mm256_set1_ps, STEP)
#undef STEP
#define STEP(k) a##k = _mm512_dpbf16_ps(a##k, (__m512bh)_mm512_set1_epi16(0x3f80), (__m512bh)_mm512_set1_epi16(0x3f80));
LMLAB_PEAK(bf16_avx512, __attribute__((target("avx512f,avx512bw,avx512bf16"))), __m512, _mm512_set1_ps, STEP)
#undef STEP
#define STEP(k) a##k = _mm512_dpbusd_epi32(a##k, _mm512_set1_epi8(3), _mm512_set1_epi8(-1));
LMLAB_PEAK(vnni_avx512, __attribute__((target("avx512f,avx512vnni"))), __m512i, _mm512_set1_epi32, STEP)
#undef STEP
#elif defined(__aarch64__)
#define STEP(k) a##k = vfmaq_f32(vdupq_n_f32(0.001f), a##k, vdupq_n_f32(0.999f));
LMLAB_PEAK(fma_neon, , float32x4_t, vdupq_n_f32, STEP)
#undef STEP
#endif

struct Peak { const char* name; float (*run)(int64_t); int64_t operations; };  // operations of one turn of the loop

static std::vector<Peak> peaks() {
    std::vector<Peak> out;
#if defined(__x86_64__)
    if (has(AVX512)) out.push_back({"float32", fma_avx512, 12 * 16 * 2});
    else if (has(AVX2)) out.push_back({"float32", fma_avx2, 12 * 8 * 2});
    if (supports("avx512_bf16")) out.push_back({"bfloat16", bf16_avx512, 12 * 32 * 2});
    if (supports("avx512_vnni")) out.push_back({"int8", vnni_avx512, 12 * 64 * 2});
#elif defined(__aarch64__)
    out.push_back({"float32", fma_neon, 12 * 4 * 2});
#endif
    return out;
}

}  // namespace lmlab

using namespace lmlab;

LMLAB_API int lmlab_abi() { return 4; }  // counted up when a signature changes; cpu.py holds the number it was written for

LMLAB_API int lmlab_threads() {  // 1 when built without OpenMP
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 0;
#endif
}

// The instruction set in use, the sets this machine offers, and what else it has; space-separated, kept by the library.
LMLAB_API const char* lmlab_level() { return names[level]; }

LMLAB_API const char* lmlab_levels() {
    static std::string s;
    s.clear();
    for (int l = best(); l >= 0; l--)
        if (has((Level)l)) s += std::string(s.empty() ? "" : " ") + names[l];
    return s.c_str();
}

LMLAB_API const char* lmlab_features() {
    static std::string s;
    s.clear();
    for (auto f : features)
        if (supports(f)) s += std::string(s.empty() ? "" : " ") + f;
    return s.c_str();
}

LMLAB_API int lmlab_set_level(const char* name) {  // 0: done; -1: this machine has no such level
    for (int l = 0; l < 3; l++)
        if (!strcmp(name, names[l]) && has((Level)l)) { level = l; return 0; }
    return -1;
}

// The sum of all words of `bytes` bytes at p, modulo 2^64; a last partial word is filled with zeros.
LMLAB_API int64_t lmlab_read(const char* p, int64_t bytes, int threads) {
    auto f = read_pick<uint64_t>();
    int64_t words = bytes / 8, part = (words / threads + 511) & ~511;
    uint64_t sum = 0, last = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t from = std::min(words, t * part), to = t == threads - 1 ? words : std::min(words, from + part);
        uint64_t s;
        f(p + from * 8, to - from, &s);
        sum += s;
    }
    if (bytes % 8) memcpy(&last, p + words * 8, bytes % 8);
    return (int64_t)(sum + last);
}

// Runs `turns` turns of the loop called `name` on every thread; returns the operations done, 0 when there is no such loop.
LMLAB_API int64_t lmlab_peak(const char* name, int64_t turns, int threads) {
    float sum = 0;  // keeps the loops alive
    for (auto& p : peaks()) {
        if (strcmp(p.name, name)) continue;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
        for (int t = 0; t < threads; t++) sum += p.run(turns);
        return p.operations * turns * threads + (sum == 0.25f);
    }
    return 0;
}
