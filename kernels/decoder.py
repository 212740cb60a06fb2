"""Transformer layers with ternary linear layers, all of them in one call: what a language model does between its embedding and its last norm.

    dec = Decoder([Layer(input_norm, q, k, v, attn_sub_norm, o, post_norm, gate, up, ffn_sub_norm, down), ...],
                  heads=20, kv_heads=5, head_dim=128, inv_freq=f, act="relu2")
    state = dec.state(batch=3, length=4096)         # keys and values of all layers
    y = dec(x, state)                               # x: 3 n d, the next n tokens of every row
    y = dec(x, state, rows=[2, 0], counts=[7, 4])   # x: 11 d, the next 7 tokens of row 2, then the next 4 of row 0
    logits = head(norm(y), weight)

A layer is `x += o(sub_norm(attention(q, k, v of norm(x))))`, then `x += down(sub_norm(act(gate(h)) * up(h)))` with `h = norm(x)`: a BitNet, or
a Llama where the sub-norms are `None`. Linear layers are those of `lmlab.kernels.ternary`, with the same bits. Everything else is float32,
but for the mean square of a norm, whose sum is in float64, so that its order does not count.

What a token becomes depends on the tokens of its row alone, bit for bit in C++: not on the batch, the cut of a prompt into calls, the
number of threads, the instruction set. There are no gradients; for these take `ternary.linear` and torch's attention.
"""

import ctypes
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from lmlab.kernels import Operation, cpu
from lmlab.kernels.ternary import PackedTernary, _Matrix, _memory, linear, paths
from torch import Tensor

ACTS = ("relu2", "silu")
DTYPES = (torch.float32, torch.bfloat16)  # of keys and values, and of the weight of a head
KEYS = 16  # that stand side by side in a block: one vector holds the same feature of all of them
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
    keys: Tensor  # layers batch kv_heads blocks head_dim KEYS; keys are rotated already
    values: Tensor  # layers batch kv_heads length' head_dim'; both filled up to a multiple of KEYS
    lengths: Tensor  # batch  int64; lower one to forget the last tokens of its row, all of them at 0
    length: int  # most tokens a row has room for

    @property
    def batch(self):
        return len(self.lengths)

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes


class _Layer(ctypes.Structure):
    "`Layer` in decoder.cpp"

    _fields_ = [(name, ctypes.c_void_p) for name in NORMS]
    _fields_ += [(name, _Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")]


class _Shape(ctypes.Structure):
    "`Shape` in decoder.cpp"

    _fields_ = [
        (name, ctypes.c_int64) for name in ("layers", "d", "f", "heads", "kv_heads", "head_dim", "batch", "length")
    ]
    _fields_ += [("eps", ctypes.c_float), ("scale", ctypes.c_float), ("silu", ctypes.c_int32), ("half", ctypes.c_int32)]


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
        wide = -(-self.head_dim // KEYS) * KEYS

        def empty(*shape):
            return _memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

        keys, values = empty(*lead, blocks, self.head_dim, KEYS), empty(*lead, blocks * KEYS, wide)
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
        for r, c in zip(rows or range(state.batch), counts or [n] * state.batch, strict=True):
            held = int(state.lengths[r])
            if not 0 <= held <= state.length - c:
                raise ValueError(f"state: row {r} holds {held} tokens and has room for {state.length}; {c} more do not fit")


def rms_norm(x, weight, eps):  # `None` for a weight is no norm
    "`weight * x / sqrt(mean(x^2) + eps)` in float32, the mean in float64"
    if weight is None:
        return x
    mean = x.double().square().mean(-1, keepdim=True).float()
    return weight * (x * (1 / (mean + eps).sqrt()))


def rotate(x, cos, sin):
    "Turn feature i and feature i + head_dim / 2 of each head by the position's angle"
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attend(dec, state, layer, row, q, k, v):
    "One row's new tokens against all of its tokens; n (heads or kv_heads) head_dim"
    n, start = len(q), int(state.lengths[row])
    end = start + n
    at = torch.arange(start, end)
    cos, sin = dec._rotations[start:end, :, None].unbind(1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = state.keys[layer, row], state.values[layer, row]
    keys[:, at // KEYS, :, at % KEYS] = k.to(keys.dtype)
    values[:, start:end, : dec.head_dim] = v.transpose(0, 1).to(values.dtype)
    k = keys.transpose(-1, -2).flatten(1, 2)[:, :end].float()
    v = values[:, :end, : dec.head_dim].float()
    q = q.transpose(0, 1).unflatten(0, (dec.kv_heads, -1))  # kv_heads group n head_dim
    scores = q @ k[:, None].mT * dec.head_dim**-0.5
    scores = scores.masked_fill(torch.arange(end) > at[:, None], -torch.inf)
    return (scores.softmax(-1) @ v[:, None]).flatten(0, 1).transpose(0, 1).flatten(1)


@torch.no_grad()
def reference(dec, x, state, rows, counts, n):
    "The definition of a decoder, in torch"
    dec._full(state, rows, counts, n)
    rows, counts = rows or list(range(state.batch)), counts or [n] * state.batch
    shape, x = x.shape, x.reshape(-1, dec.d).clone()
    act = {"relu2": lambda g: g.relu().square(), "silu": F.silu}[dec.act]
    for i, l in enumerate(dec.layers):
        h = rms_norm(x, l.input_norm, dec.eps)
        qkv = (linear(h, p, backend="reference").unflatten(-1, (-1, dec.head_dim)).split(counts) for p in (l.q, l.k, l.v))
        a = torch.cat([_attend(dec, state, i, row, *one) for row, *one in zip(rows, *qkv, strict=True)])
        x += linear(rms_norm(a, l.attn_sub_norm, dec.eps), l.o, backend="reference")
        h = rms_norm(x, l.post_norm, dec.eps)
        g, u = (linear(h, p, backend="reference") for p in (l.gate, l.up))
        x += linear(rms_norm(act(g) * u, l.ffn_sub_norm, dec.eps), l.down, backend="reference")
    state.lengths[rows] += torch.tensor(counts)
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
