// The walk over kept columns for one width of vectors, in int8: included once for each instruction set, in a namespace of its own
// that says L (int32 lanes), QUADS (how many times four columns share one load and store of the sums) and, after this file, `dot` and
// `interleave`.
typedef int32_t V __attribute__((vector_size(4 * L)));

LMLAB_INLINE V dot(V sums, V codes, V x);                                                     // += four unsigned bytes times four signed ones
LMLAB_INLINE void interleave(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, V* out);  // 4 L bytes of four columns

// Four columns are interleaved byte by byte before they are taken apart into planes, so that each 32-bit lane holds four inputs of
// one row for each plane. A plane's codes stay where they lie in their byte, so sums of plane p come out 4^p times as large.
template <int PLANES, int TOKENS> static void walk(const Walk& a) {
    constexpr int HALVES = 16 / L, WIDE = 64 * PLANES;  // vectors to a chunk of 64 bytes; rows of a chunk
    const int tokens = TOKENS ? TOKENS : a.tokens;
    const int64_t length = a.last - a.first, skip = a.ahead / length, rest = a.ahead % length;
    for (int64_t g = 0; g < a.count; g += COLUMNS) {
        const uint8_t* const* column = a.columns + g;
        const int32_t* x = (const int32_t*)a.x + g / 4 * tokens;
        V one[COLUMNS / 4];  // the activations of a single token stay in registers
        for (int q = 0; q < COLUMNS / 4; q++) one[q] = V{} + x[q * tokens];
        for (int64_t c = 0; c < length; c++) {
            const int64_t at = 64 * (a.first + c);
            const bool wraps = c + rest >= length;
            const uint8_t* const* later = column + COLUMNS * (skip + wraps);
            const int64_t there = at + 64 * (rest - (wraps ? length : 0));
            for (int j = 0; j < COLUMNS; j++) __builtin_prefetch(later[j] + there);
            int32_t* sums = (int32_t*)a.sums + (a.first + c) * tokens * WIDE;
#pragma GCC unroll 4
            for (int q = 0; q < COLUMNS / 4; q += QUADS)
                for (int h = 0; h < HALVES; h++) {
                    V codes[QUADS][4];
#pragma GCC unroll 4
                    for (int i = 0; i < QUADS; i++) {
                        const uint8_t* const* p = column + 4 * (q + i);
                        const int64_t from = at + 4 * L * h;
                        interleave(p[0] + from, p[1] + from, p[2] + from, p[3] + from, codes[i]);
                    }
#pragma GCC unroll 4
                    for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 4
                        for (int r = 0; r < 4; r++) {
                            V plane[QUADS];
#pragma GCC unroll 4
                            for (int i = 0; i < QUADS; i++) plane[i] = PLANES == 1 ? codes[i][r] : codes[i][r] & (V{} + (int32_t)(0x03030303u << (2 * p)));
                            for (int t = 0; t < tokens; t++) {
                                V s;
                                int32_t* to = sums + t * WIDE + (p * 4 + r) * 16 + L * h;
                                memcpy(&s, to, sizeof s);
#pragma GCC unroll 4
                                for (int i = 0; i < QUADS; i++) s = dot(s, plane[i], TOKENS == 1 ? one[q + i] : V{} + x[(q + i) * tokens + t]);
                                memcpy(to, &s, sizeof s);
                            }
                        }
                }
        }
    }
}

static Path path(const char* name) {
    return {name, {{walk<1, 1>, walk<1, 0>}, {walk<4, 1>, walk<4, 0>}}};
}
