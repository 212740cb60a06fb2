"""Linear layers whose weights are -1, 0 or 1 times a scale, with activations in int8: four or five weights a byte, exact integer sums.

    p = pack(w, scale)            # w: int8 [out, in] of -1, 0, 1
    y = linear(x, p, bias)        # x: [..., in], float32 or bfloat16
    p.save("w.safetensors"); p = PackedTernary.load("w.safetensors"); w == p.unpack()

Each token of `x` is rounded to int8 by its largest magnitude, `q = round(x * 127 / max|x|)`, half to even; the layer is
`(q @ w.T) * (max|x| / 127) * scale + bias`, the product in int32 and the rest in float32. Every backend, instruction set and number of
threads returns the same bits. A token that holds a NaN or an infinity becomes NaN in all its outputs, and changes no other token.
The gradient passes straight through the rounding: that of `x` is `grad @ (scale * w)`. With `activations="bf16"` tokens are only rounded to
bfloat16, for weights without the activations they were trained with; sums are then in float32.
"""

import ctypes
import json
import math
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lmlab.kernels import Operation, cpu
from torch import Tensor

FORMATS = {"2bit": 4, "1.6bit": 5}  # name -> weights a byte
DTYPES = (torch.float32, torch.bfloat16)
ROWS, LANE = 32, 4  # rows of a tile, neighbouring inputs of a row in a step
LONGEST = 2**18  # inputs; with more, a sum might leave int32 (ternary.cpp says why)
REGION = 2**26  # bytes of memory that packed matrices share; it is given back when the last of them is gone
# bytes of weights that a core keeps close: more come from memory, where fewer bytes count more than fewer operations
CACHE = 2**20
_DIGITS = {"2bit": (1, 4, 16, 64), "1.6bit": (1, 3, 9, 27, 81)}  # what each code counts in its byte


