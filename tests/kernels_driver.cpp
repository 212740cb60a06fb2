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
            for (auto name : {"float32", "bfloat16", "int8", "nothing"}) lmlab_peak(name, 10, threads);
        }
    }
    expect(lmlab_set_level("nothing") == -1, "an unknown level is refused", "", 0, 0);
    printf("%zu levels, %d failures\n", levels.size(), failures);
    return failures != 0;
}
