// The body of the attention kernels for one instruction set. attention.cpp includes this file once for each, inside a namespace that
// has said before
//   L       float lanes of a vector
//   ROWS    queries of a tile in registers
//   WIDE    vectors of keys or of values' columns in such a tile
//   STEP    numbers of the sum that one lane takes at once: 1 (float32) or 2 (pairs of bfloat16)
//   KEPT    registers that sums of a single query may take
// and that defines behind it `fma`, `dot`, `larger` and `exp2`. Nothing here is shared between the namespaces, since each may use
// instructions that the others lack; for the same reason nothing here calls an inline function of the standard library.
//
// A unit is what one lane takes at once: 4 bytes, one float or a pair of bfloat16. Both products are sums over units:
//   scores[row][key]   = sum over units u of q[u][row] * k[u][key]        u: STEP neighbouring columns of a head
//   out[row][column]   = sum over units u of p[row][u] * v[u][column]     u: STEP neighbouring keys
// with the unit of the left side broadcast to all lanes. Keys and columns are packed in panels of PANEL lanes.

typedef float V __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef uint16_t H __attribute__((vector_size(2 * L)));

constexpr int PANEL = WIDE * L;
constexpr int64_t UNITS = BLOCK / STEP;  // of a block of keys

LMLAB_INLINE V fma(V a, V b, V c);     // a * b + c
LMLAB_INLINE V dot(V sums, V a, V b);  // sums + the products of STEP numbers a lane
LMLAB_INLINE V larger(V a, V b);
LMLAB_INLINE V exp2(V t);  // of numbers up to about 0; a NaN stays one

LMLAB_INLINE V all(float f) { return f - V{}; }
LMLAB_INLINE V vec(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
LMLAB_INLINE void put(void* p, V v) { memcpy(p, &v, sizeof v); }
LMLAB_INLINE V unit(const void* p) { int32_t i; memcpy(&i, p, 4); return (V)(i - I{}); }  // the same 4 bytes in every lane

template <int degree> LMLAB_INLINE V polynomial(V f) {  // 2^f for |f| <= 1/2, to a relative 2.7e-6 and 1.6e-8
    if constexpr (degree == 4)
        return fma(fma(fma(fma(f, all(0.00957010221f), all(0.0559178628f)), f, all(0.240247443f)), f, all(0.693121791f)), f, all(0.999999285f));
    V p = fma(fma(f, all(0.000153458124f), all(0.00133999309f)), f, all(0.00961848907f));
    return fma(fma(fma(fma(p, f, all(0.0555032864f)), f, all(0.240226462f)), f, all(0.693147182f)), f, all(1.f));
}

LMLAB_INLINE V exp2_steps(V t) {  // for machines without an instruction that multiplies by powers of two; below 2^-126 comes 0
    t = t < all(-127.f) ? all(-127.f) : t;
    V shifted = t + 12582912.f;  // 1.5 * 2^23: the nearest integer ends up in the low bits
    I n = (I)shifted - 0x4b400000;
    return polynomial<6>(t - (shifted - 12582912.f)) * (V)((n + 127) << 23);
}

LMLAB_INLINE V read(const float* p) { return vec(p); }
LMLAB_INLINE V read(const bf16* p) { H h; memcpy(&h, p, sizeof h); return (V)(__builtin_convertvector(h, U) << 16); }
template <class T> LMLAB_INLINE V read(const T* p, int64_t n) {  // the first n lanes, zeros behind
    if (n >= L) return read(p);
    T part[L] = {};
    if (n > 0) memcpy((void*)part, p, n * sizeof(T));
    return read(part);
}
LMLAB_INLINE void write(float* p, V v, int64_t n) { memcpy(p, &v, n * 4); }
LMLAB_INLINE void write(bf16* p, V v, int64_t n) {  // to nearest, ties to even; a NaN stays one
    U u = (U)v;
    U r = v == v ? (U)((u + 0x7fff + ((u >> 16) & 1)) >> 16) : (U)((u >> 16) | 0x40);
    H h = __builtin_convertvector(r, H);
    memcpy((void*)p, &h, n * 2);
}
template <class T> LMLAB_INLINE void put_out(const Call& a, int64_t at, V v, int64_t n) {
    if (a.wide) write((float*)a.out + at, v, n);
    else write((T*)a.out + at, v, n);
}

// Vectors whose lane l holds what stood across the lanes of x[l]: L horizontal sums (or maxima) for the price of little more than two.
struct Add { LMLAB_INLINE V of(V a, V b) { return a + b; } };
struct Larger { LMLAB_INLINE V of(V a, V b) { return larger(a, b); } };
template <class F, int W, int... i> LMLAB_INLINE V half(V a, V b, std::integer_sequence<int, i...>) {
    return F::of(__builtin_shufflevector(a, b, (i & W ? L + i : i)...), __builtin_shufflevector(a, b, (i & W ? L + (i ^ W) : (i ^ W))...));
}
template <class F, int W, int n> LMLAB_INLINE void halves(V* x) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) x[i] = half<F, W>(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, L>());
    if constexpr (n > 2) halves<F, 2 * W, n / 2>(x);
}
template <class F> LMLAB_INLINE V across(V* x) { halves<F, 1, L>(x); return x[0]; }

