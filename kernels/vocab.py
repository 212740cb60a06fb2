"""The strongest response of a text's tokens to every word of a vocabulary, without the table of tokens by vocabulary.

    vocab_max(hidden, weight, bias=None, mask=None, backend="auto") -> (values, tokens)

`values[b, v]` is the largest `hidden[b, l] · weight[v]` over the tokens `l` that the mask lets in, plus `bias[v]`; `tokens[b, v]` is the first
token that has it, -1 (and the value -inf) where the mask lets none in. For 32 texts of 256 tokens and BERT's words the table would be a
gigabyte in float32; here the products of a few tokens and a stretch of the vocabulary are made, used while they are in the cache, and forgotten.
The backward pass reads one token for each text and word, the winner.
"""

import ctypes

import torch
from lmlab.kernels import Operation, cpu
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def _wide(x):
    return x.double() if x.dtype == torch.float64 else x.float()


def reference(hidden, weight, mask):
    "The definition, with the whole table and without the bias"
    z = _wide(hidden) @ _wide(weight).mT
    z = z.masked_fill(~mask[..., None], -torch.inf)
    if not z.shape[1]:
        z = z.new_full((len(z), 1, z.shape[2]), -torch.inf)
    values, tokens = z.max(1)
    first = torch.where(values.isnan(), z.isnan().int().argmax(1), (z == values[:, None]).int().argmax(1))
    none = values == -torch.inf
    return values.to(hidden.dtype), first.int().masked_fill(none, -1)


WIDE, ROWS = 2048, 256  # words and tokens of a tile of products: 2 MB


def tiled(hidden, weight, mask):
    "As `reference`, a tile of products at a time"
    b, length, _ = hidden.shape
    values = hidden.new_full((b, weight.shape[0]), -torch.inf, dtype=_wide(hidden[:0]).dtype)
    tokens = torch.full(values.shape, -1, dtype=torch.int32, device=hidden.device)
    for i in range(b):
        at = mask[i].nonzero()[:, 0]  # tokens that are let in
        rows = _wide(hidden[i, at])
        for v in range(0, weight.shape[0], WIDE):
            part = _wide(weight[v : v + WIDE])
            for a in range(0, len(at), ROWS):
                best, first = (rows[a : a + ROWS] @ part.mT).max(0)
                first = at[a + first].int()
                have, old = tokens[i, v : v + WIDE], values[i, v : v + WIDE]
                better = (best > old) | (best.isnan() & ~old.isnan())
                tokens[i, v : v + WIDE], values[i, v : v + WIDE] = (
                    torch.where(better, first, have),
                    torch.where(better, best.to(old), old),
                )
    return values.to(hidden.dtype), tokens


def scattered(grad, hidden, weight, tokens):
    "As `reference_backward`: the winners of a text, added up token by token and word by word"
    by_hidden, by_weight = (
        torch.zeros_like(hidden, dtype=_wide(hidden[:0]).dtype),
        torch.zeros_like(weight, dtype=_wide(weight[:0]).dtype),
    )
    for i in range(len(hidden)):
        words = (tokens[i] >= 0) & (grad[i] != 0)
        words = words.nonzero()[:, 0]
        at, g = tokens[i, words].long(), _wide(grad[i, words])[:, None]
        by_hidden[i].index_add_(0, at, g * _wide(weight[words]))
        by_weight.index_add_(0, words, g * _wide(hidden[i, at]))
    return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype)


_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def on_cpu(hidden, weight, mask):
    "As `tiled`: torch multiplies, C++ folds the tile into what is known; products and sums are float32"
    text, token = mask.nonzero(as_tuple=True)
    rows, text, token = hidden[text, token].float(), text.int(), token.int()
    values = torch.full((len(hidden), len(weight)), -torch.inf)
    tokens, tile = torch.full(values.shape, -1, dtype=torch.int32), torch.empty(ROWS * WIDE)
    fold = cpu.symbol("lmlab_vocab_fold", None, _P, _L, _L, _P, _P, _P, _P, _L, _L, _I)
    for v in range(0, len(weight), WIDE):
        part = weight[v : v + WIDE].float()
        for a in range(0, len(rows), ROWS):
            some = rows[a : a + ROWS]
            z = torch.mm(some, part.mT, out=tile[: len(some) * len(part)].view(len(some), len(part)))
            at = (text[a:].data_ptr(), token[a:].data_ptr(), values.data_ptr(), tokens.data_ptr())
            fold(z.data_ptr(), len(some), len(part), *at, len(weight), v, torch.get_num_threads())
    return values.to(hidden.dtype), tokens


