"""Sparse activations: exactly `keep` on every path, products that are bit for bit those of the masked dense layer, refusals that say why."""

import os

import pytest
import torch
import torch.nn.functional as F
from lmlab.kernels import Fallback, cpu
from lmlab.kernels import sparse as S
from lmlab.kernels import ternary as T
from safetensors.torch import load_file, save_file
from torch.library import opcheck

from lmlab.core.check import check_kernel, math_threads, test_rel

test_rel.__test__ = False
PATHS = S.paths()
LEVELS = cpu.info().get("levels", [])
QUANTISED, FLOATS = ("int8", "ternary"), ("float32", "bfloat16")
needs_library = pytest.mark.skipif(not PATHS, reason="the C++ library is not there")
how = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_library)])
WIDTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 1000, 4099)


def matrix(rows, inputs, format, seed=0):
    "(what goes into `store`, stored)"
    g = torch.Generator().manual_seed(seed)
    if format in FLOATS:
        w = torch.randn(rows, inputs, generator=g)
        return w, S.store(w, format)
    low, high = (-1, 2) if format == "ternary" else (-128, 128)
    w = torch.randint(low, high, (rows, inputs), dtype=torch.int8, generator=g)
    return w, S.store(w, format, torch.rand(rows, generator=g) + 0.1)


def by_hand(x, keep, structure="topk", group=None):
    "One token at a time, in Python: magnitudes down, indices up"
    out = torch.zeros_like(x)
    for o, token in zip(out.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), strict=True):
        v = [abs(a) for a in token.tolist()]
        d = len(v)
        size = d if structure != "n:m" else group
        if structure == "block":
            v = [sum(v[i : i + group]) for i in range(0, d, group)]  # exact for the numbers drawn here
            size = len(v)
        for start in range(0, len(v), size):
            for i in sorted(range(start, start + size), key=lambda i: (-v[i], i))[:keep]:
                part = slice(i * group, (i + 1) * group) if structure == "block" else i
                o[part] = token[part]
    return out