// ---- packing

LMLAB_INLINE uint32_t one(const float* p, int64_t n) { (void)n; uint32_t u; memcpy(&u, p, 4); return u; }
LMLAB_INLINE uint32_t one(const bf16* p, int64_t n) {  // a float, or a pair of which the second may be missing
    if (STEP == 1) return (uint32_t)p->bits << 16;
    uint32_t u = p[0].bits;
    if (n > 1) memcpy(&u, p, 4);
    return u;
}

LMLAB_INLINE uint32_t signed_unit(uint32_t x, float sign) {  // a unit times 1, -1 or 0
    if (sign == 1.f) return x;
    if (STEP == 1) {
        float f;
        memcpy(&f, &x, 4);
        f *= sign;
        memcpy(&x, &f, 4);
        return x;
    }
    if (sign < 0) return x ^ 0x80008000;
    for (uint32_t mask = 0x7f80; mask; mask = mask == 0x7f80 ? 0x7f800000 : 0)
        if ((x & mask) == mask) return 0x7fc07fc0;  // 0 times infinity; a score with a NaN is one
    return 0;
}

template <int W, int n, int... i> LMLAB_INLINE void turn_step(V* x, std::integer_sequence<int, i...>) {
#pragma GCC unroll 16
    for (int k = 0; k < L; k++)
        if (!(k & W)) {
            V a = x[k], b = x[k + W];
            x[k] = __builtin_shufflevector(a, b, (i & W ? L + (i ^ W) : i)...);
            x[k + W] = __builtin_shufflevector(a, b, (i & W ? L + i : (i ^ W))...);
        }
    if constexpr (W > 1) turn_step<W / 2, n>(x, std::integer_sequence<int, i...>());
}
LMLAB_INLINE void turn(V* x) { turn_step<L / 2, L>(x, std::make_integer_sequence<int, L>()); }  // transposes L vectors

template <class T> LMLAB_INLINE V units_of(const T* p) {  // L units that stand one after the other
    if (STEP == 2) return vec(p);
    return read(p);
}

// Keys [from, from + count) of a block to panels [unit][PANEL]; lanes behind the last key are zeros.
template <class T> static void pack_keys(const T* k, int64_t stride, int64_t count, int64_t d, float* to) {
    const int64_t units = (d + STEP - 1) / STEP, full = d / STEP / L * L;
    for (int64_t j = 0; j < BLOCK; j += L) {
        float* panel = to + j / PANEL * PANEL * units + j % PANEL;
        if (j >= count) {
            if (j / PANEL * PANEL < count)
                for (int64_t u = 0; u < units; u++) put(panel + u * PANEL, V{});
            continue;
        }
        for (int64_t u = 0; u < units; u += L) {
            V x[L];
#pragma GCC unroll 16
            for (int t = 0; t < L; t++) {
                const T* p = k + (j + t) * stride + u * STEP;
                if (j + t >= count) x[t] = V{};
                else if (u < full) x[t] = units_of(p);
                else {
                    uint32_t some[L] = {};
                    for (int64_t w = u; w < units; w++) some[w - u] = one(p + (w - u) * STEP, d - w * STEP);
                    x[t] = vec(some);
                }
            }
            turn(x);
            const int64_t n = units - u < L ? units - u : L;
            for (int64_t w = 0; w < n; w++) put(panel + (u + w) * PANEL, x[w]);
        }
    }
}

