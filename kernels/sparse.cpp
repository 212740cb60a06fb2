// Sparse activations: the largest of a token's features are kept, and a linear layer reads only the weights that belong to them.
//
// Selection is exact and sorts nothing: magnitudes order like their bits, so the bits of the smallest magnitude that stays are found
// from the highest down, each by counting how many features reach a candidate; of equal magnitudes the first ones stay. It works in
// integers on copies of the bits, so every instruction set makes the same choice.
//
// Weights lie by input, [in][out], so that a kept feature is one run of memory. Threads share the rows, not the inputs: every sum is
// formed by one thread in the order of the inputs, whatever the number of threads, and, as adding a zero changes nothing, whatever
// other tokens read the weights at the same time. Several tokens read the union of their columns once, not each its own, since
// reading is what takes the time.
//
// What stays is read in runs, and a machine's own prefetchers read on behind the end of each: where an input's weights are only
// 1 KiB, as in 2 bits for 4096 rows, half of the inputs at random take more than half of the time. Whole blocks of neighbours do not.
#include "common.h"

#include <algorithm>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lmlab {
namespace sparse {

constexpr int32_t INFINITE = 0x7f800000;  // the bits of infinity; those of a NaN, without the sign, are more
constexpr int COLUMNS = 16;               // that share one load and store of the sums
constexpr int TOGETHER = 8;               // tokens that read the weights together
constexpr int64_t SERIAL = 1 << 16;       // numbers below which another thread costs more than it brings

static int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

LMLAB_INLINE i32x16 lanes() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
LMLAB_INLINE i32x16 get(const int32_t* p) { i32x16 v; memcpy(&v, p, sizeof v); return v; }
LMLAB_INLINE void put(int32_t* p, i32x16 v) { memcpy(p, &v, sizeof v); }
template <class T> LMLAB_INLINE f32x16 some(const T* p, int64_t n) { return n >= LANES ? load(p) : load(p, (int)n); }

template <class T> LMLAB_INLINE f32x16 squared(f32x16 v) {  // relu(x)^2, rounded to the type that it is kept in
    v = v > 0.f ? v : f32x16{};
    T part[LANES];
    store(part, v * v);
    return load(part);
}

LMLAB_INLINE int32_t highest(i32x16 v) {
    int32_t m = v[0];
    for (int l = 1; l < LANES; l++) m = v[l] > m ? v[l] : m;
    return m;
}

// The bits of d magnitudes, -1 behind the last; `largest` is that of x itself, so a NaN shows in it
template <class T> LMLAB_INLINE void magnitudes_body(const T* x, int64_t d, bool square, int32_t* keys, int32_t* largest) {
    i32x16 most = {};
    for (int64_t i = 0; i < d; i += LANES) {
        f32x16 v = some(x + i, d - i);
        i32x16 m = (i32x16)v & 0x7fffffff;
        most = m > most ? m : most;
        if (square) m = (i32x16)squared<T>(v);
        put(keys + i, d - i >= LANES ? m : lanes() < (int32_t)(d - i) ? m : lanes() - lanes() - 1);
    }
    *largest = highest(most);
}
LMLAB_DISPATCH(magnitudes, (const T* x, int64_t d, bool square, int32_t* keys, int32_t* largest), (x, d, square, keys, largest))

LMLAB_INLINE int64_t reaching(const int32_t* keys, int64_t n, int32_t t) {  // how many keys are t or more
    i32x16 a = {}, b = {}, c = {}, e = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        a -= get(keys + i) >= t;
        b -= get(keys + i + LANES) >= t;
        c -= get(keys + i + 2 * LANES) >= t;
        e -= get(keys + i + 3 * LANES) >= t;
    }
    for (; i < n; i += LANES) a -= get(keys + i) >= t;
    a += b + c + e;
    int64_t sum = 0;
    for (int l = 0; l < LANES; l++) sum += a[l];
    return sum;
}

