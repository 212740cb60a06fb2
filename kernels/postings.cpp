// Inverted lists of token ids: text to sets of ids, sets to lists, lists to the best passages for a query.
//
// A block is 65,536 passages, so that a passage is 16 bits within it and its scores, 256 KB of float, stay in a core's second-level cache
// while list after list is added to them. A list of 4096 passages or more is a bitmap of the block: 4096 words, never larger, and added
// with 16 lanes instead of one. Lists are added in ascending order of ids, so a score is the same float on every path and number of threads.
#include "common.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

namespace lmlab {
namespace postings {

constexpr int64_t BLOCK = 65536, DENSE = BLOCK / LANES;

// ---- sets to lists

// Returns how many 16-bit words the lists take; docs and values have room for one an entry
template <class Id, class Value>
static int64_t invert(const Id* ids, const int64_t* ptr, int64_t n, int64_t width, const Value* values, uint16_t* docs, uint32_t* starts, Value* out) {
    std::vector<uint32_t> count(width), at(width);
    for (int64_t e = ptr[0]; e < ptr[n]; e++) count[ids[e]]++;
    uint32_t total = 0;
    for (int64_t v = 0; v < width; v++) {
        starts[v] = at[v] = total;
        const bool bitmap = !values && count[v] >= DENSE;
        if (bitmap) memset(docs + total, 0, DENSE * 2);
        total += bitmap ? DENSE : count[v];
    }
    starts[width] = total;
    for (int64_t i = 0; i < n; i++)
        for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
            const Id v = ids[e];
            if (!values && count[v] >= DENSE) docs[at[v] + i / 16] |= 1 << i % 16;
            else {
                if (values) out[at[v]] = values[e];
                docs[at[v]++] = i;
            }
        }
    return total;
}

// ---- lists to passages

struct half { uint16_t bits; };

LMLAB_INLINE f32x16 wide(const float* p) { return load(p); }
LMLAB_INLINE f32x16 wide(const half* p) {  // exact for every finite half; there are no others
    u16x16 h; memcpy(&h, p, sizeof h);
    u32x16 u = __builtin_convertvector(h, u32x16);
    f32x16 magnitude = (f32x16)((u & 0x7fff) << 13) * 0x1p112f;
    return (f32x16)((u32x16)magnitude | (u & 0x8000) << 16);
}

template <class T>
LMLAB_INLINE void add_body(const uint16_t* docs, const T* values, int64_t n, float w, float* acc) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        f32x16 p = wide(values + j) * w;
        for (int l = 0; l < LANES; l++) acc[docs[j + l]] += p[l];
    }
    if (j < n) {
        T part[LANES] = {};
        memcpy((void*)part, values + j, (n - j) * sizeof(T));
        f32x16 p = wide(part) * w;
        for (int l = 0; j + l < n; l++) acc[docs[j + l]] += p[l];
    }
}
LMLAB_DISPATCH(add, (const uint16_t* docs, const T* values, int64_t n, float w, float* acc), (docs, values, n, w, acc))

static void add_list(const uint16_t* docs, int64_t n, float w, float* acc) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        acc[docs[j]] += w;
        acc[docs[j + 1]] += w;
        acc[docs[j + 2]] += w;
        acc[docs[j + 3]] += w;
    }
    for (; j < n; j++) acc[docs[j]] += w;
}

template <class T>
LMLAB_INLINE void bitmap_body(const uint16_t* words, int64_t n, float w, T* acc) {  // n: passages, in whole lanes
    const i32x16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    const f32x16 zero = {};
    const i32x16 weight = (i32x16)(zero + w);
    for (int64_t i = 0; i < n / LANES; i++) {
        i32x16 has = (bit & (int32_t)words[i]) != 0;
        store(acc + i * LANES, load(acc + i * LANES) + (f32x16)(has & weight));  // + 0 where there is no bit changes no sum
    }
}
LMLAB_DISPATCH(bitmap, (const uint16_t* words, int64_t n, float w, T* acc), (words, n, w, acc))

struct Found {
    float score;
    int64_t id;
    bool operator<(const Found& o) const { return score != o.score ? score > o.score : id < o.id; }  // better first
};

