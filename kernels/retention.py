"""Gated retention in chunks: `o_n = q_n R_n` with `R_n = exp(log_gamma_n) R_(n-1) + d^-1/2 k_n^T v_n`, state in and state out, and the backward.

    o, state = gated_retention(q, k, v, log_gamma)           # q, k: [b, h, t, d]; v: [b, h, t, e]; log_gamma: [b, h, t], at most 0
    o, state = gated_retention(q, k, v, log_gamma, state)    # goes on where the call before has stopped; state: [b, h, d, e]

Inside a chunk it is attention without softmax, `(q k^T * D) v` with `D[i,j] = exp(g[i] - g[j])` for `j <= i`, `g` being the running sum of the
log decays; what came before the chunk is read from the state. Decays are only ever computed as the exponential of a difference that is at
most 0, so none overflows. A value that is not finite reaches its own token and later ones, never an earlier one.

In torch, matrix products of a chunk are four calls with elementwise work between them: `bench` measures its share of the time, with
`decay_scores` in use, as "share of elementwise time". It is well above a fifth, which is why there is a C++ form: a chunk stays in the
cache from its first product to its last. It computes in float32, for bfloat16 too, and its choice of instruction set shows only in rounding.
"""

import ctypes

import torch
import torch.nn.functional as F
from lmlab.kernels import Operation, cpu, decay
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

DTYPES = (torch.float32, torch.bfloat16)


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(chunk, *xs):
    "The chunks of each tensor along its third axis, side by side"
    return list(zip(*(x.split(chunk, 2) for x in xs), strict=True))


def _fades(log_gamma):
    "Running sums of a chunk, what is left of the old state at each token, and of each token at the end"
    g = log_gamma.cumsum(-1)
    return g, g.exp()[..., None], (g[..., -1:] - g).exp()[..., None]


def _next(state, k, v, log_gamma):
    "The state after a chunk; `k` is scaled already"
    _, start, end = _fades(log_gamma)
    return start[..., -1:, :] * state + k.mT @ (v * end)


def reference(q, k, v, log_gamma, state, chunk):
    "Output and last state, chunk by chunk, in float32 or wider"
    wide, outs = _wide(q), []
    state = state.to(wide)
    xs = (x.to(wide) for x in (q, k, v, log_gamma))
    for q_, k_, v_, lg in _chunks(chunk, *xs):
        k_ = k_ * k.shape[-1] ** -0.5
        g, start, _ = _fades(lg)
        bad = v_ * 0  # NaN where a value is not finite: in the product 0 * NaN would reach earlier tokens
        inside = decay.reference(q_ @ k_.mT, g) @ v_.masked_fill(bad != 0, 0) + bad.cumsum(-2)
        outs.append(inside + (q_ * start) @ state)
        state = _next(state, k_, v_, lg)
    return torch.cat(outs, 2).to(q.dtype), state


def reference_backward(grad, grad_state, q, k, v, log_gamma, state, chunk):
    "Gradients of `reference` for its five tensors; retention.cpp derives that of `log_gamma`"
    wide, scale, made = _wide(q), k.shape[-1] ** -0.5, []
    do, q_, k_, v_, lg = (x.to(wide) for x in (grad, q, k, v, log_gamma))
    xs = _chunks(chunk, do, q_, k_ * scale, v_, lg)
    states = [state.to(wide)]
    for _, _, k_, v_, lg in xs[:-1]:
        states.append(_next(states[-1], k_, v_, lg))
    G = grad_state.to(wide)
    for (do, q_, k_, v_, lg), R in zip(reversed(xs), reversed(states), strict=True):
        g, start, end = _fades(lg)
        s, ds = decay.reference(q_ @ k_.mT, g), decay.reference(do @ v_.mT, g)
        own = ds.diagonal(dim1=-2, dim2=-1)[..., None]  # no decay touches a token's own score
        ds = ds.tril(-1)
        dq, dk, cross = ds @ k_ + start * (do @ R.mT), ds.mT @ q_, end * (v_ @ G.mT)
        within = (q_ * dq - k_ * dk).sum(-1).flip(-1).cumsum(-1).flip(-1)
        across = (start[..., -1:, :] * G * R).sum((-2, -1))[..., None]
        before = F.pad((k_ * cross).sum(-1), (1, -1)).cumsum(-1) + across
        dv = s.mT @ do + end * (k_ @ G)
        made.append((dq + own * k_, (dk + cross + own * q_) * scale, dv, within + before))
        G = start[..., -1:, :] * G + (q_ * start).mT @ do
    dq, dk, dv, dlg = (torch.cat(x[::-1], 2) for x in zip(*made, strict=True))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlg.to(log_gamma.dtype), G.to(state.dtype)


