// Transformer layers with ternary linear layers, all of them in one parallel region: what a decoder does between its embedding and its
// last norm, and the product with a head. decoder.py says what is computed.
//
// Tokens of several rows go through a layer together, at most MANY at a time. Threads share each stage's work and meet at a barrier
// behind it. What becomes of a token never depends on the others beside it: every sum has an order of its own, set by positions alone.
#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lmlab {
namespace decoder {

using namespace ternary;

struct Layer {  // the fields of `_Layer` in decoder.py; a sub-norm may be null
    const float *input_norm, *attn_sub_norm, *post_norm, *ffn_sub_norm;
    Matrix q, k, v, o, gate, up, down;
};

struct Shape {  // the fields of `_Shape` in decoder.py
    int64_t layers, d, f, heads, kv_heads, head_dim, batch, length;
    double eps;   // of the norms
    float scale;  // of the scores
    int32_t silu, half;
};

constexpr int MANY = 144;     // tokens that go through a layer together, so that their activations stay in a cache
constexpr int SEGMENT = 256;  // keys whose softmax is taken at once; segments are joined in order
constexpr int QUERIES = 4;    // that read the same keys together

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

// 32 numbers as two vectors. Of bfloat16 these are the lower and the upper halves of sixteen pairs, which is cheaper than to widen them
// in order; whatever they meet is put in that order beforehand.
struct Pair { f32x16 lower, upper; };
constexpr int PAIR = 2 * LANES;

LMLAB_INLINE Pair load_pair(const float* p) { return {load(p), load(p + LANES)}; }
LMLAB_INLINE Pair load_pair(const bf16* p) {
    u32x16 v;
    memcpy(&v, p, sizeof v);
    return {(f32x16)(v << 16), (f32x16)(v & 0xffff0000)};
}

// out = weight * (x / sqrt(mean of squares + eps)); meanwhile what is read next is fetched. The root is in double, so the order of its sum does not show in the float it becomes
template <class T> LMLAB_INLINE void norm_body(const T* x, const T* weight, int64_t k, double eps, T* out, const uint8_t* next) {
    f64x8 even = {}, odd = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        for (int l = 0; l < 3; l++, next += 64) __builtin_prefetch(next, 0, 2);
        f32x8 a, b;
        memcpy(&a, x + i, sizeof a);
        memcpy(&b, x + i + 8, sizeof b);
        f64x8 p = __builtin_convertvector(a, f64x8), q = __builtin_convertvector(b, f64x8);
        even += p * p;
        odd += q * q;
    }
    even += odd;
    double sum = 0;
    for (int l = 0; l < 8; l++) sum += even[l];
    for (int64_t j = i; j < k; j++) sum += (double)x[j] * x[j];
    float r = (float)(1 / std::sqrt(sum / k + eps));
    for (i = 0; i + LANES <= k; i += LANES) {
        for (int l = 0; l < 3; l++, next += 64) __builtin_prefetch(next, 0, 2);
        store(out + i, load(weight + i) * (load(x + i) * r));
    }
    if (i < k) store(out + i, load(weight + i, k - i) * (load(x + i, k - i) * r), k - i);
}
LMLAB_DISPATCH(norm, (const T* x, const T* weight, int64_t k, double eps, T* out, const uint8_t* next), (x, weight, k, eps, out, next))

// y[n] += part[n], the outputs of one tile
template <class T> LMLAB_INLINE void add_body(const T* part, int count, int64_t width, T* y, int64_t stride) {
    for (int n = 0; n < count; n++, part += ROWS, y += stride)
        for (int r = 0; r < width; r += LANES) {
            if (width - r >= LANES) store(y + r, load(y + r) + load(part + r));
            else store(y + r, load(y + r, width - r) + load(part + r, width - r), width - r);
        }
}
LMLAB_DISPATCH(add, (const T* part, int count, int64_t width, T* y, int64_t stride), (part, count, width, y, stride))

// h[n] = act(gate[n]) * up[n], the outputs of one tile; a NaN of the gate stays one
template <class T> LMLAB_INLINE void gated_body(const T* gate, const T* up, int silu, int count, int64_t width, T* h, int64_t stride) {
    const f32x16 zero = {};
    for (int n = 0; n < count; n++, gate += ROWS, up += ROWS, h += stride)
        for (int r = 0; r < width; r += LANES) {
            f32x16 g = load(gate + r);
            if (silu) g = g / (exp(-g) + 1.f);
            else { g = g < zero ? zero : g; g = g * g; }
            g = g * load(up + r);
            if (width - r >= LANES) store(h + r, g);
            else store(h + r, g, width - r);
        }
}
LMLAB_DISPATCH(gated, (const T* gate, const T* up, int silu, int count, int64_t width, T* h, int64_t stride), (gate, up, silu, count, width, h, stride))