template <class T>  // a bit for each lane of 16 that is above t; n in whole lanes
LMLAB_INLINE void above_body(const T* acc, int64_t n, float t, uint8_t* any) {
    for (int64_t i = 0; i < n / LANES; i++) {
        i32x16 m = load(acc + i * LANES) > t;
        int32_t r = 0;
        for (int l = 0; l < LANES; l++) r |= m[l];
        any[i] = r != 0;
    }
}
LMLAB_DISPATCH(above, (const T* acc, int64_t n, float t, uint8_t* any), (acc, n, t, any))

// The k best of some scores into a heap whose front is the worst
static void best(const float* acc, int64_t n, int64_t first, size_t k, float least, std::vector<Found>& heap, uint8_t* any) {
    heap.clear();
    const auto pick = above_pick<float>();
    constexpr int64_t STRETCH = 4096;
    // below `least` nothing can be among the best of all blocks; an equal of it can
    float t = least > -INFINITY ? std::nextafterf(least, -INFINITY) : -INFINITY;
    for (int64_t a = 0; a < n; a += STRETCH) {
        const int64_t size = std::min(STRETCH, n - a), lanes = (size + LANES - 1) / LANES * LANES;
        pick(acc + a, lanes, t, any);
        for (int64_t i = 0; i < lanes / LANES; i++) {
            if (!any[i]) continue;
            for (int64_t j = a + i * LANES; j < std::min(n, a + (i + 1) * LANES); j++) {
                if (!(acc[j] > t)) continue;
                if (heap.size() == k) std::pop_heap(heap.begin(), heap.end()), heap.pop_back();
                heap.push_back({acc[j], first + j});
                std::push_heap(heap.begin(), heap.end());
                if (heap.size() == k) t = heap.front().score;  // later numbers lose ties
            }
        }
    }
}

struct Index {  // the fields of `_Index` in postings.py
    const uint16_t* docs;
    const uint32_t* starts;  // blocks x (width + 1)
    const int64_t* bases;    // of each block's part of docs
    const void* values;      // null, half or float
    const int64_t* empty;    // ascending
    int64_t n, width, empties, blocks;
    int32_t half;
};

template <class Value>
static void scores(const Index& x, int64_t block, const int32_t* ids, const float* weights, int64_t terms, int64_t m, float* acc) {
    const uint32_t* starts = x.starts + block * (x.width + 1);
    const uint16_t* docs = x.docs + x.bases[block];
    const Value* values = x.values ? (const Value*)x.values + x.bases[block] : nullptr;
    const auto dense = bitmap_pick<float>();
    const auto weighted = add_pick<Value>();
    memset(acc, 0, m * sizeof(float));
    for (int64_t j = 0; j < terms; j++) {
        const uint32_t a = starts[ids[j]], z = starts[ids[j] + 1];
        if (j + 4 < terms) {
            const uint32_t next = starts[ids[j + 4]];
            __builtin_prefetch(docs + next);
            if (values) __builtin_prefetch(values + next);
        }
        if (a == z) continue;
        if (values) weighted(docs + a, values + a, z - a, weights[j], acc);
        else if (z - a == DENSE) dense(docs + a, m, weights[j], acc);
        else add_list(docs + a, z - a, weights[j], acc);
    }
}

