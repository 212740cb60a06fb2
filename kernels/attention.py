"""Softmax attention on the CPU, causal or not, in blocks that stay in the cache: for prefill, for chunks onto a cache, for one token.

    o = attention(q, k, v)        # q: [b, h, n, d]; k, v: [b, h_kv, m, d]; the last query stands at the last key
    register()                    # AutoModel.from_pretrained(..., attn_implementation="lmlab")

Query `i` sees the keys up to `m - n + i`, and of those only the ones from `start` up to `stop` of its row of the batch; a query that sees
nothing gives zeros. Sums are in float32; in bfloat16 the weights are rounded to bfloat16 before they meet the values, as the matrix
units ask for. What stands at keys that a query does not see reaches it in no way, be it NaN. Instruction sets agree within rounding,
since their tiles differ in size; the number of threads changes no bit. The backward recomputes the weights, a block of queries at a time.
"""

import ctypes
import math
import sys

import torch
from lmlab.kernels import Operation, cpu
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
LARGEST = 2**24  # numbers in a block of scores that torch works on at a time


def _seen(start, stop, causal, i, j, n, m, device):
    "b 1 1 i:j m, or 1 1 1 i:j m: which keys queries i to j see"
    key = torch.arange(m, device=device)
    seen = key <= torch.arange(i, j, device=device)[:, None] + (m - n if causal else m)
    for bound, inside in ((start, key.ge), (stop, key.lt)):
        if bound is not None:
            seen = seen & inside(bound.to(device)[:, None, None, None, None])
    return seen.expand(*[1] * (5 - seen.ndim), *seen.shape)