_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Tokens(ctypes.Structure):
    "`Tokens` in retention.cpp"

    _fields_ = [("data", _P), ("b", _L), ("h", _L), ("t", _L)]


class _Call(ctypes.Structure):
    "`Call` in retention.cpp"

    _fields_ = [(name, _Tokens) for name in ("q", "k", "v", "dout")]
    _fields_ += [(name, _P) for name in ("log_gamma", "state", "dstate_out", "o", "dq", "dk", "dv")]
    _fields_ += [(name, _P) for name in ("state_out", "dlog_gamma", "dstate")]
    _fields_ += [(name, _L) for name in ("n", "h", "t", "d", "e", "chunk")]
    _fields_ += [("scale", ctypes.c_float), ("half", _I), ("threads", _I)]


def _rows(x):
    "`x`, copied unless its last axis is contiguous"
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(backward, chunk, q, k, v, plain, tokens):
    "Call the library on tensors by the names of `_Call`: `tokens` beside q, k and v are strided, `plain` are contiguous"
    call, (b, h, t, d) = _Call(), q.shape
    kept = {name: _rows(x) for name, x in (dict(q=q, k=k, v=v) | tokens).items()}
    for name, x in kept.items():
        setattr(call, name, _Tokens(x.data_ptr(), *x.stride()[:3]))
    for name, x in plain.items():
        setattr(call, name, x.data_ptr())
    call.n, call.h, call.t, call.d, call.e = b * h, h, t, d, v.shape[-1]
    # a chunk of a few tokens leaves the vectors empty, one longer than a head is wide computes more scores than it saves on the state
    call.chunk = min(max(chunk, 16), max(32, min(d, 128)), t)
    call.scale, call.half, call.threads = d**-0.5, q.dtype == torch.bfloat16, torch.get_num_threads()
    if cpu.symbol("lmlab_retention", ctypes.c_int, _P, ctypes.c_int)(ctypes.byref(call), backward):
        raise MemoryError(
            f"gated_retention: no memory for chunks of {call.chunk} tokens of {d} by {v.shape[-1]}"
        )


def on_cpu(q, k, v, log_gamma, state, chunk):
    "As `reference`, in C++"
    o, last = v.new_empty(v.shape), torch.empty_like(state, memory_format=torch.contiguous_format)
    plain = dict(log_gamma=log_gamma.contiguous(), state=state.contiguous(), o=o, state_out=last)
    _run(False, chunk, q, k, v, plain, {})
    return o, last


def on_cpu_backward(grad, grad_state, q, k, v, log_gamma, state, chunk):
    "As `reference_backward`, in C++"
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_gamma, state)]
    plain = dict(zip(("dq", "dk", "dv", "dlog_gamma", "dstate"), made, strict=True))
    plain |= dict(
        log_gamma=log_gamma.contiguous(), state=state.contiguous(), dstate_out=grad_state.contiguous()
    )
    _run(True, chunk, q, k, v, plain, dict(dout=grad))
    return tuple(made)


def on_triton(*args):
    "As `reference`, in Triton"
    from lmlab.kernels.retention_triton import forward

    return forward(*args)


def on_triton_backward(*args):
    "As `reference_backward`, in Triton"
    from lmlab.kernels.retention_triton import backward

    return backward(*args)


FORWARD = Operation("gated_retention", reference, on_cpu, on_triton, dtypes=DTYPES)
BACKWARD = Operation(
    "gated_retention_backward", reference_backward, on_cpu_backward, on_triton_backward, dtypes=DTYPES
)