static int search(const Index& x, const int64_t* qptr, const int32_t* qids, const float* qweights, int64_t b, int64_t k, int64_t* ids, float* out, int threads) {
    std::vector<std::vector<Found>> found(x.blocks * b);
    std::vector<std::atomic<float>> least(b);
    for (auto& t : least) t = -INFINITY;
    bool failed = false;
    const int crew = (int)std::min<int64_t>(threads, x.blocks * b);
#pragma omp parallel for num_threads(crew) if (crew > 1) schedule(dynamic, 1)
    for (int64_t item = 0; item < x.blocks * b; item++) {
        const int64_t block = item / b, q = item % b, first = block * BLOCK, n = std::min(BLOCK, x.n - first);
        static thread_local Scratch memory;
        float* acc = (float*)memory.get(BLOCK * sizeof(float) + 4096);
        if (!acc) { failed = true; continue; }
        const int64_t m = (n + LANES - 1) / LANES * LANES;
        const auto f = x.half ? scores<half> : scores<float>;
        f(x, block, qids + qptr[q], qweights + qptr[q], qptr[q + 1] - qptr[q], m, acc);
        for (int64_t j = n; j < m; j++) acc[j] = -INFINITY;
        const int64_t* e = std::lower_bound(x.empty, x.empty + x.empties, first);
        for (; e < x.empty + x.empties && *e < first + n; e++) acc[*e - first] = -INFINITY;
        auto& heap = found[item];
        best(acc, n, first, k, least[q], heap, (uint8_t*)(acc + BLOCK));
        if ((int64_t)heap.size() == k) {
            float t = heap.front().score, old = least[q];
            while (t > old && !least[q].compare_exchange_weak(old, t)) {}
        }
        heap.shrink_to_fit();
    }
    if (failed) return -2;
#pragma omp parallel for num_threads(threads) if (threads > 1 && b > threads) schedule(static)
    for (int64_t q = 0; q < b; q++) {
        std::vector<Found> all;
        for (int64_t block = 0; block < x.blocks; block++) {
            auto& part = found[block * b + q];
            all.insert(all.end(), part.begin(), part.end());
            std::vector<Found>().swap(part);
        }
        const int64_t count = std::min<int64_t>(k, all.size());
        std::partial_sort(all.begin(), all.begin() + count, all.end());
        for (int64_t j = 0; j < k; j++) {
            ids[q * k + j] = j < count ? all[j].id : -1;
            out[q * k + j] = j < count ? all[j].score : -INFINITY;
        }
    }
    return 0;
}

// ---- text to sets: words that were met before are looked up

struct Slot {
    uint64_t hash;  // 0: free
    int64_t word;   // where it stands in `words`
    uint32_t length, count;
    int64_t ids;    // where its ids stand in `ids`
};

static uint64_t hash_of(const char* p, int64_t n) {
    uint64_t h = 0x9E3779B97F4A7C15ull ^ (uint64_t)n;
    auto mix = [&](uint64_t w) {
        h = (h ^ w) * 0xBF58476D1CE4E5B9ull;
        h ^= h >> 29;
    };
    for (; n >= 8; p += 8, n -= 8) { uint64_t w; memcpy(&w, p, 8); mix(w); }
    if (n) { uint64_t w = 0; memcpy(&w, p, n); mix(w); }
    h *= 0x94D049BB133111EBull;
    return (h ^ h >> 31) | 1;
}

struct Memo {
    std::vector<Slot> table = std::vector<Slot>(1 << 12);
    std::string words;
    std::vector<uint32_t> ids;
    int64_t used = 0;

    Slot* find(const char* p, int64_t n, uint64_t h) {  // where the word is, or where it would go
        for (uint64_t i = h >> 20;; i++) {
            Slot& s = table[i & (table.size() - 1)];
            if (!s.hash || (s.hash == h && s.length == n && !memcmp(words.data() + s.word, p, n))) return &s;
        }
    }

    void add(const char* p, int64_t n, const uint32_t* of, int64_t count) {
        if (2 * (used + 1) > (int64_t)table.size()) {
            std::vector<Slot> old(table.size() * 2);
            old.swap(table);
            for (Slot& s : old)
                if (s.hash) {
                    uint64_t i = s.hash >> 20;
                    while (table[i & (table.size() - 1)].hash) i++;
                    table[i & (table.size() - 1)] = s;
                }
        }
        const uint64_t h = hash_of(p, n);
        Slot* s = find(p, n, h);
        if (s->hash) return;
        *s = {h, (int64_t)words.size(), (uint32_t)n, (uint32_t)count, (int64_t)ids.size()};
        words.append(p, n);
        ids.insert(ids.end(), of, of + count);
        used++;
    }
};

