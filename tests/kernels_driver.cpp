// Runs the C++ kernels on buffers of exactly the size they may touch, at every instruction set of this machine: built with
// AddressSanitizer and UndefinedBehaviorSanitizer by tests/test_kernels.py, which reads its exit status.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
const char* lmlab_levels();
int lmlab_set_level(const char*);
int64_t lmlab_read(const char*, int64_t, int);
int64_t lmlab_peak(const char*, int64_t, int);
const char* lmlab_sparse_paths();
int lmlab_sparse_topk(const void*, const void*, void*, int64_t, int64_t, int, int64_t, int64_t, int, int, int);
int lmlab_sparse_linear(const void*, int64_t, int64_t, int, int64_t, const void*, int, const char*);
void lmlab_differential(const float*, const float*, const float*, void*, int64_t, int64_t, int64_t, float, float, float, int, int, int);
void lmlab_decay_forward(const void*, const float*, void*, int64_t, int, int, int);
void lmlab_decay_backward(const void*, const void*, const float*, void*, float*, int64_t, int, int, int);
}

static int failures = 0;
static void expect(bool ok, const char* what, const std::string& level, long a, long b) {
    if (!ok) { failures++; fprintf(stderr, "%s: level %s, %ld, %ld\n", what, level.c_str(), a, b); }
}

typedef std::vector<unsigned char> Bytes;  // exact size on the heap: one byte beyond is an error

static Bytes numbers(int64_t n, int half, unsigned seed) {
    Bytes out(n * (half ? 2 : 4));
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        float f = (int(seed >> 16) - 32768) / 16384.f;
        uint32_t u;
        memcpy(&u, &f, 4);
        if (half) { uint16_t h = u >> 16; memcpy(&out[i * 2], &h, 2); } else memcpy(&out[i * 4], &f, 4);
    }
    return out;
}

struct Layer { const uint8_t* columns; const float *scale, *bias; void* y; int64_t rows, stride; int32_t scales, format; };

static void sparse(const std::string& level, int threads) {
    static std::vector<Bytes> first;  // of the first level: all others must return the same bits
    static size_t at = 0;
    auto same = [&](const Bytes& b, const char* what, long i, long j) {
        static bool filling = true;
        static const std::string leader = level;
        filling = filling && level == leader && threads == 1;
        if (filling) first.push_back(b);
        else expect(first[at++ % first.size()] == b, what, level, i, j);
    };
    for (int half = 0; half < 2; half++)
        for (int d : {1, 15, 16, 17, 36, 64, 130, 300})
            for (int structure = 0; structure < 3; structure++) {
                int group = !structure ? d : d % 65 == 0 ? 65 : d % 4 ? 1 : 4, most = structure == 2 ? d / group : group;
                for (int keep : {1, (most + 1) / 2, most}) {
                    Bytes x = numbers(3 * d, half, d), source = numbers(3 * d, half, d + 1), out(x.size(), 0xff);
                    for (int square = 0; square < 2; square++) {
                        expect(!lmlab_sparse_topk(x.data(), square ? source.data() : nullptr, out.data(), 3, d, half, keep, group, structure, square, threads), "topk", level, d, keep);
                        same(out, "topk differs", d, keep);
                    }
                }
            }
    const int rows_of[] = {16, 32, 64, 256};
    for (int format = 0; format < 4; format++)
        for (int rows : {1, 16, 33, 300})
            for (int k : {0, 1, 16, 35})
                for (int n : {0, 1, 2, 9})
                    for (int keep : {0, 1, (k + 1) / 2}) {
                        if (keep > k) continue;
                        int half = n == 2, stride = (rows + rows_of[format] - 1) / rows_of[format] * 64;
                        Bytes w = numbers(k * stride / 4, 0, 7), x = numbers(n * k, half, k), scale = numbers(rows, 0, 3), bias = numbers(rows, 0, 4);
                        if (format == 1) w = numbers(k * stride / 2, 1, 7);
                        if (format == 3) for (auto& b : w) b &= 0x55;
                        std::istringstream names(lmlab_sparse_paths());
                        Bytes kept;
                        for (std::string path; names >> path;) {
                            Bytes y((half ? 2 : 4) * n * rows, 0xff);
                            Layer layer = {w.data(), (float*)scale.data(), (float*)bias.data(), y.data(), rows, stride, 1, format};
                            expect(!lmlab_sparse_linear(x.data(), n, k, half, keep, &layer, threads, path.c_str()), "linear", level, rows, k);
                            if (kept.empty()) kept = y;
                            expect(kept == y, "paths differ", level, rows, k);
                        }
                        same(kept, "linear differs", rows, k);
                    }
}