@torch.library.custom_op("lmlab::gated_retention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_gamma: Tensor, state: Tensor, chunk: int, backend: str
) -> tuple[Tensor, Tensor]:
    if (
        not q.numel() or not v.numel()
    ):  # no token, or a width of 0: nothing is written, and what is there fades
        return v.new_zeros(v.shape), log_gamma.sum(-1).exp()[..., None, None] * state
    return FORWARD.pick(backend, q.device.type, q.dtype)[1](q, k, v, log_gamma, state, chunk)


@_forward.register_fake
def _(q, k, v, log_gamma, state, chunk, backend):
    return v.new_empty(v.shape), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op("lmlab::gated_retention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    state: Tensor,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = grad, grad_state, q, k, v, log_gamma, state, chunk
    if not q.numel() or not v.numel():
        all = log_gamma.sum(-1).exp()[..., None, None] * grad_state
        fades = (all * state).sum((-2, -1))[..., None].expand_as(log_gamma).contiguous()
        return *(x.new_zeros(x.shape) for x in (q, k, v)), fades, all
    return BACKWARD.pick(backend, q.device.type, q.dtype)[1](*args)


@_backward.register_fake
def _(grad, grad_state, q, k, v, log_gamma, state, chunk, backend):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_gamma, state))


def _setup(ctx, inputs, output):
    ctx.chunk, ctx.backend = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _gradients(ctx, grad, grad_state):
    return *_backward(grad, grad_state, *ctx.saved_tensors, ctx.chunk, ctx.backend), None, None


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.lmlab.gated_retention)
def _(q, k, v, log_gamma, state, chunk, backend, **_):
    (b, h, t, d), e = q, v[-1]
    return 2 * b * h * t * (min(chunk, t) * (d + e) + 2 * d * e)


@register_flop_formula(torch.ops.lmlab.gated_retention_backward)
def _(grad, grad_state, q, k, v, log_gamma, state, chunk, backend, **_):
    (b, h, t, d), e = q, v[-1]
    return 2 * b * h * t * (min(chunk, t) * (3 * d + 2 * e) + 5 * d * e)


def gated_retention(
    q: Tensor,  # b h t d
    k: Tensor,  # b h t d
    v: Tensor,  # b h t e
    log_gamma: Tensor,  # b h t  log of the decay of each token, at most 0
    state: Tensor | None = None,  # b h d e  what came before; None starts empty
    chunk: int = 64,  # tokens per chunk: changes the speed, not the result
    backend: str = "auto",  # see `lmlab.kernels`
) -> tuple[
    Tensor, Tensor
]:  # output `b h t e` in the dtype of `q`; state after the last token, float32 or wider
    "Gated retention in linear time"
    if q.ndim != 4:
        raise ValueError(f"q: shape {tuple(q.shape)}; allowed are four axes, batch, heads, tokens, width")
    b, h, t, d = q.shape
    e = v.shape[-1] if v.ndim else 0
    wants = dict(k=(k, (b, h, t, d)), v=(v, (b, h, t, e)), log_gamma=(log_gamma, (b, h, t)))
    if state is not None:
        wants["state"] = state, (b, h, d, e)
    for name, (x, shape) in wants.items():
        if tuple(x.shape) != shape:
            raise ValueError(
                f"{name}: shape {tuple(x.shape)}; {shape} belongs to q of shape {tuple(q.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, and q on {q.device}; all must be on one device")
        if not x.is_floating_point():
            raise ValueError(f"{name}: dtype {x.dtype}; it must be floating point")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype}; one floating-point dtype is allowed"
        )
    if chunk < 1:
        raise ValueError(f"chunk: {chunk}; at least 1 is allowed")
    wide = _wide(q)
    state = q.new_zeros(b, h, d, e, dtype=wide) if state is None else state.to(wide)
    return _forward(q, k, v, log_gamma.to(wide), state, chunk, backend)


