"""Sparse activations: keep the largest features of each token, and linear layers that read only the weights of the features that are kept.

    topk_sparsify(x, keep, structure="topk"|"n:m"|"block", group=None, square_relu=False, straight_through=True, backend="auto") -> Tensor
    w = store(weight, format, scale=None) -> SparseWeight        # format "float32", "bfloat16", "int8" or "ternary"
    linear(x, w, keep=None, bias=None, backend="auto") -> Tensor # keep: that many of each token's inputs; None: those that are not zero
    w.save(path); SparseWeight.load(path); w.unpack(); w.dense(dtype); w.to(device)

Selection is by index: of equal magnitudes the first ones stay, so that exactly `keep` do, and those are unchanged bit for bit. A NaN has no
place in the order of magnitudes: `topk_sparsify`, and `linear` with `keep`, refuse it with a ValueError. The C++ form meets it on the way;
on a GPU, where refusing would mean waiting for the device, Triton's form returns NaN for every feature of such a token instead.

Layers in int8 and ternary round each token to int8 by its largest magnitude as `lmlab.kernels.ternary` does, then keep the `keep` largest
integers; the product is exact, and every backend, instruction set and number of threads returns the same bits. Layers in float32 and
bfloat16 add in float32. In both a token's result does not depend on the tokens beside it. Gradients of `linear` pass straight through the
selection and the rounding: that of `x` is `grad @ dense`.
"""

import ctypes
import json
import math
from dataclasses import dataclass

import torch
from lmlab.kernels import Operation, cpu
from lmlab.kernels.ternary import InOneFile, _check_scale, _placed, quantize
from torch import Tensor

STRUCTURES = ("topk", "n:m", "block")
FORMATS = {"float32": 4, "bfloat16": 2, "int8": 1, "ternary": 0.25}  # name -> bytes a weight
DTYPES = (torch.float32, torch.bfloat16)
LONGEST = (
    2**17
)  # inputs; with more, a sum of products in int8 might leave int32 (sparse.cpp shifts sums of up to 128 * 127 a product)
TOGETHER = 8  # tokens up to which a float layer reads columns; more take torch's dense product
_CHUNK = 64  # bytes of a column that are worked on at a time


# ---- selection


def _scores(x, structure, group):
    "... groups members: what is compared with what"
    m = x.abs()
    if structure == "topk":
        return m.unsqueeze(-2)
    m = m.unflatten(-1, (-1, group))
    if structure == "n:m":
        return m
    score = m.double().mean(-1)  # exact, so the same in any order, where magnitudes are not 2^20 apart
    return (score if x.dtype == torch.float64 else score.float()).unsqueeze(-2)


def mask(
    x: Tensor,  # ... d
    keep: int,
    structure: str = "topk",
    group: int = None,
) -> Tensor:  # ... d  bool
    "Which features stay, by a stable sort: the definition"
    score = _scores(x, structure, group)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    m = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :keep], True).flatten(-2)
    return m.repeat_interleave(group, -1) if structure == "block" else m


def _refuse_nan(x):
    if x.isnan().any():
        raise ValueError(
            "x: holds NaN, which has no place in an order of magnitudes; finite values and infinities are allowed"
        )


def reference(x, source, keep, structure, group, square_relu):
    "What stays of `source`, or of `x` or `relu(x)**2` where there is none; zeros elsewhere"
    _refuse_nan(x)
    value = x.relu().square() if square_relu else x
    return torch.where(mask(value, keep, structure, group), value if source is None else source, 0)


_P, _L, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p


def _failed(code, path, x):
    if code == -1:
        raise ValueError(f"path: {path!r} does not run on this machine; allowed are {', '.join(paths())}")
    if code == -2:
        raise MemoryError(f"no memory to work on x of shape {tuple(x.shape)}")
    _refuse_nan(x)


def on_cpu(x, source, keep, structure, group, square_relu):
    "As `reference`, in C++"
    x = x.contiguous()
    source = None if source is None else source.to(x.dtype).contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    call = cpu.symbol("lmlab_sparse_topk", _I, _P, _P, _P, _L, _L, _I, _L, _L, _I, _I, _I)
    code = call(
        x.data_ptr(), None if source is None else source.data_ptr(), out.data_ptr(), math.prod(x.shape[:-1]), d,
        x.dtype == torch.bfloat16, keep, group or d, STRUCTURES.index(structure), square_relu, torch.get_num_threads(),
    )  # fmt: skip
    if code:
        _failed(code, None, x)
    return out


