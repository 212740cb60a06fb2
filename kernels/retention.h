// The body of the gated retention kernels for one instruction set. retention.cpp includes this file once for each, inside a namespace
// that has said before
//   L      float lanes of a vector
//   ROWS   rows of a tile of a matrix product, a power of two: ROWS x 2 sums stay in registers
// and that defines behind it `madd` and `zip`. Nothing here is shared between the namespaces, since each may use instructions that the
// others lack; for the same reason nothing here calls an inline function of the standard library.

typedef float V __attribute__((vector_size(4 * L)));
struct Pair { V low, high; };

LMLAB_INLINE V madd(V a, V b, V c);  // a * b + c
LMLAB_INLINE Pair zip(V a, V b);     // a0 b0 a1 b1 ...

LMLAB_INLINE V vector(const float* p) { V v; memcpy(&v, p, sizeof v); return v; }
LMLAB_INLINE void keep(float* p, V v) { memcpy(p, &v, sizeof v); }

// c[r][j] += sum over x of a[r][x] b[x][j] for R rows and W vectors of columns. What is added are `depth` full columns of a, then with
// shape not 0 a triangle of R x R (x <= r below, x >= r above), then `after` full columns; triangle and rest stand at a2, b2.
// Entries on the other side of a triangle are never read, so it does not matter what is there: no 0 * NaN comes from the future.
template <int R, int W, int shape>
LMLAB_INLINE void tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, const float* a2, const float* b2,
                       int64_t after, float* c, int64_t ldc, bool add) {
    V acc[R][W];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) acc[r][w] = add ? vector(c + r * ldc + w * L) : V{};
    auto step = [&](const float* at, const float* row, int from, int to) LAMBDA {
        V v[W];
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) v[w] = vector(row + w * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            if (r >= from && r < to)
#pragma GCC unroll 2
                for (int w = 0; w < W; w++) acc[r][w] = madd(at[r * lda] - V{}, v[w], acc[r][w]);
    };
    for (int64_t x = 0; x < depth; x++) step(a + x, b + x * ldb, 0, R);
    if (shape) {
#pragma GCC unroll 8
        for (int x = 0; x < R; x++) step(a2 + x, b2 + x * ldb, shape == BELOW ? x : 0, shape == BELOW ? R : x + 1);
        for (int64_t x = R; x < R + after; x++) step(a2 + x, b2 + x * ldb, 0, R);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int w = 0; w < W; w++) keep(c + r * ldc + w * L, acc[r][w]);
}

// c (+)= a b, where a is `depth` full columns, beside which with shape not 0 a triangle of rows x rows follows. b has a row for each
// column of a. With `lower` only what of c is on or below the diagonal is wanted. `cols` is a multiple of 16 for b and c.
template <int shape, int R>
LMLAB_INLINE void strip(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t at, int64_t rows,
                        int64_t cols, int64_t depth, bool add) {
    int64_t skip = depth + at, full = shape == BELOW ? skip : depth, after = shape == ABOVE ? rows - at - R : 0, j = 0;
    a += at * lda, c += at * ldc;
    for (; j + 2 * L <= cols; j += 2 * L)
        tile<R, 2, shape>(a, lda, b + j, ldb, full, a + skip, b + skip * ldb + j, after, c + j, ldc, add);
    for (; j < cols; j += L) tile<R, 1, shape>(a, lda, b + j, ldb, full, a + skip, b + skip * ldb + j, after, c + j, ldc, add);
}

template <int shape>
static void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t cols,
                    int64_t depth, bool add, bool lower = false) {
    for (int64_t at = 0, r; at < rows; at += r) {
        for (r = ROWS; r > rows - at;) r /= 2;
        int64_t width = lower ? up(at + r) : cols;
        if (r == ROWS) strip<shape, ROWS>(a, lda, b, ldb, c, ldc, at, rows, width, depth, add);
        else if (r == 4) strip<shape, 4>(a, lda, b, ldb, c, ldc, at, rows, width, depth, add);
        else if (r == 2) strip<shape, 2>(a, lda, b, ldb, c, ldc, at, rows, width, depth, add);
        else strip<shape, 1>(a, lda, b, ldb, c, ldc, at, rows, width, depth, add);
    }
}