CASES = [(d, keep, "topk", None) for d in WIDTHS for keep in sorted({1, (d + 1) // 2, max(1, d - 1), d})]
CASES += [
    (d, keep, "n:m", group)
    for d, group in ((4, 4), (64, 2), (64, 64), (99, 33), (100, 4), (120, 40), (1024, 16), (7, 1))
    for keep in sorted({1, (group + 1) // 2, group})
]
CASES += [
    (d, keep, "block", group)
    for d, group in ((4, 4), (64, 2), (99, 33), (100, 4), (1024, 16), (48, 1), (2048, 64))
    for keep in sorted({1, (d // group + 1) // 2, d // group})
]


def numbers(shape, dtype, seed=0, steps=None):
    "Multiples of 2^-10 (or of 1/steps, for ties), so that sums are exact"
    g = torch.Generator().manual_seed(seed)
    return (
        (torch.randn(shape, generator=g) * (steps or 1024)).round().to(dtype) / (steps or 1024)
    ).contiguous()


@how
@pytest.mark.parametrize("dtype", S.DTYPES)
def test_selection_is_exact(backend, dtype):
    "Against sorting by hand: any structure, with and without ties; what is kept has the bits of x"
    for i, (d, keep, structure, group) in enumerate(CASES):
        for steps in (None, 2):  # multiples of a half: nearly everything is tied
            x = numbers((3, d), dtype, i, steps)
            got = S.topk_sparsify(x, keep, structure, group, backend=backend)
            assert torch.equal(got, by_hand(x, keep, structure, group)), (d, keep, structure, group, steps)


@needs_library
def test_every_path_makes_the_same_choice():
    "All instruction sets, numbers of threads and the definition: also among denormals, infinities and zeros of both signs"
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf, 1.0, -1.0])
    for d, keep, structure, group in CASES:
        for dtype in S.DTYPES:
            for square in (False, True):
                x = torch.randn(70, d).to(dtype)
                x[::2] = odd[torch.randint(10, (35, d))].to(dtype)
                want = S.topk_sparsify(x, keep, structure, group, square, backend="reference")
                for level in LEVELS:
                    with cpu.level(level), math_threads(1 + (d > 1000)):
                        got = S.topk_sparsify(x, keep, structure, group, square)
                    assert torch.equal(got.signbit(), want.signbit()), (
                        d,
                        keep,
                        structure,
                        group,
                        dtype,
                        square,
                    )
                    assert torch.equal(got, want), (d, keep, structure, group, dtype, square, level)


def test_exactly_keep():
    "The count is kept where a threshold would keep more: all equal, all zero but the gradient tells, after a squared ReLU"
    for structure, group in (("topk", None), ("n:m", 8), ("block", 8)):
        x = torch.ones(2, 64, requires_grad=True)
        n = {"topk": 24, "n:m": 3, "block": 3}[structure]
        y = S.topk_sparsify(x, n, structure, group, straight_through=False)
        first = {"topk": range(24), "n:m": [i for i in range(64) if i % 8 < 3], "block": range(24)}[structure]
        assert y[0].nonzero().flatten().tolist() == list(first)
        x = (0 * x).detach().requires_grad_()
        (g,) = torch.autograd.grad(S.topk_sparsify(x, n, structure, group, straight_through=False).sum(), x)
        assert g[0].nonzero().flatten().tolist() == list(first)
    x = torch.randn(5, 40)
    assert torch.equal(S.topk_sparsify(x, 40), x)
    assert torch.equal(S.topk_sparsify(x, 13, "n:m", 40), S.topk_sparsify(x, 13))
    assert torch.equal(S.topk_sparsify(x, 13, "block", 1), S.topk_sparsify(x, 13))


def test_triton():
    "In Triton's interpreter: the same choice and the same bits; a token with a NaN becomes NaN, as refusing it would mean waiting"
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is there, and Triton compiles for it")
    for d, keep, structure, group in ((1, 1, "topk", None), (100, 99, "topk", None), (257, 100, "topk", None),
                                      (36, 2, "n:m", 4), (99, 10, "n:m", 33), (99, 2, "block", 33), (208, 5, "block", 16)):  # fmt: skip
        for dtype, square, steps in (
            (torch.float32, False, 2),
            (torch.bfloat16, True, 1024),
            (torch.bfloat16, False, 2),
        ):
            x, up = numbers((2, d), dtype, d, steps), torch.randn(2, d).to(dtype)
            got, want = (
                torch.autograd.grad(y, x, up) + (y,)
                for b in ("triton", "reference")
                for y in [
                    S.topk_sparsify(x.requires_grad_(), keep, structure, group, square, False, backend=b)
                ]
            )
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), (
                d,
                keep,
                structure,
                dtype,
                square,
            )
    x = torch.randn(3, 40)
    x[1, 5] = torch.nan
    y = S.topk_sparsify(x, 4, backend="triton")
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], S.topk_sparsify(x[[0, 2]], 4))


SHAPES = [(*lead, d) for d in WIDTHS[:-1] for lead in ((), (3,), (2, 2), (0,))]
QUICK = {
    "the_custom_op_is_well_formed": "looked at on fewer shapes",
    "kernel_compiles": "looked at on fewer shapes",
    "gradients_survive_gradcheck": "straight through is not the derivative",
}


class _Through(torch.autograd.Function):
    "The straight-through gradient, written down"

    @staticmethod
    def forward(ctx, x, m):
        return x * m

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@how
def test_as_an_operation(backend):
    "Values, gradients, strides, threads, compiled, unwritten memory: straight through, and masked"

    def make(shape, dtype, generator):
        return torch.randn(shape, generator=generator).to(dtype), (shape[-1] + 1) // 2

    def through(x, keep):
        return _Through.apply(x, S.mask(x.detach(), keep))

    def masked(x, keep):
        return x * S.mask(x.detach(), keep)

    assert len(SHAPES) >= 60
    for reference, straight in ((through, True), (masked, False)):
        op = lambda x, keep, s=straight: S.topk_sparsify(x, keep, straight_through=s, backend=backend)
        how = dict(nan=False, label=f"{backend} {straight}")
        skip = dict(QUICK)
        if not straight:
            skip.pop("gradients_survive_gradcheck")
        shapes = SHAPES if straight and backend == "cpu" else SHAPES[::7]
        check_kernel(op, reference, make, shapes, skip=skip, **how)
        check_kernel(op, reference, make, [(2, 17), (0, 3)], only=("kernel_compiles",), **how)
    for straight in (True, False):
        for square in (True, False):
            for dtype in S.DTYPES:
                x = torch.randn(3, 24).to(dtype).requires_grad_()
                for structure, group in (("topk", None), ("n:m", 4), ("block", 4)):
                    opcheck(S._topk, (x, None, 2, structure, group, square, straight, backend))


@how
def test_squared_relu(backend):
    "relu(x)^2 first; its own derivative straight through, and only where something is kept otherwise"
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(4, 50).to(dtype).requires_grad_()
        if dtype == torch.float64 and backend == "cpu":
            continue
        value = x.detach().relu().square()
        m, up = S.mask(value, 9), torch.randn(4, 50).to(dtype)
        slope = up * (2 * x.detach().relu())
        for straight, want in ((True, slope), (False, slope * m)):
            y = S.topk_sparsify(x, 9, square_relu=True, straight_through=straight, backend=backend)
            assert torch.equal(y, value * m)
            (g,) = torch.autograd.grad(y, x, up)
            test_rel(g, want, 2 * torch.finfo(dtype).eps)


@how
def test_nan_is_refused(backend):
    for dtype in S.DTYPES:
        for square in (False, True):
            for structure, group in (("topk", None), ("n:m", 4), ("block", 4)):
                x = torch.randn(3, 64).to(dtype)
                x[1, 37] = -torch.nan
                with pytest.raises(ValueError, match="x: holds NaN"):
                    S.topk_sparsify(x, 2, structure, group, square, backend=backend)
    for format in S.FORMATS:
        w = matrix(20, 64, format)[1]
        with pytest.raises(ValueError, match="x: holds NaN"):
            S.linear(x, w, 3, backend=backend)
        y = S.linear(x, w, backend=backend)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


# ---- layers

LAYERS = [
    (1, 1),
    (5, 3),
    (16, 16),
    (17, 33),
    (64, 64),
    (65, 100),
    (256, 50),
    (257, 129),
    (0, 5),
    (5, 0),
    (1030, 70),
    (8192, 20),
]
TOKENS = (0, 1, 2, 7, 8, 9, 17)


def dense(x, w, keep, bias=None):
    "The masked dense product, in int64, one token at a time"
    out = []
    for token in x.flatten(0, -2).float():
        largest = torch.tensor([1e-5, *token.abs()]).max()
        q = (token * (1 / largest * 127)).round().long()
        if keep:
            kept = sorted(range(len(q)), key=lambda i: (-abs(q[i].item()), i))[:keep]
            q = torch.zeros_like(q).index_copy(0, torch.tensor(kept), q[kept])
        y = (w.unpack().long() @ q).float() * (largest / 127) * w.scale
        out.append((y if bias is None else y + bias).to(x.dtype))
    return (
        torch.stack(out).view(*x.shape[:-1], len(w.scale))
        if out
        else x.new_empty(*x.shape[:-1], len(w.scale))
    )


@pytest.mark.parametrize("format", QUANTISED)
def test_quantised_layers_are_exact(format):
    "On every path, bit for bit the dense product of the masked integers"
    for i, (rows, inputs) in enumerate(LAYERS):
        w = matrix(rows, inputs, format, i)[1]
        bias = torch.randn(rows)
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(i)).to(
                S.DTYPES[tokens % 2]
            )
            for keep in {None, *([1, (inputs + 1) // 2, inputs] if inputs else [])}:
                b = bias if tokens % 3 else None
                want = S.linear(x, w, keep, b, backend="reference")
                if rows < 100 and tokens < 8:
                    assert torch.equal(want, dense(x, w, keep, b))
                for path in PATHS:
                    got = S.linear_on_cpu(x, w.columns, w.scale, b, rows, inputs, format, keep, path)
                    assert torch.equal(got, want), (path, rows, inputs, tokens, keep)


@needs_library
@pytest.mark.parametrize("format", list(S.FORMATS))
def test_same_bits_and_nothing_left_unwritten(format):
    "Levels, paths, numbers of threads; alone and beside other tokens; selected before or inside; memory around y is not touched"
    rows, inputs, keep = 1111, 2100, 700
    w, bias = matrix(rows, inputs, format)[1], torch.randn(rows)
    for dtype in S.DTYPES:
        x = torch.randn(5, inputs).to(dtype)
        want = S.linear(x, w, keep, bias, backend="cpu")
        assert torch.equal(S.linear(S.topk_sparsify(x, keep), w, None, bias), want) or format in QUANTISED
        for level in LEVELS:
            with cpu.level(level):
                for path in S.paths():
                    for threads in (1, 2, 3):
                        for k in (slice(0, 5), slice(2, 3)):
                            memory = torch.full((len(x[k]) + 2, rows), torch.nan, dtype=dtype)
                            call = S.prepared(
                                x[k], w.columns, w.scale, bias, memory[1:-1], format, keep, path, threads
                            )
                            assert call() == 0
                            assert torch.equal(memory[1:-1], want[k]), (level, path, threads, k)
                            assert memory[0].isnan().all() and memory[-1].isnan().all()


@how
@pytest.mark.parametrize("format", FLOATS)
def test_float_layers(format, backend):
    "Against the masked product in float64: values, gradients, threads, strides, compiled, unwritten memory"
    stored = {shape: matrix(*shape, format)[1] for shape in LAYERS}

    def make(shape, dtype, generator):
        (rows, inputs), tokens = shape
        x = torch.randn(tokens, inputs, generator=generator).to(dtype)
        return x, torch.randn(rows, generator=generator), stored[rows, inputs], (inputs + 2) // 3 or None

    def op(x, bias, w, keep):
        return S.linear(x, w, keep, bias, backend=backend)

    def reference(x, bias, w, keep):
        m = S.mask(x.detach(), keep) if keep else torch.ones_like(x)
        return _Through.apply(x, m) @ w.dense(x.dtype).mT + bias

    shapes = [(s, t) for s in LAYERS for t in (0, 1, 2, 8, 9)]
    assert len(shapes) >= 60
    terms = lambda s: max(1, s[0][1])
    common = dict(terms=terms, label=f"{format} {backend}", nan=False)
    check_kernel(
        op,
        reference,
        make,
        shapes if backend == "cpu" and format == "float32" else shapes[::5],
        skip=QUICK,
        **common,
    )
    check_kernel(op, reference, make, [((17, 33), 2)], only=("kernel_compiles",), **common)


def test_zero_inputs_are_not_read():
    "Without `keep`, what counts is what is not zero; weights of the others are not looked at, so they may be anything"
    x = torch.randn(3, 64)
    x[:, ::3] = 0
    for format in S.FORMATS:
        w, stored = matrix(70, 64, format)
        same = w.clone()
        same[:, ::3] = 1
        again = S.store(same, format, stored.scale)
        assert torch.equal(S.linear(x, stored), S.linear(x, again))
        assert torch.equal(S.linear(0 * x, stored), torch.zeros(3, 70))


def test_ternary_layers_agree_with_the_packed_ones():
    "All inputs kept: the bits of `lmlab.kernels.ternary`"
    w = torch.randint(-1, 2, (300, 200), dtype=torch.int8)
    scale, bias, x = torch.rand(300), torch.randn(300), torch.randn(4, 200)
    for dtype in S.DTYPES:
        want = T.linear(x.to(dtype), T.pack(w, scale), bias)
        for keep in (None, 200):
            assert torch.equal(S.linear(x.to(dtype), S.store(w, "ternary", scale), keep, bias), want)
    once = S.linear(x, S.store(w, "ternary", scale), 77)
    assert torch.equal(S.linear(4 * x, S.store(w, "ternary", scale), 77), 4 * once)


@pytest.mark.parametrize("format", QUANTISED)
def test_no_sum_wraps(format):
    "The longest layer with the largest values"
    n = S.LONGEST
    w = (
        torch.ones(2, n, dtype=torch.int8)
        if format == "ternary"
        else torch.full((2, n), -128, dtype=torch.int8)
    )
    w[1] = -1
    stored = S.store(w, format, 1.0)
    for sign in (1.0, -1.0):
        x = torch.full((1, n), sign)
        want = S.linear(x, stored, backend="reference")
        test_rel(want, (x @ w.float().mT), 1e-6)
        for path in PATHS:
            got = S.linear_on_cpu(x, stored.columns, stored.scale, None, 2, n, format, None, path)
            assert torch.equal(got, want), path
    with pytest.raises(ValueError, match=f"w: {n + 1} inputs; at most {n}"):
        S.store(torch.zeros(1, n + 1, dtype=torch.int8), format, 1.0)


@pytest.mark.parametrize("format", QUANTISED)
def test_tokens_that_are_not_finite(format):
    w = matrix(40, 64, format)[1]
    x = torch.randn(5, 64)
    x[0], x[1, 5], x[3] = 0, torch.inf, x[3] * 1e-8
    for backend in ("reference", "auto"):
        for keep in (None, 20):
            y = S.linear(x, w, keep, backend=backend)
            assert y[1].isnan().all() and y[[0, 2, 3, 4]].isfinite().all() and not y[0].any()


@pytest.mark.parametrize("format", list(S.FORMATS))
def test_operation_for_torch(format):
    w, stored = matrix(35, 21, format)
    x, bias = torch.randn(2, 3, 21), torch.randn(35)
    for x_, b in (
        (x, None),
        (x.clone().requires_grad_(), bias.clone().requires_grad_()),
        (x.bfloat16(), bias),
    ):
        for keep in (None, 9):
            opcheck(S._linear, (x_, stored.columns, stored.scale, b, 35, 21, format, keep, "auto"))
    layer = torch.compile(lambda x, b: 2 * S.linear(x, stored, 9, b), fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(x, bias), 2 * S.linear(x, stored, 9, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert S.linear(x, stored, 9).dtype == torch.float32
    x.requires_grad_(), bias.requires_grad_()
    grad = torch.randn(2, 3, 35)
    got = torch.autograd.grad(S.linear(x, stored, 9, bias), (x, bias), grad)
    for a, b in zip(
        got, torch.autograd.grad(F.linear(x, stored.dense(), bias), (x, bias), grad), strict=True
    ):
        test_rel(a, b, 1e-6)


@pytest.mark.parametrize("format", list(S.FORMATS))
def test_stored_weights_come_back(tmp_path, format):
    for rows, inputs in LAYERS:
        w, stored = matrix(rows, inputs, format)
        assert torch.equal(stored.unpack(), w.to(stored.unpack().dtype)) and stored.shape == w.shape
        d = w.float() if format in FLOATS else w * stored.scale[:, None]
        assert torch.equal(stored.dense(), d if format != "bfloat16" else d.bfloat16().float())
    w, stored = matrix(1500, 300, format)
    assert stored.nbytes / w.numel() == pytest.approx(S.FORMATS[format], rel=0.15)
    stored.save(tmp_path / "one.safetensors")
    back, x = S.SparseWeight.load(tmp_path / "one.safetensors"), torch.randn(3, 300)
    assert back.format == format and torch.equal(back.unpack(), stored.unpack())
    assert torch.equal(S.linear(x, back, 100), S.linear(x, stored, 100))
    assert os.listdir(tmp_path) == ["one.safetensors"]
    both = stored.tensors("a.") | matrix(3, 4, format)[1].tensors("b.")
    save_file(both, tmp_path / "two.safetensors")
    other = S.SparseWeight.from_tensors(load_file(tmp_path / "two.safetensors"), stored.metadata("a."), "a.")
    assert torch.equal(other.unpack(), stored.unpack())
    assert stored.to("cpu") is stored and stored.to("meta").device.type == "meta"


def test_damaged_checkpoints_are_refused():
    w = matrix(40, 40, "ternary")[1]
    t, m, make = w.tensors(), w.metadata(), S.SparseWeight.from_tensors
    f = matrix(40, 40, "float32")[1]
    for tensors, metadata, match in (
        (t, {}, "metadata: there is no 'sparse'"),
        ({"columns": w.columns}, m, "tensors: there is no 'scale'"),
        (t, {"sparse": "{"}, "is not what `SparseWeight.metadata` writes"),
        (t, {"sparse": m["sparse"].replace("ternary", "int4")}, "format: 'int4'; allowed are 'float32'"),
        (t | {"columns": w.columns[:1]}, m, "columns is torch.uint8 .*belongs to 40 x 40"),
        (t | {"columns": w.columns | 3}, m, "no ternary weights"),
        (t | {"scale": torch.ones(3)}, m, r"scale: shape \(3,\)"),
        ({"columns": f.columns | 255}, f.metadata(), "columns holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            make(tensors, metadata)


def test_bad_input_is_refused():
    x, w = torch.randn(2, 16), matrix(8, 16, "int8")[0]
    stored = S.store(w, "int8", 1.0)
    for match, call in (
        ("x: a torch.int64 tensor of shape", lambda: S.topk_sparsify(torch.ones(4, dtype=torch.long), 1)),
        ("x: a list", lambda: S.topk_sparsify([1.0], 1)),
        (r"x: a torch.float32 tensor of shape \(\)", lambda: S.topk_sparsify(torch.tensor(1.0), 1)),
        (r"shape \(2, 0\)", lambda: S.topk_sparsify(x[:, :0], 1)),
        ("keep: 0; allowed are whole numbers from 1 to the 16 features", lambda: S.topk_sparsify(x, 0)),
        ("keep: 17; ", lambda: S.topk_sparsify(x, 17)),
        ("keep: 2.5; ", lambda: S.topk_sparsify(x, 2.5)),
        ("keep: True; ", lambda: S.topk_sparsify(x, True)),
        ("keep: 5; .* from 1 to the 4 features of a group", lambda: S.topk_sparsify(x, 5, "n:m", 4)),
        ("keep: 5; .* from 1 to the 4 blocks", lambda: S.topk_sparsify(x, 5, "block", 4)),
        ("group: 5; .* divides the 16 features", lambda: S.topk_sparsify(x, 1, "n:m", 5)),
        ("group: None; ", lambda: S.topk_sparsify(x, 1, "block")),
        ("group: 4; only 'n:m' and 'block'", lambda: S.topk_sparsify(x, 1, group=4)),
        ("structure: '2:4'; allowed are 'topk', 'n:m', 'block'", lambda: S.topk_sparsify(x, 1, "2:4")),
        ("backend: 'gpu' is no backend", lambda: S.topk_sparsify(x, 1, backend="gpu")),
        ("format: 'int4'; allowed are 'float32'", lambda: S.store(w, "int4", 1.0)),
        ("w: a torch.int8 tensor .*float tensor", lambda: S.store(w, "float32")),
        ("w: a torch.float32 tensor .*int8 tensor", lambda: S.store(w.float(), "int8", 1.0)),
        ("w: a list", lambda: S.store([[1]], "int8", 1.0)),
        ("w: .* of 128 values are outside -1, 0, 1", lambda: S.store(w, "ternary", 1.0)),
        ("w: holds NaN or infinity", lambda: S.store(w.float() * torch.inf, "bfloat16")),
        ("w: holds NaN or infinity", lambda: S.store(w.double() * 1e300, "float32")),
        ("scale: 1.0; float32 weights have none", lambda: S.store(w.float(), "float32", 1.0)),
        ("scale: None; int8 weights need", lambda: S.store(w, "int8")),
        (r"scale: shape \(5,\)", lambda: S.store(w, "int8", torch.ones(5))),
        ("weight: Tensor", lambda: S.linear(x, w)),
        ("x: dtype torch.float64; allowed are float32, bfloat16$", lambda: S.linear(x.double(), stored)),
        ("x: dtype torch.int64", lambda: S.linear(x.long(), stored)),
        (r"x: shape \(2, 15\); the last axis must be the 16 inputs", lambda: S.linear(x[:, 1:], stored)),
        ("x: on meta, and weight on cpu", lambda: S.linear(x.to("meta"), stored)),
        ("keep: 0; allowed are whole numbers from 1 to the 16 inputs", lambda: S.linear(x, stored, 0)),
        ("keep: 17", lambda: S.linear(x, stored, 17)),
        (
            r"bias: torch.float32 of shape \(7,\); allowed are 8 floats",
            lambda: S.linear(x, stored, 1, torch.ones(7)),
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()
    if PATHS:
        with pytest.raises(ValueError, match=f"path: 'sse' does not run.*allowed are {PATHS[0]}"):
            S.linear_on_cpu(x, stored.columns, stored.scale, None, 8, 16, "int8", None, "sse")


def test_races_run(monkeypatch):
    "What `lmlab bench sparse` runs, on a layer that costs nothing"
    if not PATHS:
        with pytest.raises(RuntimeError, match="bench: .*C\\+\\+ library"):
            S.bench(quick=True)
        return
    from lmlab.core import bench

    monkeypatch.setattr(
        bench, "cold", lambda make, cold=bench.cold: cold(make, 1)
    )  # two copies are enough here
    timing, work = S._race_selection(64, torch.float32, 3, 0.1)
    assert next(iter(timing.seconds)) == "kernel" and work["bytes"] > 0
    for format in S.FORMATS:
        timing, work = S._race_layer(64, 1000, format, 1, 3, 0.1)
        assert next(iter(timing.seconds)) == "50 % active" and work["flops"] == 64 * 1000
        assert work["prediction"]["20 %"] == 5 and len(work["speed over all inputs"]) == 5


def test_without_the_library(monkeypatch):
    import lmlab.kernels as K

    x, w = torch.randn(2, 30), matrix(40, 30, "ternary")[1]
    want = S.linear(x, w, 9), S.topk_sparsify(x, 9)
    monkeypatch.setattr(cpu, "missing", lambda: "it was taken away")
    monkeypatch.setattr(K, "_said", set())
    with pytest.warns(Fallback, match="sparse_linear runs on the torch reference"):
        assert torch.equal(S.linear(x, w, 9), want[0])
    with pytest.warns(Fallback, match="topk_sparsify runs on the torch reference"):
        assert torch.equal(S.topk_sparsify(x, 9), want[1])
