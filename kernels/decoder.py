"""Transformer layers with ternary linear layers, all of them in one call: what a language model does between its embedding and its last norm.

    dec = Decoder([Layer(input_norm, q, k, v, attn_sub_norm, o, post_norm, gate, up, ffn_sub_norm, down), ...],
                  heads=20, kv_heads=5, head_dim=128, inv_freq=f, act="relu2")
    state = dec.state(batch=3, length=4096)         # keys and values of all layers
    y = dec(x, state)                               # x: 3 n d, the next n tokens of every row
    y = dec(x, state, rows=[2, 0], counts=[7, 4])   # x: 11 d, the next 7 tokens of row 2, then the next 4 of row 0
    logits = head(norm(y), weight)

A layer is `x += o(sub_norm(attention(q, k, v of norm(x))))`, then `x += down(sub_norm(act(gate(h)) * up(h)))` with `h = norm(x)`: a BitNet, or
a Llama where the sub-norms are `None`. Linear layers are those of `lmlab.kernels.ternary`, with the same bits. Everything else is float32,
but for the root of a norm, which is in float64, so that the order of its sum does not count.

What a token becomes depends on the tokens of its row alone, bit for bit in C++: not on the batch, the cut of a prompt into calls, the
number of threads, the instruction set. There are no gradients; for these take `ternary.linear` and torch's attention.
"""

import ctypes
import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from lmlab.kernels import Operation, cpu
from lmlab.kernels.ternary import PackedTernary, _Matrix, _memory, _placed, linear, pack, paths
from torch import Tensor

ACTS = ("relu2", "silu")
DTYPES = (torch.float32, torch.bfloat16)  # of keys and values, and of the weight of a head
KEYS = 16  # that stand side by side in a block: one vector holds the same feature of all of them
WIDE = 32  # features of a value are filled up to a multiple of this
NORMS = "input_norm", "attn_sub_norm", "post_norm", "ffn_sub_norm"


@dataclass(frozen=True, eq=False)
class Layer:
    "Norms and ternary matrices of one layer, in the order in which a token meets them"

    input_norm: Tensor  # d
    q: PackedTernary  # heads * head_dim, d
    k: PackedTernary  # kv_heads * head_dim, d
    v: PackedTernary  # kv_heads * head_dim, d
    attn_sub_norm: Tensor | None  # heads * head_dim
    o: PackedTernary  # d, heads * head_dim
    post_norm: Tensor  # d
    gate: PackedTernary  # f, d
    up: PackedTernary  # f, d
    ffn_sub_norm: Tensor | None  # f
    down: PackedTernary  # d, f