// to[j][i] = from[i][j] for j < cols; columns of `to` from `rows` to the next multiple of L become zero. With `lower` only blocks that
// touch the diagonal of a square `from` or lie below it.
static void transpose(const float* from, int64_t ldf, float* to, int64_t ldt, int64_t rows, int64_t cols, bool lower = false) {
    for (int64_t i = 0; i < rows; i += L)
        for (int64_t j = 0; j < (lower ? i + 1 : cols); j += L) {
            V v[L], w[L];
#pragma GCC unroll 16
            for (int l = 0; l < L; l++) v[l] = i + l < rows ? vector(from + (i + l) * ldf + j) : V{};
#pragma GCC unroll 4
            for (int s = 1; s < L; s *= 2) {
#pragma GCC unroll 8
                for (int l = 0; l < L / 2; l++) {
                    Pair p = zip(v[l], v[l + L / 2]);
                    w[2 * l] = p.low, w[2 * l + 1] = p.high;
                }
#pragma GCC unroll 16
                for (int l = 0; l < L; l++) v[l] = w[l];
            }
#pragma GCC unroll 16
            for (int l = 0; l < L; l++)
                if (j + l < cols) keep(to + (j + l) * ldt + i, v[l]);
        }
}

template <class T> static void rows_in(const T* from, int64_t stride, float* to, int64_t ld, int64_t rows, int64_t cols, float scale) {
    for (int64_t i = 0; i < rows; i++, from += stride, to += ld) {
        int64_t j = 0;
        for (; j + LANES <= cols; j += LANES) store(to + j, load(from + j) * scale);
        if (j < cols) store(to + j, load(from + j, cols - j) * scale, cols - j);
    }
}

template <class T> static void rows_out(const float* from, int64_t ld, T* to, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++, from += ld, to += cols) {
        int64_t j = 0;
        for (; j + LANES <= cols; j += LANES) store(to + j, load(from + j));
        if (j < cols) store(to + j, load(from + j), cols - j);
    }
}

static void scale_rows(float* x, int64_t ld, int64_t rows, int64_t cols, const float* by) {  // each row by a number of its own
    for (int64_t i = 0; i < rows; i++, x += ld) {
        int64_t j = 0;
        for (; j + LANES <= cols; j += LANES) store(x + j, load(x + j) * by[i]);
        for (; j < cols; j++) x[j] *= by[i];
    }
}

static void scale_columns(float* x, int64_t ld, int64_t rows, int64_t cols, const float* by) {
    for (int64_t i = 0; i < rows; i++, x += ld)
        for (int64_t j = 0; j < cols; j += LANES) store(x + j, load(x + j) * load(by + j));
}

static float dot(const float* a, const float* b, int64_t n) {  // n a multiple of 16
    f32x16 sum = {};
    for (int64_t i = 0; i < n; i += LANES) sum += load(a + i) * load(b + i);
    float total = 0;
    for (int l = 0; l < LANES; l++) total += sum[l];
    return total;
}

// Running sums of a chunk's log decays, what is left of the old state at each token, and of each token at the end
struct Fade {
    float *g, *from_start, *to_end, all;
    void set(const float* log_gamma, int64_t n) {
        float sum = 0;
        for (int64_t i = 0; i < n; i++) g[i] = sum += log_gamma[i];
        for (int64_t i = 0; i < n; i += LANES) {
            store(from_start + i, exp(load(g + i)));
            store(to_end + i, exp(sum - load(g + i)));
        }
        all = from_start[n - 1];
    }
};

LMLAB_INLINE void fade_scores(float* row, const float* g, int64_t i) {  // up to the diagonal, and further to a multiple of 16
    for (int64_t j = 0; j <= i; j += LANES) store(row + j, load(row + j) * exp(g[i] - load(g + j)));
}

