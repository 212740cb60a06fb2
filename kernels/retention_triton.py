"""Gated retention on a GPU: one kernel walks over the chunks and leaves the state before each, others then take all chunks at once.

Forward: `_states`, `_outputs`. Backward: `_states` again, so that nothing is kept between the two, `_state_gradients` from the last chunk to
the first, and `_gradients` and `_value_gradients` for all chunks at once. States are carried in float32 and left for the products in the
dtype of the inputs. How the gradient of the log decay is put together is said in retention.cpp.

A program of `_states` owns a tile of the state, so its carry never leaves the registers. Tails are masked on loading: a token behind the
end has `k = v = 0` and no decay, so it writes nothing and fades nothing. float32 is multiplied as float32, not as TF32.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot(a, b, sums, DOT: tl.constexpr):
    "sums + a b, operands as DOT"
    return tl.dot(a.to(DOT), b.to(DOT), sums, input_precision="ieee")


@triton.jit
def _fades(log_gamma, at, t, C: tl.constexpr):
    "Running sums of a chunk's log decays, their last, and which tokens there are"
    i = tl.arange(0, C)
    there = at + i < t
    lg = tl.load(log_gamma + at + i, mask=there, other=0.0)
    return tl.cumsum(lg, 0), tl.sum(lg, 0), there


@triton.jit
def _rows(x, at, t, stride, width, column, C: tl.constexpr, W: tl.constexpr):
    "A tile of C tokens and W columns, zero outside"
    i, j = at + tl.arange(0, C), column + tl.arange(0, W)
    return tl.load(
        x + i[:, None] * stride + j[None, :], mask=(i < t)[:, None] & (j < width)[None, :], other=0.0
    )


@triton.jit
def _tile(x, row, column, rows, cols, A: tl.constexpr, B: tl.constexpr):
    "A tile of a contiguous matrix, zero outside"
    i, j = row + tl.arange(0, A), column + tl.arange(0, B)
    return tl.load(
        x + i[:, None] * cols + j[None, :], mask=(i < rows)[:, None] & (j < cols)[None, :], other=0.0
    )


@triton.jit
def _keep_tile(x, value, row, column, rows, cols, A: tl.constexpr, B: tl.constexpr):
    i, j = row + tl.arange(0, A), column + tl.arange(0, B)
    at = x + i[:, None] * cols + j[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols)[None, :])


@triton.jit
def _exp(x):
    "`exp(x)` of what is at most 0 but for rounding: sums in another order may differ, and by much where they are large"
    return tl.exp(tl.where(x > 0.0, 0.0, x))


@triton.jit
def _decay(g, C: tl.constexpr):
    "`exp(g[i] - g[j])` for readers i and writers j, and which pairs are in order; of the others nothing may be used"
    i = tl.arange(0, C)
    return _exp(g[:, None] - g[None, :]), i[:, None] >= i[None, :]


@triton.jit
def _head(x, which, heads, stride_b, stride_h):
    return x + (which // heads).to(tl.int64) * stride_b + (which % heads).to(tl.int64) * stride_h


@triton.jit
def _states(
    k, v, log_gamma, first, states, last, scale, heads, t, d, e, k_b, k_h, k_t, v_b, v_h, v_t,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "The state before each chunk, and behind the last"
    row, column, which = tl.program_id(0) * D, tl.program_id(1) * E, tl.program_id(2)
    k, v = _head(k, which, heads, k_b, k_h), _head(v, which, heads, v_b, v_h)
    log_gamma += which.to(tl.int64) * t
    chunks, size = tl.cdiv(t, C), d * e
    states += which.to(tl.int64) * chunks * size
    state = _tile(first + which.to(tl.int64) * size, row, column, d, e, D, E)
    for n in range(chunks):
        at = n * C
        _keep_tile(states, state, row, column, d, e, D, E)
        states += size
        g, all, there = _fades(log_gamma, at, t, C)
        k_ = _rows(k, at, t, k_t, d, row, C, D)
        v_ = _rows(v, at, t, v_t, e, column, C, E)
        v_ = (v_ * (_exp(all - g) * scale)[:, None]).to(v_.dtype)
        state = _dot(tl.trans(k_), v_, state * tl.exp(all), DOT)
    _keep_tile(last + which.to(tl.int64) * size, state, row, column, d, e, D, E)


@triton.jit
def _outputs(
    q, k, v, log_gamma, states, o, scale, heads, t, d, e, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "What a chunk reads from its own tokens and from the state before it"
    n, column, which = tl.program_id(0), tl.program_id(1) * E, tl.program_id(2)
    at = n * C
    q, k = _head(q, which, heads, q_b, q_h), _head(k, which, heads, k_b, k_h)
    states += (which.to(tl.int64) * tl.cdiv(t, C) + n) * d * e
    scores, out = tl.zeros((C, C), tl.float32), tl.zeros((C, E), tl.float32)
    for x in range(0, d, D):
        q_ = _rows(q, at, t, q_t, d, x, C, D)
        k_ = _rows(k, at, t, k_t, d, x, C, D)
        scores = _dot(q_, tl.trans(k_), scores, DOT)
        out = _dot(q_, _tile(states, x, column, d, e, D, E), out, DOT)
    g, all, there = _fades(log_gamma + which.to(tl.int64) * t, at, t, C)
    decay, below = _decay(g, C)
    scores = tl.where(below, scores * decay * scale, 0.0)
    v_ = _rows(_head(v, which, heads, v_b, v_h), at, t, v_t, e, column, C, E)
    bad = v_.to(tl.float32) * 0.0  # NaN where a value is not finite: 0 * NaN must not reach earlier tokens
    any_bad = tl.sum(bad)
    out *= tl.exp(g)[:, None]
    if any_bad != any_bad:
        v_ = tl.where(bad == 0.0, v_, 0.0)
        out += tl.cumsum(bad, 0)
    out = _dot(scores.to(v_.dtype), v_, out, DOT)
    _keep_tile(o + which.to(tl.int64) * t * e, out, at, column, t, e, C, E)


@triton.jit
def _state_gradients(
    q, do, log_gamma, last, gradients, first, heads, t, d, e, q_b, q_h, q_t, do_b, do_h, do_t,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "The gradient of the state after each chunk, and before the first"
    row, column, which = tl.program_id(0) * D, tl.program_id(1) * E, tl.program_id(2)
    q, do = _head(q, which, heads, q_b, q_h), _head(do, which, heads, do_b, do_h)
    log_gamma += which.to(tl.int64) * t
    chunks, size = tl.cdiv(t, C), d * e
    gradients += (which.to(tl.int64) * chunks + chunks - 1) * size
    G = _tile(last + which.to(tl.int64) * size, row, column, d, e, D, E)
    for i in range(chunks):
        at = (chunks - 1 - i) * C
        _keep_tile(gradients, G, row, column, d, e, D, E)
        gradients -= size
        g, all, there = _fades(log_gamma, at, t, C)
        q_ = _rows(q, at, t, q_t, d, row, C, D)
        do_ = _rows(do, at, t, do_t, e, column, C, E)
        do_ = (do_ * tl.exp(g)[:, None]).to(do_.dtype)
        G = _dot(tl.trans(q_), do_, G * tl.exp(all), DOT)
    _keep_tile(first + which.to(tl.int64) * size, G, row, column, d, e, D, E)


@triton.jit
def _gradients(
    q, k, v, do, log_gamma, states, gradients, dq, dk, dlog_gamma, scale, heads, t, d, e,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "Gradients of queries and keys for D of their columns, and what these columns add to that of the log decays"
    n, part, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at, row = n * C, part * D
    v, do = _head(v, which, heads, v_b, v_h), _head(do, which, heads, do_b, do_h)
    matrix = (which.to(tl.int64) * tl.cdiv(t, C) + n) * d * e
    ds = tl.zeros((C, C), tl.float32)
    dq_, dk_ = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
    both = tl.zeros((D,), tl.float32)
    for y in range(0, e, E):
        v_ = _rows(v, at, t, v_t, e, y, C, E)
        do_ = _rows(do, at, t, do_t, e, y, C, E)
        R = _tile(states + matrix, row, y, d, e, D, E)
        G = _tile(gradients + matrix, row, y, d, e, D, E)
        ds = _dot(do_, tl.trans(v_), ds, DOT)
        dq_ = _dot(do_, tl.trans(R), dq_, DOT)
        dk_ = _dot(v_, tl.trans(G), dk_, DOT)
        both += tl.sum(R.to(tl.float32) * G.to(tl.float32), 1)
    g, all, there = _fades(log_gamma + which.to(tl.int64) * t, at, t, C)
    i = tl.arange(0, C)
    own = (
        tl.sum(tl.where(i[:, None] == i[None, :], ds, 0.0), 1) * scale
    )  # no decay touches a token's own score
    decay, below = _decay(g, C)
    q_ = _rows(_head(q, which, heads, q_b, q_h), at, t, q_t, d, row, C, D)
    k_ = _rows(_head(k, which, heads, k_b, k_h), at, t, k_t, d, row, C, D)
    ds = tl.where(i[:, None] > i[None, :], ds * decay * scale, 0.0).to(q_.dtype)
    dq_ = _dot(ds, k_, dq_ * tl.exp(g)[:, None], DOT)
    dk_ *= (_exp(all - g) * scale)[:, None]
    within = _dot(tl.trans(ds), q_, tl.zeros((C, D), tl.float32), DOT)
    q32, k32 = q_.to(tl.float32), k_.to(tl.float32)
    written = tl.sum(k32 * dk_, 1)
    dlg = tl.cumsum(tl.sum(q32 * dq_ - k32 * within, 1), 0, reverse=True)
    dlg += tl.cumsum(written, 0) - written + tl.sum(both, 0) * tl.exp(all)
    to = dlog_gamma + (part.to(tl.int64) * tl.num_programs(2) + which) * t
    tl.store(to + at + i, dlg, mask=there)
    _keep_tile(dq + which.to(tl.int64) * t * d, dq_ + own[:, None] * k32, at, row, t, d, C, D)
    _keep_tile(dk + which.to(tl.int64) * t * d, dk_ + within + own[:, None] * q32, at, row, t, d, C, D)


@triton.jit
def _value_gradients(
    q, k, do, log_gamma, gradients, dv, scale, heads, t, d, e,
    q_b, q_h, q_t, k_b, k_h, k_t, do_b, do_h, do_t,
    C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "Gradients of the values"
    n, column, which = tl.program_id(0), tl.program_id(1) * E, tl.program_id(2)
    at = n * C
    q, k = _head(q, which, heads, q_b, q_h), _head(k, which, heads, k_b, k_h)
    gradients += (which.to(tl.int64) * tl.cdiv(t, C) + n) * d * e
    scores, dv_ = tl.zeros((C, C), tl.float32), tl.zeros((C, E), tl.float32)
    for x in range(0, d, D):
        q_ = _rows(q, at, t, q_t, d, x, C, D)
        k_ = _rows(k, at, t, k_t, d, x, C, D)
        scores = _dot(q_, tl.trans(k_), scores, DOT)
        dv_ = _dot(k_, _tile(gradients, x, column, d, e, D, E), dv_, DOT)
    g, all, there = _fades(log_gamma + which.to(tl.int64) * t, at, t, C)
    decay, below = _decay(g, C)
    do_ = _rows(_head(do, which, heads, do_b, do_h), at, t, do_t, e, column, C, E)
    scores = tl.where(below, scores * decay * scale, 0.0).to(do_.dtype)
    dv_ = _dot(tl.trans(scores), do_, dv_ * (_exp(all - g) * scale)[:, None], DOT)
    _keep_tile(dv + which.to(tl.int64) * t * e, dv_, at, column, t, e, C, E)


def _blocks(q, v, chunk):
    """Tokens, columns of `q` and of `v` in a tile, as keywords of a kernel

    64 x 64 bfloat16 operands keep two stages of loads in flight beside the sums of four warps; float32 needs twice the room, so half the width.
    """
    most = 64 if q.dtype == torch.bfloat16 else 32
    size = lambda n: min(most, max(16, triton.next_power_of_2(n)))
    # the interpreter on the CPU would multiply the bits of bfloat16 numbers as integers; in float32 their products are exact
    half = q.dtype == torch.bfloat16 and q.device.type != "cpu"
    tile = dict(C=size(min(chunk, q.shape[2])), D=size(q.shape[-1]), E=size(v.shape[-1]))
    return tile | dict(DOT=tl.bfloat16 if half else tl.float32, num_warps=4, num_stages=2)


def _strides(*xs):
    return [s for x in xs for s in x.stride()[:3]]


def _rows_of(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _run_states(k, v, log_gamma, state, sizes, grid, how):
    "(state before each chunk, state after the last)"
    states = k.new_empty(grid[2], grid[0], *state.shape[2:])
    last = torch.empty_like(state)
    tiles = triton.cdiv(state.shape[2], how["D"]), triton.cdiv(state.shape[3], how["E"]), grid[2]
    scale = k.shape[-1] ** -0.5
    _states[tiles](k, v, log_gamma, state, states, last, scale, *sizes, *_strides(k, v), **how)
    return states, last


def _prepared(q, k, v, log_gamma, state, chunk):
    "Inputs as the kernels read them, sizes, tiles; the grid has chunks, tiles of columns of `v`, and heads"
    q, k, v = (_rows_of(x) for x in (q, k, v))
    b, h, t, d = q.shape
    how = _blocks(q, v, chunk)
    grid = triton.cdiv(t, how["C"]), triton.cdiv(v.shape[-1], how["E"]), b * h
    return (q, k, v, log_gamma.contiguous(), state.contiguous()), (h, t, d, v.shape[-1]), grid, how


def forward(q, k, v, log_gamma, state, chunk):
    "As `reference` in retention.py"
    (q, k, v, log_gamma, state), sizes, grid, how = _prepared(q, k, v, log_gamma, state, chunk)
    states, last = _run_states(k, v, log_gamma, state, sizes, grid, how)
    o, scale = v.new_empty(v.shape), q.shape[-1] ** -0.5
    _outputs[grid](q, k, v, log_gamma, states, o, scale, *sizes, *_strides(q, k, v), **how)
    return o, last


def backward(grad, grad_state, q, k, v, log_gamma, state, chunk):
    "As `reference_backward` in retention.py"
    (q, k, v, log_gamma, state), sizes, grid, how = _prepared(q, k, v, log_gamma, state, chunk)
    grad, grad_state, scale = _rows_of(grad), grad_state.contiguous(), q.shape[-1] ** -0.5
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, state)]
    dq, dk, dv, first = made
    states, _ = _run_states(k, v, log_gamma, state, sizes, grid, how)
    gradients, parts = torch.empty_like(states), triton.cdiv(q.shape[-1], how["D"])
    _state_gradients[parts, grid[1], grid[2]](
        q, grad, log_gamma, grad_state, gradients, first, *sizes, *_strides(q, grad), **how
    )
    dlg = log_gamma.new_empty(parts, *log_gamma.shape)
    _gradients[grid[0], parts, grid[2]](
        q,
        k,
        v,
        grad,
        log_gamma,
        states,
        gradients,
        dq,
        dk,
        dlg,
        scale,
        *sizes,
        *_strides(q, k, v, grad),
        **how,
    )
    _value_gradients[grid](q, k, grad, log_gamma, gradients, dv, scale, *sizes, *_strides(q, k, grad), **how)
    return dq, dk, dv, dlg.sum(0), first