// Attention of up to QUERIES queries to one segment of keys. Keys stand in blocks of 16, [feature][16], or [feature / 2][16][2] in bfloat16;
// values in rows of `wide` features, in bfloat16 with features i and i + 16 of 32 side by side.
// What a query gets: the largest score, the sum of exponentials below it, and the values weighted with these exponentials.
struct Query {
    const float* q;   // rotated and scaled
    int64_t visible;  // keys of this segment, 0 for none
    float* out;       // largest, sum, 14 unused, wide values
};

// B blocks of keys; meanwhile `next` and the values behind `soon` are fetched, `lines` of each for every two features
template <int N, int B, class T> LMLAB_INLINE void scores(const Query* queries, const T* keys, int64_t dim, float* p, const char* next, const char* soon) {
    constexpr int lines = B * PAIR * sizeof(T) / 64;
    const float* q[N];
    for (int n = 0; n < N; n++) q[n] = queries[n].q;
    f32x16 s[N][B] = {};
    for (int64_t i = 0; i < dim; i += 2) {
#pragma GCC unroll 8
        for (int l = 0; l < lines; l++, next += 64, soon += 64) {
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(soon, 0, 2);
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) {
            Pair k = load_pair(keys + (b * dim + i) * LANES);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                s[n][b] += k.lower * q[n][i];
                s[n][b] += k.upper * q[n][i + 1];
            }
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) store(p + n * SEGMENT + b * LANES, s[n][b]);
}

template <int N, int V, class T> LMLAB_INLINE void weigh(const Query* queries, const T* values, int64_t wide, int64_t from, int64_t to, const float* p, int64_t at) {
    f32x16 acc[N][2 * V];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * V; v++) acc[n][v] = load(queries[n].out + LANES + at + v * LANES);
    for (int64_t j = from; j < to; j++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
            Pair row = load_pair(values + j * wide + at + v * PAIR);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                acc[n][2 * v] += row.lower * p[n * SEGMENT + j];
                acc[n][2 * v + 1] += row.upper * p[n * SEGMENT + j];
            }
        }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int v = 0; v < 2 * V; v++) store(queries[n].out + LANES + at + v * LANES, acc[n][v]);
}

template <int N, class T> LMLAB_INLINE void weigh_all(const Query* queries, const T* values, int64_t wide, int64_t from, int64_t to, const float* p) {
    int64_t at = 0;
    for (; at + 2 * PAIR <= wide; at += 2 * PAIR) weigh<N, 2>(queries, values, wide, from, to, p, at);
    if (at < wide) weigh<N, 1>(queries, values, wide, from, to, p, at);
}

template <int N, class T> LMLAB_INLINE void segment_of(const Query* queries, const T* keys, const T* values, int64_t dim, int64_t wide, float* p, const void* next) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 zero = {}, none = zero - __builtin_inff();
    int64_t most = 0, least = SEGMENT;
    for (int n = 0; n < N; n++) {
        most = std::max(most, queries[n].visible);
        least = std::min(least, queries[n].visible);
    }
    int64_t block = 0, blocks = (most + LANES - 1) / LANES;
    auto some = [&](auto size) __attribute__((always_inline)) {
        constexpr int B = sizeof(size);
        const T *from = keys + block * dim * LANES, *behind = from + B * dim * LANES;
        block += B;
        scores<N, B>(queries, from, dim, p + (block - B) * LANES, block < blocks ? (const char*)behind : (const char*)next, (const char*)(values + (block - B) * LANES * wide));
    };
    while (block + 4 <= blocks) some(int32_t());
    while (block < blocks) some(char());
    for (int n = 0; n < N; n++) {
        const Query& q = queries[n];
        if (!q.visible) continue;
        f32x16 largest = none, total = {};
        for (int64_t j = 0; j < q.visible; j += LANES) {
            f32x16 s = load(p + n * SEGMENT + j);
            if (j + LANES > q.visible) s = lane < (int32_t)(q.visible - j) ? s : none;
            largest = s > largest ? s : largest;
        }
        float m = largest[0];
        for (int l = 1; l < LANES; l++) m = largest[l] > m ? largest[l] : m;
        for (int64_t j = 0; j < q.visible; j += LANES) {
            f32x16 e = exp(load(p + n * SEGMENT + j) - m);
            if (j + LANES > q.visible) e = lane < (int32_t)(q.visible - j) ? e : zero;
            total += e;
            store(p + n * SEGMENT + j, e);
        }
        float sum = 0;
        for (int l = 0; l < LANES; l++) sum += total[l];
        q.out[0] = m;
        q.out[1] = sum;
        for (int64_t v = 0; v < wide; v += LANES) store(q.out + LANES + v, zero);
    }
    weigh_all<N>(queries, values, wide, 0, least, p);
    for (int n = 0; n < N; n++)  // keys that only some of the queries see
        if (queries[n].visible > least) weigh_all<1>(queries + n, values, wide, least, queries[n].visible, p + n * SEGMENT);
}