@dataclass(eq=False)
class State:
    "Keys and values of every layer, and how many tokens each row has; made by `Decoder.state`"

    decoder: object  # the `Decoder` it belongs to
    keys: Tensor  # layers batch kv_heads blocks head_dim/pair KEYS pair, rotated already; pair is 2 in bfloat16, else 1
    values: Tensor  # layers batch kv_heads length' head_dim'/(16 pair) 16 pair; feature 16 pair c + 16 p + i stands at c i p
    lengths: Tensor  # batch  int64; lower one to forget the last tokens of its row, all of them at 0
    length: int  # most tokens a row has room for

    @property
    def batch(self):
        return len(self.lengths)

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes

    def of(
        self,
        layer: int,
        row: int,
    ) -> tuple[Tensor, Tensor]:  # kv_heads length' head_dim; kv_heads length' head_dim'
        "A copy of the keys and values of a row in order, with what is behind the last"
        k, v = self.keys[layer, row], self.values[layer, row]
        return k.transpose(2, 3).flatten(3).flatten(1, 2), v.transpose(-1, -2).flatten(2)

    def put(
        self,
        layer: int,
        row: int,
        start: int,  # position of the first
        k: Tensor,  # n kv_heads head_dim
        v: Tensor,  # n kv_heads head_dim
    ):
        "Write the keys and values of tokens that follow one another"
        keys, values, at = self.keys[layer, row], self.values[layer, row], torch.arange(start, start + len(k))
        pair, wide = keys.shape[-1], values.shape[2:].numel()
        keys[:, at // KEYS, :, at % KEYS] = k.unflatten(-1, (-1, pair)).to(keys.dtype)
        v = F.pad(v, (0, wide - v.shape[-1])).transpose(0, 1).unflatten(-1, (-1, pair, 16))
        values[:, at] = v.transpose(-1, -2).to(values.dtype)


class _Layer(ctypes.Structure):
    "`Layer` in decoder.cpp"

    _fields_ = [(name, ctypes.c_void_p) for name in NORMS]
    _fields_ += [(name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")]


class _Shape(ctypes.Structure):
    "`Shape` in decoder.cpp"

    _fields_ = [
        (name, ctypes.c_int64) for name in ("layers", "d", "f", "heads", "kv_heads", "head_dim", "batch", "length")
    ]
    _fields_ += [("eps", ctypes.c_double), ("scale", ctypes.c_float), ("silu", ctypes.c_int32), ("half", ctypes.c_int32)]


def _matrix(p):
    return _Matrix(p.codes.data_ptr(), p.scale.data_ptr(), None, None, p.out_features, p.scale.numel() > 1, p.format == "1.6bit")


class Decoder:
    "Layers, ready to be run; nothing of them is copied but the norms that are not float32"

    def __init__(
        self,
        layers,  # list of `Layer`
        heads: int,  # of the queries
        kv_heads: int,  # of the keys and values; `heads // kv_heads` queries share one
        head_dim: int,  # even
        inv_freq: Tensor,  # head_dim / 2  angle of a rotation by one position
        eps: float = 1e-5,  # of the norms
        act: str = "relu2",  # one of `ACTS`
    ):
        if act not in ACTS:
            raise ValueError(f"act: {act!r}; allowed are {', '.join(map(repr, ACTS))}")
        for name, n in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name}: {n!r}; allowed is a whole number from 1")
        if heads % kv_heads:
            raise ValueError(f"heads: {heads}; it must be a multiple of kv_heads, which is {kv_heads}")
        if head_dim % 2 or tuple(inv_freq.shape) != (head_dim // 2,):
            raise ValueError(
                f"inv_freq: shape {tuple(inv_freq.shape)}; it must be ({head_dim // 2},), half of head_dim, which is even"
            )
        self.layers, self.heads, self.kv_heads, self.head_dim = list(layers), heads, kv_heads, head_dim
        self.eps, self.act, self.inv_freq = eps, act, inv_freq.detach().float().cpu()
        if not self.layers:
            raise ValueError("layers: empty; at least one is needed")
        self.d, self.f = self.layers[0].q.in_features, self.layers[0].gate.out_features
        self.layers = [self._checked(i, l) for i, l in enumerate(self.layers)]
        self._rotations = torch.empty(0, 2, head_dim // 2)
        self._c_layers = (_Layer * len(self.layers))(
            *(
                _Layer(**{f.name: self._c_field(getattr(l, f.name)) for f in fields(l)})
                for l in self.layers
            )
        )

    def _checked(self, i, layer):
        "The layer with its norms in float32 and in one piece"
        d, f, a, b = self.d, self.f, self.heads * self.head_dim, self.kv_heads * self.head_dim
        want = {"q": (a, d), "k": (b, d), "v": (b, d), "o": (d, a), "gate": (f, d), "up": (f, d), "down": (d, f)}
        for name, shape in want.items():
            p = getattr(layer, name)
            if not isinstance(p, PackedTernary):
                raise TypeError(f"layers[{i}].{name}: {type(p).__name__}; allowed is a PackedTernary")
            if p.shape != shape or p.device.type != "cpu":
                raise ValueError(
                    f"layers[{i}].{name}: {p.out_features} x {p.in_features} on {p.device}; "
                    f"this decoder needs {shape[0]} x {shape[1]} on the CPU"
                )
        norms = {}
        for name, size in zip(NORMS, (d, a, d, f), strict=True):
            w = getattr(layer, name)
            if w is None and "sub" in name:
                norms[name] = None
            elif not isinstance(w, Tensor) or tuple(w.shape) != (size,) or not w.is_floating_point():
                what = f"{w.dtype} of shape {tuple(w.shape)}" if isinstance(w, Tensor) else repr(w)
                raise ValueError(f"layers[{i}].{name}: {what}; allowed is a float tensor of {size}")
            else:
                norms[name] = w.detach().float().cpu().contiguous()
        contiguous = {name: getattr(layer, name) for name in want}
        return Layer(**norms, **contiguous)

    @staticmethod
    def _c_field(value):
        return _matrix(value) if isinstance(value, PackedTernary) else None if value is None else value.data_ptr()

    def state(
        self,
        batch: int,  # rows
        length: int,  # most tokens of a row
        dtype: torch.dtype = torch.float32,  # of keys and values; bfloat16 halves what a long context costs
    ) -> State:
        "Room for the keys and values of `batch` rows of up to `length` tokens, all empty"
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype}; allowed are float32 and bfloat16")
        for name, n in (("batch", batch), ("length", length)):
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{name}: {n!r}; allowed is a whole number from 1")
        blocks, lead = -(-length // KEYS), (len(self.layers), batch, self.kv_heads)
        wide = -(-self.head_dim // WIDE) * WIDE

        def empty(*shape):
            return _memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

        pair = 2 if dtype == torch.bfloat16 else 1
        keys = empty(*lead, blocks, self.head_dim // pair, KEYS, pair)
        values = empty(*lead, blocks * KEYS, wide // (16 * pair), 16, pair)
        self._rotate_up_to(length)
        return State(self, keys, values, torch.zeros(batch, dtype=torch.long), length)

    def _rotate_up_to(self, length):
        "Cosines and sines of all positions below `length`: length 2 head_dim/2"
        if len(self._rotations) < length:
            angle = torch.arange(length).float()[:, None] * self.inv_freq
            self._rotations = torch.stack([angle.cos(), angle.sin()], 1)

    def __call__(
        self,
        x: Tensor,  # rows n d  float32, or sum(counts) d when `counts` says how many tokens each row has
        state: State,
        rows=None,  # rows of `state` that these tokens belong to, each at most once; default: all, in order
        counts=None,  # tokens of each of them, one row's behind the other's in `x`
        backend: str = "auto",  # see `lmlab.kernels`
    ) -> Tensor:  # as `x`, before the model's last norm
        "Append tokens to rows of `state` and run them through all layers; a NaN stays within its row"
        if not isinstance(state, State) or state.decoder is not self:
            what = "of another decoder" if isinstance(state, State) else f"a {type(state).__name__}"
            raise ValueError(f"state: {what}; allowed is what `state()` of this decoder returns")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"x: {x.dtype} on {x.device}; allowed is float32 on the CPU")
        if rows is None and counts is None:
            sequences = state.batch
        else:
            rows = list(range(state.batch)) if rows is None else [int(r) for r in rows]
            sequences = len(rows)
            if len(set(rows)) < sequences or any(not 0 <= r < state.batch for r in rows):
                raise ValueError(f"rows: {rows}; allowed are different rows from 0 to {state.batch - 1}")
        if counts is None:
            if x.ndim != 3 or x.shape[0] != sequences or x.shape[2] != self.d:
                raise ValueError(f"x: shape {tuple(x.shape)}; it must be {sequences} rows, n tokens, {self.d}")
            n = x.shape[1]
            counts = None if rows is None else [n] * sequences
        else:
            counts, n = [int(c) for c in counts], 0
            if len(counts) != sequences or any(c < 0 for c in counts):
                raise ValueError(f"counts: {counts}; allowed is a number of tokens for each of the {sequences} rows")
            if tuple(x.shape) != (sum(counts), self.d):
                raise ValueError(
                    f"x: shape {tuple(x.shape)}; with counts it must be all {sum(counts)} tokens behind one another, {self.d} wide"
                )
        run = STEP.pick(backend, x.device.type, x.dtype)[1]
        return run(self, x.detach().contiguous(), state, rows, counts, n)

    def _c_shape(self, state):
        return ctypes.byref(
            _Shape(
                len(self.layers), self.d, self.f, self.heads, self.kv_heads, self.head_dim, state.batch, state.length,
                self.eps, self.head_dim**-0.5, self.act == "silu", state.keys.dtype == torch.bfloat16,
            )
        )  # fmt: skip

    def _full(self, state, rows, counts, n):
        "Say which row has no room"
        rows = range(state.batch) if rows is None else rows
        for r, c in zip(rows, [n] * len(rows) if counts is None else counts, strict=True):
            held = int(state.lengths[r])
            if not 0 <= held <= state.length - c:
                raise ValueError(f"state: row {r} holds {held} tokens and has room for {state.length}; {c} more do not fit")


def rms_norm(x, weight, eps):  # `None` for a weight is no norm
    "`weight * x / sqrt(mean(x^2) + eps)` in float32; what x is divided by is in float64 until it is ready"
    if weight is None:
        return x
    mean = x.double().square().mean(-1, keepdim=True)
    return weight * (x * (1 / (mean + eps).sqrt()).float())


def rotate(x, cos, sin):
    "Turn feature i and feature i + head_dim / 2 of each head by the position's angle"
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(dec, state, layer, row, q, k, v):
    "One row's new tokens against all of its tokens; n (heads or kv_heads) head_dim"
    n, start = len(q), int(state.lengths[row])
    end = start + n
    cos, sin = dec._rotations[start:end, :, None].unbind(1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    state.put(layer, row, start, k, v)
    k, v = (t[:, None, :, : dec.head_dim].float() for t in state.of(layer, row))  # kv_heads 1 length' head_dim
    q = q.transpose(0, 1).unflatten(0, (dec.kv_heads, -1)) * dec.head_dim**-0.5  # kv_heads group n head_dim
    out = q.new_empty(n, dec.heads, dec.head_dim)
    for i, seen in enumerate(range(start + 1, end + 1)):  # no token meets a later one, not even with a weight of zero
        scores = q[:, :, i : i + 1] @ k[:, :, :seen].mT
        out[i] = (scores.softmax(-1) @ v[:, :, :seen]).flatten(0, 2)
    return out.flatten(1)


@torch.no_grad()
def reference(dec, x, state, rows, counts, n):
    "The definition of a decoder, in torch"
    dec._full(state, rows, counts, n)
    rows = list(range(state.batch)) if rows is None else rows
    counts = [n] * len(rows) if counts is None else counts
    shape, x = x.shape, x.reshape(-1, dec.d).clone()
    act = {"relu2": lambda g: g.relu().square(), "silu": F.silu}[dec.act]
    for i, l in enumerate(dec.layers):
        h = rms_norm(x, l.input_norm, dec.eps)
        qkv = (linear(h, p, backend="reference").unflatten(-1, (-1, dec.head_dim)).split(counts) for p in (l.q, l.k, l.v))
        rows_of = [_attend(dec, state, i, row, *one) for row, *one in zip(rows, *qkv, strict=True)]
        a = torch.cat([x.new_empty(0, dec.heads * dec.head_dim), *rows_of])
        x += linear(rms_norm(a, l.attn_sub_norm, dec.eps), l.o, backend="reference")
        h = rms_norm(x, l.post_norm, dec.eps)
        g, u = (linear(h, p, backend="reference") for p in (l.gate, l.up))
        x += linear(rms_norm(act(g) * u, l.ffn_sub_norm, dec.eps), l.down, backend="reference")
    for row, count in zip(rows, counts, strict=True):
        state.lengths[row] += count
    return x.view(shape)


_P, _L, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p


def _whole(numbers):
    return None if numbers is None else (ctypes.c_int64 * len(numbers))(*numbers)


def on_cpu(dec, x, state, rows, counts, n, path=None, threads=None):
    "As `reference`, in C++; `path` is one of `ternary.paths()`, None for the best"
    y = torch.empty_like(x)
    call = cpu.symbol("lmlab_decoder_step", _I, *[_P] * 10, _L, _L, _I, _S)
    sequences = state.batch if rows is None else len(rows)
    pointers = (t.data_ptr() for t in (dec._rotations, state.keys, state.values, state.lengths, x, y))
    threads, name = threads or torch.get_num_threads(), path and path.encode()
    failed = call(
        dec._c_layers, dec._c_shape(state), *pointers, _whole(rows), _whole(counts), sequences, n, threads, name
    )
    if failed == -3:
        dec._full(state, rows, counts, n)
    if failed == -1:
        raise ValueError(f"path: {path!r} does not run on this machine; allowed are {', '.join(paths())}")
    if failed:
        raise MemoryError(f"decoder: no memory for the activations of {x.numel() // dec.d} tokens of {dec.d}")
    return y


STEP = Operation("decoder", reference, on_cpu, dtypes=(torch.float32,))


def head_reference(x, weight):
    "The definition of `head`, in torch"
    return F.linear(x, weight.float())


def head_on_cpu(x, weight, threads=None):
    "As `head_reference`, in C++"
    x, weight, y = x.contiguous(), weight.contiguous(), x.new_empty(len(x), len(weight))
    call = cpu.symbol("lmlab_head", _I, _P, _L, _P, _L, _L, _I, _P, _I)
    half, threads = weight.dtype == torch.bfloat16, threads or torch.get_num_threads()
    if call(x.data_ptr(), len(x), weight.data_ptr(), *weight.shape, half, y.data_ptr(), threads):
        raise MemoryError(f"head: no memory for {len(x)} rows of {x.shape[1]}")
    return y


HEAD = Operation("head", head_reference, head_on_cpu, dtypes=(torch.float32,))


def head(
    x: Tensor,  # m d  float32
    weight: Tensor,  # vocab d  float32 or bfloat16
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # m vocab  float32
    "`x @ weight.T` for few rows, which is one read of the weight; bfloat16 is widened exactly, sums are in float32"
    if x.ndim != 2 or x.dtype != torch.float32:
        raise ValueError(f"x: {x.dtype} of shape {tuple(x.shape)}; allowed is float32 [m, d]")
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: {weight.dtype} of shape {tuple(weight.shape)}; allowed is float32 or bfloat16 [vocab, {x.shape[1]}]"
        )
    return HEAD.pick(backend, x.device.type, x.dtype)[1](x.detach(), weight.detach())


def _bitnet(layers, format="auto"):
    "Layers of the shape of a BitNet with 2 billion weights; all have the same weights, but each its own memory"
    d, heads, kv_heads, head_dim, f = 2560, 20, 5, 128, 6912
    shapes = {
        "q": (heads * head_dim, d), "k": (kv_heads * head_dim, d), "v": (kv_heads * head_dim, d),
        "o": (d, heads * head_dim), "gate": (f, d), "up": (f, d), "down": (d, f),
    }  # fmt: skip
    packed = {
        name: pack(torch.randint(-1, 2, shape, dtype=torch.int8), shape[1] ** -0.5, format)
        for name, shape in shapes.items()
    }
    norms = {name: torch.ones(f if name == "ffn_sub_norm" else d) for name in NORMS}
    made = [
        Layer(**norms, **{name: replace(p, codes=_placed(p.codes)) for name, p in packed.items()})
        for _ in range(layers)
    ]
    return Decoder(made, heads, kv_heads, head_dim, 5e5 ** -(torch.arange(head_dim // 2) * 2 / head_dim))


def _llama(dec):
    "The stock model of this shape in bfloat16"
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32, hidden_size=dec.d, intermediate_size=dec.f, num_hidden_layers=len(dec.layers),
        num_attention_heads=dec.heads, num_key_value_heads=dec.kv_heads, head_dim=dec.head_dim,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaModel(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    model.rotary_emb.inv_freq = dec.inv_freq.clone()
    return model


def _llama_step(model, batch, n, context):
    "A call that leaves its cache as it was"
    from transformers.cache_utils import DynamicCache

    c, x = model.config, torch.randn(batch, n, model.config.hidden_size).bfloat16()
    shape = batch, c.num_key_value_heads, context, c.head_dim

    def step():
        cache = DynamicCache()
        for layer, (k, v) in enumerate(held):
            cache.update(k, v, layer)
        with torch.no_grad():
            return model(inputs_embeds=x, past_key_values=cache).last_hidden_state

    held = [[torch.randn(shape).bfloat16() for _ in range(2)] for _ in range(c.num_hidden_layers)]
    return step


def _race(dec, model, batch, n, context, dtype, threads, rounds, budget):
    "The next `n` tokens of each row: the decoder, what it reads merely read, what it multiplies merely multiplied, and transformers"
    from lmlab.core.bench import paired

    state, x, lib = dec.state(batch, context + n, dtype), torch.randn(batch, n, dec.d), cpu.library()
    for t in (state.keys, state.values):
        t.normal_()
    weights = sum(getattr(l, name).nbytes for l in dec.layers for name in ("q", "k", "v", "o", "gate", "up", "down"))
    cached = 2 * len(dec.layers) * batch * context * dec.kv_heads * dec.head_dim * dtype.itemsize
    memory = _memory(weights + cached).fill_(1)
    products = batch * n * sum(p.out_features * p.in_features for l in dec.layers for p in (l.q, l.k, l.v, l.o, l.gate, l.up, l.down))  # fmt: skip

    def step():
        state.lengths.fill_(context)
        dec(x, state)

    fns = {"decoder": step, "plain read": lambda: cpu.plain_read(memory)}
    if once := lib.lmlab_peak(b"int8", 1, 1):
        fns["int8 peak"] = lambda: lib.lmlab_peak(b"int8", max(1, 2 * products // once // threads), threads)
    if model is not None:
        fns["transformers bfloat16"] = _llama_step(model, batch, n, context)
    timing = paired(fns, rounds=rounds, threads=threads, budget=budget)
    work = {"bytes": weights + cached, "flops": 2 * products}
    work["fraction of plain read"] = {"decoder": timing.ratio("plain read", "decoder")}
    if once:
        work["fraction of int8 peak"] = {"decoder": timing.ratio("int8 peak", "decoder")}
    if model is not None:
        work["times as fast as"] = {
            "transformers bfloat16": timing.ratio("transformers bfloat16", "decoder")
        }
    return timing, work


def bench(
    quick: bool = False,  # four layers, no transformers, fewer rounds
) -> dict:  # name of the case -> (`Timing`, what was read and multiplied, and the ratios that count)
    "Twelve layers of the shape of a BitNet with 2 billion weights: single tokens, a batch of them, and prompts"
    if cpu.missing():
        raise RuntimeError(f"bench: decoder kernels need the C++ library, but {cpu.missing()}")
    dec, out = _bitnet(4 if quick else 12), {}
    model = None if quick else _llama(dec)
    cases = [
        (1, 1, 64, torch.float32),
        (1, 1, 1024, torch.float32),
        (1, 1, 1024, torch.bfloat16),
        (8, 1, 64, torch.float32),
        (1, 64, 0, torch.float32),
        (1, 512, 0, torch.float32),
    ]
    for threads in sorted({1, torch.get_num_threads()}):
        for batch, n, context, dtype in cases[::4] if quick else cases:
            what = f"prompt of {n}" if n > 1 else f"next token of {batch}, context {context}"
            name = f"{what}, cache {str(dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}"
            out[name] = _race(dec, model, batch, n, context, dtype, threads, *((9, 1) if quick else (41, 6)))
    return out