LMLAB_INLINE U raw(const bf16* p, int64_t n) {
    uint16_t part[L] = {};
    H h;
    if (n >= L) memcpy(&h, p, sizeof h);
    else {
        if (n > 0) memcpy(part, p, n * 2);
        memcpy(&h, part, sizeof h);
    }
    return __builtin_convertvector(h, U);
}
LMLAB_INLINE U raw(const float* p, int64_t n) { return (U)read(p, n); }  // not reached: pairs are bfloat16

// Values of a block to panels [unit][PANEL]. Returns whether all of them are finite.
template <class T> static bool pack_values(const T* v, int64_t stride, int64_t count, int64_t d, float* to) {
    const int64_t units = (count + STEP - 1) / STEP;
    I wild = {};
    for (int64_t e = 0; e < d; e += PANEL) {
        float* panel = to + e * UNITS;
        for (int64_t u = 0; u < units; u++)
            for (int w = 0; w < PANEL; w += L) {
                const T* p = v + u * STEP * stride + e + w;
                V x;
                if constexpr (STEP == 2) {
                    U low = raw(p, d - e - w), high = u * 2 + 1 < count ? raw(p + stride, d - e - w) : U{};
                    wild |= (I)((low & 0x7f80) == 0x7f80) | (I)((high & 0x7f80) == 0x7f80);
                    x = (V)(low | high << 16);
                } else {
                    x = read(p, d - e - w);
                    wild |= (I)(((U)x & 0x7f800000) == 0x7f800000);
                }
                put(panel + u * PANEL + w, x);
            }
    }
    for (int l = 0; l < L; l++)
        if (wild[l]) return false;
    return true;
}

// ---- a group of R queries against a block of keys

// scores[row][key] of `panels` panels; q: [unit][ROWS]
template <int R> static void score(const float* q, const float* k, int64_t units, int64_t panels, float* scores) {
    for (int64_t panel = 0; panel < panels; panel++, k += units * PANEL, scores += PANEL) {
        V sum[R][WIDE] = {};
        const float* a = q;
        const float* b = k;
        for (int64_t u = 0; u < units; u++, a += ROWS, b += PANEL) {
            V w[WIDE];
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) w[c] = vec(b + c * L);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                V x = unit(a + r);
#pragma GCC unroll 4
                for (int c = 0; c < WIDE; c++) sum[r][c] = dot(sum[r][c], w[c], x);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) put(scores + r * BLOCK + c * L, sum[r][c]);
    }
}

// out[row][column] = out * fade[row] + p v; p: [row][BLOCK floats], of which the first `units` units count; v: panels [unit][PANEL]
template <int R> static void mix(const float* p, const float* v, int64_t units, int64_t columns, const float* fade, float* out) {
    for (int64_t e = 0; e < columns; e += PANEL, v += UNITS * PANEL) {
        V sum[R][WIDE];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) sum[r][c] = vec(out + r * columns + e + c * L) * fade[r];
        const float* a = p;
        const float* b = v;
        for (int64_t u = 0; u < units; u++, a++, b += PANEL) {
            V w[WIDE];
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) w[c] = vec(b + c * L);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                V x = unit(a + r * BLOCK);
#pragma GCC unroll 4
                for (int c = 0; c < WIDE; c++) sum[r][c] = dot(sum[r][c], w[c], x);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int c = 0; c < WIDE; c++) put(out + r * columns + e + c * L, sum[r][c]);
    }
}