template <class T> LMLAB_INLINE void segment_body(const Query* queries, int count, const T* keys, const T* values, int64_t dim, int64_t wide, float* p, const void* next) {
    if (count == 4) segment_of<4>(queries, keys, values, dim, wide, p, next);
    else if (count == 3) segment_of<3>(queries, keys, values, dim, wide, p, next);
    else if (count == 2) segment_of<2>(queries, keys, values, dim, wide, p, next);
    else segment_of<1>(queries, keys, values, dim, wide, p, next);
}
LMLAB_DISPATCH(segment, (const Query* queries, int count, const T* keys, const T* values, int64_t dim, int64_t wide, float* p, const void* next), (queries, count, keys, values, dim, wide, p, next))

// Takes the next segment into what the ones before it gave
template <class T> LMLAB_INLINE void join_body(T* into, const T* next, int64_t wide) {
    float m = into[0] < next[0] ? next[0] : into[0];
    f32x16 scale = exp(f32x16{into[0] - m, next[0] - m});
    float a = scale[0], b = scale[1];
    into[0] = m;
    into[1] = into[1] * a + next[1] * b;
    for (int64_t v = LANES; v < LANES + wide; v += LANES) store(into + v, load(into + v) * a + load(next + v) * b);
}
LMLAB_DISPATCH(join, (T* into, const T* next, int64_t wide), (into, next, wide))

template <class T> LMLAB_INLINE void divide_body(const T* joined, int64_t dim, T* out) {
    int64_t i = 0;
    for (; i + LANES <= dim; i += LANES) store(out + i, load(joined + LANES + i) / joined[1]);
    if (i < dim) store(out + i, load(joined + LANES + i) / joined[1], dim - i);
}
LMLAB_DISPATCH(divide, (const T* joined, int64_t dim, T* out), (joined, dim, out))

// Threads of one parallel region wait for one another. Waiting is mostly shorter than a call of the system, so it spins at first;
// where there are more threads than cores, the one that is waited for may need this one's core.
class Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> turn{0};

  public:
    void wait(int threads) {
        if (threads == 1) return;
        int now = turn.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(now + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; turn.load(std::memory_order_acquire) == now; i++) {
            if (i >= 4096) std::this_thread::yield();
#if defined(__x86_64__)
            else _mm_pause();
#endif
        }
    }
};

struct Place { int64_t row, position; };                       // of a token
struct Run { int64_t first, count, row, start; };              // tokens of one row that stand behind one another, from position `start`
struct Item { int32_t run, kv_head, at; };                     // a share of attention: `at` is a segment, or the first of some queries

static thread_local Scratch scratch;