def on_cpu_backward(grad, hidden, weight, tokens):
    "As `scattered`, in C++"
    by_hidden, by_weight = torch.zeros(hidden.shape), torch.zeros(weight.shape)
    grad, wide_hidden, wide_weight = (t.float().contiguous() for t in (grad, hidden, weight))
    if grad.numel():
        call = cpu.symbol("lmlab_vocab_backward", None, *[_P] * 6, *[_L] * 4, _I)
        arrays = (grad, tokens.contiguous(), wide_hidden, wide_weight, by_hidden, by_weight)
        call(*(t.data_ptr() for t in arrays), *hidden.shape, len(weight), torch.get_num_threads())
    return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype)


def on_triton(hidden, weight, mask):
    "As `tiled`, in Triton"
    from lmlab.kernels.vocab_triton import forward

    return forward(hidden, weight, mask)


def on_triton_backward(grad, hidden, weight, tokens):
    "As `scattered`, in Triton"
    from lmlab.kernels.vocab_triton import backward

    return backward(grad, hidden, weight, tokens)


FORWARD = Operation("vocab_max", tiled, on_cpu, on_triton, dtypes=DTYPES)
BACKWARD = Operation("vocab_max_backward", scattered, on_cpu_backward, on_triton_backward, dtypes=DTYPES)


@torch.library.custom_op("lmlab::vocab_max", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return FORWARD.pick(backend, hidden.device.type, hidden.dtype)[1](hidden, weight, mask)


@_forward.register_fake
def _(hidden, weight, mask, backend):
    shape = hidden.shape[0], weight.shape[0]
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.int32)


@torch.library.custom_op("lmlab::vocab_max_backward", mutates_args=())
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return BACKWARD.pick(backend, hidden.device.type, hidden.dtype)[1](grad, hidden, weight, tokens)


@_backward.register_fake
def _(grad, hidden, weight, tokens, backend):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    ctx.backend = inputs[3]
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    return *_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


_forward.register_autograd(_gradients, setup_context=_setup)


def vocab_max(
    hidden: Tensor,  # b l d  any float dtype
    weight: Tensor,  # V d    the same dtype, unless autocast is on
    bias: Tensor = None,  # V
    mask: Tensor = None,  # b l    true or non-zero where a token counts; None: everywhere
    backend: str = "auto",  # see `lmlab.kernels`
) -> tuple[Tensor, Tensor]:  # b V in the dtype of `hidden`; b V  int32, the token
    "The largest product over the tokens, plus the bias, for every word, and the token that has it"
    if hidden.ndim != 3 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden, weight: shapes {tuple(hidden.shape)}, {tuple(weight.shape)}; allowed are b l d and V d"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden, weight: dtypes {hidden.dtype}, {weight.dtype}; both must be of one floating point dtype"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}; allowed is {tuple(weight.shape[:1])}, one a word")
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"mask: shape {tuple(mask.shape)}; allowed is {tuple(hidden.shape[:2])}, one a token"
        )
    values, tokens = _forward(hidden, weight, mask != 0, backend)
    return (values if bias is None else values + bias.to(values.dtype)), tokens


def in_torch(hidden, weight, mask):
    "The table, masked, and its maximum, with torch's own backward: what the kernel has to beat"
    return (hidden @ weight.mT).masked_fill(~mask[..., None], -torch.inf).max(1)[0]


def bench(
    quick: bool = False,  # fewer words and rounds
) -> dict:  # name of the case -> (`Timing`, what was moved and computed)
    "Forward and backward at the width of a small encoder against the whole table, on one thread and on all"
    from lmlab.core.bench import paired, peak_memory

    words, d = (2000 if quick else 29_523), 384
    out, rounds = {}, dict(rounds=3 if quick else 9, budget=1 if quick else 12)
    for threads in sorted({1, torch.get_num_threads()}):
        for b, length in ((8, 32),) if quick else ((8, 32), (8, 128)):
            hidden, weight = (
                torch.randn(b, length, d, requires_grad=True),
                torch.randn(words, d, requires_grad=True),
            )
            mask, grad = torch.ones(b, length, dtype=torch.bool), torch.randn(b, words)
            for what in ("forward", "forward + backward"):

                def run(f, what=what, x=(hidden, weight, mask), grad=grad):
                    if what == "forward":
                        with torch.no_grad():
                            return f(*x)
                    return torch.autograd.grad(f(*x), x[:2], grad)

                fns = {
                    "kernel": lambda run=run: run(lambda h, w, m: vocab_max(h, w, mask=m)[0]),
                    "table": lambda run=run: run(in_torch),
                }
                flops = 2 * b * length * d * words + (4 * b * d * words if what != "forward" else 0)
                work = {"bytes": 4 * (words * d + b * length * d + 2 * b * words), "flops": flops}
                work |= {f"memory of the {k}": peak_memory(f) for k, f in fns.items()}
                name = f"{b} texts of {length} tokens, {words:,} words, {what}, {threads} thread{'s' * (threads > 1)}"
                out[name] = paired(fns, threads=threads, **rounds), work
    return out