struct Group {  // what is known of L queries so far
    V top;     // the largest score
    V sum[L];  // of exp2((score - top) * c), by lanes of keys
};

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"  // only paths with dot products of pairs define these
LMLAB_INLINE V pairs(V a, V b);  // to bfloat16, those of a before those of b
LMLAB_INLINE V low_pairs(V a, V b);  // the first 4 of each 8 bfloat16 of a and b
LMLAB_INLINE V high_pairs(V a, V b);  // the last 4
#pragma GCC diagnostic pop

LMLAB_INLINE void write_weights(float* to, V a, V b) {  // two vectors of weights as units
    if constexpr (STEP == 2) put(to, pairs(a, b));
    else put(to, a), put(to + L, b);
}

// Scores to weights, in place; fade: what the sums so far are worth under the new maximum
template <int R> static void soften(float* scores, int64_t keys, float c, Group& g, float* fade) {
    V x[L];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        const float* s = scores + r * BLOCK;
        V a = vec(s), b = vec(s + L);
        for (int64_t j = 2 * L; j < keys; j += 2 * L) a = larger(a, vec(s + j)), b = larger(b, vec(s + j + L));
        x[r] = larger(a, b);
    }
#pragma GCC unroll 16
    for (int r = R; r < L; r++) x[r] = x[0];
    V top = across<Larger>(x), most = top > g.top ? top : g.top;
    V used = most == -__builtin_inff() ? V{} : most;  // nothing seen yet, or nothing but -inf: weights of 0
    V worth = exp2((g.top - used) * c);  // the difference first: a score may be too large to be told from its neighbours
    g.top = most;
    put(fade, worth);
    float least[L];
    put(least, used);
#pragma GCC unroll 1
    for (int r = 0; r < R; r++) {
        float* s = scores + r * BLOCK;
        V a = {}, b = {}, minus = all(least[r]), by = all(c);
        for (int64_t j = 0; j < keys; j += 2 * L) {
            V p = exp2((vec(s + j) - minus) * by), o = exp2((vec(s + j + L) - minus) * by);
            a += p;
            b += o;
            write_weights(s + j / STEP, p, o);
        }
        g.sum[r] = fma(g.sum[r], all(fade[r]), a + b);
    }
}

LMLAB_INLINE float weight(const float* p, int64_t j) {  // of key j in a row of weights
    if (STEP == 1) return p[j];
    uint16_t h;
    memcpy(&h, (const char*)p + 2 * j, 2);
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// As `mix`, for values of which some are not finite, and may only reach the queries that see them: 0 times infinity is not 0.
static void mix_seen(const float* p, const float* v, int64_t rows, const int64_t* first, const int64_t* last, int64_t columns, const float* fade, float* out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < columns; e++) {
            float sum = out[r * columns + e] * fade[r];
            for (int64_t j = first[r]; j < last[r]; j++)
                sum += weight(p + r * BLOCK, j) * weight(v + e / PANEL * PANEL * UNITS + j / STEP * PANEL + e % PANEL, j % STEP);
            out[r * columns + e] = sum;
        }
}

template <int R> static void group_block(const float* q, const float* k, const float* v, bool finite, int64_t units, int64_t columns,
                                         int64_t rows, const int64_t* first, const int64_t* last, float c, Group& g, float* scores, float* out) {
    int64_t keys = 0, seen_by_all = BLOCK, from = 0;
    for (int64_t r = 0; r < rows; r++) {
        keys = last[r] > keys ? last[r] : keys;
        seen_by_all = last[r] < seen_by_all ? last[r] : seen_by_all;
        from = first[r] > from ? first[r] : from;
    }
    const int64_t panels = (keys + PANEL - 1) / PANEL, width = panels * PANEL;
    score<R>(q, k, units, panels, scores);
    if (from > 0 || seen_by_all < width)
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t j = 0; j < first[r] && j < width; j++) scores[r * BLOCK + j] = -__builtin_inff();
            for (int64_t j = last[r]; j < width; j++) scores[r * BLOCK + j] = -__builtin_inff();
        }
    float fade[L];
    soften<R>(scores, width, c, g, fade);
    const int64_t used = (keys + STEP - 1) / STEP;
    if (!finite && (from > 0 || seen_by_all < used * STEP)) mix_seen(scores, v, rows, first, last, columns, fade, out);
    else mix<R>(scores, v, used, columns, fade, out);
}