static int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T> struct Step {
    const Path& path;
    const Layer* layers;
    const Shape& s;
    const float* rotations;  // position cos/sin head_dim/2
    T *keys, *values;
    const int64_t a = s.heads * s.head_dim, b = s.kv_heads * s.head_dim, wide = rounded(s.head_dim, PAIR);
    const int64_t blocks = rounded(s.length, LANES) / LANES, group = s.heads / s.kv_heads, partial = LANES + wide;
    const int64_t widest = std::max({s.d, s.f, a}), padded = rounded(widest + 1, STEP[0] * STEP[1]);
    decltype(quantize_pick<float>()) quantize = quantize_pick<float>();
    decltype(finish_pick<float>()) finish = finish_pick<float>();
    decltype(norm_pick<float>()) norm = norm_pick<float>();
    decltype(add_pick<float>()) add = add_pick<float>();
    decltype(gated_pick<float>()) gated = gated_pick<float>();
    decltype(segment_pick<T>()) segment = segment_pick<T>();
    decltype(join_pick<float>()) join = join_pick<float>();
    decltype(divide_pick<float>()) divide = divide_pick<float>();

    // what a chunk of tokens shares
    int64_t n = 0;
    std::vector<Place> places = {};
    std::vector<Run> runs = {};
    std::vector<Item> items = {};
    bool split = false;        // attention is shared out by segments, whose results meet in `partials`
    int64_t segments = 0;      // of the longest row, if so
    float *x = nullptr, *qkv = nullptr, *attended = nullptr, *h = nullptr, *partials = nullptr;
    int8_t* q8 = nullptr;      // n x padded
    Token* tokens = nullptr;
    Barrier barrier = {};

    struct Own {  // what a thread has for itself
        int me, all;
        int8_t* q8 = nullptr;  // the int8 values that it reads: its own where there is one token, so that nobody waits for it
        Token* tokens = nullptr;
        float *normed = nullptr, *p = nullptr, *out = nullptr, *parts = nullptr;
    };

    int64_t own_bytes() const {
        return rounded(padded, 64) + 64 + 4 * (rounded(widest, 16) + LANES + QUERIES * SEGMENT + 2 * QUERIES * partial + 2 * ROWS * MOST);
    }

    Own own(char* memory, int me, int all) const {
        Own o = {me, all};
        o.q8 = (int8_t*)memory;
        o.tokens = (Token*)(memory + rounded(padded, 64));
        o.normed = (float*)(memory + rounded(padded, 64) + 64);
        o.p = o.normed + rounded(widest, 16) + LANES;
        o.out = o.p + QUERIES * SEGMENT;
        o.parts = o.out + 2 * QUERIES * partial;
        if (n > 1) { o.q8 = q8; o.tokens = tokens; }
        return o;
    }

    Blocks split_tokens() const { return {n, (n + path.tokens - 1) / path.tokens}; }

    template <class F> static void share(int64_t count, const Own& o, F f) {
        for (int64_t i = count * o.me / o.all, end = count * (o.me + 1) / o.all; i < end; i++) f(i);
    }

    // Norm and int8 values of all tokens. A single token is done by every thread for itself.
    template <class F> void round_tokens(const Own& o, const float* weight, int64_t k, const uint8_t* next, F source) {
        Blocks to = split_tokens();
        auto one = [&](int64_t t) {
            int64_t block = to.of(t), first = to.first(block), size = to.first(block + 1) - first, length = filled(k);
            const float* from = source(t);
            if (weight) { norm(from, weight, k, s.eps, o.normed, next); from = o.normed; }
            quantize(from, k, length, o.q8 + first * length + 4 * (t - first), 4 * size, o.tokens + t);
        };
        if (n == 1) return one(0);
        share(n, o, one);
        barrier.wait(o.all);
    }

    static int64_t filled(int64_t k) { return std::max(rounded(k, STEP[0]), rounded(k, STEP[1])); }

    // The outputs of one tile for a block of tokens
    void tile(const Own& o, const Matrix& m, int64_t k, int64_t tile, int64_t block, float* y, int64_t stride) const {
        Blocks to = split_tokens();
        int64_t steps = (k + STEP[m.trits] - 1) / STEP[m.trits], first = to.first(block), size = to.first(block + 1) - first;
        alignas(64) int32_t sums[ROWS * MOST];
        path.sums[m.trits][size - 1](m.codes + tile * steps * 4 * ROWS, o.q8 + first * filled(k), steps, sums);
        finish(sums, o.tokens + first, size, m, tile * ROWS, y, stride);
    }

    static int64_t tiles(const Matrix& m) { return (m.rows + ROWS - 1) / ROWS; }

    // Every tile and block of tokens of a layer with `rows` outputs; the blocks of a tile follow one another, so that its codes are in a cache
    template <class F> void each_tile(const Own& o, int64_t count, F f) const {
        Blocks to = split_tokens();
        share(count * to.count, o, [&](int64_t i) {
            int64_t block = i % to.count;
            f(i / to.count, block, to.first(block), to.first(block + 1) - to.first(block));
        });
    }

    void add_to_x(const Own& o, const Matrix& m, int64_t k) {
        each_tile(o, tiles(m), [&](int64_t i, int64_t block, int64_t first, int64_t size) {
            tile(o, m, k, i, block, o.parts, ROWS);
            add(o.parts, size, std::min<int64_t>(ROWS, m.rows - i * ROWS), x + first * s.d + i * ROWS, s.d);
        });
        barrier.wait(o.all);
    }

    T* keys_of(int64_t layer, int64_t row, int64_t kv_head) const {
        return keys + ((layer * s.batch + row) * s.kv_heads + kv_head) * blocks * s.head_dim * LANES;
    }
    T* values_of(int64_t layer, int64_t row, int64_t kv_head) const {
        return values + ((layer * s.batch + row) * s.kv_heads + kv_head) * blocks * LANES * wide;
    }

    static void put(float& to, float v) { to = v; }
    static void put(bf16& to, float v) {  // as `store` rounds sixteen of them
        uint32_t u;
        memcpy(&u, &v, 4);
        to.bits = v == v ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : u >> 16 | 0x40;
    }
    static constexpr bool paired = sizeof(T) == 2;
    static int64_t in_block(int64_t feature, int64_t key) { return paired ? feature / 2 * PAIR + 2 * key + feature % 2 : feature * LANES + key; }
    static int64_t in_row(int64_t feature) {
        int64_t i = feature % PAIR;
        return paired ? feature - i + i % LANES * 2 + i / LANES : feature;
    }

    // One token's head turned by its position: a query in place and scaled, a key into the state, and the value with it
    void rotate(int64_t layer, int64_t t, int64_t head) const {
        const int64_t half = s.head_dim / 2, position = places[t].position, row = places[t].row;
        const float *cos = rotations + position * s.head_dim, *sin = cos + half;
        float* v = qkv + t * (a + 2 * b) + head * s.head_dim;
        const bool query = head < s.heads;
        T* block = query ? nullptr : keys_of(layer, row, head - s.heads) + position / LANES * LANES * s.head_dim;
        for (int64_t i = 0; i < half; i++) {
            float lower = v[i] * cos[i] - v[i + half] * sin[i], upper = v[i + half] * cos[i] + v[i] * sin[i];
            if (query) { v[i] = lower * s.scale; v[i + half] = upper * s.scale; }
            else { put(block[in_block(i, position % LANES)], lower); put(block[in_block(i + half, position % LANES)], upper); }
        }
        if (query) return;
        T* value = values_of(layer, row, head - s.heads) + position * wide;
        for (int64_t i = 0; i < s.head_dim; i++) put(value[in_row(i)], v[b + i]);
    }

    // Queries `first`, `first` + 1, ... of a run, counted by token and then by head of the group, against one segment
    template <class F> int queries(const Run& r, int64_t kv_head, int64_t first, int64_t seg, Query* out, F where) const {
        int count = std::min<int64_t>(QUERIES, r.count * group - first);
        for (int i = 0; i < count; i++) {
            int64_t t = r.first + (first + i) / group, head = kv_head * group + (first + i) % group;
            int64_t visible = r.start + (first + i) / group + 1 - seg * SEGMENT;
            out[i].q = qkv + t * (a + 2 * b) + head * s.head_dim;
            out[i].visible = std::max<int64_t>(0, std::min<int64_t>(SEGMENT, visible));
            out[i].out = where(i, t, head);
        }
        return count;
    }

    float* partial_of(int64_t t, int64_t head, int64_t seg) const { return partials + ((t * s.heads + head) * segments + seg) * partial; }

    // `next`: what the thread reads after this
    void attend_segment(int64_t layer, const Item& item, const Own& o, const void* next) const {
        const Run& r = runs[item.run];
        Query all[QUERIES];
        for (int64_t first = 0; first < r.count * group; first += QUERIES) {
            int count = queries(r, item.kv_head, first, item.at, all, [&](int, int64_t t, int64_t head) { return partial_of(t, head, item.at); });
            run_segment(layer, r.row, item.kv_head, item.at, all, count, o, next);
        }
    }

    const T* keys_at(int64_t layer, int64_t row, int64_t kv_head, int64_t seg) const { return keys_of(layer, row, kv_head) + seg * SEGMENT * s.head_dim; }

    void run_segment(int64_t layer, int64_t row, int64_t kv_head, int64_t seg, const Query* all, int count, const Own& o, const void* next) const {
        segment(all, count, keys_at(layer, row, kv_head, seg), values_of(layer, row, kv_head) + seg * SEGMENT * wide, s.head_dim, wide, o.p, next);
    }

    void attend_queries(int64_t layer, const Item& item, const Own& o) const {
        const Run& r = runs[item.run];
        Query all[QUERIES];
        int64_t last = r.start + std::min<int64_t>(item.at + QUERIES - 1, r.count * group - 1) / group;
        for (int64_t seg = 0; seg <= last / SEGMENT; seg++) {
            int count = queries(r, item.kv_head, item.at, seg, all, [&](int i, int64_t, int64_t) { return o.out + (seg ? QUERIES + i : i) * partial; });
            run_segment(layer, r.row, item.kv_head, seg, all, count, o, keys_at(layer, r.row, item.kv_head, seg + 1));
            for (int i = 0; seg && i < count; i++)
                if (all[i].visible) join(o.out + i * partial, all[i].out, wide);
        }
        for (int i = 0; i < QUERIES && item.at + i < r.count * group; i++) {
            int64_t t = r.first + (item.at + i) / group, head = item.kv_head * group + (item.at + i) % group;
            divide(o.out + i * partial, s.head_dim, attended + t * a + head * s.head_dim);
        }
    }

    // One token's attention from the segments that it was shared out by
    const float* joined(int64_t t, const Own& o) const {
        for (int64_t head = 0; head < s.heads; head++) {
            memcpy(o.out, partial_of(t, head, 0), partial * sizeof(float));
            for (int64_t seg = 1; seg <= places[t].position / SEGMENT; seg++) join(o.out, partial_of(t, head, seg), wide);
            divide(o.out, s.head_dim, o.normed + head * s.head_dim);
        }
        return o.normed;
    }

    const void* first_keys(int64_t layer, const Item& item) const { return keys_at(layer, runs[item.run].row, item.kv_head, item.at); }

    // Where a thread's share of a matrix begins
    const uint8_t* share_of(const Own& o, const Matrix& m, int64_t k) const {
        return m.codes + tiles(m) * o.me / o.all * ((k + STEP[m.trits] - 1) / STEP[m.trits]) * 4 * ROWS;
    }

    void run(const Own& o) {
        const int64_t stride = a + 2 * b;
        for (int64_t l = 0; l < s.layers; l++) {
            const Layer& layer = layers[l];
            round_tokens(o, layer.input_norm, s.d, share_of(o, layer.q, s.d), [&](int64_t t) { return x + t * s.d; });
            const int64_t tq = tiles(layer.q), tk = tiles(layer.k);
            each_tile(o, tq + 2 * tk, [&](int64_t i, int64_t block, int64_t first, int64_t) {
                int which = i < tq ? 0 : i < tq + tk ? 1 : 2;
                const Matrix& m = which == 0 ? layer.q : which == 1 ? layer.k : layer.v;
                i -= which == 0 ? 0 : which == 1 ? tq : tq + tk;
                tile(o, m, s.d, i, block, qkv + first * stride + (which == 0 ? 0 : which == 1 ? a : a + b) + i * ROWS, stride);
            });
            barrier.wait(o.all);
            share(n * (s.heads + s.kv_heads), o, [&](int64_t i) { rotate(l, i / (s.heads + s.kv_heads), i % (s.heads + s.kv_heads)); });
            barrier.wait(o.all);
            if (split) {
                const int64_t end = items.size() * (o.me + 1) / o.all;
                share(items.size(), o, [&](int64_t i) { attend_segment(l, items[i], o, i + 1 < end ? first_keys(l, items[i + 1]) : share_of(o, layer.o, a)); });
            } else {
                for (size_t i = o.me; i < items.size(); i += o.all) attend_queries(l, items[i], o);
            }
            barrier.wait(o.all);
            round_tokens(o, layer.attn_sub_norm, a, share_of(o, layer.o, a), [&](int64_t t) -> const float* {
                return split ? joined(t, o) : attended + t * a;
            });
            add_to_x(o, layer.o, a);
            round_tokens(o, layer.post_norm, s.d, share_of(o, layer.gate, s.d), [&](int64_t t) { return x + t * s.d; });
            each_tile(o, tiles(layer.gate), [&](int64_t i, int64_t block, int64_t first, int64_t size) {
                tile(o, layer.gate, s.d, i, block, o.parts, ROWS);
                tile(o, layer.up, s.d, i, block, o.parts + ROWS * MOST, ROWS);
                gated(o.parts, o.parts + ROWS * MOST, s.silu, size, std::min<int64_t>(ROWS, s.f - i * ROWS), h + first * s.f + i * ROWS, s.f);
            });
            barrier.wait(o.all);
            round_tokens(o, layer.ffn_sub_norm, s.f, share_of(o, layer.down, s.f), [&](int64_t t) { return h + t * s.f; });
            add_to_x(o, layer.down, s.f);
        }
    }

    // Tokens [from, from + n) of the call, whose rows and positions are in `places`
    void plan(const Place* all, int64_t count) {
        n = count;
        places.assign(all, all + count);
        runs.clear();
        items.clear();
        segments = 0;
        for (int64_t t = 0; t < n; t++) {
            segments = std::max(segments, places[t].position / SEGMENT + 1);
            if (t && places[t].row == places[t - 1].row) runs.back().count++;
            else runs.push_back({t, 1, places[t].row, places[t].position});
        }
        split = n <= MOST;
        for (size_t r = 0; r < runs.size(); r++)
            for (int64_t kv = 0; kv < s.kv_heads; kv++) {
                int64_t parts = split ? (runs[r].start + runs[r].count - 1) / SEGMENT + 1 : runs[r].count * group;
                for (int64_t at = 0; at < parts; at += split ? 1 : QUERIES) items.push_back({(int32_t)r, (int32_t)kv, (int32_t)at});
            }
    }

    int all(const std::vector<Place>& all_places, float* y, int threads) {
        const int64_t total = all_places.size();
        for (int64_t from = 0; from < total; from += n) {
            plan(all_places.data() + from, std::min<int64_t>(MANY, total - from));
            x = y + from * s.d;
            int64_t sizes[] = {n * (a + 2 * b), n * a, n * s.f, split ? n * s.heads * segments * partial : 0}, floats = 0;
            for (auto& size : sizes) floats += size = rounded(size, 16);
            int64_t shared = 4 * floats + rounded(n * padded, 64) + rounded(n * sizeof(Token), 64), each = rounded(own_bytes(), 4096);
            char* memory = scratch.get(shared + threads * each);
            if (!memory) return -2;
            qkv = (float*)memory;
            attended = qkv + sizes[0];
            h = attended + sizes[1];
            partials = h + sizes[2];
            q8 = (int8_t*)(partials + sizes[3]);
            tokens = (Token*)(q8 + rounded(n * padded, 64));
            char* rest = memory + shared;
#pragma omp parallel num_threads(threads) if (threads > 1)
            {
#ifdef _OPENMP
                int me = omp_get_thread_num(), count = omp_get_num_threads();
#else
                int me = 0, count = 1;
#endif
                run(own(rest + me * each, me, count));
            }
        }
        return 0;
    }
};