template <class T> static void forward_one(const Call& c, int64_t which, float* memory) {
    const int64_t d = c.d, e = c.e, dp = up(d), ep = up(e), most = c.chunk, cp = up(most), lda = d + cp;
    Scratch take = {memory, 0};
    Fade fade = {take(cp), take(cp), take(cp), 0};
    float* k = take(most * dp);
    float* kt = take(d * cp);
    float* a = take(most * lda);              // queries, scores
    float* state = take((d + most) * ep);     // state, values: one matrix product reads both
    float* values = state + d * ep;
    float* out = take(most * ep);
    const T *q0 = c.q.at<T>(which, c.h), *k0 = c.k.at<T>(which, c.h), *v0 = c.v.at<T>(which, c.h);
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < ep; j++) state[i * ep + j] = c.state && j < e ? c.state[(which * d + i) * e + j] : 0;
    for (int64_t at = 0, n; at < c.t; at += n) {
        n = c.t - at < most ? c.t - at : most;
        fade.set(c.log_gamma + which * c.t + at, n);
        rows_in(q0 + at * c.q.t, c.q.t, a, lda, n, d, 1);
        rows_in(k0 + at * c.k.t, c.k.t, k, dp, n, d, c.scale);
        rows_in(v0 + at * c.v.t, c.v.t, values, ep, n, e, 1);
        transpose(k, dp, kt, cp, n, d);
        product<FULL>(a, lda, kt, cp, a + d, lda, n, cp, d, false, true);
        for (int64_t i = 0; i < n; i++) fade_scores(a + i * lda + d, fade.g, i);
        scale_rows(a, lda, n, d, fade.from_start);
        product<BELOW>(a, lda, state, ep, out, ep, n, ep, d, false);
        rows_out(out, ep, (T*)c.o + (which * c.t + at) * e, n, e);
        scale_columns(kt, cp, d, up(n), fade.to_end);
        for (int64_t i = 0; i < d * ep; i += LANES) store(state + i, load(state + i) * fade.all);
        product<FULL>(kt, cp, values, ep, state, ep, d, ep, n, true);
    }
    rows_out(state, ep, c.state_out + which * d * e, d, e);
}