// ---- a tile of queries of one key head

// Rows [row, row + count) of key head `head` of batch row `b`: row i * group + g is query i of query head g of the group.
template <class T> static void tile(const Call& a, int64_t b, int64_t head, int64_t row, int64_t count, Packed packed, bool ready, char* scratch) {
    const int64_t units = (a.d + STEP - 1) / STEP, columns = (a.dv + PANEL - 1) / PANEL * PANEL, group = a.h / a.hk;
    const int64_t groups = (count + ROWS - 1) / ROWS, start = a.first(b);
    Group* state = (Group*)scratch;
    float* q = (float*)(state + groups);
    float* out = q + groups * ROWS * units;
    float* scores = out + groups * ROWS * columns;
    const float sign = a.sign(), c = a.factor();

    memset(out, 0, groups * ROWS * columns * sizeof(float));
    memset(q, 0, groups * ROWS * units * sizeof(float));
    for (int64_t g = 0; g < groups; g++) {
        state[g].top = all(-__builtin_inff());
        for (int r = 0; r < L; r++) state[g].sum[r] = V{};
    }
    for (int64_t r = 0; r < count; r++) {
        const T* from = (const T*)a.q + b * a.qs[0] + (head * group + (row + r) % group) * a.qs[1] + (row + r) / group * a.qs[2];
        float* to = q + r / ROWS * ROWS * units + r % ROWS;
        for (int64_t u = 0; u < units; u++) {
            uint32_t x = signed_unit(one(from + u * STEP, a.d - u * STEP), sign);
            memcpy(to + u * ROWS, &x, 4);
        }
    }

    const int64_t end = a.limit(b, (row + count - 1) / group);
    const T* keys = (const T*)a.k + b * a.ks[0] + head * a.ks[1];
    const T* values = (const T*)a.v + b * a.vs[0] + head * a.vs[1];
    for (int64_t at = start / BLOCK * BLOCK; at < end; at += BLOCK) {
        const int64_t n = a.m - at < BLOCK ? a.m - at : BLOCK, index = ready ? at / BLOCK : 0;
        float* k = packed.k + index * BLOCK * units;
        float* v = packed.v + index * UNITS * columns;
        if (!ready) {
            pack_keys(keys + at * a.ks[2], a.ks[2], n, a.d, k);
            packed.finite[0] = pack_values(values + at * a.vs[2], a.vs[2], n, a.dv, v);
        }
        for (int64_t g = 0; g < groups; g++) {
            int64_t rows = count - g * ROWS < ROWS ? count - g * ROWS : ROWS, first[ROWS], last[ROWS];
            if (a.limit(b, (row + g * ROWS + rows - 1) / group) <= at) continue;
            for (int64_t r = 0; r < rows; r++) {
                int64_t to = a.limit(b, (row + g * ROWS + r) / group) - at;
                last[r] = to < 0 ? 0 : to < n ? to : n;
                first[r] = start > at ? start - at : 0;
            }
            auto f = rows * 3 <= ROWS ? group_block<ROWS / 3> : rows * 3 <= ROWS * 2 ? group_block<ROWS / 3 * 2> : group_block<ROWS>;
            f(q + g * ROWS * units, k, v, packed.finite[index], units, columns, rows, first, last, c, state[g], scores, out + g * ROWS * columns);
        }
    }

    for (int64_t g = 0; g * ROWS < count; g++) {
        V x[L];
        float sums[L];
        for (int r = 0; r < L; r++) x[r] = state[g].sum[r];
        put(sums, across<Add>(x));
        for (int64_t r = 0; r < ROWS && g * ROWS + r < count; r++) {
            const int64_t i = row + g * ROWS + r;
            const float* from = out + (g * ROWS + r) * columns;
            const int64_t to = b * a.os[0] + (head * group + i % group) * a.os[1] + i / group * a.os[2];
            const bool seen = a.limit(b, i / group) > start;
            for (int64_t e = 0; e < a.dv; e += L) put_out<T>(a, to + e, seen ? vec(from + e) / sums[r] : V{}, a.dv - e < L ? a.dv - e : L);
        }
    }
}