// Products of N rows of x with R rows of a weight, `apart` from each other: each is sixteen sums along the row, then the sum of these. x is filled up with zeros.
template <int R, int N, class T> LMLAB_INLINE void products(const float* x, int64_t filled, const T* weight, int64_t apart, int64_t d, float* y, int64_t stride) {
    f32x16 sums[R][N] = {};
    auto one = [&](int r, int64_t i, const T* from) __attribute__((always_inline)) {
        Pair w = load_pair(from);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[r][n] += w.lower * load(x + n * filled + i) + w.upper * load(x + n * filled + i + LANES);
    };
    int64_t i = 0;
    for (; i + PAIR <= d; i += PAIR)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) one(r, i, weight + r * apart * d + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        if (i < d) {
            T last[PAIR] = {};
            memcpy(last, weight + r * apart * d + i, (d - i) * sizeof(T));
            one(r, i, last);
        }
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
            float total = 0;
            for (int l = 0; l < LANES; l++) total += sums[r][n][l];
            y[n * stride + r * apart] = total;
        }
    }
}

template <int R, class T> LMLAB_INLINE void all_products(const float* x, int64_t filled, int64_t m, const T* weight, int64_t apart, int64_t d, float* y, int64_t stride) {
    int64_t n = 0;
    for (; n + 4 <= m; n += 4) products<R, 4>(x + n * filled, filled, weight, apart, d, y + n * stride, stride);
    for (; n + 2 <= m; n += 2) products<R, 2>(x + n * filled, filled, weight, apart, d, y + n * stride, stride);
    if (n < m) products<R, 1>(x + n * filled, filled, weight, apart, d, y + n * stride, stride);
}