def _blocks(q, k, v, start, stop, scale, causal, wild=False):
    "For each block of queries: its slice, the queries by key head, what they see, their weights"
    (b, h, n, _), (hk, m) = q.shape, k.shape[1:3]
    step = max(1, LARGEST // max(1, b * h * m * (v.shape[-1] if wild else 1)))
    for i in range(0, n, step):
        j = min(n, i + step)
        seen = _seen(start, stop, causal, i, j, n, m, q.device)
        x = q[:, :, i:j].unflatten(1, (hk, h // hk))
        s = (x @ k[:, :, None].mT * scale).masked_fill(~seen, -torch.inf)
        s = s.masked_fill(~seen.any(-1, keepdim=True), 0)  # a query that sees nothing: any finite number
        yield slice(i, j), x, seen, s.softmax(-1).masked_fill(~seen, 0)


def _wide(*tensors):
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def reference(q, k, v, start, stop, scale, causal):
    "`softmax(scale q kᵀ + mask) v`, a block of queries at a time"
    (b, h, n, _), dtype = q.shape, q.dtype
    q, k, v = _wide(q, k, v)
    out, wild = [], not v.isfinite().all()
    for _, _, seen, w in _blocks(q, k, v, start, stop, scale, causal, wild):
        if wild:  # 0 times infinity is NaN: what is not seen must not be multiplied at all
            o = (w[..., None] * v[:, :, None, None]).masked_fill(~seen[..., None], 0).sum(-2)
        else:
            o = w @ v[:, :, None]
        out.append(o.flatten(1, 2))
    out = torch.cat([q.new_empty(b, h, 0, v.shape[-1]), *out], 2).to(dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def reference_backward(grad, q, k, v, start, stop, scale, causal):
    "Gradients of `reference` for `q`, `k` and `v`; the weights are computed again"
    dtypes, hk = (q.dtype, k.dtype, v.dtype), k.shape[1]
    grad, q, k, v = _wide(grad, q, k, v)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for at, x, seen, w in _blocks(q, k, v, start, stop, scale, causal):
        g = grad[:, :, at].unflatten(1, (hk, -1))
        dw = (g @ v[:, :, None].mT).masked_fill(~seen, 0)
        ds = w * (dw - (w * dw).sum(-1, keepdim=True)) * scale
        dq[:, :, at] = (ds @ k[:, :, None]).flatten(1, 2)
        dk += (ds.mT @ x).sum(2)
        dv += (w.mT @ g).sum(2)
    return tuple(t.to(dtype) for t, dtype in zip((dq, dk, dv), dtypes, strict=True))


_P, _L, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p


class _Call(ctypes.Structure):
    "`Call` in attention.cpp"

    _fields_ = [(name, _P) for name in ("q", "k", "v", "out", "start", "stop")]
    _fields_ += [(name, _L) for name in ("b", "h", "hk", "n", "m", "d", "dv")]
    _fields_ += [(name, _L * 3) for name in ("qs", "ks", "vs", "os")]
    _fields_ += [("scale", ctypes.c_float), ("causal", ctypes.c_int32), ("half", ctypes.c_int32)]


def paths() -> list:  # best first; empty without the C++ library
    "The instruction sets for which this machine has an attention kernel"
    return [] if cpu.missing() else cpu.symbol("lmlab_attention_paths", _S)().decode().split()


def on_cpu(q, k, v, start, stop, scale, causal, path=None):
    "As `reference`, in C++; `path` is one of `paths()`, None for the best"
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    start, stop = (None if t is None else t.to(torch.int64).contiguous() for t in (start, stop))
    (b, h, n, d), (hk, m), dv = q.shape, k.shape[1:3], v.shape[-1]
    out = q.new_empty(b, n, h, dv).transpose(1, 2)
    pointers = (None if t is None else t.data_ptr() for t in (q, k, v, out, start, stop))
    strides = ((_L * 3)(*t.stride()[:3]) for t in (q, k, v, out))
    call = _Call(*pointers, b, h, hk, n, m, d, dv, *strides, scale, causal, q.dtype == torch.bfloat16)
    run = cpu.symbol("lmlab_attention", _I, _P, _I, _S)
    failed = run(ctypes.addressof(call), torch.get_num_threads(), path and path.encode())
    if failed == -1:
        raise ValueError(f"path: {path!r} does not run on this machine; allowed are {', '.join(paths())}")
    if failed:
        raise MemoryError(f"attention: no memory to pack {m} keys of {d} and values of {dv}")
    return out


ATTENTION = Operation("attention", reference, on_cpu, dtypes=DTYPES)


@torch.library.custom_op("lmlab::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> Tensor:
    return ATTENTION.pick(backend, q.device.type, q.dtype)[1](q, k, v, start, stop, scale, causal)


@_attention.register_fake
def _(q, k, v, start, stop, scale, causal, backend):
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


@torch.library.custom_op("lmlab::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    made = reference_backward(grad, q, k, v, start, stop, scale, causal)
    return tuple(t.contiguous() for t in made)


@_backward.register_fake
def _(grad, q, k, v, start, stop, scale, causal):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.scale, ctx.causal = inputs[5:7]


def _gradients(ctx, grad):
    return *_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_setup)


def _bound(name, bound, q):
    if bound is None:
        return
    if not isinstance(bound, Tensor) or bound.is_floating_point() or bound.dtype == torch.bool:
        what = bound.dtype if isinstance(bound, Tensor) else type(bound).__name__
        raise ValueError(f"{name}: {what}; allowed is a tensor of integers, one for each row of the batch")
    if tuple(bound.shape) != (q.shape[0],) or bound.device != q.device:
        raise ValueError(
            f"{name}: shape {tuple(bound.shape)} on {bound.device}; allowed is ({q.shape[0]},) on {q.device}"
        )


def attention(
    q: Tensor,  # b h n d       float32 or bfloat16 (float64 runs on the reference)
    k: Tensor,  # b h_kv m d    h a multiple of h_kv
    v: Tensor,  # b h_kv m d_v
    causal: bool = True,  # query i sees the keys up to m - n + i; it needs m >= n
    scale: float = None,  # of the scores; default: 1 / sqrt(d)
    start: Tensor = None,  # b  integers: the first key that may be seen, as after left padding
    stop: Tensor = None,  # b  integers: the first key that may not be seen any more, as before right padding
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # b h n d_v, in memory as b n h d_v
    "`softmax(scale q kᵀ) v` over the keys that a query sees; a query that sees none gives zeros"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.ndim != 4:
            raise ValueError(f"{name}: shape {tuple(t.shape)}; allowed are four axes: batch, heads, tokens, width")
        if t.dtype != q.dtype or not t.is_floating_point():
            raise ValueError(f"{name}: {t.dtype}, and q {q.dtype}; all must be of one floating dtype")
        if t.device != q.device:
            raise ValueError(f"{name}: on {t.device}, and q on {q.device}; all must be on one device")
    (b, h, n, d), (hk, m) = q.shape, k.shape[1:3]
    if tuple(k.shape) != (b, hk, m, d) or not hk or h % hk:
        raise ValueError(
            f"k: shape {tuple(k.shape)} for q of shape {tuple(q.shape)}; allowed are {b} rows, a divisor of {h} heads, {d} columns"
        )
    if tuple(v.shape[:3]) != (b, hk, m):
        raise ValueError(f"v: shape {tuple(v.shape)} for k of shape {tuple(k.shape)}; the first three axes must agree")
    if causal and m < n:
        raise ValueError(f"k: {m} keys for {n} queries; causal attention needs a key for each query")
    _bound("start", start, q)
    _bound("stop", stop, q)
    return _attention(q, k, v, start, stop, d**-0.5 if scale is None and d else float(scale or 0), causal, backend)