class InOneFile:
    "Saves what `tensors` and `metadata` say as one safetensors file, and loads it through `from_tensors`"

    def save(
        self,
        path,  # file, replaced in one step
    ):
        "Write a safetensors file"
        from safetensors.torch import save_file

        part = Path(f"{path}.{os.getpid()}.part")
        try:
            save_file(self.tensors(), part, self.metadata())
            with open(part, "rb") as f:
                os.fsync(f.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        path,  # file that `save` wrote
        device: str = "cpu",
    ):
        "Read a safetensors file"
        from safetensors import safe_open

        with safe_open(path, "pt", device=str(device)) as f:
            return cls.from_tensors({k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {})  # noqa: SIM118


@dataclass(frozen=True, eq=False)
class PackedTernary(InOneFile):
    "A ternary weight matrix in 2 or 1.6 bits a weight, and its scale"

    codes: Tensor  # tiles steps 128  uint8; byte 4 row + j of step s holds weights + 1 of inputs 4 (n s + p) + j, p = 0..n-1
    scale: Tensor  # 1 or out         float32
    out_features: int
    in_features: int
    format: str  # one of `FORMATS`

    @property
    def shape(self):
        return self.out_features, self.in_features

    @property
    def device(self):
        return self.codes.device

    @property
    def nbytes(self):
        return self.codes.nbytes + self.scale.nbytes

    def unpack(self) -> Tensor:  # out in  int8, what `pack` was given
        "The weights without their scale"
        return _unpack(self.codes, *self.shape, self.format)

    def dense(
        self,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # out in
        "The weights times their scale"
        return (self.unpack() * self.scale[:, None]).to(dtype)

    def to(
        self,
        device,  # a copy unless it is there already
    ):
        "The same matrix on another device"
        if self.device == torch.device(device):
            return self
        return PackedTernary(_placed(self.codes.to(device)), self.scale.to(device), *self.shape, self.format)

    def tensors(
        self,
        prefix: str = "",  # e.g. "layers.0.mlp.up."
    ) -> dict:  # name -> Tensor, fit for safetensors
        "What a checkpoint holds of this matrix, beside `metadata`"
        return {f"{prefix}codes": self.codes, f"{prefix}scale": self.scale}

    def metadata(
        self,
        prefix: str = "",
    ) -> dict:  # str -> str, as in the header of a safetensors file
        "What `from_tensors` needs to know about `tensors`"
        about = {"format": self.format, "out_features": self.out_features, "in_features": self.in_features}
        return {f"{prefix}ternary": json.dumps(about)}

    @classmethod
    def from_tensors(
        cls,
        tensors: dict,  # name -> Tensor, more than those of this matrix may be in it
        metadata: dict,  # str -> str
        prefix: str = "",
    ):
        "The matrix back from `tensors` and `metadata`; codes that no packing writes are refused"
        for name, source, key in (
            ("metadata", metadata, "ternary"),
            ("tensors", tensors, "codes"),
            ("tensors", tensors, "scale"),
        ):
            if prefix + key not in source:
                raise ValueError(f"{name}: there is no {prefix + key!r}; this is no packed ternary matrix")
        try:
            about = json.loads(metadata[prefix + "ternary"])
            format, rows, inputs = about["format"], int(about["out_features"]), int(about["in_features"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(
                f"metadata: {metadata[prefix + 'ternary']!r} is not what `PackedTernary.metadata` writes"
            ) from e
        _check_format(format, FORMATS)
        codes, scale = tensors[prefix + "codes"], tensors[prefix + "scale"]
        want = _packed_shape(rows, inputs, format)
        if codes.dtype != torch.uint8 or tuple(codes.shape) != want:
            raise ValueError(
                f"tensors: {prefix}codes is {codes.dtype} {tuple(codes.shape)}; uint8 {want} belongs to {rows} x {inputs} in {format}"
            )
        if _impossible(codes, format):
            raise ValueError(
                f"tensors: {prefix}codes holds bytes that stand for no ternary weights in {format}"
            )
        return cls(
            _placed(codes.contiguous()), _check_scale(scale, rows).to(codes.device), rows, inputs, format
        )


def _check_format(format, allowed):
    if format not in allowed:
        raise ValueError(f"format: {format!r}; allowed are {', '.join(map(repr, allowed))}")


def _check_scale(scale, rows):
    "float32 [1] or [out]"
    try:
        s = torch.as_tensor(scale).detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"scale: {scale!r}; allowed are a number or a tensor of 1 or {rows} numbers") from e
    if tuple(s.shape) not in {(), (1,), (rows,), (rows, 1)}:
        raise ValueError(
            f"scale: shape {tuple(s.shape)}; allowed are a number, or one for each of the {rows} rows"
        )
    if not s.isfinite().all():
        raise ValueError("scale: holds NaN or infinity; every scale must be a finite float32")
    return s.reshape(-1).contiguous()


def _packed_shape(rows, inputs, format):
    return -(-rows // ROWS), -(-inputs // (LANE * FORMATS[format])), ROWS * LANE


def _impossible(codes, format):
    if not codes.numel():
        return False
    return bool(codes.max() >= 3**5) if format == "1.6bit" else bool((codes & codes >> 1 & 0x55).any())


_lock, _region = (
    threading.Lock(),
    [None, 0, 0],
)  # memory in large pages, how much of it is handed out, how much there is


def _memory(size):
    "Bytes in large pages where the system has them, zero: with small ones the address cache, not the memory, sets the speed of a long read"
    if size < 2**16 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    with _lock:
        if _region[1] + size > _region[2]:
            # matrices share regions, since a page of its own for each would waste half of it
            whole = max(REGION, size)
            memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without large pages
                pass
            _region[:] = memory, 0, whole
        memory, offset = _region[:2]
        _region[1] += -(-size // 64) * 64
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)


def _placed(codes):
    "The codes where they are read fast"
    if (
        codes.device.type != "cpu"
        or not codes.numel()
        or (codes.nbytes < 2**16 and codes.data_ptr() % 64 == 0)
    ):
        return codes
    return _memory(codes.nbytes).view(codes.shape).copy_(codes)


def _unpack(codes, rows, inputs, format):
    per, (tiles, steps, _) = FORMATS[format], codes.shape
    digits = torch.tensor(_DIGITS[format], dtype=torch.uint8, device=codes.device)
    c = codes[..., None] // digits % (4 if format == "2bit" else 3)
    c = c.view(tiles, steps, ROWS, LANE, per).permute(0, 2, 1, 4, 3).reshape(tiles * ROWS, steps * LANE * per)
    return c[:rows, :inputs].to(torch.int8) - 1


def pack(
    w: Tensor,  # out in  int8, of -1, 0 and 1
    scale,  # a number, or a tensor of one for each row
    format: str = "auto",  # "2bit", "1.6bit"; "auto": the smaller one where the weights come from memory and this machine unpacks it fast enough
) -> PackedTernary:  # on the device of `w`
    "Ternary weights, packed; `unpack` gives them back exactly"
    if not isinstance(w, Tensor) or w.ndim != 2 or w.dtype != torch.int8:
        what = f"{w.dtype} tensor of shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(f"w: a {what}; allowed is an int8 tensor [out, in]")
    if w.shape[1] > LONGEST:
        raise ValueError(
            f"w: {w.shape[1]} inputs; at most {LONGEST} are allowed, or sums might not fit int32"
        )
    bad = (w < -1) | (w > 1)
    if n := int(bad.sum()):
        at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"w: {n} of {w.numel()} values are outside -1, 0, 1, the first is {w[tuple(at)].item()} at {at}"
        )
    _check_format(format, ("auto", *FORMATS))
    scale = _check_scale(scale, w.shape[0]).to(w.device)
    if format == "auto":
        format = (
            "1.6bit"
            if w.device.type == "cpu" and w.numel() // 4 > CACHE and "avx512vbmi" in paths()
            else "2bit"
        )
    (rows, inputs), per = w.shape, FORMATS[format]
    tiles, steps, _ = shape = _packed_shape(rows, inputs, format)
    c = F.pad(w + 1, (0, steps * LANE * per - inputs, 0, tiles * ROWS - rows), value=1).view(torch.uint8)
    codes = torch.zeros(tiles, ROWS, steps, LANE, dtype=torch.uint8, device=w.device)
    for plane, digit in zip(c.view(tiles, ROWS, steps, per, LANE).unbind(-2), _DIGITS[format], strict=True):
        codes += plane * digit
    return PackedTernary(_placed(codes.transpose(1, 2).reshape(shape)), scale, rows, inputs, format)


def quantize(
    x: Tensor,  # ... in  any float dtype
) -> tuple[
    Tensor, Tensor
]:  # ... in  float32 holding integers from -127 to 127; ... 1  float32, what one of them is worth
    "Each token to int8 by its largest magnitude; a token that is not finite becomes zeros worth NaN"
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = largest.isfinite()
    largest = largest.clamp(min=1e-5)
    q = (x * (largest.reciprocal() * 127)).round()
    return torch.where(finite, q, 0.0), torch.where(finite, largest / 127, torch.nan)


def reference(x, codes, scale, bias, rows, inputs, format):
    "The definition of `linear`, in torch: sums in float64 are exact"
    q, ratio = quantize(x)
    w = _unpack(codes, rows, inputs, format)
    y = (q.double() @ w.double().mT).float() * ratio * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def reference_floats(x, codes, scale, bias, rows, inputs, format):
    "The definition of `linear` with activations in bfloat16"
    y = (x.bfloat16().float() @ _unpack(codes, rows, inputs, format).float().mT) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


class _Matrix(ctypes.Structure):
    "`Matrix` in ternary.cpp"

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    ]
    _fields_ += [("rows", ctypes.c_int64), ("scales", ctypes.c_int32), ("trits", ctypes.c_int32)]


_P, _L, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_char_p


def paths() -> list:  # best first; empty without the C++ library
    "The instruction sets for which this machine has a ternary kernel"
    return [] if cpu.missing() else cpu.symbol("lmlab_ternary_paths", _S)().decode().split()


def prepared(
    x: Tensor,  # ... in   contiguous
    layers: list,  # (codes, scale, bias float32 or None, y, format) of each; y [..., out] is written, all are contiguous
    path: str = None,  # one of `paths()`; default: the best
    threads: int = None,  # default: torch's
):  # function without arguments; not 0 when it failed
    "The C++ call with everything looked up: layers that read the same tokens round them once and share one dispatch"
    matrices = (_Matrix * len(layers))()
    for m, (codes, scale, bias, y, format) in zip(matrices, layers, strict=True):
        m.codes, m.scale, m.bias, m.y = (None if t is None else t.data_ptr() for t in (codes, scale, bias, y))
        m.rows, m.scales, m.trits = y.shape[-1], scale.numel() > 1, format == "1.6bit"
    tokens, half = math.prod(x.shape[:-1]), x.dtype == torch.bfloat16
    threads, name = threads or torch.get_num_threads(), path and path.encode()
    args = x.data_ptr(), tokens, x.shape[-1], half, matrices, len(layers), threads, name
    call, kept = cpu.symbol("lmlab_ternary_linear", _I, _P, _L, _L, _I, _P, _I, _I, _S), (x, layers)
    return lambda kept=kept: call(*args)


def on_cpu(x, codes, scale, bias, rows, inputs, format, path=None):
    "As `reference`, in C++; `path` is one of `paths()`, None for the best"
    y = x.new_empty(*x.shape[:-1], rows)
    bias = None if bias is None else bias.float().contiguous()
    failed = prepared(x.contiguous(), [(codes.contiguous(), scale.contiguous(), bias, y, format)], path)()
    if failed == -1:
        raise ValueError(f"path: {path!r} does not run on this machine; allowed are {', '.join(paths())}")
    if failed:
        raise MemoryError(
            f"linear: no memory for the int8 activations of {math.prod(x.shape[:-1])} tokens of {inputs}"
        )
    return y


def on_triton(*args):
    "As `reference`, in Triton"
    from lmlab.kernels import ternary_triton

    return ternary_triton.on_triton(*args)


def floats_on_triton(*args):
    "As `reference_floats`, in Triton"
    from lmlab.kernels import ternary_triton

    return ternary_triton.floats_on_triton(*args)


LINEAR = Operation("ternary_linear", reference, on_cpu, on_triton, dtypes=DTYPES)
FLOATS = Operation("ternary_linear_floats", reference_floats, triton=floats_on_triton, dtypes=DTYPES)


@torch.library.custom_op("lmlab::ternary_linear", mutates_args=())
def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    inputs: int,
    format: str,
    backend: str,
) -> Tensor:
    return LINEAR.pick(backend, x.device.type, x.dtype)[1](x, codes, scale, bias, rows, inputs, format)


@torch.library.custom_op("lmlab::ternary_linear_floats", mutates_args=())
def _floats(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    inputs: int,
    format: str,
    backend: str,
) -> Tensor:
    return FLOATS.pick(backend, x.device.type, x.dtype)[1](x, codes, scale, bias, rows, inputs, format)


def _setup(ctx, inputs, output):
    x, codes, scale, bias, ctx.rows, ctx.inputs, ctx.format, _ = inputs
    ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(codes, scale)


def _gradients(ctx, grad):
    codes, scale = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = ((grad.float() * scale) @ _unpack(codes, ctx.rows, ctx.inputs, ctx.format).float()).to(ctx.dtype)
    if ctx.needs_input_grad[3]:
        db = grad.float().reshape(math.prod(grad.shape[:-1]), ctx.rows).sum(0).to(ctx.bias)
    return dx, None, None, db, None, None, None, None


for _op in (_linear, _floats):
    _op.register_fake(lambda x, codes, scale, bias, rows, *_: x.new_empty(*x.shape[:-1], rows))
    _op.register_autograd(_gradients, setup_context=_setup)


def linear(
    x: Tensor,  # ... in  float32 or bfloat16
    packed: PackedTernary,
    bias: Tensor = None,  # out
    backend: str = "auto",  # see `lmlab.kernels`
    activations: str = "int8",  # "bf16": not rounded to int8; fast on a GPU only, and bits depend on the backend
) -> Tensor:  # ... out  dtype of `x`
    "`(q @ w.T) * (max|x| / 127) * scale + bias` with `q` the tokens of `x` in int8; not-finite tokens give NaN"
    if not isinstance(packed, PackedTernary):
        raise TypeError(f"packed: {type(packed).__name__}; allowed is what `pack` returns")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: dtype {x.dtype}; allowed are float32 and bfloat16")
    if not x.ndim or x.shape[-1] != packed.in_features:
        raise ValueError(
            f"x: shape {tuple(x.shape)}; the last axis must be the {packed.in_features} inputs of `packed`"
        )
    if x.device != packed.device:
        raise ValueError(f"x: on {x.device}, and packed on {packed.device}; both must be on one device")
    if bias is not None:
        if tuple(bias.shape) != (packed.out_features,) or not bias.is_floating_point():
            raise ValueError(
                f"bias: {bias.dtype} of shape {tuple(bias.shape)}; allowed are {packed.out_features} floats"
            )
        if bias.device != x.device:
            raise ValueError(f"bias: on {bias.device}, and x on {x.device}; both must be on one device")
    if activations not in ("int8", "bf16"):
        raise ValueError(f"activations: {activations!r}; allowed are 'int8', 'bf16'")
    op = _linear if activations == "int8" else _floats
    return op(
        x, packed.codes, packed.scale, bias, packed.out_features, packed.in_features, packed.format, backend
    )


def _race(rows, inputs, tokens, threads, rounds, budget):
    "One shape: both formats, the same bytes merely read, the same products merely multiplied, and torch's own layers"
    from lmlab.core.bench import cold, paired

    w = torch.randint(-1, 2, (rows, inputs), dtype=torch.int8)
    x, y, scale = torch.randn(tokens, inputs), torch.empty(tokens, rows), torch.tensor([0.02])
    q, x16, fns = quantize(x)[0].to(torch.int8), x.bfloat16(), {}
    packed = {format: pack(w, scale, format) for format in FORMATS}
    for format, p in packed.items():

        def make(p=p, format=format):
            codes = _placed(p.codes)
            return codes, prepared(x, [(codes, scale, None, y, format)], threads=threads)

        following = cold(make)
        fns[format] = lambda f=following: f()[1]()
        if format == "2bit":
            fns["plain read"] = lambda f=following: cpu.plain_read(f()[0])
            fns["2bit as an operation"] = lambda f=following: _linear(
                x, f()[0], scale, None, rows, inputs, "2bit", "cpu"
            )
    flops, lib = 2 * rows * inputs * tokens, cpu.library()
    if once := lib.lmlab_peak(b"int8", 1, 1):
        fns["int8 peak"] = lambda: lib.lmlab_peak(b"int8", max(1, flops // once // threads), threads)
    following = {
        dtype: cold(lambda dtype=dtype: w.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.int8)
    }
    fns["torch bfloat16"] = lambda: F.linear(x16, following[torch.bfloat16]())
    fns["torch float32"] = lambda: F.linear(x, following[torch.float32]())
    fns["torch int8 _int_mm"] = lambda: torch._int_mm(q, following[torch.int8]().mT)
    timing = paired(fns, rounds=rounds, threads=threads, budget=budget)
    work = {"bytes": packed["2bit"].codes.nbytes, "flops": flops, "dtype": "int8"}
    work["time over plain read"] = {format: timing.ratio(format, "plain read") for format in FORMATS}
    if once:
        work["fraction of int8 peak"] = {format: timing.ratio("int8 peak", format) for format in FORMATS}
    return timing, work


def bench(
    quick: bool = False,  # two cases and fewer rounds
) -> dict:  # name of the case -> (`Timing`, what was moved and computed, and the two ratios that count)
    "The shapes of a BitNet with 2 billion weights, of its down projection, and of a Llama with 7; weights from memory"
    if cpu.missing():
        raise RuntimeError(f"bench: ternary kernels need the C++ library, but {cpu.missing()}")
    cases = [
        (2560, 2560, 1),
        (6912, 2560, 1),
        (2560, 6912, 1),
        (4096, 14336, 1),
        (6912, 2560, 8),
        (6912, 2560, 128),
        (4096, 14336, 128),
    ]
    out = {}
    for threads in sorted({1, torch.get_num_threads()}):
        for rows, inputs, tokens in cases[1::4] if quick else cases:
            name = f"{rows} x {inputs}, {tokens} token{'s' * (tokens > 1)}, {threads} thread{'s' * (threads > 1)}"
            out[name] = _race(rows, inputs, tokens, threads, *((15, 1.5) if quick else (101, 6)))
    return out
