"""Ternary linear layers on a GPU, from the codes as `pack` writes them; the bits are those of the reference.

One program rounds a token to int8 and lays it out by planes, so that plane `p` of the codes meets the four-byte words that follow one another
in memory. With few tokens a step's 32 words of codes, one a row, are multiplied as they come: a shift, a mask and a four-byte dot product for four
weights, the inputs of a tile spread over so many programs that all processors read. Their integer sums are added by a second kernel, in which
order does not matter. With more tokens each byte of codes is unpacked into four operands of the matrix units.

There are no kernels for five weights a byte: taking five digits of base 3 apart costs a GPU more than it saves by reading less. Such codes are
packed anew at the first call, in 2 bits, and kept for as long as the old ones live.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

FEW = 8  # tokens that are multiplied without the matrix units
STEPS = 64  # a program's share of the inputs is a multiple of this many steps
_twice = WeakTensorKeyDictionary()  # codes in 1.6 bits -> (their version, the same weights in 2 bits)


@triton.jit
def _quantize(x, q, ratio, total, inputs, steps, BLOCK: tl.constexpr):
    "A token to int8: q[token, p, s, j] is input 4 (4 s + p) + j; not-finite tokens become zeros worth NaN"
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.int32)  # magnitudes order like their bits, a NaN above all
    for at in range(0, inputs, BLOCK):
        v = tl.load(x + token * inputs + at + i, mask=at + i < inputs, other=0.0).to(tl.float32)
        most = tl.maximum(most, v.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(most, 0)
    finite = bits < 0x7F800000
    largest = tl.maximum(bits.to(tl.float32, bitcast=True), 1e-5)
    largest = tl.where(finite, largest, 1.0)
    scale = tl.div_rn(1.0, largest) * 127.0  # in torch's order, so that the int8 values agree
    sums = tl.zeros([BLOCK], tl.int32)
    for at in range(0, 16 * steps, BLOCK):
        k = at + i
        v = tl.load(x + token * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
        rounded = (
            tl.where(finite, v, 0.0) * scale + 12582912.0
        )  # 1.5 * 2^23: to the nearest, ties to even, the integer in the low bits
        n = rounded.to(tl.int32, bitcast=True) - 0x4B400000
        sums += n
        place = ((token * 4 + k // 4 % 4) * steps + k // 16) * 4 + k % 4
        tl.store(q + place, n.to(tl.int8), mask=k < 16 * steps)
    tl.store(ratio + token, tl.where(finite, tl.div_rn(largest, 127.0), float("nan")))
    tl.store(total + token, tl.sum(sums, 0))


@triton.jit
def _finish(sums, total, ratio, scale, bias, row, mask, SCALES: tl.constexpr, BIAS: tl.constexpr):
    "Sums of codes to outputs; all arguments broadcast against `sums`"
    y = (sums - total).to(tl.float32) * ratio
    y = y * (tl.load(scale + row, mask=mask, other=0.0) if SCALES else tl.load(scale))
    return y + tl.load(bias + row, mask=mask, other=0.0) if BIAS else y


@triton.jit
def _store(y, out, mask):
    "Round to nearest even by hand where y is bfloat16: Triton's interpreter would cut the lower bits off"
    if y.dtype.element_ty == tl.bfloat16:
        bits = out.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        out = tl.where(out == out, bits.to(tl.float32, bitcast=True), out)
    tl.store(y, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dot4(sums, codes, x, DP4A: tl.constexpr):
    "sums + the four products of bytes, codes without a sign, exact"
    if DP4A:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, x, sums],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    for j in tl.static_range(4):
        sums += ((codes >> 8 * j) & 0xFF) * ((x << (24 - 8 * j)) >> 24)
    return sums


@triton.jit
def _few(
    q,  # tokens 4 padded   words
    codes,  # tiles steps 32  words
    parts,  # splits tokens rows  sums, where there are several
    ratio,
    total,
    scale,
    bias,
    y,  # tokens rows
    tokens,
    rows,
    steps,
    padded,
    share,  # steps of one program
    N: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    DP4A: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    "One tile of 32 rows, `share` of its steps, N tokens"
    tile, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, n = tl.arange(0, 32), tl.arange(0, N)
    known = tl.minimum(n, tokens - 1)[:, None]
    here = codes + tile * steps * 32 + r[None, None, :]
    sums = tl.zeros([N, S, 32], tl.int32)
    for at in range(part * share, tl.minimum(part * share + share, steps), S):
        s = at + tl.arange(0, S)
        w = tl.load(here + s[None, :, None] * 32, mask=s[None, :, None] < steps, other=0)
        for p in tl.static_range(4):
            v = tl.load(q + (known * 4 + p) * padded + s[None, :])
            sums = _dot4(sums, (w >> 2 * p) & 0x03030303, v[:, :, None], DP4A)
    sums, row = tl.sum(sums, 1), (tile * 32 + r)[None, :]
    mask = (n[:, None] < tokens) & (row < rows)
    if SPLIT:
        tl.store(parts + (part * tokens + n[:, None]) * rows + row, sums, mask=mask)
    else:
        a, b = tl.load(total + known), tl.load(ratio + known)
        out = _finish(sums, a, b, scale, bias, row, row < rows, SCALES, BIAS)
        _store(y + n[:, None] * rows + row, out, mask)


@triton.jit
def _join(
    parts,
    ratio,
    total,
    scale,
    bias,
    y,
    tokens,
    rows,
    splits,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    "The sums of all programs of `_few`, one token and a block of rows"
    token, row = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.int32)
    for part in range(splits):
        sums += tl.load(parts + (part * tokens + token) * rows + row, mask=row < rows, other=0)
    a, b = tl.load(total + token), tl.load(ratio + token)
    out = _finish(sums, a, b, scale, bias, row, row < rows, SCALES, BIAS)
    _store(y + token * rows + row, out, row < rows)


@triton.jit
def _many(
    q,  # tokens 4 padded 4   bytes
    codes,  # tiles steps 32 4  bytes
    ratio,
    total,
    scale,
    bias,
    y,  # tokens rows
    tokens,
    rows,
    steps,
    padded,
    R: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    "R rows by N tokens; each byte of codes serves four products of matrices"
    r, n = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, 4 * S)
    place = (r // 32).to(tl.int64) * steps * 128 + r % 32 * 4
    token = tl.minimum(n, tokens - 1).to(tl.int64) * 4 * padded * 4
    sums = tl.zeros([R, N], tl.int32)
    for at in range(0, steps, S):
        inside = (r < rows)[:, None] & (at + k // 4 < steps)[None, :]
        w = tl.load(codes + place[:, None] + ((at + k // 4) * 128 + k % 4)[None, :], mask=inside, other=0)
        for p in tl.static_range(4):
            v = tl.load(q + token[None, :] + ((p * padded + at) * 4 + k)[:, None])
            sums = tl.dot(((w >> 2 * p) & 3).to(tl.int8), v, sums, out_dtype=tl.int32)
    a, b = tl.load(total + n, mask=n < tokens, other=0), tl.load(ratio + n, mask=n < tokens, other=0.0)
    row = r[:, None]
    out = _finish(sums, a[None, :], b[None, :], scale, bias, row, row < rows, SCALES, BIAS)
    mask = (row < rows) & (n < tokens)[None, :]
    _store(y + n[None, :].to(tl.int64) * rows + row, out, mask)


@triton.jit
def _floats(
    x,  # tokens inputs
    codes,  # tiles steps 32 4  bytes
    parts,  # splits tokens rows  sums, where there are several
    scale,
    bias,
    y,  # tokens rows
    tokens,
    rows,
    inputs,
    steps,
    share,  # steps of one program
    R: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALES: tl.constexpr,
    BIAS: tl.constexpr,
):
    "As `_many`, on activations that were not rounded to int8, with the inputs of a tile spread over programs as in `_few`"
    r, n = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1) * N + tl.arange(0, N)
    k, part = tl.arange(0, 4 * S), tl.program_id(2)
    place = (r // 32).to(tl.int64) * steps * 128 + r % 32 * 4
    token, known = n.to(tl.int64)[None, :] * inputs, (n < tokens)[None, :]
    sums = tl.zeros([R, N], tl.float32)
    for at in range(part * share, tl.minimum(part * share + share, steps), S):
        s = at + k // 4
        inside = (r < rows)[:, None] & (s < steps)[None, :]
        w = tl.load(codes + place[:, None] + (s * 128 + k % 4)[None, :], mask=inside, other=0)
        for p in tl.static_range(4):
            i = (16 * s + 4 * p + k % 4)[:, None]
            v = tl.load(x + token + i, mask=(i < inputs) & known, other=0.0)
            sums = tl.dot((((w >> 2 * p) & 3).to(tl.int8) - 1).to(v.dtype), v, sums)
    row, to = r[:, None], n[None, :].to(tl.int64) * rows + r[:, None]
    if SPLIT:
        tl.store(parts + part.to(tl.int64) * tokens * rows + to, sums, mask=(row < rows) & known)
    else:
        sums = sums * (tl.load(scale + row, mask=row < rows, other=0.0) if SCALES else tl.load(scale))
        sums = sums + tl.load(bias + row, mask=row < rows, other=0.0) if BIAS else sums
        _store(y + to, sums, (row < rows) & known)


def _two_bit(codes, rows, inputs, format):
    "Codes in 2 bits a weight, made once"
    if format == "2bit" or not codes.numel():
        return codes
    from lmlab.kernels.ternary import _unpack, pack

    version, made = _twice.get(codes, (None, None))
    if version != codes._version:  # never seen, or written to since
        version, made = codes._version, pack(_unpack(codes, rows, inputs, format), 1.0, "2bit").codes
        _twice[codes] = version, made
    return made


def _room(device):
    "Programs that keep all processors busy, four on each, and tokens of a program of `_many` that fit its shared memory"
    if device.type != "cuda":
        return 6, 64
    p = torch.cuda.get_device_properties(device)
    return 4 * p.multi_processor_count, 128 if p.shared_memory_per_block_optin >= 2**17 else 64


def on_triton(
    x: Tensor,  # ... in
    codes: Tensor,
    scale: Tensor,  # 1 or out
    bias: Tensor | None,  # out
    rows: int,
    inputs: int,
    format: str,
) -> Tensor:  # ... out
    "As `reference` of lmlab.kernels.ternary, in Triton"
    y = x.new_empty(*x.shape[:-1], rows)
    if y.numel():
        with torch.cuda.device_of(x):
            _launch(
                x.contiguous(), _two_bit(codes, rows, inputs, format).contiguous(), scale, bias, y, inputs
            )
    return y


def _launch(x, codes, scale, bias, y, inputs):
    tokens, rows, (tiles, steps, _) = y.numel() // y.shape[-1], y.shape[-1], codes.shape
    new, (programs, wide) = x.new_empty, _room(x.device)
    blocks = max(1, triton.cdiv(steps, STEPS))
    padded = blocks * STEPS
    q, ratio = new(tokens, 4, padded, 4, dtype=torch.int8), new(tokens, dtype=torch.float32)
    total = new(tokens, dtype=torch.int32)
    # a product and a sum that become one operation round once where the reference rounds twice
    exact = dict(enable_fp_fusion=False)
    block = min(4096, triton.next_power_of_2(16 * padded))
    _quantize[(tokens,)](x, q, ratio, total, inputs, padded, block, num_warps=8, **exact)
    given = dict(SCALES=scale.numel() > 1, BIAS=bias is not None) | exact
    end = (
        ratio,
        total,
        scale.contiguous(),
        scale if bias is None else bias.float().contiguous(),
        y,
        tokens,
        rows,
    )
    if tokens > FEW:
        n = min(wide, max(16, triton.next_power_of_2(tokens)))
        grid, warps = (triton.cdiv(rows, 128), triton.cdiv(tokens, n)), 8 if n > 32 else 4
        _many[grid](q, codes, *end, steps, padded, R=128, N=n, S=16, num_warps=warps, num_stages=3, **given)
        return
    share = triton.cdiv(blocks, max(1, min(programs // tiles, blocks))) * STEPS
    splits = triton.cdiv(padded, share)
    parts = new(splits, tokens, rows, dtype=torch.int32) if splits > 1 else total
    sizes = dict(N=triton.next_power_of_2(tokens), S=STEPS if tokens <= 2 else STEPS // 2, SPLIT=splits > 1)
    dp4a = x.is_cuda and torch.version.cuda is not None
    words = q.view(torch.int32), codes.view(torch.int32), parts
    _few[tiles, splits](*words, *end, steps, padded, share, **sizes, DP4A=dp4a, **given)
    if splits > 1:
        _join[triton.cdiv(rows, 256), tokens](parts, *end, splits, BLOCK=256, **given)


def floats_on_triton(
    x: Tensor,  # ... in
    codes: Tensor,
    scale: Tensor,  # 1 or out
    bias: Tensor | None,  # out
    rows: int,
    inputs: int,
    format: str,
) -> Tensor:  # ... out
    "As `reference_floats` of lmlab.kernels.ternary, in Triton"
    y = x.new_empty(*x.shape[:-1], rows)
    if not y.numel():
        return y
    codes, tokens = _two_bit(codes, rows, inputs, format).contiguous(), y.numel() // rows
    steps, few = codes.shape[1], tokens <= 16
    r, n = (32, 16) if few else (128, 64)
    grid, blocks = (triton.cdiv(rows, r), triton.cdiv(tokens, n)), max(1, triton.cdiv(steps, STEPS))
    share = triton.cdiv(blocks, max(1, min(_room(x.device)[0] // (grid[0] * grid[1]), blocks))) * STEPS
    splits = max(1, triton.cdiv(steps, share))
    parts = x.new_empty(splits, *y.shape, dtype=torch.float32) if splits > 1 else scale
    bias, x = None if bias is None else bias.float().contiguous(), x.bfloat16().contiguous()
    x = x if x.is_cuda else x.float()  # Triton's interpreter has no product of matrices in bfloat16
    with torch.cuda.device_of(x):
        _floats[*grid, splits](
            x, codes, parts, scale.contiguous(), scale if bias is None else bias, y, tokens,
            rows, inputs, steps, share, R=r, N=n, S=STEPS // 2 if few else STEPS // 4, SPLIT=splits > 1,
            SCALES=scale.numel() > 1, BIAS=bias is not None, num_warps=4 if few else 8, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            out = parts.sum(0) * scale
            y.copy_(out if bias is None else out + bias)
    return y
