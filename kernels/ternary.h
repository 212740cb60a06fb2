// The body of the ternary kernels for one instruction set. ternary.cpp includes this file once for each, inside a namespace that
// has said before
//   L         int32 lanes of a vector
//   KEPT      vectors that fit into the registers as sums and codes of one plane, beside what else a step needs
//   SCALED    a dot product takes unsigned codes up to 162, and has so long a latency that few tokens need several sums a row
// and that defines behind it `dot` and `split`. Nothing here is shared between the namespaces, since each may use instructions
// that the others lack; for the same reason nothing here calls an inline function of the standard library.
//
// How codes stand in memory: a tile is 32 rows, a step of it 128 bytes; byte 4 row + j of step s holds the codes of that row for
// P inputs, k = 4 (P s + p) + j with p < P. One 32-bit lane is one row. So four activations are broadcast to all rows at once,
// nothing is summed across lanes, and a matrix is read from end to end as one stream.

typedef int32_t V __attribute__((vector_size(4 * L)));
typedef uint32_t U __attribute__((vector_size(4 * L)));
typedef uint16_t H __attribute__((vector_size(4 * L)));
typedef uint8_t B __attribute__((vector_size(4 * L)));

struct Split { V four, last; };  // the first four codes of a 1.6-bit byte as 2-bit codes, and 81 times the fifth

LMLAB_INLINE V dot(V sums, V codes, V x);  // lane: sums + sum over j of codes[j] (unsigned) * x[j] (signed), exact
LMLAB_INLINE Split split(V bytes);

LMLAB_INLINE V vector(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
LMLAB_INLINE V four_of(const void* p) { int32_t i; memcpy(&i, p, 4); return i - V{}; }  // the same four bytes in every lane
LMLAB_INLINE V bytes(int b) { return (int32_t)(b * 0x01010101u) - V{}; }

// Base 3 digit by digit, for machines without a permutation of 128 bytes: a comparison is -1 where it holds.
LMLAB_INLINE Split split_digits(V v) {
    B b = (B)v, above = (B)(b >= 81) & 81, twice = (B)(b >= 162) & 81, last = above + twice;
    b -= last;
    B c3 = -(B)(b >= 27) - (B)(b >= 54);
    b -= c3 * 27;
    B c2 = -(B)(b >= 9) - (B)(b >= 18);
    b -= c2 * 9;
    B c1 = -(B)(b >= 3) - (B)(b >= 6);
    b -= c1 * 3;
    return {(V)(b + c1 * 4 + c2 * 16 + c3 * 64), (V)last};
}

struct TwoBit {  // code p in bits 2p and 2p + 1
    static constexpr int P = 4;
    typedef V Codes;
    LMLAB_INLINE Codes load(const uint8_t* p) { return vector(p); }
    template <int p> LMLAB_INLINE V plane(Codes c) { return (V)((H)c >> 2 * p) & bytes(3); }
    template <int p> LMLAB_INLINE V scaled(Codes c) { return c & bytes(3 << 2 * p); }  // plane times 4^p, a shift less
    template <int p> LMLAB_INLINE V unscale(V sums) { return sums >> 2 * p; }          // exact: a multiple of 4^p
};

struct Trits {  // c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4
    static constexpr int P = 5;
    typedef Split Codes;
    LMLAB_INLINE Codes load(const uint8_t* p) { return split(vector(p)); }
    template <int p> LMLAB_INLINE V plane(Codes c) {
        if constexpr (p < 4) return TwoBit::plane<p>(c.four);
        return (V)((H)c.last >> 6) & bytes(3);  // 81 is 01'010001, 162 is 10'100010
    }
    template <int p> LMLAB_INLINE V scaled(Codes c) {
        if constexpr (p < 4) return TwoBit::scaled<p>(c.four);
        return c.last;
    }
    template <int p> LMLAB_INLINE V unscale(V sums) {
        if constexpr (p < 4) return TwoBit::unscale<p>(sums);
        return (V)((U)sums * 0x781948b1u);  // a multiple of 81 is divided by multiplying with 1/81 modulo 2^32
    }
};

template <int i> struct Int { static constexpr int value = i; };
template <class F, int... i> LMLAB_INLINE void each_of(F f, std::integer_sequence<int, i...>) { (f(Int<i>()), ...); }
template <int n, class F> LMLAB_INLINE void each(F f) { each_of(f, std::make_integer_sequence<int, n>()); }  // f(0), ..., f(n - 1)

// Vectors of rows that N tokens take at once, and whether every plane of codes then has accumulators of its own. With few tokens
// it should: the next dot product need not wait for the one before, and planes need no shift.
struct Shape { int group; bool split; };
template <class Format> constexpr Shape shape(int tokens) {
    constexpr int all = ROWS / L;
    for (int g = all; SCALED && g > 1; g /= 2)
        if (g * (tokens * Format::P + 1) <= KEPT) return {g, true};
    for (int g = all; g > 1; g /= 2)
        if (g * (tokens + 1) <= KEPT) return {g, false};
    return {1, false};
}

// sums[ROWS n + row] = sum over k of code[row][k] * x[n][k] for one tile and N tokens; x stands as quantize leaves it. The loops over
// N and G must be unrolled, or the sums stay in memory.
template <class Format, int N> static void tile_sums(const uint8_t* codes, const int8_t* x, int64_t steps, int32_t* sums) {
    constexpr int P = Format::P, G = shape<Format>(N).group;
    constexpr bool own = shape<Format>(N).split;
    for (int row = 0; row < ROWS; row += G * L) {
        V acc[G][N][own ? P : 1] = {};
        const uint8_t* c = codes + 4 * row;
        const int8_t* at = x;
        for (int64_t s = 0; s < steps; s++, c += 4 * ROWS, at += 4 * P * N) {
            for (int b = 0; b < 4 * ROWS; b += 64) __builtin_prefetch(c - 4 * row + AHEAD + b);
            typename Format::Codes block[G];
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) block[g] = Format::load(c + 4 * L * g);
            each<P>([&](auto p) LAMBDA {
                constexpr int plane = p.value;
                V w[G];
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    if constexpr (own) w[g] = Format::template scaled<plane>(block[g]);
                    else w[g] = Format::template plane<plane>(block[g]);
                }
#pragma GCC unroll 12
                for (int n = 0; n < N; n++) {
                    V four = four_of(at + 4 * (N * plane + n));
#pragma GCC unroll 8
                    for (int g = 0; g < G; g++) acc[g][n][own ? plane : 0] = dot(acc[g][n][own ? plane : 0], w[g], four);
                }
            });
        }
#pragma GCC unroll 12
        for (int n = 0; n < N; n++)
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                V total = acc[g][n][0];
                if constexpr (own)
                    each<P - 1>([&](auto p) LAMBDA { total += Format::template unscale<p.value + 1>(acc[g][n][p.value + 1]); });
                memcpy(sums + ROWS * n + row + L * g, &total, sizeof total);
            }
    }
}

template <class Format, int... i> static void add_sums(Path& p, std::integer_sequence<int, i...>) {
    ((p.sums[Format::P - 4][i] = tile_sums<Format, i + 1>), ...);
}

template <int tokens> static Path path(const char* name) {
    Path p = {name, tokens, {}};
    add_sums<TwoBit>(p, std::make_integer_sequence<int, tokens>());
    add_sums<Trits>(p, std::make_integer_sequence<int, tokens>());
    return p;
}