// -1 into all but `keep` of n keys: the largest stay, of equal ones the first. Keys have no bits but `high` to `low`.
template <class T> LMLAB_INLINE void top_body(int32_t* keys, int64_t n, int64_t keep, int high, int low) {
    if (keep >= n) return;
    int32_t t = 0;        // the smallest key that stays
    int64_t reach = n;
    for (int bit = high; bit >= low && reach > keep; bit--) {
        int64_t r = reaching(keys, n, t | 1 << bit);
        if (r >= keep) { t |= 1 << bit; reach = r; }
    }
    int64_t last = n;  // of keys equal to t those from here on go
    for (int64_t surplus = reach - keep; surplus;) {
        constexpr int64_t BLOCK = 16 * LANES;
        int64_t start = (last - 1) / BLOCK * BLOCK;
        int64_t here = 0;
        for (int64_t i = start; i < last; i++) here += keys[i] == t;
        if (here <= surplus) {
            surplus -= here;
            last = start;
        } else {
            while (surplus) surplus -= keys[--last] == t;
        }
    }
    for (int64_t i = 0; i < n; i += LANES) {
        i32x16 k = get(keys + i), from = lanes() < (int32_t)(minimum(last - i, LANES)) ? lanes() - lanes() + t : lanes() - lanes() + t + 1;
        put(keys + i, k >= from ? k : lanes() - lanes() - 1);
    }
}
LMLAB_DISPATCH(top, (int32_t* keys, int64_t n, int64_t keep, int high, int low), (keys, n, keep, high, low))

// source, or x, or relu(x)^2 where a key stayed, and zeros
template <class T> LMLAB_INLINE void masked_body(const T* x, const T* source, const int32_t* keys, int64_t d, bool square, T* out) {
    for (int64_t i = 0; i < d; i += LANES) {
        f32x16 v = some((source ? source : x) + i, d - i);
        if (square && !source) v = squared<T>(v);
        v = get(keys + i) >= 0 ? v : f32x16{};
        if (d - i >= LANES) store(out + i, v);
        else store(out + i, v, (int)(d - i));
    }
}
LMLAB_DISPATCH(masked, (const T* x, const T* source, const int32_t* keys, int64_t d, bool square, T* out), (x, source, keys, d, square, out))

enum Structure { TOPK = 0, GROUPS = 1, BLOCKS = 2 };
constexpr int64_t RANKED = 32;  // groups up to this length count for each member how many go before it

template <class T> struct Selection {
    int64_t d, keep, group;
    int structure;
    bool square;
    decltype(magnitudes_pick<T>()) magnitudes = magnitudes_pick<T>();
    decltype(top_pick<int>()) top = top_pick<int>();
    decltype(masked_pick<T>()) masked = masked_pick<T>();
    static constexpr int LOW = sizeof(T) == 2 ? 16 : 0;  // bfloat16 has no lower bits

    int64_t scratch() const { return 2 * padded(d) + LANES; }  // of int32

    void rank(int32_t* keys) const {
        uint64_t gone = 0;
        for (int64_t i = 0; i < group; i++) {
            int64_t before = 0;
            for (int64_t j = 0; j < group; j++) before += (keys[j] > keys[i]) | ((keys[j] == keys[i]) & (j < i));
            gone |= (uint64_t)(before >= keep) << i;
        }
        for (int64_t i = 0; i < group; i++)
            if (gone >> i & 1) keys[i] = -1;
    }

    void groups(int32_t* keys) const {
        int32_t* part = keys + padded(d);
        for (int64_t g = 0; g < d; g += group) {
            if (group <= RANKED) { rank(keys + g); continue; }
            std::fill(part + group, part + padded(group), -1);
            memcpy(part, keys + g, group * sizeof *keys);
            top(part, group, keep, 30, LOW);
            memcpy(keys + g, part, group * sizeof *keys);
        }
    }

    void blocks(int32_t* keys) const {  // sums in double: exact, so the same in any order, where magnitudes are not 2^20 apart
        int32_t* score = keys + padded(d);
        int64_t n = d / group;
        std::fill(score + n, score + padded(n), -1);
        for (int64_t b = 0; b < n; b++) {
            double sum = 0;
            for (int64_t i = 0; i < group; i++) {
                float v;
                memcpy(&v, keys + b * group + i, 4);
                sum += v;
            }
            float mean = (float)(sum / group);
            memcpy(score + b, &mean, 4);
        }
        top(score, n, keep, 30, 0);
        for (int64_t b = 0; b < n; b++)
            if (score[b] < 0) std::fill(keys + b * group, keys + (b + 1) * group, -1);
    }

    bool one(const T* x, const T* source, T* out, int32_t* keys) const {  // false: x holds a NaN
        int32_t largest;
        magnitudes(x, d, square, keys, &largest);
        if (largest > INFINITE) return false;
        if (structure == GROUPS) groups(keys);
        else if (structure == BLOCKS) blocks(keys);
        else top(keys, d, keep, 30, LOW);
        masked(x, source, keys, d, square, out);
        return true;
    }
};

