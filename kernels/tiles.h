// What the files share that run ternary matrices: how a matrix and a token stand in memory, rounding tokens to int8, the sums of a tile
// on the instruction set that was chosen, and what becomes of them.
#pragma once
#include "common.h"

namespace lmlab {
namespace ternary {

struct Matrix {  // as the caller lays it out; the fields of `_Matrix` in ternary.py
    const uint8_t* codes;
    const float* scale;  // one, or one a row
    const float* bias;   // one a row, or null
    void* y;             // tokens x rows
    int64_t rows;
    int32_t scales, trits;  // is there a scale for each row; is the format 1.6 bits
};

struct Token { float ratio; int32_t sum; };  // what one step of its int8 values is worth, and their sum

constexpr int ROWS = 32;          // of a tile
constexpr int STEP[] = {16, 20};  // inputs of a step: 2 bits, 1.6 bits
constexpr int MOST = 12;          // tokens of one pass over a tile, at most
constexpr int AHEAD = 7168;       // bytes: codes are fetched when the pass is this far from them

typedef int8_t i8x16 __attribute__((vector_size(16)));

// One token to int8 by its largest magnitude, four values every `stride` bytes, zeros behind the last. A token that holds a NaN or
// an infinity becomes zeros with a NaN for its ratio: it can spoil no other token, and cannot pass for a number.
template <class T> LMLAB_INLINE void quantize_body(const T* x, int64_t k, int64_t padded, int8_t* q, int64_t stride, Token* token) {
    i32x16 largest = {};  // magnitudes order like their bits
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        i32x16 m = (i32x16)load(x + i) & 0x7fffffff;
        largest = m > largest ? m : largest;
    }
    if (i < k) {
        i32x16 m = (i32x16)load(x + i, k - i) & 0x7fffffff;
        largest = m > largest ? m : largest;
    }
    int32_t bits = 0;
    for (int l = 0; l < LANES; l++) bits = largest[l] > bits ? largest[l] : bits;
    bool finite = bits < 0x7f800000;
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude = magnitude > 1e-5f ? magnitude : 1e-5f;
    float scale = 1 / magnitude * 127;  // in the order in which torch computes 127 / x, so that int8 values agree
    i32x16 total = {};
    for (i = 0; i < padded; i += LANES) {
        f32x16 v = {};
        if (finite && i < k) v = i + LANES <= k ? load(x + i) : load(x + i, k - i);
        f32x16 shifted = v * scale + 12582912.f;  // 1.5 * 2^23: rounds to nearest even, the integer is in the low bits
        i32x16 n = (i32x16)shifted - 0x4b400000;
        total += n;
        i8x16 low = __builtin_convertvector(n, i8x16);
        if (stride == 4 && padded - i >= LANES) {
            memcpy(q, &low, 16);
            q += 16;
            continue;
        }
        int32_t four[4];
        memcpy(four, &low, 16);
        int groups = padded - i < LANES ? (padded - i) / 4 : 4;
        for (int g = 0; g < groups; g++, q += stride) memcpy(q, four + g, 4);
    }
    int32_t sum = 0;
    for (int l = 0; l < LANES; l++) sum += total[l];
    *token = {finite ? magnitude / 127 : __builtin_nanf(""), sum};
}
LMLAB_DISPATCH(quantize, (const T* x, int64_t k, int64_t padded, int8_t* q, int64_t stride, Token* token), (x, k, padded, q, stride, token))

// y[n][row] = (sums - sum of the token's activations) * ratio * scale + bias: codes are weights plus one
template <class T> LMLAB_INLINE void finish_body(const int32_t* sums, const Token* tokens, int count, const Matrix& m, int64_t row, T* y, int64_t stride) {
    const int64_t rows = m.rows - row < ROWS ? m.rows - row : ROWS;
    for (int r = 0; r < rows; r += LANES) {
        int width = rows - r < LANES ? rows - r : LANES;
        f32x16 s = m.scales ? load(m.scale + row + r, width) : *m.scale - f32x16{};
        f32x16 b = {};
        if (m.bias) b = load(m.bias + row + r, width);
        for (int n = 0; n < count; n++) {
            i32x16 v;
            memcpy(&v, sums + ROWS * n + r, sizeof v);
            f32x16 out = __builtin_convertvector(v - tokens[n].sum, f32x16) * tokens[n].ratio * s;
            if (m.bias) out += b;
            T* to = y + n * stride + r;
            width == LANES ? store(to, out) : store(to, out, width);
        }
    }
}
LMLAB_DISPATCH(finish, (const int32_t* sums, const Token* tokens, int count, const Matrix& m, int64_t row, T* y, int64_t stride), (sums, tokens, count, m, row, y, stride))

typedef void (*Sums)(const uint8_t* codes, const int8_t* x, int64_t steps, int32_t* sums);

struct Path {  // the sums of a tile on one instruction set
    const char* name;
    int tokens;           // of one pass, at most
    Sums sums[2][MOST];   // [2 or 1.6 bits][tokens - 1]
};

Paths<Path> paths();

// Tokens meet a tile in blocks of nearly equal length, each with its int8 values in one piece: [k / 4][token][4].
struct Blocks {
    int64_t tokens, count;
    int64_t first(int64_t block) const { return tokens * block / count; }
    int64_t of(int64_t token) const { return (count * (token + 1) - 1) / tokens; }
};

}  // namespace ternary
}  // namespace lmlab