// Rows of a weight for all m rows of x. Four rows from four quarters at a time: each is a stream of memory that the machine fetches ahead.
template <class T> LMLAB_INLINE void head_body(const float* x, int64_t filled, int64_t m, const T* weight, int64_t rows, int64_t d, float* y, int64_t stride) {
    const int64_t quarter = rows / 4;
    for (int64_t r = 0; r < quarter; r++) all_products<4>(x, filled, m, weight + r * d, quarter, d, y + r, stride);
    for (int64_t r = 4 * quarter; r < rows; r++) all_products<1>(x, filled, m, weight + r * d, 0, d, y + r, stride);
}
LMLAB_DISPATCH(head, (const float* x, int64_t filled, int64_t m, const T* weight, int64_t rows, int64_t d, float* y, int64_t stride), (x, filled, m, weight, rows, d, y, stride))

template <class T> static int head_all(const float* x, int64_t m, const void* weight, int64_t vocab, int64_t d, float* y, int threads) {
    auto f = head_pick<T>();
    const int64_t filled = rounded(d, PAIR);
    float* ordered = (float*)scratch.get(m * filled * sizeof(float));
    if (!ordered) return -2;
    for (int64_t n = 0; n < m; n++)
        for (int64_t i = 0; i < filled; i++) {
            int64_t in = i % PAIR, from = sizeof(T) == 4 ? i : i - in + in % LANES * 2 + in / LANES;
            ordered[n * filled + i] = from < d ? x[n * d + from] : 0;
        }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int t = 0; t < threads; t++) {
        int64_t from = vocab * t / threads, to = vocab * (t + 1) / threads;
        f(ordered, filled, m, (const T*)weight + from * d, to - from, d, y + from, vocab);
    }
    return 0;
}

