// vocab_max: for every text and word the largest product over the text's tokens. The products come from a matrix multiplication, a tile of
// some tokens and a stretch of the vocabulary at a time; here the tile is folded into what is known, while it is in the cache.
//
// Backward: one token for each text and word has the gradient g. dweight[v] += g hidden[b][t] and dhidden[b][t] += g weight[v] are
// elementwise in the features, so threads share the features out: every sum is made by one thread, texts and words in ascending order.
#include "common.h"

#include <algorithm>

namespace lmlab {
namespace vocab {

constexpr int WIDE = 4 * LANES;  // words that are held in registers, and features that are worked on at a time

// The rows of one text: n rows of a tile, of which `words` columns count
template <class T>
LMLAB_INLINE void fold_body(const T* tile, int64_t stride, int64_t n, int64_t words, const int32_t* token, T* value, int32_t* best) {
    for (int64_t v = 0; v < words; v += LANES) {
        const int size = (int)std::min<int64_t>(LANES, words - v);
        f32x16 have;
        i32x16 at;
        if (size == LANES) have = load(value + v), memcpy(&at, best + v, sizeof at);
        else {
            int32_t part[LANES] = {};
            memcpy(part, best + v, size * 4);
            memcpy(&at, part, sizeof at);
            have = load(value + v, size);
        }
        for (int64_t r = 0; r < n; r++) {
            const T* p = tile + r * stride + v;
            f32x16 z = size == LANES ? load(p) : load(p, size);
            i32x16 better = (z > have) | ((z != z) & (have == have));  // a NaN stays; of equals the first
            have = better ? z : have;
            at = better ? (at ^ at) + token[r] : at;
        }
        if (size == LANES) store(value + v, have), memcpy(best + v, &at, sizeof at);
        else {
            store(value + v, have, size);
            memcpy(best + v, &at, size * 4);
        }
    }
}
LMLAB_DISPATCH(fold, (const T* tile, int64_t stride, int64_t n, int64_t words, const int32_t* token, T* value, int32_t* best), (tile, stride, n, words, token, value, best))

template <class T>
LMLAB_INLINE void axpy(float g, const T* x, T* y, int n) {
    if (n == WIDE) {
        for (int j = 0; j < WIDE; j += LANES) store(y + j, load(y + j) + load(x + j) * g);
        return;
    }
    for (int j = 0; j < n; j++) y[j] += x[j] * g;
}

struct Sizes { int64_t b, l, d, words; };

// Features first to first + n of both gradients
template <class T>
LMLAB_INLINE void back_body(const T* grad, const int32_t* token, const T* hidden, const T* weight, T* dhidden, T* dweight, Sizes s, int64_t first, int n) {
    constexpr int64_t BLOCK = 256;  // words whose features stay in the cache while all texts go by
    for (int64_t a = 0; a < s.words; a += BLOCK)
        for (int64_t i = 0; i < s.b; i++)
            for (int64_t v = a; v < std::min(s.words, a + BLOCK); v++) {
                const float g = grad[i * s.words + v];
                const int32_t t = token[i * s.words + v];
                if (t < 0 || g == 0) continue;
                const int64_t at = (i * s.l + t) * s.d + first;
                axpy(g, hidden + at, dweight + v * s.d + first, n);
                axpy(g, weight + v * s.d + first, dhidden + at, n);
            }
}
LMLAB_DISPATCH(back, (const T* grad, const int32_t* token, const T* hidden, const T* weight, T* dhidden, T* dweight, Sizes s, int64_t first, int n), (grad, token, hidden, weight, dhidden, dweight, s, first, n))

}  // namespace vocab
}  // namespace lmlab

using namespace lmlab;

// tile: rows x words of products; text and token: whose they are, rows of a text together and in order; value and best: texts x all
// words, of which this tile's begin at `first`
LMLAB_API void lmlab_vocab_fold(const float* tile, int64_t rows, int64_t words, const int32_t* text, const int32_t* token, float* value, int32_t* best, int64_t all, int64_t first, int threads) {
    const auto f = vocab::fold_pick<float>();
    constexpr int64_t STRIPE = 512;
    const int64_t stripes = (words + STRIPE - 1) / STRIPE;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t s = 0; s < stripes; s++) {
        const int64_t v = s * STRIPE, n = std::min(STRIPE, words - v);
        for (int64_t r = 0, z; r < rows; r = z) {
            for (z = r + 1; z < rows && text[z] == text[r];) z++;
            const int64_t at = text[r] * all + first + v;
            f(tile + r * words + v, words, z - r, n, token + r, value + at, best + at);
        }
    }
}

// grad and token: b x words; hidden and dhidden: b x l x d; weight and dweight: words x d; the gradients are added to
LMLAB_API void lmlab_vocab_backward(const float* grad, const int32_t* token, const float* hidden, const float* weight, float* dhidden, float* dweight, int64_t b, int64_t l, int64_t d, int64_t words, int threads) {
    const auto f = vocab::back_pick<float>();
    const int64_t slices = (d + vocab::WIDE - 1) / vocab::WIDE;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t s = 0; s < slices; s++)
        f(grad, token, hidden, weight, dhidden, dweight, {b, l, d, words}, s * vocab::WIDE, (int)std::min<int64_t>(vocab::WIDE, d - s * vocab::WIDE));
}