static char* aligned(std::vector<char>& memory, size_t bytes) {  // null when there is none
    try {
        if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
    return (char*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
}
static thread_local std::vector<char> memory;  // stays for the next call: fresh pages would cost more than the work

template <class T> static int sparsify(const Selection<T>& s, const T* x, const T* source, T* out, int64_t n, int threads) {
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, std::min(n, n * s.d / SERIAL)));
    int32_t* keys = (int32_t*)aligned(memory, threads * s.scratch() * sizeof(int32_t));
    if (!keys) return -2;
    int bad = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : bad) schedule(static)
    for (int64_t t = 0; t < n; t++) {
#ifdef _OPENMP
        int32_t* mine = keys + omp_get_thread_num() * s.scratch();
#else
        int32_t* mine = keys;
#endif
        bad += !s.one(x + t * s.d, source ? source + t * s.d : nullptr, out + t * s.d, mine);
    }
    return bad ? -3 : 0;
}

// ---- linear layers

enum Format { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, TERNARY = 3 };
constexpr int ROWS[] = {16, 32, 64, 256};     // of a chunk of 64 bytes
constexpr int ZERO[] = {0, 0, 128, 1};        // what a weight's code is above the weight

struct Token { float ratio; int32_t sum; };  // what one step of its int8 values is worth, and their sum

struct Walk {  // the columns that some token reads, for the chunks of rows of one thread
    const uint8_t* const* columns;  // padded to whole groups of COLUMNS, and to what is fetched ahead
    int64_t count;                  // whole groups
    const void* x;                  // [column][token] float, or [column / 4][token][4] int8
    int tokens;
    int64_t first, last, ahead;     // chunks; chunks that are fetched before they are needed
    void* sums;                     // [chunk][token][row]
};
typedef void (*Walker)(const Walk&);
struct Path { const char* name; Walker walk[2][2]; };  // [int8, ternary][one token, several]

// Largest magnitude of a token: the bits of a float
template <class T> LMLAB_INLINE void largest_body(const T* x, int64_t k, int32_t* largest) {
    i32x16 most = {};
    for (int64_t i = 0; i < k; i += LANES) {
        i32x16 m = (i32x16)some(x + i, k - i) & 0x7fffffff;
        most = m > most ? m : most;
    }
    *largest = highest(most);
}
LMLAB_DISPATCH(largest, (const T* x, int64_t k, int32_t* largest), (x, k, largest))

typedef int8_t i8x16 __attribute__((vector_size(16)));

// A token in int8, and the magnitudes of that with -1 behind the last. In the order in which torch computes 127 / x, so that
// values agree with those of a quantised model.
template <class T> LMLAB_INLINE void quantize_body(const T* x, int64_t k, float magnitude, int8_t* q, int32_t* keys) {
    const float scale = 1 / magnitude * 127;
    for (int64_t i = 0; i < k; i += LANES) {
        f32x16 shifted = some(x + i, k - i) * scale + 12582912.f;  // 1.5 * 2^23: rounds to nearest even, the integer is in the low bits
        i32x16 n = (i32x16)shifted - 0x4b400000;
        i8x16 low = __builtin_convertvector(n, i8x16);
        memcpy(q + i, &low, sizeof low);
        i32x16 m = n < 0 ? -n : n;
        put(keys + i, lanes() < (int32_t)minimum(k - i, LANES) ? m : lanes() - lanes() - 1);
    }
}
LMLAB_DISPATCH(quantize, (const T* x, int64_t k, float magnitude, int8_t* q, int32_t* keys), (x, k, magnitude, q, keys))