def on_triton(x, source, keep, structure, group, square_relu):
    "As `reference`, in Triton, but a token that holds a NaN becomes NaN"
    from lmlab.kernels.sparse_triton import sparsify

    return sparsify(x, source, keep, structure, group, square_relu)


TOPK = Operation("topk_sparsify", reference, on_cpu, on_triton, dtypes=DTYPES)


@torch.library.custom_op("lmlab::topk_sparsify", mutates_args=())
def _topk(
    x: Tensor,
    source: Tensor | None,
    keep: int,
    structure: str,
    group: int | None,
    square_relu: bool,
    straight_through: bool,
    backend: str,
) -> Tensor:
    return TOPK.pick(backend, x.device.type, x.dtype)[1](x, source, keep, structure, group, square_relu)


@_topk.register_fake
def _(x, source, keep, structure, group, square_relu, straight_through, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_topk(ctx, inputs, output):
    x, _, *ctx.how, ctx.straight_through, ctx.backend = inputs
    if ctx.how[-1] or not ctx.straight_through:
        ctx.save_for_backward(x)


def _topk_gradients(ctx, grad):
    if not ctx.straight_through:
        grad = _topk(ctx.saved_tensors[0], grad, *ctx.how, True, ctx.backend)
    elif not ctx.how[-1]:
        grad = grad.clone()  # an operation must not return its input
    if ctx.how[-1]:
        grad = grad * (2 * ctx.saved_tensors[0].relu())
    return grad, *[None] * 7


_topk.register_autograd(_topk_gradients, setup_context=_setup_topk)


def _check_keep(keep, most, of):
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= most:
        raise ValueError(f"keep: {keep!r}; allowed are whole numbers from 1 to the {most} {of}")


def topk_sparsify(
    x: Tensor,  # ... d  any float dtype; C++ and Triton for float32 and bfloat16
    keep: int,  # features of each token; with "n:m" features of each group; with "block" whole groups
    structure: str = "topk",  # one of `STRUCTURES`
    group: int = None,  # neighbouring features in a group of "n:m" or "block"; must divide d
    square_relu: bool = False,  # `relu(x)**2` first, and the selection on that
    straight_through: bool = True,  # the gradient reaches all of x; False: what is kept only
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # ... d  dtype of `x`
    "The features of largest magnitude of each token, zeros elsewhere; blocks go by their mean magnitude"
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim or not x.shape[-1]:
        what = f"{x.dtype} tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"x: a {what}; allowed is a floating point tensor [..., d] with at least one feature"
        )
    if structure not in STRUCTURES:
        raise ValueError(f"structure: {structure!r}; allowed are {', '.join(map(repr, STRUCTURES))}")
    d = x.shape[-1]
    if structure == "topk":
        if group is not None:
            raise ValueError(f"group: {group!r}; only 'n:m' and 'block' have groups")
        _check_keep(keep, d, "features of x")
    else:
        if not isinstance(group, int) or isinstance(group, bool) or group < 1 or d % group:
            raise ValueError(
                f"group: {group!r}; allowed is a whole number that divides the {d} features of x"
            )
        _check_keep(keep, *((group, "features of a group") if structure == "n:m" else (d // group, "blocks")))
    return _topk(x, None, keep, structure, group, square_relu, straight_through, backend)


# ---- weights


@dataclass(frozen=True, eq=False)
class SparseWeight(InOneFile):
    "A weight matrix stored by input, so that the weights of one input are one run of memory"

    columns: Tensor  # in bytes  uint8; rows in the order that sparse.h takes apart, whole chunks of 64 bytes
    scale: Tensor | None  # 1 or out  float32, None for float formats
    out_features: int
    in_features: int
    format: str  # one of `FORMATS`

    @property
    def shape(self):
        return self.out_features, self.in_features

    @property
    def device(self):
        return self.columns.device

    @property
    def nbytes(self):
        return self.columns.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def unpack(self) -> Tensor:  # out in  what `store` was given
        "The weights without their scale"
        return _unpack(self.columns, *self.shape, self.format).mT.contiguous()

    def dense(
        self,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # out in
        "The weights times their scale"
        w = self.unpack()
        return (w if self.scale is None else w * self.scale[:, None]).to(dtype)

    def to(
        self,
        device,  # a copy unless it is there already
    ):
        "The same matrix on another device"
        if self.device == torch.device(device):
            return self
        scale = None if self.scale is None else self.scale.to(device)
        return SparseWeight(_placed(self.columns.to(device)), scale, *self.shape, self.format)

    def tensors(
        self,
        prefix: str = "",  # e.g. "layers.0.mlp.up."
    ) -> dict:  # name -> Tensor, fit for safetensors
        "What a checkpoint holds of this matrix, beside `metadata`"
        return {f"{prefix}columns": self.columns} | (
            {} if self.scale is None else {f"{prefix}scale": self.scale}
        )

    def metadata(
        self,
        prefix: str = "",
    ) -> dict:  # str -> str, as in the header of a safetensors file
        "What `from_tensors` needs to know about `tensors`"
        about = {"format": self.format, "out_features": self.out_features, "in_features": self.in_features}
        return {f"{prefix}sparse": json.dumps(about)}

    @classmethod
    def from_tensors(
        cls,
        tensors: dict,  # name -> Tensor, more than those of this matrix may be in it
        metadata: dict,  # str -> str
        prefix: str = "",
    ):
        "The matrix back from `tensors` and `metadata`; weights that `store` would refuse are refused"
        if prefix + "sparse" not in metadata:
            raise ValueError(
                f"metadata: there is no {prefix + 'sparse'!r}; this is no matrix stored by input"
            )
        try:
            about = json.loads(metadata[prefix + "sparse"])
            format, rows, inputs = about["format"], int(about["out_features"]), int(about["in_features"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"metadata: {metadata[prefix + 'sparse']!r} is not what `SparseWeight.metadata` writes"
            ) from e
        _check_format(format)
        for key in ("columns", "scale")[: 1 + (format in ("int8", "ternary"))]:
            if prefix + key not in tensors:
                raise ValueError(f"tensors: there is no {prefix + key!r}; it belongs to a matrix in {format}")
        columns, want = tensors[prefix + "columns"], (inputs, _stride(rows, format))
        if columns.dtype != torch.uint8 or tuple(columns.shape) != want:
            raise ValueError(
                f"tensors: {prefix}columns is {columns.dtype} {tuple(columns.shape)}; uint8 {want} belongs to {rows} x {inputs} in {format}"
            )
        columns, scale = columns.contiguous(), None
        if format in ("int8", "ternary"):
            scale = _check_scale(tensors[prefix + "scale"], rows).to(columns.device)
        if format == "ternary" and bool((columns & columns >> 1 & 0x55).any()):
            raise ValueError(f"tensors: {prefix}columns holds bytes that stand for no ternary weights")
        if scale is None and not columns.view(_TYPES[format]).isfinite().all():
            raise ValueError(f"tensors: {prefix}columns holds NaN or infinity; every weight must be finite")
        return cls(_placed(columns), scale, rows, inputs, format)


_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _check_format(format):
    if format not in FORMATS:
        raise ValueError(f"format: {format!r}; allowed are {', '.join(map(repr, FORMATS))}")


def _stride(rows, format):
    "Bytes from one column to the next"
    chunks = math.ceil(rows * FORMATS[format] / _CHUNK)
    # columns 2048 bytes apart, or a multiple of that, would share few places in the nearest cache
    return _CHUNK * (chunks + (chunks > 0 and chunks % 32 == 0))


def _pack(w, format):
    "in bytes  uint8, of w [out, in]"
    rows, inputs = w.shape
    stride = _stride(rows, format)
    wide = int(stride / FORMATS[format])
    c = w.new_zeros(inputs, wide)
    c[:, :rows] = w.mT
    if format in _TYPES:
        return c.view(torch.uint8)
    # a row of a chunk is (plane, quarter, lane, element), a byte (lane, quarter, element): see `interleave` in sparse.cpp
    planes = 4 if format == "ternary" else 1
    c = (c.to(torch.int16) + (1 if planes == 4 else 128)).to(torch.uint8)
    c = c.view(inputs, stride // _CHUNK, planes, 4, 4, 4).transpose(-2, -3)
    out = torch.zeros_like(c[:, :, 0])
    for p in range(planes):
        out |= c[:, :, p] << 2 * p
    return out.reshape(inputs, stride)


def _unpack(columns, rows, inputs, format):
    "in out"
    if format in _TYPES:
        return columns.view(_TYPES[format])[:, :rows]
    planes = 4 if format == "ternary" else 1
    c = columns.view(inputs, columns.shape[1] // _CHUNK, 1, 4, 4, 4).transpose(-2, -3)
    if planes == 4:
        c = torch.cat([c >> 2 * p & 3 for p in range(4)], 2)
    c = c.reshape(inputs, columns.shape[1] * planes)[:, :rows]
    return (c.to(torch.int16) - (1 if planes == 4 else 128)).to(torch.int8)


def store(
    w: Tensor,  # out in  float for "float32" and "bfloat16", int8 for "int8", int8 of -1, 0 and 1 for "ternary"
    format: str,  # one of `FORMATS`
    scale=None,  # of "int8" and "ternary": a number, or a tensor of one for each row
) -> SparseWeight:  # on the device of `w`
    "Weights stored so that one input's are read together"
    _check_format(format)
    if (
        not isinstance(w, Tensor)
        or w.ndim != 2
        or (w.dtype != torch.int8 if format not in _TYPES else not w.is_floating_point())
    ):
        what = f"{w.dtype} tensor of shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        want = "a float tensor [out, in]" if format in _TYPES else "an int8 tensor [out, in]"
        raise ValueError(f"w: a {what}; allowed for {format} is {want}")
    w = w.detach()
    if format in _TYPES:
        if scale is not None:
            raise ValueError(f"scale: {scale!r}; {format} weights have none")
        w = w.to(_TYPES[format])
        if not w.isfinite().all():
            raise ValueError(
                "w: holds NaN or infinity; every weight must be finite, or leaving some out would change NaN into a number"
            )
    else:
        if scale is None:
            raise ValueError(
                f"scale: None; {format} weights need a number, or one for each of the {len(w)} rows"
            )
        if w.shape[1] > LONGEST:
            raise ValueError(
                f"w: {w.shape[1]} inputs; at most {LONGEST} are allowed, or sums might not fit int32"
            )
        if format == "ternary" and (n := int(((w < -1) | (w > 1)).sum())):
            raise ValueError(f"w: {n} of {w.numel()} values are outside -1, 0, 1")
        scale = _check_scale(scale, len(w)).to(w.device)
    return SparseWeight(_placed(_pack(w, format)), scale, *w.shape, format)


# ---- layers


def linear_reference(x, columns, scale, bias, rows, inputs, format, keep):
    "The definition of `linear`, in torch: products in float64 of the masked activations"
    if keep is not None:
        _refuse_nan(x)
    w = _unpack(columns, rows, inputs, format).double()
    q, ratio = quantize(x) if scale is not None else (x, None)
    if keep is not None:
        q = torch.where(mask(q, keep), q, 0)
    y = q.double() @ w
    if scale is not None:
        y = y.float() * ratio * scale
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


class _Layer(ctypes.Structure):
    "`Layer` in sparse.cpp"

    _fields_ = [(name, ctypes.c_void_p) for name in ("columns", "scale", "bias", "y")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "stride")]
    _fields_ += [(name, ctypes.c_int32) for name in ("scales", "format")]


def paths() -> list:  # best first; empty without the C++ library
    "The instruction sets for which this machine has a walk over columns in int8"
    return [] if cpu.missing() else cpu.symbol("lmlab_sparse_paths", _S)().decode().split()


def prepared(
    x: Tensor,  # ... in   contiguous
    columns: Tensor,
    scale: Tensor,  # or None
    bias: Tensor,  # out  float32, or None
    y: Tensor,  # ... out  is written
    format: str,
    keep: int = None,
    path: str = None,  # one of `paths()`; default: the best
    threads: int = None,  # default: torch's
):  # function without arguments; not 0 when it failed
    "The C++ call with everything looked up"
    layer = _Layer(*(None if t is None else t.data_ptr() for t in (columns, scale, bias, y)))
    layer.rows, layer.stride = y.shape[-1], columns.shape[-1]
    layer.scales, layer.format = scale is not None and scale.numel() > 1, list(FORMATS).index(format)
    args = x.data_ptr(), math.prod(x.shape[:-1]), x.shape[-1], x.dtype == torch.bfloat16, keep or 0
    more = ctypes.byref(layer), threads or torch.get_num_threads(), path and path.encode()
    call = cpu.symbol("lmlab_sparse_linear", _I, _P, _L, _L, _I, _L, _P, _I, _S)
    return lambda kept=(x, columns, scale, bias, y): call(*args, *more)


def linear_on_cpu(x, columns, scale, bias, rows, inputs, format, keep, path=None):
    "As `linear_reference`, in C++; `path` is one of `paths()`, None for the best"
    if scale is None and math.prod(x.shape[:-1]) > TOGETHER:
        return _dense(x, columns, bias, rows, inputs, format, keep)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], rows)
    bias = None if bias is None else bias.float().contiguous()
    scale = None if scale is None else scale.contiguous()
    code = prepared(x, columns.contiguous(), scale, bias, y, format, keep, path)()
    if code:
        _failed(code, path, x)
    return y


def _dense(x, columns, bias, rows, inputs, format, keep):
    "Many tokens keep every column between them, so none is left out"
    if keep is not None:
        x = on_cpu(x, None, keep, "topk", None, False)
    w = _unpack(columns, rows, inputs, format)
    y = (x @ w if x.dtype == w.dtype else x.float() @ w.float()).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


LINEAR = Operation("sparse_linear", linear_reference, linear_on_cpu, dtypes=DTYPES)


@torch.library.custom_op("lmlab::sparse_linear", mutates_args=())
def _linear(
    x: Tensor,
    columns: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    inputs: int,
    format: str,
    keep: int | None,
    backend: str,
) -> Tensor:
    return LINEAR.pick(backend, x.device.type, x.dtype)[1](
        x, columns, scale, bias, rows, inputs, format, keep
    )


@_linear.register_fake
def _(x, columns, scale, bias, rows, inputs, format, keep, backend):
    return x.new_empty(*x.shape[:-1], rows)


def _setup(ctx, inputs, output):
    x, columns, scale, bias, *ctx.how, _, _ = inputs
    ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(columns, scale)


def _gradients(ctx, grad):
    columns, scale = ctx.saved_tensors
    dx = db = None
    wide = torch.promote_types(grad.dtype, torch.float32)
    if ctx.needs_input_grad[0]:
        g = grad.to(wide) if scale is None else grad.to(wide) * scale
        dx = (g @ _unpack(columns, *ctx.how).to(wide).mT).to(ctx.dtype)
    if ctx.needs_input_grad[3]:
        db = grad.to(wide).sum_to_size(ctx.how[0]).to(ctx.bias)
    return dx, None, None, db, *[None] * 5


_linear.register_autograd(_gradients, setup_context=_setup)


def linear(
    x: Tensor,  # ... in  float32 or bfloat16; float64 by the reference, with float weights
    weight: SparseWeight,
    keep: int = None,  # inputs of each token that are used, the largest; None: all that are not zero
    bias: Tensor = None,  # out
    backend: str = "auto",  # see `lmlab.kernels`
) -> Tensor:  # ... out  dtype of `x`
    "`mask(x) * x @ w.T + bias`, reading the weights of the inputs that count; int8 and ternary layers round `x` to int8 first"
    if not isinstance(weight, SparseWeight):
        raise TypeError(f"weight: {type(weight).__name__}; allowed is what `store` returns")
    allowed = DTYPES + ((torch.float64,) if weight.scale is None else ())
    if x.dtype not in allowed:
        raise ValueError(f"x: dtype {x.dtype}; allowed are {', '.join(str(d)[6:] for d in allowed)}")
    if not x.ndim or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; the last axis must be the {weight.in_features} inputs of `weight`"
        )
    if x.device != weight.device:
        raise ValueError(f"x: on {x.device}, and weight on {weight.device}; both must be on one device")
    if keep is not None:
        _check_keep(keep, weight.in_features, "inputs of `weight`")
    if bias is not None:
        if tuple(bias.shape) != (weight.out_features,) or not bias.is_floating_point():
            raise ValueError(
                f"bias: {bias.dtype} of shape {tuple(bias.shape)}; allowed are {weight.out_features} floats"
            )
        if bias.device != x.device:
            raise ValueError(f"bias: on {bias.device}, and x on {x.device}; both must be on one device")
    return _linear(x, weight.columns, weight.scale, bias, *weight.shape, weight.format, keep, backend)


ACTIVE = (50, 100, 60, 40, 20)  # per cent; the first is what the ratios of a case are against


def _race_selection(d, dtype, rounds, budget):
    "One token's selection against torch's own, which returns what is largest but does not put it back in place"
    from lmlab.core.bench import paired

    x, keep = torch.randn(1, d).to(dtype), d // 2
    fns = {
        "kernel": lambda: on_cpu(x, None, keep, "topk", None, False),
        "as an operation": lambda: topk_sparsify(x, keep, backend="cpu"),
        "torch.topk": lambda: torch.topk(x.abs(), keep, sorted=False),
        "plain read": lambda: cpu.plain_read(x),
    }
    timing = paired(fns, rounds=rounds, threads=1, budget=budget)
    work = {"bytes": 2 * x.nbytes, "flops": 0, "speed over torch.topk": timing.ratio("torch.topk", "kernel")}
    return timing, work


def _race_layer(rows, inputs, format, threads, rounds, budget):
    "One layer and one token, weights from memory: a share of the inputs against all of them, and against other dense layers"
    from lmlab.kernels import ternary

    from lmlab.core.bench import cold, paired

    low, high = (-1, 2) if format == "ternary" else (-127, 128)
    w = torch.randint(low, high, (rows, inputs), dtype=torch.int8)
    scale = None if format in _TYPES else torch.tensor([0.02])
    w = w if scale is not None else w.to(_TYPES[format])
    stored, x, y, fns = store(w, format, scale), torch.randn(1, inputs), torch.empty(1, rows), {}

    def make():
        columns = _placed(stored.columns)
        calls = (
            prepared(x, columns, scale, None, y, format, inputs * a // 100, threads=threads) for a in ACTIVE
        )
        return columns, dict(zip(ACTIVE, calls, strict=True))

    following = cold(make)
    for active in ACTIVE:
        fns[f"{active} % active"] = lambda active=active: following()[1][active]()
    fns["50 % active, as an operation"] = lambda: _linear(
        x, following()[0], scale, None, rows, inputs, format, inputs // 2, "cpu"
    )
    fns["plain read"] = lambda: cpu.plain_read(following()[0])
    if format == "ternary":
        packed = ternary.pack(w, scale, "2bit")

        def make_packed():
            codes = _placed(packed.codes)
            return codes, ternary.prepared(x, [(codes, scale, None, y, "2bit")], threads=threads)

        others = cold(make_packed)
        peer, fns["packed in 2 bits, all inputs"] = "packed in 2 bits, all inputs", lambda: others()[1]()
    else:
        others, peer = cold(w.clone), f"torch {format}"
        q = quantize(x)[0].to(torch.int8) if format == "int8" else x.to(w.dtype)
        dense = (lambda: torch._int_mm(q, others().mT)) if format == "int8" else (lambda: q @ others().mT)
        fns[peer] = dense
    timing = paired(fns, rounds=rounds, threads=threads, budget=budget)
    column = rows * FORMATS[format]
    work = {"bytes": int(column * (inputs // 2)), "flops": 2 * rows * (inputs // 2)}
    work["bytes of weights"] = {f"{a} %": int(column * (inputs * a // 100)) for a in ACTIVE}
    work["speed over all inputs"] = {f"{a} %": timing.ratio("100 % active", f"{a} % active") for a in ACTIVE}
    work["prediction"] = {f"{a} %": 100 / a for a in ACTIVE}
    work[f"speed over {peer}"] = {f"{a} %": timing.ratio(peer, f"{a} % active") for a in ACTIVE}
    return timing, work


def bench(
    quick: bool = False,  # one shape, fewer rounds
) -> dict:  # name of the case -> (`Timing`, what was moved and computed, and the speed over dense layers)
    "Selection from the cache; layers of a Llama with 7 billion weights and of a BitNet with 2, weights from memory"
    if cpu.missing():
        raise RuntimeError(f"bench: sparse kernels need the C++ library, but {cpu.missing()}")
    out = {}
    for d in (4096,) if quick else (1024, 4096, 11008, 16384):
        for dtype in DTYPES:
            name = f"{d} of which half stay, {str(dtype).removeprefix('torch.')}, 1 thread"
            out[name] = _race_selection(d, dtype, *((15, 0.3) if quick else (101, 1)))
    shapes = [(2560, 6912)] if quick else [(4096, 4096), (11008, 4096), (6912, 2560), (2560, 6912)]
    for rows, inputs in shapes:
        for format in FORMATS:
            for threads in sorted({1, torch.get_num_threads()}):
                name = f"{rows} x {inputs} {format}, {threads} thread{'s' * (threads > 1)}"
                out[name] = _race_layer(rows, inputs, format, threads, *((9, 0.5) if quick else (51, 1.5)))
    return out