def in_torch(q, k, v, log_gamma, chunk=64):
    "All chunks at once in torch's operations and `decay_scores`, with torch's own backward: what the kernel has to beat"
    shape, short = v.shape, -q.shape[2] % chunk
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for x in (q, k * k.shape[-1] ** -0.5, v))
    g = F.pad(log_gamma, (0, short)).unflatten(2, (-1, chunk)).cumsum(-1)
    o = decay.decay_scores(q @ k.mT, g) @ v
    states = (k.mT @ (v * (g[..., -1:] - g).exp()[..., None].to(v.dtype))).float()  # what each chunk writes
    ends = g[..., -1].cumsum(-1)
    fades = (ends[..., :, None] - ends[..., None, :]).clamp(max=0).exp().tril()
    states = F.pad((fades @ states.flatten(-2)).view_as(states)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    o = o + (q * g.exp()[..., None].to(q.dtype)) @ states.to(q.dtype)
    return o.flatten(2, 3)[:, :, : shape[2]]


def _products(b, h, t, d, dtype, backward, chunk=64):
    "Only the matrix products of `in_torch`, as a function without arguments; a backward has two for each"
    n = -(-t // chunk)
    x = lambda *s, dtype=dtype: torch.randn(b * h, *s).to(dtype)
    tokens, scores, states = x(n, chunk, d), x(n, chunk, chunk), x(n, d, d)
    fades, flat = x(n, n, dtype=torch.float32), x(n, d * d, dtype=torch.float32)

    def run():
        tokens @ tokens.mT, scores @ tokens, tokens.mT @ tokens, tokens @ states, fades @ flat
        if backward:
            scores @ tokens, scores.mT @ tokens, scores.mT @ tokens, tokens @ tokens.mT, tokens @ states
            tokens @ states.mT, tokens @ states.mT, tokens.mT @ tokens, fades.mT @ flat, flat @ flat.mT

    return run


def _one_case(b, h, t, d, dtype, backward, threads, quick):
    "Race one shape; (`Timing`, what one run must move and compute, and the share of torch's time that is no matrix product)"
    from lmlab.core.bench import paired

    heads = lambda: (
        torch.randn(b, t, h, d).to(dtype).transpose(1, 2).requires_grad_()
    )  # as a layer hands them over
    q, k, v, grad = heads(), heads(), heads(), heads().detach()
    log_gamma = (F.logsigmoid(torch.randn(b, h, t)) / 16).requires_grad_()
    attention = lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    forms = {"kernel": lambda *x: gated_retention(*x)[0], "torch": in_torch, "SDPA": attention}

    def run(f):
        if not backward:
            with torch.no_grad():
                return f(q, k, v, log_gamma)
        return torch.autograd.grad(f(q, k, v, log_gamma), (q, k, v, log_gamma), grad, allow_unused=True)

    fns = {name: lambda f=f: run(f) for name, f in forms.items()}
    fns["torch, products only"] = _products(b, h, t, d, dtype, backward)
    timing = paired(fns, rounds=5 if quick else 21, threads=threads, budget=1 if quick else 3)
    tokens, (middle, low, high) = b * h * t, timing.ratio("torch, products only", "torch")
    work = {
        "bytes": (12 if backward else 4) * tokens * d * dtype.itemsize,
        "flops": tokens * d * (7 * 64 + 14 * d if backward else 2 * 64 + 4 * d),
    }
    return timing, work | {"share of elementwise time": (1 - middle, 1 - high, 1 - low)}


def bench(
    quick: bool = False,  # two shapes and fewer rounds
) -> (
    dict
):  # name of the case -> (`Timing`, what was moved and computed, and the elementwise share of torch's time)
    "Prompts of the YOCO chapter's model and its training batch; against torch in chunks, and for scale softmax attention of equal width"
    f, h = torch.float32, torch.bfloat16
    cases = [
        (1, 8, 512, 64, f),
        (1, 8, 2048, 64, f),
        (1, 8, 2048, 64, h),
        (1, 8, 8192, 64, h),
        (8, 2, 256, 32, f),
    ]
    out = {}
    for threads in sorted({1, torch.get_num_threads()}):
        for b, heads, t, d, dtype in cases[::4] if quick else cases:
            for backward in (False, True):
                name = f"{b} x {heads} x {t} x {d} {str(dtype).removeprefix('torch.')}, forward"
                name += f"{' + backward' * backward}, {threads} thread{'s' * (threads > 1)}"
                out[name] = _one_case(b, heads, t, d, dtype, backward, threads, quick)
    return out