// Zeros where a key is gone, also behind the last; returns the sum of what stays
template <class T> LMLAB_INLINE void kept_body(int8_t* q, const int32_t* keys, int64_t k, int32_t* sum) {
    i32x16 total = {};
    for (int64_t i = 0; i < k; i += LANES) {
        i8x16 v;
        memcpy(&v, q + i, sizeof v);
        i32x16 n = __builtin_convertvector(v, i32x16);
        n = get(keys + i) >= 0 ? n : i32x16{};
        total += n;
        v = __builtin_convertvector(n, i8x16);
        memcpy(q + i, &v, sizeof v);
    }
    int32_t all = 0;
    for (int l = 0; l < LANES; l++) all += total[l];
    *sum = all;
}
LMLAB_DISPATCH(kept, (int8_t* q, const int32_t* keys, int64_t k, int32_t* sum), (q, keys, k, sum))

// Sums in float32, one column after the other. Products are rounded before they are added, so that machines without a fused
// operation return the same bits; the time goes into reading weights.
template <class T> LMLAB_INLINE void floats_body(const Walk& a) {
    constexpr int WIDE = 64 / sizeof(T);
    const int64_t length = a.last - a.first, skip = a.ahead / length, rest = a.ahead % length;
    for (int64_t g = 0; g < a.count; g += COLUMNS) {
        const uint8_t* const* column = a.columns + g;
        const float* x = (const float*)a.x + g * a.tokens;
        for (int64_t c = 0; c < length; c++) {
            const int64_t at = 64 * (a.first + c);
            const bool wraps = c + rest >= length;
            const uint8_t* const* later = column + COLUMNS * (skip + wraps);
            const int64_t there = at + 64 * (rest - (wraps ? length : 0));
            for (int j = 0; j < COLUMNS; j++) __builtin_prefetch(later[j] + there);
            float* sums = (float*)a.sums + (a.first + c) * a.tokens * WIDE;
            for (int t = 0; t < a.tokens; t++)
                for (int h = 0; h < WIDE; h += LANES) {
                    f32x16 s = load(sums + t * WIDE + h);
#pragma GCC unroll 16
                    for (int j = 0; j < COLUMNS; j++) s += load((const T*)(column[j] + at) + h) * x[j * a.tokens + t];
                    store(sums + t * WIDE + h, s);
                }
        }
    }
}
LMLAB_DISPATCH(floats, (const Walk& a), (a))

// y = sums * ratio * scale + bias for the rows of one chunk; int8 sums lose what the codes lie above the weights
template <class T> LMLAB_INLINE void finish_body(const void* sums, int format, const Token* token, const float* scale, bool scales, const float* bias, int64_t row, int64_t rows, T* y) {
    for (int64_t r = 0; r < minimum(ROWS[format], rows - row); r += LANES) {
        const int64_t width = minimum(rows - row - r, LANES);
        f32x16 out;
        if (format <= BFLOAT16) out = load((const float*)sums + r);
        else {
            i32x16 v = get((const int32_t*)sums + r);
            if (format == TERNARY) v >>= 2 * (int)(r / 64);  // exact: plane p came out 4^p times as large
            f32x16 s = scales ? some(scale + row + r, width) : *scale - f32x16{};
            out = __builtin_convertvector(v - ZERO[format] * token->sum, f32x16) * token->ratio * s;
        }
        if (bias) out += some(bias + row + r, width);
        if (width == LANES) store(y + row + r, out);
        else store(y + row + r, out, (int)width);
    }
}
LMLAB_DISPATCH(finish, (const void* sums, int format, const Token* token, const float* scale, bool scales, const float* bias, int64_t row, int64_t rows, T* y), (sums, format, token, scale, scales, bias, row, rows, y))

namespace base {  // any machine with a compiler
constexpr int L = 4, QUADS = 1;
#include "sparse.h"
LMLAB_INLINE V dot(V sums, V codes, V x) {
    typedef uint32_t U __attribute__((vector_size(16)));
    for (int j = 0; j < 4; j++) sums += (V)((U)codes << (24 - 8 * j) >> 24) * ((V)((U)x << (24 - 8 * j)) >> 24);
    return sums;
}
LMLAB_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, V* out) {
    uint8_t bytes[64];
    for (int i = 0; i < 16; i++) bytes[4 * i] = a[i], bytes[4 * i + 1] = b[i], bytes[4 * i + 2] = c[i], bytes[4 * i + 3] = d[i];
    memcpy(out, bytes, sizeof bytes);
}
}  // namespace base