static bool space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// The sets of the texts whose length is -1; of a text with words that are not known the length stays -1 and those words are noted
static int64_t sets(Memo& memo, const char* text, const int64_t* ptr, int64_t n, int64_t room, uint32_t shift, int64_t width, uint32_t* out, int32_t* lengths, int64_t* unknown, int64_t most, int threads) {
    std::atomic<int64_t> notes{0};
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 64)
    for (int64_t i = 0; i < n; i++) {
        if (lengths[i] != -1) continue;
        static thread_local std::vector<uint32_t> seen;  // the last round in which an id was met
        static thread_local uint32_t round = 0;
        if ((int64_t)seen.size() < width || ++round == 0) seen.assign(width, 0), round = 1;
        uint32_t* set = out + i * room;
        int64_t tokens = 0, size = 0;
        bool known = true;
        for (const char *p = text + ptr[i], *end = text + ptr[i + 1]; p < end && tokens < room;) {
            while (p < end && space(*p)) p++;
            const char* word = p;
            while (p < end && !space(*p)) p++;
            if (p == word) break;
            Slot* s = memo.find(word, p - word, hash_of(word, p - word));
            if (!s->hash) {
                known = false;
                const int64_t at = notes++;
                if (at < most) unknown[2 * at] = word - text, unknown[2 * at + 1] = p - word;
                continue;
            }
            for (uint32_t j = 0; j < s->count && tokens < room; j++, tokens++) {
                const uint32_t id = memo.ids[s->ids + j];
                if (id < shift || id - shift >= width || seen[id - shift] == round) continue;
                seen[id - shift] = round;
                set[size++] = id - shift;
            }
        }
        if (!known) continue;
        std::sort(set, set + size);
        lengths[i] = size;
    }
    return std::min<int64_t>(notes, most);
}

}  // namespace postings
}  // namespace lmlab

using namespace lmlab;

// ids: 2 or 4 bytes each (id_bytes); values: 0, 2 or 4 bytes each. Returns the entries written, -1 for an id that is not below width.
LMLAB_API int64_t lmlab_postings_invert(const void* ids, int id_bytes, const int64_t* ptr, int64_t n, int64_t width, const void* values, int value_bytes, uint16_t* docs, uint32_t* starts, void* out) {
    using namespace postings;
    for (int64_t e = ptr[0]; e < ptr[n]; e++)
        if ((id_bytes == 2 ? ((const uint16_t*)ids)[e] : ((const uint32_t*)ids)[e]) >= width) return -1;
    auto run = [&](auto id, auto value) {
        typedef decltype(id) Id;
        typedef decltype(value) Value;
        return invert<Id, Value>((const Id*)ids, ptr, n, width, value_bytes ? (const Value*)values : nullptr, docs, starts, (Value*)out);
    };
    if (id_bytes == 2) return value_bytes == 4 ? run(uint16_t(), float()) : run(uint16_t(), uint16_t());
    return value_bytes == 4 ? run(uint32_t(), float()) : run(uint32_t(), uint16_t());
}

// ids and scores: b x k. 0: done; -2: no memory
LMLAB_API int lmlab_postings_search(const void* index, const int64_t* qptr, const int32_t* qids, const float* qweights, int64_t b, int64_t k, int64_t* ids, float* scores, int threads) {
    return postings::search(*(const postings::Index*)index, qptr, qids, qweights, b, k, ids, scores, threads);
}

LMLAB_API void* lmlab_memo_new() { return new postings::Memo; }

LMLAB_API void lmlab_memo_free(void* memo) { delete (postings::Memo*)memo; }

LMLAB_API int64_t lmlab_memo_add(void* memo, const char* words, const int64_t* word_ptr, int64_t n, const uint32_t* ids, const int64_t* id_ptr) {
    auto& m = *(postings::Memo*)memo;
    for (int64_t i = 0; i < n; i++) m.add(words + word_ptr[i], word_ptr[i + 1] - word_ptr[i], ids + id_ptr[i], id_ptr[i + 1] - id_ptr[i]);
    return m.used;
}

// out: n x room; lengths: n, those of -1 are done; unknown: at most `most` pairs (first byte, bytes). Returns how many are unknown.
LMLAB_API int64_t lmlab_memo_sets(void* memo, const char* text, const int64_t* ptr, int64_t n, int64_t room, uint32_t shift, int64_t width, uint32_t* out, int32_t* lengths, int64_t* unknown, int64_t most, int threads) {
    return postings::sets(*(postings::Memo*)memo, text, ptr, n, room, shift, width, out, lengths, unknown, most, threads);
}