static int64_t tile_bytes(const Call& a) {  // of scratch
    const int64_t units = (a.d + STEP - 1) / STEP, columns = (a.dv + PANEL - 1) / PANEL * PANEL, groups = TILE / ROWS;
    return groups * sizeof(Group) + 4 * (groups * ROWS * (units + columns) + ROWS * BLOCK);
}
static int64_t key_floats(const Call& a) { return (a.d + STEP - 1) / STEP * BLOCK; }  // of a packed block
static int64_t value_floats(const Call& a) { return (a.dv + PANEL - 1) / PANEL * PANEL * UNITS; }

template <class T> static void pack(const Call& a, int64_t b, int64_t head, int64_t block, Packed to) {
    const int64_t at = block * BLOCK, n = a.m - at < BLOCK ? a.m - at : BLOCK;
    pack_keys((const T*)a.k + b * a.ks[0] + head * a.ks[1] + at * a.ks[2], a.ks[2], n, a.d, to.k + block * key_floats(a));
    to.finite[block] = pack_values((const T*)a.v + b * a.vs[0] + head * a.vs[1] + at * a.vs[2], a.vs[2], n, a.dv, to.v + block * value_floats(a));
}

// ---- one query: a pass over keys and values as they stand, which costs what reading them costs

// 2 L numbers of a row are a `Two`. Where the machine multiplies pairs of bfloat16, scores take them as they stand, as L units, and two
// rows of values are interleaved to pairs of keys; elsewhere bfloat16 is widened, even numbers before odd ones.
struct Two { V a, b; };
LMLAB_INLINE Two two(const float* p) { return {vec(p), vec(p + L)}; }
LMLAB_INLINE Two two(const bf16* p) { U u; memcpy(&u, p, sizeof u); return {(V)(u << 16), (V)(u & 0xffff0000)}; }
template <class T> struct Copy { T of[2 * L]; };
template <class T> LMLAB_INLINE Copy<T> first(const T* p, int64_t n) {  // zeros behind
    Copy<T> c = {};
    memcpy((void*)c.of, p, n * sizeof(T));
    return c;
}
LMLAB_INLINE int64_t place(const float*, int64_t i) { return i; }  // where number i of a row of values ends up
LMLAB_INLINE int64_t place(const bf16*, int64_t i) {
    const int64_t from = i / (2 * L) * 2 * L, at = i % (2 * L);
    return from + (STEP == 2 ? at % 8 / 4 * L + at / 8 * 4 + at % 4 : at % 2 * L + at / 2);
}

template <class T> LMLAB_INLINE void ahead(const T* p) {  // what one `Two` reads
    for (unsigned i = 0; i < 2 * L * sizeof(T); i += 64) __builtin_prefetch((const char*)p + i);
}

template <int R, class T> LMLAB_INLINE void single_add(const T* p, const float* q, int64_t wide, V* x, V* y) {
    if constexpr (STEP == 2) {
        V w = vec(p);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) x[r] = dot(x[r], w, vec(q + r * wide));
    } else {
        Two w = two(p);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            x[r] = fma(w.a, vec(q + r * wide), x[r]);
            y[r] = fma(w.b, vec(q + r * wide + L), y[r]);
        }
    }
}

// query r is at q + r wide, and its scores go to scores + r apart
template <int R, class T> LMLAB_INLINE void single_scores(const T* k, int64_t stride, int64_t n, int64_t d, const float* q, int64_t wide, float* scores, int64_t apart) {
    for (int64_t j = 0; j < n; j += L) {
        V sums[R][L];
        for (int t = 0; t < L; t++) {
            const T* p = k + (j + t < n ? j + t : n - 1) * stride;
            V x[R] = {}, y[R] = {};
            int64_t i = 0;
            for (; i + 2 * L <= d; i += 2 * L) {
                ahead(p + AHEAD * stride + i);
                single_add<R>(p + i, q + i / STEP, wide, x, y);
            }
            if (i < d) {
                Copy<T> last = first(p + i, d - i);
                single_add<R>(last.of, q + i / STEP, wide, x, y);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) sums[r][t] = x[r] + y[r];
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) put(scores + r * apart + j, across<Add>(sums[r]));
    }
}

