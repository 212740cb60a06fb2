"""Softmax attention on the CPU, causal or not, in blocks that stay in the cache: for prefill, for chunks onto a cache, for one token.

    o = attention(q, k, v)        # q: [b, h, n, d]; k, v: [b, h_kv, m, d]; the last query stands at the last key
    register()                    # AutoModel.from_pretrained(..., attn_implementation="lmlab")

Query `i` sees the keys up to `m - n + i`, and of those only the ones from `start` up to `stop` of its row of the batch; a query that sees
nothing gives zeros. Sums are in float32; in bfloat16 the weights are rounded to bfloat16 before they meet the values, as the matrix
units ask for. What stands at keys that a query does not see reaches it in no way, be it NaN. Instruction sets agree within rounding,
since their tiles differ in size; the number of threads changes no bit. The backward recomputes the weights, a block of queries at a time.
"""

import ctypes
import sys

import torch
from lmlab.kernels import Operation, cpu
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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
    for i in range(0, max(n, 1), step):
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
    dtype, (q, k, v) = q.dtype, _wide(q, k, v)
    out, wild = [], not v.isfinite().all()
    for _, _, seen, w in _blocks(q, k, v, start, stop, scale, causal, wild):
        if wild:  # 0 times infinity is NaN: what is not seen must not be multiplied at all
            o = (w[..., None] * v[:, :, None, None]).masked_fill(~seen[..., None], 0).sum(-2)
        else:
            o = w @ v[:, :, None]
        out.append(o.flatten(1, 2))
    return torch.cat(out, 2).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


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
    _fields_ += [("scale", ctypes.c_float), *((name, ctypes.c_int32) for name in ("causal", "half", "wide"))]
    _fields_ += [("twin", _L)]


def paths() -> list:  # best first; empty without the C++ library
    "The instruction sets for which this machine has an attention kernel"
    return [] if cpu.missing() else cpu.symbol("lmlab_attention_paths", _S)().decode().split()


def prepared(
    q: Tensor,  # b h n d      the last axis of each has stride 1
    k: Tensor,  # b h_kv m d
    v: Tensor,  # b h_kv m d_v
    out: Tensor,  # b h n d_v  written; of the dtype of q, or float32
    start: Tensor = None,  # b  int64, contiguous, as is `stop`
    stop: Tensor = None,
    scale: float = 1.0,
    causal: bool = True,
    path: str = None,  # one of `paths()`; default: the best
    threads: int = None,  # default: torch's
    twin: int = 0,  # with one query: numbers from a key head to the one that odd query heads read
):  # function without arguments; not 0 when it failed
    "The C++ call with everything looked up"
    tensors = q, k, v, out, start, stop
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    strides = ((_L * 3)(*t.stride()[:3]) for t in (q, k, v, out))
    (b, h, n, d), (hk, m), dv = q.shape, k.shape[1:3], v.shape[-1]
    flags = causal, q.dtype == torch.bfloat16, out.dtype == torch.float32
    call = _Call(*pointers, b, h, hk, n, m, d, dv, *strides, scale, *flags, twin)
    args = ctypes.addressof(call), threads or torch.get_num_threads(), path and path.encode()
    run, kept = cpu.symbol("lmlab_attention", _I, _P, _I, _S), (call, tensors)
    return lambda kept=kept: run(*args)


def on_cpu(q, k, v, start, stop, scale, causal, path=None):
    "As `reference`, in C++; `path` is one of `paths()`, None for the best"
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    start, stop = (None if t is None else t.to(torch.int64).contiguous() for t in (start, stop))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    failed = prepared(q, k, v, out, start, stop, scale, causal, path)()
    if failed == -1:
        raise ValueError(f"path: {path!r} does not run on this machine; allowed are {', '.join(paths())}")
    if failed:
        raise MemoryError(f"attention: no memory to pack the keys and values of {tuple(k.shape)}")
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


@register_flop_formula(torch.ops.lmlab.attention)
def _(q, k, v, start, stop, scale, causal, backend, **_):
    "As torch counts its own attention: what the mask hides is counted too"
    b, h, n, d = q
    return 2 * b * h * n * k[2] * (d + v[-1])


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
            raise ValueError(
                f"{name}: shape {tuple(t.shape)}; allowed are four axes: batch, heads, tokens, width"
            )
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
        raise ValueError(
            f"v: shape {tuple(v.shape)} for k of shape {tuple(k.shape)}; the first three axes must agree"
        )
    if causal and m < n:
        raise ValueError(f"k: {m} keys for {n} queries; causal attention needs a key for each query")
    _bound("start", start, q)
    _bound("stop", stop, q)
    return _attention(
        q, k, v, start, stop, d**-0.5 if scale is None and d else float(scale or 0), causal, backend
    )