#if defined(__x86_64__)
// Within 16 bytes, as all these instructions work: the order in which rows are stored undoes it
#define INTERLEAVE(vec, load, op)                                                                                       \
    LMLAB_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, V* out) {      \
        vec va = load((const vec*)a), vb = load((const vec*)b), vc = load((const vec*)c), vd = load((const vec*)d);     \
        vec ab = op##_unpacklo_epi8(va, vb), cd = op##_unpacklo_epi8(vc, vd);                                           \
        vec AB = op##_unpackhi_epi8(va, vb), CD = op##_unpackhi_epi8(vc, vd);                                           \
        out[0] = (V)op##_unpacklo_epi16(ab, cd), out[1] = (V)op##_unpackhi_epi16(ab, cd);                               \
        out[2] = (V)op##_unpacklo_epi16(AB, CD), out[3] = (V)op##_unpackhi_epi16(AB, CD);                               \
    }

TARGET_BEGIN("avx2")
namespace avx2 {
constexpr int L = 8, QUADS = 1;
#include "sparse.h"
LMLAB_INLINE V dot(V sums, V codes, V x) {  // in two halves: unsigned times signed bytes in pairs would not fit int16
    __m256i c = (__m256i)codes, q = (__m256i)x, low = _mm256_set1_epi32(0x00ff00ff);
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, low), _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(q, 8));
    return sums + (V)even + (V)odd;
}
INTERLEAVE(__m256i, _mm256_loadu_si256, _mm256)
}  // namespace avx2
TARGET_END

#if defined(__clang__) || __GNUC__ >= 11  // older compilers do not know these instructions
#define LMLAB_AVXVNNI
TARGET_BEGIN("avx2,avxvnni")
namespace avxvnni {
constexpr int L = 8, QUADS = 1;
#include "sparse.h"
LMLAB_INLINE V dot(V sums, V codes, V x) { return (V)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, (__m256i)x); }
INTERLEAVE(__m256i, _mm256_loadu_si256, _mm256)
}  // namespace avxvnni
TARGET_END
#endif

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace avx512 {
constexpr int L = 16, QUADS = 4;
#include "sparse.h"
LMLAB_INLINE V dot(V sums, V codes, V x) { return (V)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, (__m512i)x); }
INTERLEAVE(__m512i, _mm512_loadu_si512, _mm512)
}  // namespace avx512
TARGET_END
#endif

static Paths<Path> paths() {
    Paths<Path> p;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (level >= AVX512 && __builtin_cpu_supports("avx512vnni")) {  // a table is filled by code that uses what the path uses
        static const Path wide = avx512::path("avx512");
        p.add(wide);
    }
#ifdef LMLAB_AVXVNNI
    if (level >= AVX2 && __builtin_cpu_supports("avxvnni")) {
        static const Path vnni = avxvnni::path("avxvnni");
        p.add(vnni);
    }
#endif
    if (level >= AVX2) {
        static const Path plain = avx2::path("avx2");
        p.add(plain);
    }
#endif
    static const Path any = base::path("base");
    p.add(any);
    return p;
}

// Which of k entries are not zero, and the entries; room for a whole vector behind the last is needed
template <class Q> static int64_t nonzero_base(const Q* x, int64_t k, int32_t* index, Q* value) {
    int64_t n = 0;
    for (int64_t i = 0; i < k; i++) {
        Q v = x[i];
        index[n] = (int32_t)i;
        value[n] = v;
        n += v != 0;
    }
    return n;
}

#if defined(__x86_64__)
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl")
static __m512i bits_of(const float* x) { return _mm512_loadu_si512(x); }
static __m512i bits_of(const int8_t* x) { return _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)x)); }
static __mmask16 nonzero_lanes(__m512i v, const float*) { return _mm512_cmp_ps_mask(_mm512_castsi512_ps(v), _mm512_setzero_ps(), _CMP_NEQ_UQ); }
static __mmask16 nonzero_lanes(__m512i v, const int8_t*) { return _mm512_test_epi32_mask(v, v); }
static void put_values(float* to, __m512i v) { _mm512_storeu_si512(to, v); }
static void put_values(int8_t* to, __m512i v) { _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, v)); }

template <class Q> static int64_t nonzero_avx512(const Q* x, int64_t k, int32_t* index, Q* value) {  // x padded with zeros
    int64_t n = 0;
    __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t at = 0; at < k; at += LANES) {
        __m512i v = bits_of(x + at);
        __mmask16 m = nonzero_lanes(v, x);
        _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(m, i));
        put_values(value + n, _mm512_maskz_compress_epi32(m, v));
        n += __builtin_popcount(m);
        i = _mm512_add_epi32(i, _mm512_set1_epi32(LANES));
    }
    return n;
}
TARGET_END
#endif