// STEP rows of values times their weights
template <int R, int N, class T> LMLAB_INLINE void single_mix(const T* v, const T* next, const float* p, V sum[R][2 * N]) {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        Two w;
        if constexpr (STEP == 2) {
            V a = vec(v + 2 * L * i), b = next ? vec(next + 2 * L * i) : V{};
            w = {low_pairs(a, b), high_pairs(a, b)};
        } else w = two(v + 2 * L * i);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            V x = unit(p + r * BLOCK);
            sum[r][2 * i] = dot(sum[r][2 * i], w.a, x);
            sum[r][2 * i + 1] = dot(sum[r][2 * i + 1], w.b, x);
        }
    }
}

// 2 L C columns, or with C = 0 the last ones, fewer than 2 L
template <int R, int C, class T> LMLAB_INLINE void single_columns(const T* v, int64_t stride, int64_t n, int64_t d, const float* p, int64_t size, float* out) {
    constexpr int N = C ? C : 1;
    V sum[R][2 * N] = {};
    int64_t j = 0;
    if constexpr (C > 0) {
        for (; j + STEP <= n; j += STEP, v += STEP * stride) {
            for (int s = 0; s < STEP; s++)
#pragma GCC unroll 4
                for (int i = 0; i < N; i++) ahead(v + (AHEAD + s) * stride + 2 * L * i);
            single_mix<R, N>(v, v + stride, p + j / STEP, sum);
        }
        if (STEP == 2 && j < n) single_mix<R, N>(v, (const T*)nullptr, p + j / STEP, sum);
    } else
        for (; j < n; j += STEP, v += STEP * stride) {
            Copy<T> a = first(v, d), b = first(v + (j + 1 < n ? stride : 0), j + 1 < n ? d : 0);
            single_mix<R, N>(a.of, b.of, p + j / STEP, sum);
        }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < 2 * N; i++) put(out + r * size + i * L, sum[r][i]);
}

// R query heads of one key head, or of it and its twin, against up to BLOCK keys: the largest score, the sum of weights and the weighted
// values of each. q: [R][wide]; part: [R][size]
template <int R, class T> static void single(const T* k, int64_t ks, int64_t twin, const T* v, int64_t vs, int64_t n, int64_t d, int64_t dv, const float* q, int64_t wide, float c, float* part, int64_t size) {
    alignas(64) float scores[R * BLOCK];
    if (twin) {  // heads come in pairs then
        constexpr int H = R > 1 ? R / 2 : 1;
        single_scores<H>(k, ks, n, d, q, 2 * wide, scores, 2 * BLOCK);
        single_scores<H>(k + twin, ks, n, d, q + wide, 2 * wide, scores + BLOCK, 2 * BLOCK);
    } else single_scores<R>(k, ks, n, d, q, wide, scores, BLOCK);
    for (int r = 0; r < R; r++) {
        float* s = scores + r * BLOCK;
        for (int64_t j = n; j % (2 * L); j++) s[j] = -__builtin_inff();
        V x = vec(s), sum = {};
        for (int64_t j = L; j < n; j += L) x = larger(x, vec(s + j));
        float top = x[0];
        for (int l = 1; l < L; l++) top = x[l] > top ? x[l] : top;
        V minus = all(top == -__builtin_inff() ? 0.f : top), by = all(c);
        for (int64_t j = 0; j < n; j += 2 * L) {
            V a = exp2((vec(s + j) - minus) * by), b = exp2((vec(s + j + L) - minus) * by);
            sum += a + b;
            write_weights(s + j / STEP, a, b);
        }
        float total = 0;
        for (int l = 0; l < L; l++) total += sum[l];
        part[r * size] = top;
        part[r * size + 1] = total;
    }
    constexpr int C = R * 8 <= KEPT ? 4 : R * 4 <= KEPT ? 2 : 1;
    int64_t e = 0;
    for (; e + 2 * L * C <= dv; e += 2 * L * C) single_columns<R, C>(v + e, vs, n, dv - e, scores, size, part + 2 + e);
    for (; e + 2 * L <= dv; e += 2 * L) single_columns<R, 1>(v + e, vs, n, dv - e, scores, size, part + 2 + e);
    if (e < dv) single_columns<R, 0>(v + e, vs, n, dv - e, scores, size, part + 2 + e);
}

