"""Differential attention on a GPU: both maps of a head carry their (largest score, sum, weighted values) over the same tile of values.

Forward: `_outputs`, one program for a tile of queries of a head; difference, norm and scale happen before anything is written. Backward: the
maps again, and at once the gradient `G` of the difference and what each map's row is worth, `<G, A v>` (`_prepare`); then `_query_gradients` by
tiles of queries and `_key_gradients` by tiles of keys, where `G v^T` serves both maps and `(A1 - lam A2)^T G` is one product.

Weights are powers of two. A value that is not finite must not reach a query that does not see it, though 0 times it is NaN: a tile that
comes out NaN is computed again with the values put in by hand, and others pay nothing. float32 is multiplied as float32, not as TF32.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot(a, b, sums, DOT: tl.constexpr):
    "sums + a b, operands as DOT"
    return tl.dot(a.to(DOT), b.to(DOT), sums, input_precision="ieee")


@triton.jit
def _rows(x, at, first, last, stride, width, T: tl.constexpr, W: tl.constexpr):
    "T rows and W columns from row `at`, zero outside of the rows from `first` up to `last`"
    i, j = at + tl.arange(0, T), tl.arange(0, W)
    there = ((i >= first) & (i < last))[:, None] & (j < width)[None, :]
    return tl.load(x + i.to(tl.int64)[:, None] * stride + j[None, :], mask=there, other=0.0)


@triton.jit
def _keep_rows(x, value, at, last, stride, width, T: tl.constexpr, W: tl.constexpr):
    i, j = at + tl.arange(0, T), tl.arange(0, W)
    to = x + i.to(tl.int64)[:, None] * stride + j[None, :]
    tl.store(to, value.to(x.dtype.element_ty), mask=(i < last)[:, None] & (j < width)[None, :])


@triton.jit
def _bounds(start, stop, row, m):
    "The first key that a row of the batch sees, and the end of what it sees"
    first, last = m * 0, m
    if start is not None:
        first = tl.minimum(tl.maximum(tl.load(start + row), 0), m).to(tl.int32)
    if stop is not None:
        last = tl.minimum(tl.maximum(tl.load(stop + row), 0), m).to(tl.int32)
    return first, last


@triton.jit
def _limits(i, last, n, m, CAUSAL: tl.constexpr):
    "The end of what each query sees; nothing where there is no query"
    limit = tl.minimum(i + (m - n + 1), last) if CAUSAL else i * 0 + last
    return tl.where(i < n, limit, 0)


@triton.jit
def _meet(s, seen, v, top, total, mix, DOT: tl.constexpr):
    "A map of a tile meets a block of keys: its largest score, the sum of its weights and its weighted values so far"
    s = tl.where(seen, s, float("-inf"))
    now = tl.maximum(top, tl.max(s, 1))
    used = tl.where(now == float("-inf"), 0.0, now)
    p, fade = tl.exp2(s - used[:, None]), tl.exp2(top - used)
    return now, total * fade + tl.sum(p, 1), _dot(p.to(v.dtype), v, mix * fade[:, None], DOT)


@triton.jit
def _finish(top, total, mix):
    "Weighted values, and the logarithm of what the weights are to be divided by; zeros where nothing is seen"
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return mix / total[:, None], tl.where(empty, 0.0, top) + tl.log2(total)


@triton.jit
def _maps(
    q, k, v, at, first, limit, n, m, d, e, scale, q_h, q_t, k_h, k_t, v_t,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    "The values as each map of a tile of queries sees them, and the logarithms of its sums"
    q1, q2 = _rows(q, at, 0, n, q_t, d, M, D), _rows(q + q_h, at, 0, n, q_t, d, M, D)
    top1, top2 = tl.full((M,), float("-inf"), tl.float32), tl.full((M,), float("-inf"), tl.float32)
    total1, total2 = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    mix1, mix2 = tl.zeros((M, E), tl.float32), tl.zeros((M, E), tl.float32)
    wild = tl.full((E,), 2147483647, tl.int32)  # the first key whose value is not finite
    end = tl.max(limit, 0)
    for j in range(first // N * N, end, N):
        k1, k2 = _rows(k, j, first, end, k_t, d, N, D), _rows(k + k_h, j, first, end, k_t, d, N, D)
        v_, key = _rows(v, j, first, end, v_t, e, N, E), j + tl.arange(0, N)
        if CAREFUL:
            fine = v_.to(tl.float32) * 0.0 == 0.0
            wild = tl.minimum(wild, tl.min(tl.where(fine, 2147483647, key[:, None]), 0))
            v_ = tl.where(fine, v_, 0.0)
        seen = (key >= first)[None, :] & (key[None, :] < limit[:, None])
        none = tl.zeros((M, N), tl.float32)
        s1, s2 = _dot(q1, tl.trans(k1), none, DOT) * scale, _dot(q2, tl.trans(k2), none, DOT) * scale
        top1, total1, mix1 = _meet(s1, seen, v_, top1, total1, mix1, DOT)
        top2, total2, mix2 = _meet(s2, seen, v_, top2, total2, mix2, DOT)
    o1, log1 = _finish(top1, total1, mix1)
    o2, log2 = _finish(top2, total2, mix2)
    if CAREFUL:
        reached = limit[:, None] > wild[None, :]
        o1, o2 = tl.where(reached, float("nan"), o1), tl.where(reached, float("nan"), o2)
    return o1, o2, log1, log2


@triton.jit
def _both(
    q, k, v, at, first, limit, n, m, d, e, scale, q_h, q_t, k_h, k_t, v_t,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "As `_maps`, again with care where it gave NaN"
    o1, o2, log1, log2 = _maps(q, k, v, at, first, limit, n, m, d, e, scale, q_h, q_t, k_h, k_t, v_t, M, N, D, E, DOT, False)  # fmt: skip
    bad = tl.sum(tl.sum((o1 + o2) * 0.0, 1), 0)
    if bad != bad:
        o1, o2, log1, log2 = _maps(q, k, v, at, first, limit, n, m, d, e, scale, q_h, q_t, k_h, k_t, v_t, M, N, D, E, DOT, True)  # fmt: skip
    return o1, o2, log1, log2


@triton.jit
def _gain(weight, e, E: tl.constexpr):
    gain, j = tl.full((E,), 1.0, tl.float32), tl.arange(0, E)
    if weight is not None:
        gain = tl.load(weight + j, mask=j < e, other=0.0).to(tl.float32)
    return gain


@triton.jit
def _outputs(
    q, k, v, lam, weight, start, stop, out, scale, factor, eps, heads, kv_heads, n, m, d, e,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    CAUSAL: tl.constexpr, NORM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "A tile of queries of one head; the longest tiles first"
    at, which = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(1)
    row, head = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    own = head // (heads // kv_heads)  # the key pair and the value head it reads
    first, last = _bounds(start, stop, row, m)
    limit = _limits(at + tl.arange(0, M), last, n, m, CAUSAL)
    q, k, v = q + row * q_b + 2 * head * q_h, k + row * k_b + 2 * own * k_h, v + row * v_b + own * v_h
    o1, o2, _, _ = _both(q, k, v, at, first, limit, n, m, d, e, scale, q_h, q_t, k_h, k_t, v_t, M, N, D, E, DOT)
    o = o1 - tl.load(lam) * o2
    if NORM:
        r = tl.rsqrt(tl.sum(o * o, 1) / e + eps)
        o = o * (r * factor)[:, None] * _gain(weight, e, E)[None, :]
    _keep_rows(out + row * o_b + head * o_h, o, at, n, o_t, e, M, E)


@triton.jit
def _prepare(
    q, k, v, grad, lam, weight, start, stop, G, logs, inner, dweight, scale, factor, eps, heads, kv_heads, n, m, d, e,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    CAUSAL: tl.constexpr, NORM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "The maps again: the gradient of their difference, the logarithms of their sums, `<G, A v>` of each, and of the gain a part"
    at, which = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(1)
    row, head = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    own = head // (heads // kv_heads)
    first, last = _bounds(start, stop, row, m)
    i = at + tl.arange(0, M)
    limit = _limits(i, last, n, m, CAUSAL)
    q, k, v = q + row * q_b + 2 * head * q_h, k + row * k_b + 2 * own * k_h, v + row * v_b + own * v_h
    o1, o2, log1, log2 = _both(q, k, v, at, first, limit, n, m, d, e, scale, q_h, q_t, k_h, k_t, v_t, M, N, D, E, DOT)  # fmt: skip
    g = _rows(grad + row * g_b + head * g_h, at, 0, n, g_t, e, M, E).to(tl.float32)
    if NORM:
        o = o1 - tl.load(lam) * o2
        r = tl.rsqrt(tl.sum(o * o, 1) / e + eps)
        o, g = o * r[:, None], g * factor
        if weight is not None:
            part = which.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            j = tl.arange(0, E)
            tl.store(dweight + part * e + j, tl.sum(g * o, 0), mask=j < e)
            g = g * _gain(weight, e, E)[None, :]
        g = (g - o * (tl.sum(g * o, 1) / e)[:, None]) * r[:, None]
    g = g.to(G.dtype.element_ty)
    _keep_rows(G + which.to(tl.int64) * n * e, g, at, n, e, e, M, E)
    g, to = g.to(tl.float32), 2 * which.to(tl.int64) * n + i
    tl.store(logs + to, log1, mask=i < n)
    tl.store(logs + n + to, log2, mask=i < n)
    tl.store(inner + to, tl.sum(g * o1, 1), mask=i < n)
    tl.store(inner + n + to, tl.sum(g * o2, 1), mask=i < n)


@triton.jit
def _score_gradient(q, k, seen, dw, log, inner, scale, M: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr):
    "The weights of a map on a block, and the gradient of its scores but for their factor"
    s = _dot(q, tl.trans(k), tl.zeros((M, N), tl.float32), DOT) * scale
    w = tl.where(seen, tl.exp2(s - log[:, None]), 0.0)
    return w, w * (dw - inner[:, None])


@triton.jit
def _row_numbers(x, i, n):
    "Of both maps: a number for each query"
    return tl.load(x + i, mask=i < n, other=0.0), tl.load(x + n + i, mask=i < n, other=0.0)


@triton.jit
def _query_gradients(
    q, k, v, lam, start, stop, G, logs, inner, dq, scale, plain, heads, kv_heads, n, m, d, e,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    CAUSAL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "Gradients of a tile of query pairs"
    at, which = (tl.num_programs(0) - 1 - tl.program_id(0)) * M, tl.program_id(1)
    row, head = (which // heads).to(tl.int64), (which % heads).to(tl.int64)
    own = head // (heads // kv_heads)
    first, last = _bounds(start, stop, row, m)
    i = at + tl.arange(0, M)
    limit = _limits(i, last, n, m, CAUSAL)
    end = tl.max(limit, 0)
    q, k, v = q + row * q_b + 2 * head * q_h, k + row * k_b + 2 * own * k_h, v + row * v_b + own * v_h
    q1, q2 = _rows(q, at, 0, n, q_t, d, M, D), _rows(q + q_h, at, 0, n, q_t, d, M, D)
    g = _rows(G + which.to(tl.int64) * n * e, at, 0, n, e, e, M, E)
    log1, log2 = _row_numbers(logs + 2 * which.to(tl.int64) * n, i, n)
    in1, in2 = _row_numbers(inner + 2 * which.to(tl.int64) * n, i, n)
    dq1, dq2 = tl.zeros((M, D), tl.float32), tl.zeros((M, D), tl.float32)
    for j in range(first // N * N, end, N):
        k1, k2 = _rows(k, j, first, end, k_t, d, N, D), _rows(k + k_h, j, first, end, k_t, d, N, D)
        v_, key = _rows(v, j, first, end, v_t, e, N, E), j + tl.arange(0, N)
        seen = (key >= first)[None, :] & (key[None, :] < limit[:, None])
        dw = tl.where(seen, _dot(g, tl.trans(v_), tl.zeros((M, N), tl.float32), DOT), 0.0)
        _, ds1 = _score_gradient(q1, k1, seen, dw, log1, in1, scale, M, N, DOT)
        _, ds2 = _score_gradient(q2, k2, seen, dw, log2, in2, scale, M, N, DOT)
        dq1, dq2 = _dot(ds1.to(k1.dtype), k1, dq1, DOT), _dot(ds2.to(k2.dtype), k2, dq2, DOT)
    to = dq + 2 * which.to(tl.int64) * n * d
    _keep_rows(to, dq1 * plain, at, n, d, d, M, D)
    _keep_rows(to + n * d, dq2 * (-tl.load(lam) * plain), at, n, d, d, M, D)


@triton.jit
def _key_gradients(
    q, k, v, lam, start, stop, G, logs, inner, dk, dv, scale, plain, heads, kv_heads, n, m, d, e,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    CAUSAL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "Gradients of a tile of key pairs and of their values, from all heads that read them"
    at, which = tl.program_id(0) * N, tl.program_id(1)
    row, own, group = (which // kv_heads).to(tl.int64), (which % kv_heads).to(tl.int64), heads // kv_heads
    first, last = _bounds(start, stop, row, m)
    key, by = at + tl.arange(0, N), tl.load(lam)
    k, v = k + row * k_b + 2 * own * k_h, v + row * v_b + own * v_h
    k1, k2 = _rows(k, at, first, last, k_t, d, N, D), _rows(k + k_h, at, first, last, k_t, d, N, D)
    v_ = _rows(v, at, first, last, v_t, e, N, E)
    dk1, dk2, dv_ = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32), tl.zeros((N, E), tl.float32)
    begin = tl.maximum(at - (m - n), 0) // M * M if CAUSAL else at * 0
    for r in range(group):
        head = own * group + r
        one = row * heads + head
        for x in range(begin, n, M):
            i = x + tl.arange(0, M)
            limit = _limits(i, last, n, m, CAUSAL)
            seen = (key >= first)[None, :] & (key[None, :] < limit[:, None])
            here = q + row * q_b + 2 * head * q_h
            q1, q2 = _rows(here, x, 0, n, q_t, d, M, D), _rows(here + q_h, x, 0, n, q_t, d, M, D)
            g = _rows(G + one * n * e, x, 0, n, e, e, M, E)
            log1, log2 = _row_numbers(logs + 2 * one * n, i, n)
            in1, in2 = _row_numbers(inner + 2 * one * n, i, n)
            dw = tl.where(seen, _dot(g, tl.trans(v_), tl.zeros((M, N), tl.float32), DOT), 0.0)
            w1, ds1 = _score_gradient(q1, k1, seen, dw, log1, in1, scale, M, N, DOT)
            w2, ds2 = _score_gradient(q2, k2, seen, dw, log2, in2, scale, M, N, DOT)
            dk1 = _dot(tl.trans(ds1.to(q1.dtype)), q1, dk1, DOT)
            dk2 = _dot(tl.trans(ds2.to(q2.dtype)), q2, dk2, DOT)
            dv_ = _dot(tl.trans((w1 - by * w2).to(g.dtype)), g, dv_, DOT)
    to = dk + 2 * which.to(tl.int64) * m * d
    _keep_rows(to, dk1 * plain, at, m, d, d, N, D)
    _keep_rows(to + m * d, dk2 * (-by * plain), at, m, d, d, N, D)
    _keep_rows(dv + which.to(tl.int64) * m * e, dv_, at, m, e, e, N, E)


LOG2E = 1.4426950408889634


def _tiles(q, n, m, e, causal):
    """Queries and keys in a tile, padded widths, as keywords of a kernel

    Two maps of 64 x 256 float32 sums are 128 registers of each thread of eight warps: there 32 keys at a time are what does not spill.
    float32 operands need twice the room of bfloat16.
    """
    most = 64 if q.dtype == torch.bfloat16 else 32
    keys = most if e <= 128 else 32
    size = lambda x, most=2**30: min(most, max(16, triton.next_power_of_2(x)))
    # the interpreter on the CPU would multiply the bits of bfloat16 numbers as integers; in float32 their products are exact
    half = q.dtype == torch.bfloat16 and q.device.type != "cpu"
    tile = dict(M=size(n, most), N=size(m, keys), D=size(q.shape[-1]), E=size(e), CAUSAL=causal)
    return tile | dict(DOT=tl.bfloat16 if half else tl.float32, num_warps=8, num_stages=2)


def _strides(*xs):
    return [s for x in xs for s in x.stride()[:3]]


def _prepared(q, k, v, weight, start, stop, causal):
    "Inputs as the kernels read them, sizes, tiles; the grid has tiles of queries and heads"
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    weight, start, stop = (None if t is None else t.contiguous() for t in (weight, start, stop))
    (b, h, n, d), (hk, m, e) = q.shape, v.shape[1:]
    how = _tiles(q, n, m, e, causal)
    return (q, k, v, weight, start, stop), (h // 2, hk, n, m, d, e), (triton.cdiv(n, how["M"]), b * h // 2), how


def forward(q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps):
    "As `reference` in differential.py"
    b, h, n, _ = q.shape
    out = q.new_empty(b, n, h // 2, v.shape[-1]).transpose(1, 2)
    if not out.numel():
        return out
    (q, k, v, weight, start, stop), sizes, grid, how = _prepared(q, k, v, weight, start, stop, causal)
    factor = 1.0 if lambda_init is None else 1 - lambda_init
    _outputs[grid](
        q, k, v, lam, weight, start, stop, out, scale * LOG2E, factor, eps, *sizes, *_strides(q, k, v, out),
        NORM=lambda_init is not None, **how,
    )  # fmt: skip
    return out


def backward(grad, q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps):
    "As `reference_backward` in differential.py"
    made = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    if not grad.numel():
        return *(t.zero_() for t in made), torch.zeros_like(lam), None if weight is None else weight * 0
    (q, k, v, weight, start, stop), sizes, grid, how = _prepared(q, k, v, weight, start, stop, causal)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    factor, (b, h, n, _), (hk, m, e) = 1.0 if lambda_init is None else 1 - lambda_init, q.shape, v.shape[1:]
    G, logs = q.new_empty(b, h // 2, n, e), q.new_empty(b, h // 2, 2, n, dtype=torch.float32)
    inner = torch.empty_like(logs)
    gain = None if weight is None else q.new_empty(grid[0] * grid[1], e, dtype=torch.float32)
    _prepare[grid](
        q, k, v, grad, lam, weight, start, stop, G, logs, inner, gain, scale * LOG2E, factor, eps, *sizes,
        *_strides(q, k, v, grad), NORM=lambda_init is not None, **how,
    )  # fmt: skip
    common = q, k, v, lam, start, stop, G, logs, inner
    rest = scale * LOG2E, scale, *sizes, *_strides(q, k, v)
    _query_gradients[grid](*common, made[0], *rest, **how)
    if m:
        _key_gradients[triton.cdiv(m, how["N"]), b * hk](*common, *made[1:], *rest, **how)
    dlam = -inner[:, :, 1].sum().to(lam.dtype)
    return *made, dlam, None if weight is None else gain.sum(0).to(weight.dtype)