static void differential(const std::string& level, int threads) {
    static std::vector<Bytes> first;
    static size_t at = 0;
    static const std::string leader = level;
    for (int half = 0; half < 2; half++)
        for (int e : {0, 1, 2, 15, 16, 17, 64, 100})
            for (int rows : {0, 1, 3, 700})
                for (int form = 0; form < 3; form++) {  // no norm, a norm, a gain
                    Bytes x = numbers(rows * 2 * e, 0, e + 1), weight = numbers(e, 0, 3), out((int64_t)rows * e * (half ? 2 : 4), 0xff);
                    const float *a = (float*)x.data(), *gain = form == 2 ? (float*)weight.data() : nullptr;
                    lmlab_differential(a, rows ? a + e : a, gain, out.data(), rows, e, 2 * e, 0.6f, 0.8f, 1e-5f, form > 0, half, threads);
                    if (level == leader && threads == 1) first.push_back(out);
                    else expect(first[at++ % first.size()] == out, "differential differs", level, rows, e);
                    for (int i = 0; i < rows * e && !half && form == 0; i++) {
                        float got;
                        memcpy(&got, &out[4 * i], 4);
                        const float* p = a + i / e * 2 * e + i % e;
                        expect(std::fabs(got - (p[0] - 0.6f * p[e])) < 1e-5f, "differential", level, rows, e);
                    }
                }
}

int main() {
    std::vector<std::string> levels;
    std::istringstream all(lmlab_levels());
    for (std::string l; all >> l;) levels.push_back(l);
    for (auto& level : levels) {
        expect(lmlab_set_level(level.c_str()) == 0, "set_level", level, 0, 0);
        for (int threads = 1; threads <= 2; threads++) {
            for (int64_t n : {0, 1, 7, 8, 9, 255, 256, 263, 4096, 5003, 65536}) {
                for (int offset = 0; offset < 2; offset++) {
                    Bytes b(n + offset, 1);
                    uint64_t want = 0;
                    for (int64_t i = 0; i < n; i++) want += uint64_t(1) << (8 * (i % 8));
                    expect((uint64_t)lmlab_read((const char*)b.data() + offset, n, threads) == want, "read", level, n, offset);
                }
            }
            for (int half = 0; half < 2; half++)
                for (int c : {1, 2, 15, 16, 17, 31, 32, 33, 65})
                    for (int n : {0, 1, 3}) {
                        Bytes s = numbers((int64_t)n * c * c, half, c), d = numbers((int64_t)n * c * c, half, c + 1), g = numbers((int64_t)n * c, 0, 5);
                        Bytes out(s.size(), 0xff), ds(s.size(), 0xff), dg(g.size(), 0xff);  // 0xff...: NaN
                        lmlab_decay_forward(s.data(), (float*)g.data(), out.data(), n, c, half, threads);
                        lmlab_decay_backward(d.data(), out.data(), (float*)g.data(), ds.data(), (float*)dg.data(), n, c, half, threads);
                        static std::vector<Bytes> first;  // of the first level: all others must return the same bits
                        static size_t at = 0;
                        if (level == levels[0] && threads == 1) {
                            for (auto& b : {out, ds, dg}) first.push_back(b);
                        } else {
                            for (auto& b : {out, ds, dg}) expect(first[at++ % first.size()] == b, "decay differs", level, c, half);
                        }
                        for (size_t i = 0; i + 4 <= dg.size(); i += 4) {
                            float f;
                            memcpy(&f, &dg[i], 4);
                            expect(!std::isnan(f), "decay left dg unwritten", level, c, half);
                        }
                    }
            sparse(level, threads);
            differential(level, threads);
            for (auto name : {"float32", "bfloat16", "int8", "nothing"}) lmlab_peak(name, 10, threads);
        }
    }
    expect(lmlab_set_level("nothing") == -1, "an unknown level is refused", "", 0, 0);
    printf("%zu levels, %d failures\n", levels.size(), failures);
    return failures != 0;
}
