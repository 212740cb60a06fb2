"""Differential attention: `(A1 - lam A2) v`, the difference of two softmax maps over the same values, and the norm that follows it.

    o = differential_attention(q, k, v, lam)                     # q: [b, 2h, n, d]; k: [b, 2h_kv, m, d]; v: [b, h_kv, m, 2d]
    o = differential_attention(q, k, v, lam, lambda_init=0.2)    # (1 - lambda_init) RMSNorm(o), by head

Heads `2i` and `2i + 1` of the queries are the pair of head `i`; it reads the key pair and the value head `i // (h / h_kv)`. What a query
sees is what it sees in `lmlab.kernels.attention`; both maps see the same, and a query that sees nothing gives zeros. The two maps nearly
cancel, so they are subtracted in float32.

On a CPU the two maps are two calls of the attention there. On a GPU one kernel carries both over the same tile of values. The backward
keeps nothing but its inputs: with `G` the gradient of the difference, both maps share the product `G v^T`, and `dlam = -<G, A2 v>`.
"""

import math

import torch
from lmlab.kernels import Operation
from lmlab.kernels import attention as attention_
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

DTYPES = attention_.DTYPES


def _members(x):
    "The first and the second of each pair of heads"
    return x[:, ::2], x[:, 1::2]


def _pairs(first, second):
    "The inverse of `_members`"
    return torch.stack((first, second), 2).flatten(1, 2)


def _normed(o, weight, lambda_init, eps):
    "`(1 - lambda_init) RMSNorm(o)` over the last axis, or `o` where there is no `lambda_init`"
    if lambda_init is None:
        return o
    o = o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 - lambda_init)
    return o if weight is None else o * weight.to(o.dtype)


def _normed_backward(grad, o, weight, lambda_init, eps):
    "Gradients of `_normed` for `o`, and for `weight` where there is one"
    grad, r = grad * (1 - lambda_init), (o.square().mean(-1, keepdim=True) + eps).rsqrt()
    o = o * r
    dweight = None if weight is None else (grad * o).flatten(0, -2).sum(0)
    grad = grad if weight is None else grad * weight.to(o.dtype)
    return r * (grad - o * (grad * o).mean(-1, keepdim=True)), dweight


def _laid(o, dtype):
    "In memory as b n h e"
    return o.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _blocks(q, k, v, start, stop, scale, causal, wild=False):
    "As the blocks of `attention`, of both maps: slice, queries of each, what they see, weights of each"
    both = (
        attention_._blocks(x, y, v, start, stop, scale, causal, wild)
        for x, y in zip(_members(q), _members(k), strict=True)
    )
    for (at, x1, seen, w1), (_, x2, _, w2) in zip(*both, strict=True):
        yield at, (x1, x2), seen, (w1, w2)


def _mixed(w, v, seen, wild):
    "b h_kv r i e: the values under the weights; what is not seen must not be multiplied at all where it may be infinite"
    if wild:
        return (w[..., None] * v[:, :, None, None]).masked_fill(~seen[..., None], 0).sum(-2)
    return w @ v[:, :, None]


def reference(q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps):
    "`(softmax(scale q1 k1ᵀ) - lam softmax(scale q2 k2ᵀ)) v`, a block of queries at a time, then the norm"
    dtype, (q, k, v, lam) = q.dtype, attention_._wide(q, k, v, lam)
    out, wild = [], not v.isfinite().all()
    for _, _, seen, (w1, w2) in _blocks(q, k, v, start, stop, scale, causal, wild):
        out.append(_mixed(w1 - lam * w2, v, seen, wild).flatten(1, 2))
    return _laid(_normed(torch.cat(out, 2), weight, lambda_init, eps), dtype)


