"""`vocab_max` of `lmlab.kernels.vocab` for GPUs: the products of a few tokens and words live in registers; no gradient needs an atomic addition."""

import torch
import triton
import triton.language as tl


@triton.jit
def _forward(
    h_ptr, w_ptr, mask_ptr, value_ptr, token_ptr, length, d, words,
    BL: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    k = tl.arange(0, BD)
    best, token = tl.full([BV], -float("inf"), tl.float32), tl.full([BV], -1, tl.int32)
    nan = tl.full([BV], 0, tl.int32)
    for start in range(0, length, BL):
        rows = start + tl.arange(0, BL)
        products = tl.zeros([BL, BV], tl.float32)
        for first in range(0, d, BD):
            f = first + k
            h = tl.load(
                h_ptr + (text * length + rows[:, None]) * d + f[None, :],
                (rows < length)[:, None] & (f < d)[None, :],
                0.0,
            )
            w = tl.load(
                w_ptr + v[None, :].to(tl.int64) * d + f[:, None], (v < words)[None, :] & (f < d)[:, None], 0.0
            )
            products += tl.dot(h.to(DOT), w.to(DOT), input_precision="ieee")
        counts = tl.load(mask_ptr + text * length + rows, rows < length, 0) != 0
        products = tl.where(counts[:, None], products, -float("inf"))
        odd = products != products
        nan_here = tl.max(odd.to(tl.int32), 0)
        first_nan = tl.min(tl.where(odd, rows[:, None], 2147483647), 0)
        products = tl.where(odd, -float("inf"), products)
        most = tl.max(products, 0)
        where = tl.min(tl.where(products == most[None, :], rows[:, None], 2147483647), 0)
        better = (most > best) & (nan == 0)
        token = tl.where((nan_here > 0) & (nan == 0), first_nan, tl.where(better, where, token))
        best = tl.where(better, most, best)
        nan = tl.maximum(nan, nan_here)
    best = tl.where(nan > 0, float("nan"), best)
    tl.store(value_ptr + text * words + v, best, v < words)
    tl.store(token_ptr + text * words + v, token, v < words)


@triton.jit
def _by_weight(
    g_ptr, token_ptr, h_ptr, out_ptr, texts, length, d, words,
    BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    v, f = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BV, BD], tl.float32)
    for i in range(0, texts):
        text = tl.cast(i, tl.int64)
        t = tl.load(token_ptr + text * words + v, v < words, -1)
        g = tl.load(g_ptr + text * words + v, v < words, 0.0).to(tl.float32)
        won = t >= 0
        h = tl.load(
            h_ptr + (text * length + t[:, None]) * d + f[None, :], won[:, None] & (f < d)[None, :], 0.0
        )
        total += tl.where(won, g, 0.0)[:, None] * h.to(tl.float32)
    at = out_ptr + v[:, None].to(tl.int64) * d + f[None, :]
    tl.store(at, total, (v < words)[:, None] & (f < d)[None, :])


@triton.jit
def _by_hidden(
    g_ptr, token_ptr, w_ptr, out_ptr, length, d, words,
    BL: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    "The winners of a text as a matrix of tokens by words with one entry a column, made in registers, times the weights"
    text = tl.program_id(0).to(tl.int64)
    rows, f = tl.program_id(1) * BL + tl.arange(0, BL), tl.program_id(2) * BD + tl.arange(0, BD)
    total = tl.zeros([BL, BD], tl.float32)
    for start in range(0, words, BV):
        v = start + tl.arange(0, BV)
        t = tl.load(token_ptr + text * words + v, v < words, -1)
        g = tl.load(g_ptr + text * words + v, v < words, 0.0)
        share = tl.where(t[None, :] == rows[:, None], g[None, :], 0.0).to(DOT)
        w = tl.load(
            w_ptr + v[:, None].to(tl.int64) * d + f[None, :], (v < words)[:, None] & (f < d)[None, :], 0.0
        )
        total += tl.dot(share, w.to(DOT), input_precision="ieee")
    at = out_ptr + (text * length + rows[:, None]) * d + f[None, :]
    tl.store(at, total, (rows < length)[:, None] & (f < d)[None, :])


def _operands(x):
    "What products are made of: the interpreter on the CPU would multiply the bits of bfloat16 numbers; in float32 their products are exact"
    return tl.bfloat16 if x.dtype == torch.bfloat16 and x.is_cuda else tl.float32


def forward(hidden, weight, mask):
    "As `lmlab.kernels.vocab.tiled`"
    hidden, weight, mask = hidden.contiguous(), weight.contiguous(), mask.to(torch.int8).contiguous()
    b, length, d = hidden.shape
    values = torch.empty(b, len(weight), device=hidden.device)
    tokens = torch.empty(values.shape, dtype=torch.int32, device=hidden.device)
    if values.numel():
        grid = (b, triton.cdiv(len(weight), 128))
        sizes = dict(BL=64, BV=128, BD=32, DOT=_operands(hidden), num_warps=8)
        _forward[grid](hidden, weight, mask, values, tokens, length, d, len(weight), **sizes)
    return values.to(hidden.dtype), tokens


def backward(grad, hidden, weight, tokens):
    "As `lmlab.kernels.vocab.scattered`"
    grad, hidden, weight, tokens = (t.contiguous() for t in (grad, hidden, weight, tokens))
    (b, length, d), words = hidden.shape, len(weight)
    by_hidden, by_weight = (torch.empty(t.shape, device=t.device) for t in (hidden, weight))
    if by_weight.numel():
        grid = (triton.cdiv(words, 32), triton.cdiv(d, 64))
        _by_weight[grid](grad, tokens, hidden, by_weight, b, length, d, words, BV=32, BD=64)
    if by_hidden.numel():
        grid = (b, triton.cdiv(length, 64), triton.cdiv(d, 64))
        sizes = dict(BL=64, BV=64, BD=64, DOT=_operands(weight))
        _by_hidden[grid](grad, tokens, weight, by_hidden, length, d, words, **sizes)
    return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype)