static int64_t single_wide(const Call& a) { return (a.d + 2 * L - 1) / (2 * L) * 2 * L / STEP; }  // floats of a query
static int64_t single_size(const Call& a) { return (a.dv + 2 * L - 1) / (2 * L) * 2 * L + 2; }

template <class T> LMLAB_INLINE void single_query(const Call& a, int64_t b, int64_t head, float* to) {  // the queries of a key head
    const int64_t group = a.h / a.hk, wide = single_wide(a);
    for (int64_t g = 0; g < group; g++) {
        const T* from = (const T*)a.q + b * a.qs[0] + (head * group + g) * a.qs[1];
        for (int64_t i = 0; i < a.d; i += 2 * L) {
            Copy<T> some = first(from + i, a.d - i < 2 * L ? a.d - i : 2 * L);
            if constexpr (STEP == 2)
                for (int u = 0; u < L; u++) {
                    uint32_t x = signed_unit(one(some.of + 2 * u, 2), a.sign());
                    memcpy(to + g * wide + i / 2 + u, &x, 4);
                }
            else {
                Two w = two(some.of);
                put(to + g * wide + i, w.a * a.sign());
                put(to + g * wide + i + L, w.b * a.sign());
            }
        }
    }
}

template <class T> static void single_part(const Call& a, int64_t b, int64_t head, int64_t from, int64_t n, float* q, float* part) {
    const int64_t group = a.h / a.hk, wide = single_wide(a), size = single_size(a);
    const T* k = (const T*)a.k + b * a.ks[0] + head * a.ks[1] + from * a.ks[2];
    const T* v = (const T*)a.v + b * a.vs[0] + head * a.vs[1] + from * a.vs[2];
    const float c = a.factor();
    single_query<T>(a, b, head, q);
    for (int64_t g = 0; g < group;) {
        const int64_t left = group - g;
        auto f = left >= 4 ? single<4, T> : left >= 2 ? single<2, T> : single<1, T>;
        f(k, a.ks[2], a.twin, v, a.vs[2], n, a.d, a.dv, q + g * wide, wide, c, part + g * size, size);
        g += left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
}

template <class T> static void single_join(const Call& a, int64_t b, int64_t head, int64_t parts, float* part) {
    const int64_t group = a.h / a.hk, size = single_size(a);
    const float c = a.factor();
    for (int64_t g = 0; g < group; g++, part += size) {
        float top = -__builtin_inff(), total = 0;
        for (int64_t i = 0; i < parts; i++) top = part[i * group * size] > top ? part[i * group * size] : top;
        const float used = top == -__builtin_inff() ? 0.f : top;
        float* sum = part + 2;  // the first part becomes the sum of all
        for (int64_t i = 0; i < parts; i++) {
            const float* p = part + i * group * size;
            const V worth = exp2(all((p[0] - used) * c));
            total = fma(worth, all(p[1]), all(total))[0];
            for (int64_t e = 0; e + 2 < size; e += L) put(sum + e, i ? fma(worth, vec(p + 2 + e), vec(sum + e)) : worth * vec(sum + e));
        }
        const int64_t to = b * a.os[0] + (head * group + g) * a.os[1];
        for (int64_t e = 0; e < a.dv; e += L) {
            const int64_t n = a.dv - e < L ? a.dv - e : L;
            float some[L] = {};
            for (int64_t l = 0; l < n && parts; l++) some[l] = sum[place((const T*)0, e + l)];
            put_out<T>(a, to + e, parts ? vec(some) / total : V{}, n);
        }
    }
}

template <class T> static Kernels kernels() {
    return {tile<T>, pack<T>, tile_bytes, key_floats, value_floats, single_part<T>, single_join<T>, single_wide, single_size};
}