def reference_backward(grad, q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps):
    "Gradients of `reference` for `q`, `k`, `v`, `lam` and `weight` (None without one); the weights are computed again"
    given, hk = (q, k, v, lam, weight), v.shape[1]
    grad, q, k, v, lam = attention_._wide(grad, q, k, v, lam)
    dq, dk, dv, dlam = (torch.zeros_like(t) for t in (q, k, v, lam))
    dweight = None if weight is None else v.new_zeros(weight.shape)
    wild = not v.isfinite().all()
    for at, x, seen, (w1, w2) in _blocks(q, k, v, start, stop, scale, causal, wild):
        w, g = w1 - lam * w2, grad[:, :, at].unflatten(1, (hk, -1))
        if lambda_init is not None:
            g, own = _normed_backward(g, _mixed(w, v, seen, wild), weight, lambda_init, eps)
            dweight = None if weight is None else dweight + own
        dw = (g @ v[:, :, None].mT).masked_fill(~seen, 0)  # of both maps, up to the factor -lam
        for s, (ws, by) in enumerate(((w1, scale), (w2, -lam * scale))):
            inner = (ws * dw).sum(-1, keepdim=True)
            ds = ws * (dw - inner) * by
            dq[:, s::2, at] = (ds @ k[:, s::2, None]).flatten(1, 2)
            dk[:, s::2] += (ds.mT @ x[s]).sum(2)
        dlam -= inner.sum()
        dv += (w.mT @ g).sum(2)
    made = dq, dk, dv, dlam, dweight
    return tuple(None if t is None else t.to(o.dtype) for t, o in zip(made, given, strict=True))


def on_cpu(q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps):
    "As `reference`: two calls of the attention in C++"
    o1, o2 = (
        attention_.on_cpu(x, y, v, start, stop, scale, causal).float()
        for x, y in zip(_members(q), _members(k), strict=True)
    )
    return _laid(_normed(o1 - lam * o2, weight, lambda_init, eps), q.dtype)


def on_triton(*args):
    "As `reference`, in Triton"
    from lmlab.kernels.differential_triton import forward

    return forward(*args)


def on_triton_backward(*args):
    "As `reference_backward`, in Triton"
    from lmlab.kernels.differential_triton import backward

    return backward(*args)


FORWARD = Operation("differential_attention", reference, on_cpu, on_triton, dtypes=DTYPES)
BACKWARD = Operation(
    "differential_attention_backward", reference_backward, triton=on_triton_backward, dtypes=DTYPES
)


def _finite(lam):
    "Raise where `lam` is NaN or infinite; on a GPU at the next synchronisation, so that nothing waits for it"
    if lam.device.type == "cuda":
        torch._assert_async(lam.isfinite(), "lam: it must be finite")
    elif not math.isfinite(lam.item()):
        raise ValueError(f"lam: {lam.item()}; it must be finite")


@torch.library.custom_op("lmlab::differential_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    causal: bool,
    lambda_init: float | None,
    eps: float,
    backend: str,
) -> Tensor:
    _finite(lam)
    form = FORWARD.pick(backend, q.device.type, q.dtype)[1]
    return form(q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps)


@_forward.register_fake
def _(q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps, backend):
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h // 2, v.shape[-1]).transpose(1, 2)


@torch.library.custom_op("lmlab::differential_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    weight: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    causal: bool,
    lambda_init: float | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    form = BACKWARD.pick(backend, q.device.type, q.dtype)[1]
    made = form(grad, q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps)
    return tuple(lam.new_empty(0) if t is None else t.contiguous() for t in made)


@_backward.register_fake
def _(grad, q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps, backend):
    made = (q, k, v, lam, lam.new_empty(0) if weight is None else weight)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in made)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _gradients(ctx, grad):
    *made, dweight = _backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *made, None if ctx.saved_tensors[4] is None else dweight, *[None] * 7


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.lmlab.differential_attention)
def _(q, k, v, *args, **_):
    "As torch counts its own attention: what the mask hides is counted too"
    b, h, n, d = q
    return 2 * b * h * n * k[2] * (d + v[-1])


