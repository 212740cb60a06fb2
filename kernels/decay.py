"""Scores times the decay between two positions: the elementwise heart of a gated retention chunk, in one pass over memory.

Within a chunk of `c` tokens gated retention multiplies its scores by `exp(g[i] - g[j])`, `g` being the running sum of the log gates, and keeps
the lower triangle. In torch this is a difference, a mask, an exponential, a product: each writes a `c x c` matrix and the next reads it back.
Here it is one read and one write, and the backward needs only the output, not the scores.
"""

import ctypes

import torch
from lmlab.kernels import Operation, cpu
from torch import Tensor


def _wide(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _decay(g, like):
    g = g.to(_wide(like))
    below = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    return (g[..., :, None] - g[..., None, :]).masked_fill(~below, -torch.inf).exp(), below


def reference(scores, g):
    "`scores[i,j] * exp(g[i] - g[j])` on and below the diagonal, zero above"
    d, below = _decay(g, scores)
    return (scores.to(d.dtype) * d).masked_fill(~below, 0).to(scores.dtype)


def reference_backward(grad, out, g):
    "Gradients of `reference` for `scores` and `g`, from its output"
    d, below = _decay(g, grad)
    grad_scores = (grad.to(d.dtype) * d).masked_fill(~below, 0).to(grad.dtype)
    p = (grad.to(d.dtype) * out.to(d.dtype)).tril(-1)
    return grad_scores, (p.sum(-1) - p.sum(-2)).to(g.dtype)


def _symbol(name, pointers):
    return cpu.symbol(name, None, *[ctypes.c_void_p] * pointers, ctypes.c_int64, *[ctypes.c_int] * 3)


def _sizes(x):
    c = x.shape[-1]
    return x.numel() // c**2, c, x.dtype == torch.bfloat16, torch.get_num_threads()


def on_cpu(scores, g):
    "As `reference`, in C++"
    scores, g = scores.contiguous(), g.float().contiguous()
    out = torch.empty_like(scores)
    if out.numel():
        _symbol("lmlab_decay_forward", 3)(*(t.data_ptr() for t in (scores, g, out)), *_sizes(scores))
    return out


def on_cpu_backward(grad, out, g):
    "As `reference_backward`, in C++"
    grad, out, wide = grad.contiguous(), out.contiguous(), g.float().contiguous()
    made = torch.empty_like(grad), torch.empty_like(wide)
    if out.numel():
        _symbol("lmlab_decay_backward", 5)(*(t.data_ptr() for t in (grad, out, wide, *made)), *_sizes(grad))
    return made[0], made[1].to(g.dtype)


DTYPES = (torch.float32, torch.bfloat16)
FORWARD = Operation("decay_scores", reference, on_cpu, dtypes=DTYPES)
BACKWARD = Operation("decay_scores_backward", reference_backward, on_cpu_backward, dtypes=DTYPES)


@torch.library.custom_op("lmlab::decay_scores", mutates_args=())
def _forward(scores: Tensor, g: Tensor, backend: str) -> Tensor:
    return FORWARD.pick(backend, scores.device.type, scores.dtype)[1](scores, g)


@_forward.register_fake
def _(scores, g, backend):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op("lmlab::decay_scores_backward", mutates_args=())
def _backward(grad: Tensor, out: Tensor, g: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return BACKWARD.pick(backend, grad.device.type, grad.dtype)[1](grad, out, g)


@_backward.register_fake
def _(grad, out, g, backend):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (grad, g))


def _setup(ctx, inputs, output):
    ctx.backend = inputs[2]
    ctx.save_for_backward(output, inputs[1])


def _gradients(ctx, grad):
    out, g = ctx.saved_tensors
    return *_backward(grad, out, g, ctx.backend), None


_forward.register_autograd(_gradients, setup_context=_setup)


def decay_scores(
    scores: Tensor,  # ... c c  queries by keys, any float dtype
    g: Tensor,  # ... c    running sum of the log decay; its leading axes broadcast to those of `scores`
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # ... c c  dtype of `scores`
    "`scores[i,j] * exp(g[i] - g[j])` on and below the diagonal, zero above; exponentials in float32 or better"
    if scores.ndim < 2 or scores.shape[-1] != scores.shape[-2]:
        raise ValueError(f"scores: shape {tuple(scores.shape)}; the last two axes must be of equal size")
    if not g.ndim or g.shape[-1] != scores.shape[-1]:
        raise ValueError(
            f"g: shape {tuple(g.shape)} for scores of shape {tuple(scores.shape)}; the last axes must be of equal size"
        )
    if not scores.is_floating_point() or not g.is_floating_point():
        raise ValueError(f"scores, g: dtypes {scores.dtype} and {g.dtype}; both must be floating point")
    if scores.device != g.device:
        raise ValueError(f"g: on {g.device}, and scores on {scores.device}; both must be on one device")
    return _forward(scores, g.expand(scores.shape[:-1]), backend)


def in_torch(scores, g):
    "The same in plain torch operations, with torch's own backward: what the kernel has to beat"
    below = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    d = (g[..., :, None] - g[..., None, :]).masked_fill(~below, -torch.inf)
    return scores * d.exp().to(scores.dtype)


def _one_case(n, c, dtype, what, threads, quick):
    "Race one shape; (`Timing`, what one run must move and compute)"
    from lmlab.kernels.cpu import plain_read

    from lmlab.core.bench import cold, paired

    def make():
        g = (-0.1 * torch.rand(n, c)).cumsum(-1).requires_grad_()
        return torch.randn(n, c, c).to(dtype).requires_grad_(), g, torch.randn(n, c, c).to(dtype)

    size = n * c * c * dtype.itemsize
    one = make()
    following = (lambda: one) if size <= HOT else cold(make)

    def run(f):
        s, g, d = following()
        if what == "forward":
            with torch.no_grad():
                return f(s, g)
        return torch.autograd.grad(f(s, g), (s, g), d)

    fns = {"kernel": decay_scores, "torch": in_torch}
    if not quick and _compiles():
        fns["torch.compile"] = torch.compile(in_torch, dynamic=False)
    fns = {name: lambda f=f: run(f) for name, f in fns.items()} | {
        "plain read": lambda: plain_read(following()[0])
    }
    timing = paired(fns, rounds=9 if quick else 31, threads=threads, budget=1 if quick else 3)
    passes, operations = (
        (2, 16) if what == "forward" else (5, 36)
    )  # over the matrix; for each entry below the diagonal
    return timing, {"bytes": passes * size, "flops": operations * n * c * c // 2}


HOT = 2**20  # bytes of scores up to which everything a run touches stays in a cache


def _compiles():
    import shutil

    return any(shutil.which(c) for c in ("g++", "clang++", "c++"))


def bench(
    quick: bool = False,  # fewer rounds and shapes, no `torch.compile`
) -> dict:  # name of the case -> (`Timing`, what was moved and computed)
    "Forward and backward against plain torch, compiled or not, in the cache and from memory, on one thread and on all"
    shapes, dtypes = [(64, 64), (2048, 64), (128, 256)], [torch.float32, torch.bfloat16]
    cases = [(n, c, dtype) for n, c in shapes for dtype in dtypes]
    out = {}
    for threads in sorted({1, torch.get_num_threads()}):
        for n, c, dtype in [cases[0], cases[3]] if quick else cases:
            for what in ("forward", "forward + backward"):
                where = "in cache" if n * c * c * dtype.itemsize <= HOT else "from memory"
                name = f"{n} x {c} x {c} {str(dtype).removeprefix('torch.')} {where}, {what}"
                name += f", {threads} thread{'s' * (threads > 1)}"
                torch.compiler.reset()  # each shape gets a graph of its own
                out[name] = _one_case(n, c, dtype, what, threads, quick)
    return out
