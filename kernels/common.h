// What every kernel file shares: sixteen lanes of float or int, one body compiled for several instruction sets, run-time choice.
//
// A kernel is written once, in GCC/clang vector types, as an always_inline body. LMLAB_DISPATCH compiles that body once for
// each instruction set and picks one when called. Nothing is compiled with -march=native: the library runs on any machine of
// its architecture. With contraction off (setup.py) every path does the same IEEE operations in the same order, so all
// paths return the same bits.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#ifdef _OPENMP
#include <omp.h>
#endif

#define LMLAB_API extern "C" __attribute__((visibility("default")))
#define LMLAB_INLINE static inline __attribute__((always_inline))

// GCC and clang say differently that everything up to TARGET_END may use these instructions. Lambdas need it said again by GCC.
#define DO(x) _Pragma(#x)
#if defined(__clang__)
#define TARGET_BEGIN(features) DO(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TARGET_END DO(clang attribute pop)
#else
#define TARGET_BEGIN(features) DO(GCC push_options) DO(GCC target(features))
#define TARGET_END DO(GCC pop_options)
#endif
#define LAMBDA __attribute__((always_inline))

namespace lmlab {

enum Level { BASE = 0, AVX2 = 1, AVX512 = 2 };
extern int level;  // the instruction set in use: the best this machine has, or what lmlab_set_level chose

constexpr int LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// name##_body<T> for each instruction set, and name##_pick<T>() for the one in use
#if defined(__x86_64__)
#define LMLAB_DISPATCH(name, params, args)                                                                              \
    template <class T> __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) static void name##_avx512 params { \
        name##_body<T> args;                                                                                            \
    }                                                                                                                   \
    template <class T> __attribute__((target("avx2"))) static void name##_avx2 params { name##_body<T> args; }          \
    template <class T> static void name##_base params { name##_body<T> args; }                                          \
    template <class T> static auto name##_pick() -> void(*) params {                                                    \
        return level == AVX512 ? name##_avx512<T> : level == AVX2 ? name##_avx2<T> : name##_base<T>;                    \
    }
#else
#define LMLAB_DISPATCH(name, params, args)                                                                              \
    template <class T> static void name##_base params { name##_body<T> args; }                                          \
    template <class T> static auto name##_pick() -> void(*) params { return name##_base<T>; }
#endif

// The forms of a kernel that this machine can run at the library's level, best first; each has a `name` and lives for ever
template <class Path> struct Paths {
    const Path* of[8];
    int count = 0;

    void add(const Path& p) { of[count++] = &p; }

    const Path* named(const char* name) const {  // the best for null; null when this machine has no such path
        for (int i = 0; i < count; i++)
            if (!name || !strcmp(name, of[i]->name)) return of[i];
        return nullptr;
    }

    const char* names() const {  // separated by spaces; valid until the thread asks again
        static thread_local std::string s;
        s.clear();
        for (int i = 0; i < count; i++) s += std::string(i ? " " : "") + of[i]->name;
        return s.c_str();
    }
};

// Memory of the calling thread that stays for the next call: fresh pages would cost more than the arithmetic of a small layer
struct Scratch {
    char* at = nullptr;
    size_t size = 0;
    ~Scratch() { free(at); }
    char* get(size_t bytes) {
        if (bytes <= size) return at;
        free(at);
        size = (bytes + 4095) & ~(size_t)4095;
        at = (char*)aligned_alloc(4096, size);
        if (!at) size = 0;
        return at;
    }
};

// bfloat16 as stored: the upper half of a float
struct bf16 { uint16_t bits; };

LMLAB_INLINE f32x16 load(const float* p) { f32x16 v; memcpy(&v, p, sizeof v); return v; }
LMLAB_INLINE void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }

LMLAB_INLINE f32x16 load(const bf16* p) {
    u16x16 h; memcpy(&h, p, sizeof h);
    return (f32x16)(__builtin_convertvector(h, u32x16) << 16);
}

LMLAB_INLINE void store(bf16* p, f32x16 v) {  // to nearest, ties to even; a NaN stays one
    u32x16 u = (u32x16)v;
    u32x16 r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u32x16 nan = (u >> 16) | 0x40;
    u16x16 h = __builtin_convertvector((u32x16)(v == v ? (i32x16)r : (i32x16)nan), u16x16);
    memcpy(p, &h, sizeof h);
}

template <class T> LMLAB_INLINE f32x16 load(const T* p, int n) {  // the first n lanes, zeros behind
    T part[LANES] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

template <class T> LMLAB_INLINE void store(T* p, f32x16 v, int n) {
    T part[LANES];
    store(part, v);
    memcpy(p, part, n * sizeof(T));
}

// exp in float32, below 2 ulp: x = n ln2 + r with |r| <= ln2/2, a polynomial in r, and the power of two applied in two
// halves, so that results run into denormals and infinity as they should. A NaN stays one.
LMLAB_INLINE f32x16 exp(f32x16 x) {
    const f32x16 zero = {};
    x = x < zero - 104.f ? zero - 104.f : x;
    x = x > zero + 89.f ? zero + 89.f : x;
    f32x16 shifted = x * 1.44269504088896341f + 12582912.f;  // 1.5 * 2^23: the nearest integer ends up in the low bits
    i32x16 n = (i32x16)shifted - 0x4b400000;
    f32x16 k = shifted - 12582912.f;
    f32x16 r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    i32x16 half = n >> 1;
    return p * (f32x16)((half + 127) << 23) * (f32x16)((n - half + 127) << 23);
}

}  // namespace lmlab