# ---- in transformers


# What models hand to every attention function, and what changes nothing here: a window is in the mask already
HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict", "sliding_window", "use_cache",
}  # fmt: skip
_TAG = "_lmlab_seen"  # attribute of a mask: (its version, what `_recognised` found in it)


def _ranges(rows):
    "b m, bool: (first, end) of the one range of True in each row, None where there is more than one"
    count, m = rows.sum(-1), rows.shape[-1]
    first = rows.int().argmax(-1)
    end = torch.where(count > 0, m - rows.flip(-1).int().argmax(-1), first)
    return (first, end) if bool((end - first == count).all()) else None


def _recognised(mask):
    "b 1 n m, bool: (keys, start, stop, causal) of which it is the mask, or None"
    n, m = mask.shape[2:]
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or not n or not m:
        return None
    if (ranges := _ranges(mask[:, 0, -1])) is None:
        return None
    start, stop = ranges
    for keys, causal in ((m, n > 1), (int(stop.max()), n > 1), (m, False)):
        if keys >= n or not causal:
            seen = _seen(start, stop, causal, 0, n, n, keys, mask.device)[:, 0]
            if bool((mask[..., :keys] == seen).all()) and not bool(mask[..., keys:].any()):
                return keys, start, stop, causal
    return None


def _understood(mask):
    "As `_recognised`, which the layers of a model ask only once"
    try:
        version = mask._version
    except RuntimeError:  # made in inference mode: there is no telling whether it was written to since
        return _recognised(mask)
    tag = getattr(mask, _TAG, None)
    if tag is None or tag[0] != version:
        tag = version, _recognised(mask)
        setattr(mask, _TAG, tag)
    return tag[1]


def _mask(*, q_length, kv_length, allow_is_causal_skip=True, **kwargs):
    "The mask of torch's attention; none only where that means the same to every reader"
    from transformers.masking_utils import sdpa_mask

    allow = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
    return sdpa_mask(q_length=q_length, kv_length=kv_length, allow_is_causal_skip=allow, **kwargs)


def _eager(module, query, key, value, mask, why, causal, **kwargs):
    "The attention of the model's own module, which knows what its layers ask for"
    own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if own is None:
        raise ValueError(
            f"{why}: {type(module).__name__} asks for it, which the attention 'lmlab' does not have, and its module has no eager one"
        )
    n, m = query.shape[2], key.shape[2]
    if mask is None and causal and n > 1:  # as torch reads it: the first query stands at the first key
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return own(module, query, key, value, mask, **kwargs)


def _forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **kwargs):
    "What transformers calls: `attention` where it gives the model's own result, else torch's or the model's own function"
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    asked = sorted(k for k, v in kwargs.items() if k not in HARMLESS and v is not None and v is not False)
    if set(asked) - {"position_bias", "cache"}:
        return _eager(
            module,
            query,
            key,
            value,
            attention_mask,
            ", ".join(asked),
            causal,
            scaling=scaling,
            dropout=dropout,
            **kwargs,
        )
    n, m, plan = query.shape[2], key.shape[2], None
    if (
        dropout
        or asked
        or query.device.type != "cpu"
        or query.dtype not in DTYPES
        or query.shape[0] != key.shape[0]
    ):
        pass
    elif attention_mask is None:
        if n == 1 or not causal or n == m:
            plan = m, None, None, bool(causal) and n > 1
    elif not torch.compiler.is_compiling() and attention_mask.shape[-2:] == (n, m):
        plan = _understood(attention_mask)
    if plan is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=causal,
            **kwargs,
        )
    keys, start, stop, causal = plan
    if start is not None:
        start, stop = (t.expand(query.shape[0]) for t in (start, stop))
    out = attention(query, key[:, :, :keys], value[:, :, :keys], causal, scaling, start, stop)
    return out.transpose(1, 2), None


def register(
    name: str = "lmlab",  # as in `attn_implementation="lmlab"`
) -> str:
    "Put `attention` among those that transformers' models can be switched to"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # without the library torch's own attention is the best there is
    AttentionInterface.register(name, sdpa_attention_forward if cpu.missing() else _forward)
    AttentionMaskInterface.register(name, _mask)
    return name


# ---- measured