@register_flop_formula(torch.ops.lmlab.differential_attention_backward)
def _(grad, q, k, v, *args, **_):
    "Scores, queries and keys of each map; of both together the output, the gradient of the weights and that of the values"
    b, h, n, d = q
    return 2 * b * h * n * k[2] * 3 * d + 2 * b * (h // 2) * n * k[2] * 3 * v[-1]


def differential_attention(
    q: Tensor,  # b 2h n d      float32 or bfloat16 (float64 runs on the reference); heads 2i and 2i + 1 are a pair
    k: Tensor,  # b 2h_kv m d   h a multiple of h_kv; pairs as in q
    v: Tensor,  # b h_kv m 2d
    lam: Tensor,  # scalar, float32 or wider; the second map is subtracted `lam` times
    causal: bool = True,  # query i sees the keys up to m - n + i; it needs m >= n
    scale: float = None,  # of the scores; default: 1 / sqrt(d)
    start: Tensor = None,  # b  integers: the first key that may be seen, as after left padding
    stop: Tensor = None,  # b  integers: the first key that may not be seen any more, as before right padding
    lambda_init: float = None,  # with it, RMSNorm over each head's 2d entries and the factor 1 - lambda_init follow
    weight: Tensor = None,  # 2d  gain of the norm; default: none
    eps: float = 1e-5,  # of the norm
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # b h n 2d, in memory as b n h 2d
    "The difference of two softmax maps times the values, and the norm of each head when `lambda_init` is given"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(
                f"{name}: shape {tuple(t.shape)}; allowed are four axes: batch, heads, tokens, width"
            )
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(
                f"{name}: {t.dtype} on {t.device}, and q {q.dtype} on {q.device}; they must agree"
            )
    if not q.is_floating_point():
        raise ValueError(f"q: {q.dtype}; it must be floating point")
    (b, h, n, d), (m, hk) = q.shape, (k.shape[2], v.shape[1])
    if h % 2:
        raise ValueError(f"q: {h} heads; allowed is an even number, since two of them are a pair")
    if tuple(k.shape) != (b, 2 * hk, m, d):
        raise ValueError(
            f"k: shape {tuple(k.shape)}; ({b}, {2 * hk}, {m}, {d}) belongs to q of shape {tuple(q.shape)} and {hk} heads of v"
        )
    if tuple(v.shape) != (b, hk, m, 2 * d):
        raise ValueError(
            f"v: shape {tuple(v.shape)}; ({b}, {hk}, {m}, {2 * d}) belongs to k, twice as wide as a query of {d}"
        )
    if (h // 2) % hk if hk else h:
        raise ValueError(f"v: {hk} heads; allowed is a divisor of the {h // 2} pairs of heads in q")
    if causal and m < n:
        raise ValueError(f"k: {m} keys for {n} queries; causal attention needs at least as many")
    if not isinstance(lam, Tensor) or lam.ndim or lam.dtype not in (torch.float32, torch.float64):
        what = f"{tuple(lam.shape)}, {lam.dtype}" if isinstance(lam, Tensor) else type(lam).__name__
        raise ValueError(f"lam: {what}; allowed is a scalar tensor of float32 (float64)")
    if lam.device != q.device:
        raise ValueError(f"lam: on {lam.device}, and q on {q.device}; they must be on one device")
    if weight is not None:
        if lambda_init is None:
            raise ValueError("weight: a gain without a norm; lambda_init asks for the norm")
        if tuple(weight.shape) != (2 * d,) or weight.device != q.device or not weight.is_floating_point():
            raise ValueError(
                f"weight: shape {tuple(weight.shape)}, {weight.dtype} on {weight.device}; allowed is ({2 * d},) floating point on {q.device}"
            )
    if lambda_init is not None and not math.isfinite(lambda_init):
        raise ValueError(f"lambda_init: {lambda_init}; it must be finite")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: {eps}; allowed is a positive number")
    for name, bound in (("start", start), ("stop", stop)):
        attention_._bound(name, bound, q)
    scale = d**-0.5 if scale is None and d else float(scale or 0)
    return _forward(q, k, v, lam, weight, start, stop, scale, causal, lambda_init, eps, backend)


# ---- measured


def _two_calls(call, q, k, v, lam, lambda_init):
    "The difference of two calls of an attention, then torch's norm: what the kernel has to beat"
    o1, o2 = (call(x, y, v) for x, y in zip(_members(q), _members(k), strict=True))
    o = o1.float() - lam * o2.float()
    normed = torch.nn.functional.rms_norm(o, (o.shape[-1],), eps=1e-5) * (1 - lambda_init)
    return normed.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _one_case(h, hk, n, m, d, dtype, backward, threads, rounds, budget):
    "Race one shape of `h` pairs; (`Timing`, what must be moved and computed, and the ratios that count)"
    import torch.nn.functional as F

    from lmlab.core.bench import cold, paired

    def make():
        x = (torch.randn(1, heads, t, e) for heads, t, e in ((2 * h, n, d), (2 * hk, m, d), (hk, m, 2 * d)))
        return [t.to(dtype).requires_grad_(backward) for t in x]

    one, lam = make(), torch.tensor(0.6, requires_grad=backward)
    following = cold(make) if n == 1 else lambda: one  # a token finds nothing in the cache
    how = dict(is_causal=n > 1, enable_gqa=h != hk)
    if 1 < n < m:  # torch's `is_causal` would put the first query at the first key
        how |= dict(is_causal=False, attn_mask=torch.ones(n, m, dtype=torch.bool).tril(m - n))
    sdpa = lambda *x: F.scaled_dot_product_attention(*x, **how)
    narrow = lambda v: v.unflatten(-1, (2, d)).transpose(2, 3).flatten(1, 2)  # 2 h_kv heads of width d
    forms = {
        "kernel": lambda q, k, v: differential_attention(q, k, v, lam, lambda_init=0.2),
        "two calls": lambda *x: _two_calls(attention_.attention, *x, lam, 0.2),
        "two SDPA": lambda *x: _two_calls(sdpa, *x, lam, 0.2),
        "attention of equal width": lambda q, k, v: attention_.attention(q, k, narrow(v)),
        "SDPA of equal width": lambda q, k, v: sdpa(q, k, narrow(v)),
    }

    def run(f):
        x = following()
        if not backward:
            with torch.no_grad():
                return f(*x)
        out = f(*x)
        return torch.autograd.grad(out, [*x, lam], torch.ones_like(out), allow_unused=True)

    timing = paired(
        {k: lambda f=f: run(f) for k, f in forms.items()}, rounds=rounds, threads=threads, budget=budget
    )
    seen = sum(range(m - n + 1, m + 1))
    flops = 2 * h * seen * (2 * 3 * d if not backward else 2 * 3 * d + 6 * d + 3 * 2 * d)
    read, out = sum(t.nbytes for t in one), h * n * 2 * d * dtype.itemsize
    work = {"bytes": read + out if not backward else 3 * read + 2 * out, "flops": flops}
    work |= {f"time over {other}": timing.ratio("kernel", other) for other in list(forms)[1:]}
    return timing, work


def bench(
    quick: bool = False,  # fewer cases and rounds
) -> dict:  # name of the case -> (`Timing`, what was moved and computed, and the ratios that count)
    "Prompts, a chunk, tokens and a training batch: against two calls of an attention, and against one of equal width and parameters"
    f, h = torch.float32, torch.bfloat16
    cases = [  # pairs, key pairs, queries, keys, width of a query
        (4, 4, 512, 512, 64, f, False),
        (4, 4, 2048, 2048, 64, h, False),
        (8, 2, 2048, 2048, 64, h, False),
        (4, 4, 64, 2048, 64, h, False),
        (4, 4, 1, 2048, 64, h, False),
        (8, 2, 1, 8192, 64, h, False),
        (4, 4, 256, 256, 16, f, True),
    ]
    out, settings = {}, (5, 0.4) if quick else (21, 1.5)
    for threads in sorted({1, torch.get_num_threads()}):
        for *shape, dtype, backward in cases[::4] if quick else cases:
            pairs, keys, n, m, d = shape
            name = f"{str(dtype).removeprefix('torch.')}, {n} on {m} tokens, {pairs} pairs of {d} on {keys}"
            name += f"{', forward + backward' * backward}, {threads} thread{'s' * (threads > 1)}"
            out[name] = _one_case(*shape, dtype, backward, threads, *settings)
    return out