template <class T> static int step(const Path& path, const Layer* layers, const Shape& s, const float* rotations, void* keys, void* values,
                                   const std::vector<Place>& places, float* y, int threads) {
    Step<T> step = {path, layers, s, rotations, (T*)keys, (T*)values};
    return step.all(places, y, threads);
}

}  // namespace decoder
}  // namespace lmlab

using namespace lmlab;

// Appends tokens to rows of a state and runs them through all layers. x, y: tokens x d; rows: null for all; counts: tokens of each of the
// `sequences` rows, or null for `n` of each. lengths: of every row, moved on at the end.
// 0: done; -1: this machine has no such path; -2: no memory; -3: a row has no room, nothing was done
LMLAB_API int lmlab_decoder_step(const void* layers, const void* shape, const float* rotations, void* keys, void* values, int64_t* lengths,
                                 const float* x, float* y, const int64_t* rows, const int64_t* counts, int64_t sequences, int64_t n, int threads, const char* path) {
    const ternary::Path* p = ternary::paths().named(path);
    if (!p) return -1;
    const decoder::Shape& s = *(const decoder::Shape*)shape;
    try {
        std::vector<decoder::Place> places;
        for (int64_t i = 0; i < sequences; i++) {
            int64_t row = rows ? rows[i] : i, count = counts ? counts[i] : n;
            if (lengths[row] < 0 || lengths[row] > s.length - count) return -3;
            for (int64_t t = 0; t < count; t++) places.push_back({row, lengths[row] + t});
        }
        if (places.size()) memcpy(y, x, places.size() * s.d * sizeof(float));
        auto run = s.half ? decoder::step<bf16> : decoder::step<float>;
        if (int failed = run(*p, (const decoder::Layer*)layers, s, rotations, keys, values, places, y, threads)) return failed;
    } catch (const std::bad_alloc&) {
        return -2;
    }
    for (int64_t i = 0; i < sequences; i++) lengths[rows ? rows[i] : i] += counts ? counts[i] : n;
    return 0;
}

// y[m][vocab] = x[m][d] times weight[vocab][d], which is float (half = 0) or bf16 (half = 1). 0: done; -2: no memory
LMLAB_API int lmlab_head(const float* x, int64_t m, const void* weight, int64_t vocab, int64_t d, int half, float* y, int threads) {
    return (half ? decoder::head_all<bf16> : decoder::head_all<float>)(x, m, weight, vocab, d, y, threads);
}