def _race(b, h, hk, n, m, d, dtype, threads, rounds, budget):
    "One shape: ours, torch's, the arithmetic units on as many products, and the same keys and values merely read"
    import torch.nn.functional as F

    from lmlab.core.bench import cold, paired

    def make():
        q, k, v = (torch.randn(b, heads, t, d).to(dtype) for heads, t in ((h, n), (hk, m), (hk, m)))
        return (q, k, v), prepared(q, k, v, torch.empty_like(q), scale=d**-0.5, threads=threads)

    one = make()
    following = (
        cold(make) if n == 1 else lambda: one
    )  # a token finds nothing in the cache, a prompt has just been computed
    flops = 4 * d * b * h * sum(range(m - n + 1, m + 1))
    lib, name = cpu.library(), str(dtype).removeprefix("torch.").encode()
    how = dict(is_causal=n > 1, enable_gqa=h != hk)
    if 1 < n < m:  # torch's `is_causal` would put the first query at the first key
        how |= dict(is_causal=False, attn_mask=torch.ones(n, m, dtype=torch.bool).tril(m - n))
    fns = {
        "kernel": lambda: following()[1](),
        "as an operation": lambda: attention(*following()[0]),
        "torch": lambda: F.scaled_dot_product_attention(*following()[0], **how),
    }
    work = {"bytes": sum(t.nbytes for t in one[0]) + one[0][0].nbytes, "flops": flops}
    if once := lib.lmlab_peak(name, 1, 1):
        fns["peak"] = lambda: lib.lmlab_peak(name, max(1, flops // once // threads), threads)
    if n == 1:
        fns["plain read"] = lambda: [cpu.plain_read(t) for t in following()[0][1:]]
    timing = paired(fns, rounds=rounds, threads=threads, budget=budget)
    work["time over torch"] = timing.ratio("kernel", "torch")
    if once:
        work["fraction of peak"] = timing.ratio("peak", "kernel")
    if n == 1:
        work["time over plain read"] = timing.ratio("kernel", "plain read")
    return timing, work


def _prefill(tokens, dtype, threads, rounds, budget):
    "A prompt through a stock Llama with heads of 128, under torch's attention and under ours"
    from lmlab.core.bench import paired
    from lmlab.core.nano import build

    shape = dict(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=128, intermediate_size=1024
    )
    shape |= dict(num_hidden_layers=4, max_position_embeddings=tokens)
    ids, fns = torch.randint(3, 259, (1, tokens)), {}
    for label, name in (("kernel", register()), ("torch", "sdpa")):
        model = build("llama", "small", attn_implementation=name, **shape).eval().to(dtype)
        fns[label] = lambda model=model: model(ids, logits_to_keep=1)
    with torch.no_grad():
        timing = paired(fns, rounds=rounds, threads=threads, budget=budget)
    weights = sum(p.numel() for p in model.model.layers.parameters())
    flops = 2 * weights * tokens + 4 * 4 * 128 * 8 * tokens * (tokens + 1) // 2
    return timing, {"bytes": 0, "flops": flops, "time over torch": timing.ratio("kernel", "torch")}


def bench(
    quick: bool = False,  # fewer cases and rounds
) -> dict:  # name of the case -> (`Timing`, what was moved and computed, and the ratios that count)
    "Prompts against torch's attention and the peak of the arithmetic units, single tokens against a plain read, a stock model"
    if cpu.missing():
        raise RuntimeError(f"bench: attention kernels need the C++ library, but {cpu.missing()}")
    cases = [
        (8, 8, 2048, 2048, 128),
        (16, 4, 2048, 2048, 128),
        (8, 8, 512, 512, 128),
        (16, 4, 128, 2048, 128),
        (8, 8, 2048, 2048, 64),
        (2, 2, 8192, 8192, 128),
        (8, 8, 1, 2048, 128),
        (16, 4, 1, 2048, 128),
        (8, 2, 1, 8192, 128),
    ]
    out, settings = {}, (9, 0.5) if quick else (31, 1.8)
    for threads in sorted({1, torch.get_num_threads()}):
        ending = f"{threads} thread{'s' * (threads > 1)}"
        for dtype in (torch.bfloat16, torch.float32):
            kind = str(dtype).removeprefix("torch.")
            for h, hk, n, m, d in cases[::6] if quick else cases:
                name = f"{kind}, {n} on {m} tokens, {h} heads of {d} on {hk}, {ending}"
                out[name] = _race(1, h, hk, n, m, d, dtype, threads, *settings)
            if not quick:
                out[f"{kind}, a stock Llama on 2048 tokens, {ending}"] = _prefill(
                    2048, dtype, threads, *settings
                )
    return out