template <class Q> static int64_t nonzero(const Q* x, int64_t k, int32_t* index, Q* value) {
#if defined(__x86_64__)
    if (level >= AVX512) return nonzero_avx512(x, k, index, value);
#endif
    return nonzero_base(x, k, index, value);
}

struct Layer {  // as the caller lays it out; the fields of `_Layer` in sparse.py
    const uint8_t* columns;
    const float* scale;  // one, or one a row; null for float formats
    const float* bias;   // one a row, or null
    void* y;             // tokens x rows
    int64_t rows, stride;  // bytes from one column to the next
    int32_t scales, format;
};

constexpr int64_t AHEAD = 8192;  // bytes of weights that are fetched before they are needed

template <class T> struct Call {
    const Path& path;
    const Layer& m;
    int64_t k, keep;  // 0: every input that is not zero
    int threads;
    Selection<T> selection;
    decltype(largest_pick<T>()) largest = largest_pick<T>();
    decltype(quantize_pick<T>()) quantize = quantize_pick<T>();
    decltype(kept_pick<int>()) kept = kept_pick<int>();
    decltype(masked_pick<float>()) masked = masked_pick<float>();
    decltype(finish_pick<T>()) finish = finish_pick<T>();

    bool integer() const { return m.format >= INT8; }

    // A token's kept values in `row`, zeros elsewhere. False: no order of magnitudes, since it holds a NaN.
    bool token(const T* x, int8_t* row, int32_t* keys, Token* about) const {
        int32_t bits;
        largest(x, k, &bits);
        if (keep && bits > INFINITE) return false;
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude = magnitude > 1e-5f ? magnitude : 1e-5f;
        *about = {magnitude / 127, 0};
        if (bits >= INFINITE) {  // cannot pass for a number
            memset(row, 0, padded(k));
            about->ratio = __builtin_nanf("");
            return true;
        }
        quantize(x, k, magnitude, row, keys);
        if (keep) selection.top(keys, k, keep, 6, 0);
        kept(row, keys, k, &about->sum);
        return true;
    }

    bool token(const T* x, float* row, int32_t* keys, Token*) const {
        if (keep) {
            int32_t bits;
            selection.magnitudes(x, k, false, keys, &bits);
            if (bits > INFINITE) return false;
            selection.top(keys, k, keep, 30, Selection<T>::LOW);
        }
        for (int64_t i = 0; i < k; i += LANES) {
            f32x16 v = some(x + i, k - i);
            if (keep) v = get(keys + i) >= 0 ? v : f32x16{};
            lmlab::store(row + i, v);  // zeros behind the last
        }
        return true;
    }

    // Up to TOGETHER tokens
    template <class Q> int tile(const T* x, T* y, int tokens) const {
        const int64_t wide = padded(k), chunks = (m.rows + ROWS[m.format] - 1) / ROWS[m.format];
        const int64_t ahead = std::max<int64_t>(1, AHEAD / 64 / COLUMNS), most = wide + COLUMNS * (ahead + 3);
        const int64_t sizes[] = {wide * 4, TOGETHER * (int64_t)sizeof(Token), wide * tokens * (int64_t)sizeof(Q), most * 4, most * 8,
                                 most * tokens * (int64_t)sizeof(Q), chunks * ROWS[m.format] * tokens * 4};
        int64_t total = 0;
        for (int64_t s : sizes) total += (s + 63) & ~63;
        char* at = aligned(memory, total);
        if (!at) return -2;
        char* parts[7];
        for (int i = 0; i < 7; i++) parts[i] = at, at += (sizes[i] + 63) & ~63;
        int32_t *keys = (int32_t*)parts[0], *index = (int32_t*)parts[3];
        Token* about = (Token*)parts[1];
        Q *rows = (Q*)parts[2], *values = (Q*)parts[5];
        const uint8_t** columns = (const uint8_t**)parts[4];
        for (int t = 0; t < tokens; t++)
            if (!token(x + t * k, rows + t * wide, keys, about + t)) return -3;
        int64_t count;
        if (tokens == 1) count = nonzero(rows, k, index, values);
        else {  // the union: a column is read once for all
            int8_t* any = (int8_t*)keys;
            memset(any, 0, wide);
            for (int t = 0; t < tokens; t++)
                for (int64_t i = 0; i < k; i++) any[i] |= rows[t * wide + i] != 0;
            count = nonzero(any, k, index, any + wide);
        }
        const int64_t whole = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
        if (tokens == 1) std::fill(values + count, values + whole, (Q)0);
        else {
            constexpr int PACK = sizeof(Q) == 1 ? 4 : 1;  // neighbours of one token
            for (int64_t j = 0; j < whole; j++)
                for (int t = 0; t < tokens; t++)
                    values[(j / PACK * tokens + t) * PACK + j % PACK] = j < count ? rows[t * wide + index[j]] : (Q)0;
        }
        for (int64_t j = 0; j < count; j++) columns[j] = m.columns + m.stride * index[j];
        std::fill(columns + count, columns + whole + COLUMNS * (ahead + 2), m.columns);
        const Walker walk = m.format == FLOAT32 ? floats_pick<float>() : m.format == BFLOAT16 ? floats_pick<bf16>() : path.walk[m.format - INT8][tokens > 1];
        const int crew = (int)std::max<int64_t>(1, std::min<int64_t>({threads, chunks, count * m.stride / SERIAL}));
        char* sums = parts[6];
        const int64_t size = ROWS[m.format] * tokens * 4;  // of the sums of a chunk
#pragma omp parallel for num_threads(crew) if (crew > 1) schedule(static)
        for (int part = 0; part < crew; part++) {
            const int64_t first = chunks * part / crew, last = chunks * (part + 1) / crew;
            memset(sums + first * size, 0, (last - first) * size);
            walk({columns, whole, values, tokens, first, last, ahead, sums});
            for (int64_t c = first; c < last; c++)
                for (int t = 0; t < tokens; t++)
                    finish(sums + c * size + t * ROWS[m.format] * 4, m.format, about + t, m.scale, m.scales, m.bias, c * ROWS[m.format], m.rows, y + t * m.rows);
        }
        return 0;
    }
};