// With S = (q k^T) * D the faded scores, R the state before a chunk, G the gradient of the state after it, u and w what is left of
// the old state at a token and of a token at the end, and dS = (do v^T) * D:
//   dq = dS k + u do R^T,  dk = dS^T q + w v G^T,  dv = S^T do + w k G,  dR = (u q)^T do + u_last G.
// The log decay of token m fades every pair of a reader i >= m and a writer j < m, the state being a writer before all tokens and its
// gradient a reader behind them. So its gradient is the sum over i >= m of q_i dq_i - k_i (dS^T q)_i, which counts pairs inside the
// chunk on both sides of m once and the others not at all, plus the sum over j < m of k_j (w v G^T)_j, plus u_last <G, R>. A token's
// own score, which no decay touches, is kept out of both sides: it would cancel only up to rounding.
template <class T> static void backward_one(const Call& c, int64_t which, float* memory) {
    const int64_t d = c.d, e = c.e, dp = up(d), ep = up(e), most = c.chunk, cp = up(most), le = e + cp, ld = d + cp;
    const int64_t wide = dp > ep ? dp : ep, chunks = (c.t + most - 1) / most;
    Scratch take = {memory, 0};
    Fade fade = {take(cp), take(cp), take(cp), 0};
    float *own = take(cp), *reads = take(cp), *writes = take(cp), *ends = take(cp);
    float* dout = take(most * le);          // output gradients, dS
    float* v = take(most * le);             // values, dS^T
    float* k = take(most * ld);             // keys, S^T
    float* rt = take((e + most) * dp);      // R^T, keys
    float* gt = take((e + most) * dp);      // G^T, queries
    float* g = take((d + most) * ep);       // G, output gradients
    float* turned = take(wide * cp);        // k^T, v^T, q^T, one after the other
    float* s = take(most * cp);
    float* made = take(most * wide);
    float* cross = take(most * dp);
    float* states = take((chunks + 1) * d * ep);
    float *krows = rt + e * dp, *qrows = gt + e * dp, *drows = g + d * ep;
    const T *q0 = c.q.at<T>(which, c.h), *k0 = c.k.at<T>(which, c.h), *v0 = c.v.at<T>(which, c.h), *do0 = c.dout.at<T>(which, c.h);
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < ep; j++) {
            states[i * ep + j] = c.state && j < e ? c.state[(which * d + i) * e + j] : 0;
            g[i * ep + j] = j < e ? c.dstate_out[(which * d + i) * e + j] : 0;
        }
    for (int64_t at = 0; at + most < c.t; at += most) {  // the states again; the last chunk need not write its own
        float *old = states + at / most * d * ep, *next = old + d * ep;
        fade.set(c.log_gamma + which * c.t + at, most);
        rows_in(k0 + at * c.k.t, c.k.t, krows, dp, most, d, c.scale);
        rows_in(v0 + at * c.v.t, c.v.t, made, ep, most, e, 1);
        transpose(krows, dp, turned, cp, most, d);
        scale_columns(turned, cp, d, up(most), fade.to_end);
        for (int64_t i = 0; i < d * ep; i += LANES) store(next + i, load(old + i) * fade.all);
        product<FULL>(turned, cp, made, ep, next, ep, d, ep, most, true);
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        const int64_t at = chunk * most, n = c.t - at < most ? c.t - at : most, row = which * c.t + at;
        const float* r = states + chunk * d * ep;
        fade.set(c.log_gamma + row, n);
        transpose(r, ep, rt, dp, d, e);
        transpose(g, ep, gt, dp, d, e);
        rows_in(k0 + at * c.k.t, c.k.t, krows, dp, n, d, c.scale);
        rows_in(q0 + at * c.q.t, c.q.t, qrows, dp, n, d, 1);
        rows_in(v0 + at * c.v.t, c.v.t, v, le, n, e, 1);
        rows_in(do0 + at * c.dout.t, c.dout.t, drows, ep, n, e, 1);
        rows_in(krows, dp, k, ld, n, d, 1);
        rows_in(drows, ep, dout, le, n, e, 1);
        transpose(krows, dp, turned, cp, n, d);
        product<FULL>(qrows, dp, turned, cp, s, cp, n, cp, d, false, true);
        transpose(v, le, turned, cp, n, e);
        product<FULL>(dout, le, turned, cp, dout + e, le, n, cp, e, false, true);
        for (int64_t i = 0; i < n; i++) {
            float *si = s + i * cp, *di = dout + i * le + e;
            for (int64_t j = 0; j <= i; j += LANES) {
                f32x16 fades = exp(fade.g[i] - load(fade.g + j));
                store(si + j, load(si + j) * fades);
                store(di + j, load(di + j) * fades);
            }
            own[i] = di[i], di[i] = 0;
        }
        transpose(s, cp, k + d, ld, n, n, true);
        transpose(dout + e, le, v + e, le, n, n, true);
        scale_rows(dout, le, n, e, fade.from_start);
        scale_rows(k, ld, n, d, fade.to_end);

        product<BELOW>(dout, le, rt, dp, made, dp, n, dp, e, false);
        for (int64_t i = 0; i < n; i++) {
            float *to = made + i * dp, *ki = krows + i * dp;
            reads[i] = dot(qrows + i * dp, to, dp);
            for (int64_t j = 0; j < dp; j += LANES) store(to + j, load(to + j) + load(ki + j) * own[i]);
        }
        rows_out(made, dp, (T*)c.dq + row * d, n, d);

        product<ABOVE>(v + e, le, qrows, dp, made, dp, n, dp, 0, false);
        product<FULL>(v, le, gt, dp, cross, dp, n, dp, e, false);
        for (int64_t i = 0; i < n; i++) {
            float *to = made + i * dp, *from = cross + i * dp, *ki = krows + i * dp, *qi = qrows + i * dp;
            writes[i] = dot(ki, to, dp);
            ends[i] = dot(ki, from, dp) * fade.to_end[i];
            for (int64_t j = 0; j < dp; j += LANES)
                store(to + j, (load(to + j) + load(qi + j) * own[i] + load(from + j) * fade.to_end[i]) * c.scale);
        }
        rows_out(made, dp, (T*)c.dk + row * d, n, d);

        product<ABOVE>(k, ld, g, ep, made, ep, n, ep, d, false);
        rows_out(made, ep, (T*)c.dv + row * e, n, e);

        float across = dot(g, r, d * ep) * fade.all, behind = 0;
        for (int64_t i = 0; i < n; i++) {
            float end = ends[i];
            ends[i] = across, across += end;  // what was written before token i and read after the chunk
        }
        for (int64_t i = n; i-- > 0;) c.dlog_gamma[row + i] = (behind += reads[i] - writes[i]) + ends[i];

        transpose(qrows, dp, turned, cp, n, d);
        scale_columns(turned, cp, d, up(n), fade.from_start);
        for (int64_t i = 0; i < d * ep; i += LANES) store(g + i, load(g + i) * fade.all);
        product<FULL>(turned, cp, drows, ep, g, ep, d, ep, n, true);
    }
    rows_out(g, ep, c.dstate + which * d * e, d, e);
}