template <class T> static int linear(const Path& path, const Layer& m, const void* x, int64_t n, int64_t k, int64_t keep, int threads) {
    if (!m.rows) return 0;
    Call<T> call = {path, m, k, keep, threads, {k, keep, k, TOPK, false}};
    for (int64_t t = 0; t < n; t += TOGETHER) {
        const int tokens = (int)minimum(TOGETHER, n - t);
        const T* from = (const T*)x + t * k;
        T* to = (T*)m.y + t * m.rows;
        if (int failed = call.integer() ? call.template tile<int8_t>(from, to, tokens) : call.template tile<float>(from, to, tokens)) return failed;
    }
    return 0;
}

}  // namespace sparse
}  // namespace lmlab

using namespace lmlab;

LMLAB_API const char* lmlab_sparse_paths() { return sparse::paths().names(); }  // for int8 and ternary weights

// x, source (or null) and out: n x d float (half = 0) or bf16 (half = 1). structure: 0 keep of d, 1 keep of every group, 2 keep blocks
// of group. 0: done; -2: no memory; -3: x holds a NaN
LMLAB_API int lmlab_sparse_topk(const void* x, const void* source, void* out, int64_t n, int64_t d, int half, int64_t keep, int64_t group, int structure, int square, int threads) {
    if (half) return sparse::sparsify<bf16>({d, keep, group, structure, square != 0}, (const bf16*)x, (const bf16*)source, (bf16*)out, n, threads);
    return sparse::sparsify<float>({d, keep, group, structure, square != 0}, (const float*)x, (const float*)source, (float*)out, n, threads);
}

// x: n x k float (half = 0) or bf16 (half = 1), as y is. keep = 0: all inputs that are not zero. path: null for the best.
// 0: done; -1: this machine has no such path; -2: no memory; -3: x holds a NaN and something is to be kept
LMLAB_API int lmlab_sparse_linear(const void* x, int64_t n, int64_t k, int half, int64_t keep, const void* layer, int threads, const char* path) {
    const sparse::Path* p = sparse::paths().named(path);
    if (!p) return -1;
    return (half ? sparse::linear<bf16> : sparse::linear<float>)(*p, *(const sparse::Layer*)layer, x, n, k, keep, threads);
}
