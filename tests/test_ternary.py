"""Ternary linear layers: exact against int64, the same bits from every path, and refusals that name what was wrong."""

import gc
import itertools
import os
import subprocess
import sys

import native
import pytest
import torch
from lmlab.kernels import Fallback, absent, cpu
from lmlab.kernels import ternary as T
from safetensors.torch import load_file, save_file

from lmlab.core.check import check_kernel, test_rel, tolerance

test_rel.__test__ = False

PATHS = T.paths()
FORMATS = list(T.FORMATS)
SHAPES = [  # rows, inputs: a tile is 32 rows, a step 16 or 20 inputs
    (1, 1), (1, 16), (31, 15), (32, 20), (33, 17), (64, 19), (65, 21), (47, 80), (2, 161), (100, 257), (0, 5), (5, 0), (129, 64)
]  # fmt: skip
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 24, 25)
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not interpreted or absent("triton", "cpu") is not None, reason="Triton's interpreter is not there"
)
needs_library = pytest.mark.skipif(not PATHS, reason="the C++ library is not there")


def weights(rows, inputs, seed=0):
    return torch.randint(
        -1, 2, (rows, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(seed)
    )


def bits(x):
    "For comparisons in which a NaN equals itself"
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def by_hand(x, w, scale, bias=None):
    "The layer again, in int64 and one token at a time"
    rows = []
    for token in x.flatten(0, -2).float():
        largest = torch.tensor([1e-5, *token.abs()]).max()
        q = (token * (1 / largest * 127)).round().long()
        y = (w.long() * q).sum(-1).float() * (largest / 127) * scale
        rows.append((y if bias is None else y + bias.float()).to(x.dtype))
    return torch.stack(rows).reshape(*x.shape[:-1], len(w)) if rows else x.new_empty(*x.shape[:-1], len(w))


@pytest.mark.parametrize("dtype", T.DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_exact_on_every_path(format, dtype):
    g = torch.Generator().manual_seed(1)
    for i, (rows, inputs) in enumerate(SHAPES):
        w, one = weights(rows, inputs, i), torch.tensor([0.37])
        scale, bias = (torch.randn(rows, generator=g) for _ in range(2))
        for tokens in TOKENS:
            x = (3 * torch.randn(tokens, inputs, generator=g)).to(dtype)
            for s, b in ((one, None), (scale, bias)):
                want = by_hand(x, w, s, b)
                p = T.pack(w, s, format)
                assert torch.equal(T.linear(x, p, b, backend="reference"), want), (rows, inputs, tokens)
                for path in PATHS:
                    got = T.on_cpu(x, p.codes, p.scale, b, rows, inputs, format, path)
                    assert torch.equal(got, want), (path, rows, inputs, tokens, got - want)


@needs_library
@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_from_levels_and_threads_and_nothing_left_unwritten(format):
    rows, inputs = 333, 1025
    p, bias = T.pack(weights(rows, inputs), torch.rand(rows), format), torch.randn(rows)
    for tokens, dtype in ((1, torch.float32), (9, torch.bfloat16), (64, torch.float32)):
        x = torch.randn(tokens, inputs).to(dtype)
        want = T.linear(x, p, bias, backend="reference")
        for level in cpu.info()["levels"]:
            with cpu.level(level):
                for path in T.paths():
                    for threads in (1, 2, 3):
                        memory = torch.full(
                            (tokens + 2, rows), torch.nan, dtype=dtype
                        )  # a margin on both sides
                        y = memory[1:-1]
                        assert T.prepared(x, [(p.codes, p.scale, bias, y, format)], path, threads)() == 0
                        assert torch.equal(y, want), (level, path, threads)
                        assert memory[0].isnan().all() and memory[-1].isnan().all()


GRID = [(33, 21, (2,)), (48, 160, (3,)), (0, 5, (2,)), (5, 0, (2,)), (333, 1025, (5,))]
GRID += itertools.product((1, 31, 32, 65), (1, 15, 21, 80), ((0,), (), (2, 3), (13,)))


def given(shape, dtype, g):
    "Arguments of the operation: a token alone and batches of them, both formats, a scale for each row or for all, with a bias or without"
    (rows, inputs, tokens), i = shape, sum(shape[:2]) + len(shape[2])
    p = T.pack(weights(rows, inputs, i), 0.1 + torch.rand(rows if i % 3 else 1, generator=g), FORMATS[i % 2])
    x, bias = torch.randn(*tokens, inputs, generator=g), torch.randn(rows, generator=g)
    return (
        x.to(dtype),
        p.codes,
        p.scale,
        bias.to(dtype) if i % 5 else None,
        rows,
        inputs,
        p.format,
        "auto",
    )


def layer(x, codes, scale, bias, rows, inputs, format, backend):
    "The layer in float64; the rounding of activations lets gradients through as if it were not there"
    q, ratio = T.quantize(x.detach())
    x = x + (q.double() * ratio.double() - x).detach()
    y = x @ (T._unpack(codes, rows, inputs, format) * scale.detach()[:, None]).mT
    return y if bias is None else y + bias


def test_kernel_contract():
    slow, through = "the_custom_op_is_well_formed", "gradients_survive_gradcheck"
    reasons = {slow: "below, for both formats", through: "what passes straight through is no derivative"}
    options = dict(terms=lambda s: s[1], custom_op=T._linear, label="ternary linear")
    report = check_kernel(T._linear, layer, given, GRID, skip=reasons, **options)
    assert len(GRID) >= 60 and len(report.of("passed")) > 1000
    check_kernel(T._linear, layer, given, GRID[:2], only=(slow,), **options)


def float_layer(x, codes, scale, bias, rows, inputs, format, backend):
    "The layer in float64 with activations in bfloat16"
    x = x + (x.detach().bfloat16().double() - x).detach()
    y = x @ (T._unpack(codes, rows, inputs, format) * scale.detach()[:, None]).mT
    return y if bias is None else y + bias


def test_kernel_contract_of_unrounded_activations():
    same = "registered by the line that registers the rounded one"
    reasons = dict.fromkeys(("the_custom_op_is_well_formed", "kernel_compiles"), same)
    reasons["gradients_survive_gradcheck"] = "rounding to bfloat16 is no derivative"
    options = dict(terms=lambda s: s[1], label="ternary linear, bf16 activations")
    check_kernel(T._floats, float_layer, given, [*GRID[:4], GRID[-6]], skip=reasons, **options)
    p, x = T.pack(weights(37, 50), 0.5), torch.randn(3, 50)
    assert torch.equal(T.linear(x, p, activations="bf16"), 0.5 * x.bfloat16().float() @ p.unpack().float().mT)
    assert not torch.equal(T.linear(x, p, activations="bf16"), T.linear(x, p))


@needs_library
def test_layers_that_share_their_tokens():
    rows, inputs = (70, 33, 1, 200), 90
    packed = [T.pack(weights(r, inputs, r), 0.5, FORMATS[i % 2]) for i, r in enumerate(rows)]
    for tokens in (1, 5, 30):
        x, ys = torch.randn(tokens, inputs), [torch.full((tokens, r), torch.nan) for r in rows]
        layers = [(p.codes, p.scale, None, y, p.format) for p, y in zip(packed, ys, strict=True)]
        for threads in (1, 2):
            assert T.prepared(x, layers, threads=threads)() == 0
            for p, y in zip(packed, ys, strict=True):
                assert torch.equal(y, T.linear(x, p, backend="reference"))
                y.fill_(torch.nan)


def test_many_tokens_are_worked_on_in_chunks():
    w, x = weights(40, 4100), torch.randn(700, 4100)  # more than one chunk of int8 activations
    p = T.pack(w, 0.5, "2bit")
    assert torch.equal(T.linear(x, p), T.linear(x, p, backend="reference"))


@pytest.mark.parametrize("format", FORMATS)
def test_any_layout_of_tokens(format):
    w, bias = weights(37, 50), torch.randn(37)
    p = T.pack(w, 0.5, format)
    x = torch.randn(50, 3, 4).permute(2, 1, 0)
    y = T.linear(x, p, bias[torch.arange(37)])
    assert y.shape == (4, 3, 37) and torch.equal(y, by_hand(x, w, torch.tensor([0.5]), bias))
    assert torch.equal(T.linear(x[:, ::2], p), T.linear(x.contiguous(), p)[:, ::2])
    assert torch.equal(T.linear(x[0, 0], p), T.linear(x, p)[0, 0])
    assert T.linear(x[:0], p).shape == (0, 3, 37)
    with torch.autocast("cpu", torch.bfloat16):
        assert T.linear(x, p).dtype == torch.float32
    strided = torch.randn(74)[::2]
    assert torch.equal(T.linear(x, p, strided), T.linear(x, p, strided.contiguous()))


@pytest.mark.parametrize("format", FORMATS)
def test_no_sum_wraps(format):
    "The largest layer with the largest values, and the bound that the kernel relies on"
    n = T.LONGEST
    codes_times_digits = 2 * n + max(128 * n // 4, 162 * -(-n // 5))  # more than any one lane gets to see
    assert 127 * codes_times_digits < 2**31
    w = torch.ones(2, n, dtype=torch.int8)
    w[1] = -1
    p = T.pack(w, 127.0, format)
    for sign in (1, -1):
        x = torch.full((2, n), float(sign))
        for f in [T.reference, *(lambda *a, path=path: T.on_cpu(*a, path) for path in PATHS)]:
            y = f(x, p.codes, p.scale, None, 2, n, format)
            want = sign * torch.tensor([[1.0, -1.0]] * 2) * (127.0 * n * torch.tensor(1 / 127.0) * 127.0)
            assert torch.equal(y, want)
    with pytest.raises(ValueError, match=f"w: {n + 1} inputs; at most {n}"):
        T.pack(torch.zeros(1, n + 1, dtype=torch.int8), 1.0)


@pytest.mark.parametrize("format", FORMATS)
def test_extreme_activations(format):
    w = weights(33, 40)
    p, dense = T.pack(w, 2.0, format), w.float()
    x = torch.randn(9, 40)
    x[0] = 0
    x[1] *= 1e-7  # below the smallest magnitude that is scaled up
    x[2] *= 1e30
    x[3, 7], x[4, 0], x[5, 39] = torch.nan, torch.inf, -torch.inf
    x[6] = torch.linspace(-127, 127, 40).round() + 0.5  # ties, which go to the even neighbour
    want = T.linear(x, p, backend="reference")
    assert (want[0] == 0).all() and want[3:6].isnan().all() and want[[0, 1, 2, 6, 7, 8]].isfinite().all()
    assert torch.equal(want[7:], by_hand(x[7:], w, torch.tensor([2.0])))
    assert (
        (want[7] - 2 * dense @ x[7]).abs() <= 40 * x[7].abs().max() / 127
    ).all()  # half a step an input, times 2
    for path in PATHS:
        for dtype in T.DTYPES:
            a = x.to(dtype), p.codes, p.scale, None, 33, 40, format
            got, ref = T.on_cpu(*a, path), T.reference(*a)
            assert torch.equal(got.isnan(), ref.isnan()) and torch.equal(got.nan_to_num(), ref.nan_to_num())
    y = T.linear(x[8:], p)
    assert torch.equal(T.linear(4 * x[8:], p), 4 * y)  # a token's scale is its own


def test_bfloat16_rounds_as_torch():
    p = T.pack(weights(96, 64), torch.rand(96), "2bit")
    x = torch.randn(20, 64).bfloat16()
    bias = torch.full((96,), torch.nan)
    bias[0], bias[1:] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32), torch.randn(95)
    got, want = T.linear(x, p, bias), T.linear(x, p, bias, backend="reference")
    assert got[:, 0].isnan().all() and torch.equal(bits(got[:, 1:]), bits(want[:, 1:]))


def test_activations_agree_with_transformers():
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    x = torch.randn(50, 77) * torch.logspace(-6, 6, 50)[:, None]
    x[3] = 0
    q, ratio = T.quantize(x)
    s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    with torch.compiler.set_stance("force_eager"):  # theirs is compiled, which takes a C++ compiler
        want = bitnet.ActQuant.apply(x)
    assert torch.equal(q / s, want)
    assert torch.allclose(q * ratio, want, rtol=4e-7, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_unpack_is_exact(format):
    per = T.FORMATS[format]
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * per)  # all bytes there are
    for w in (every, every.T.contiguous(), *(weights(*s) for s in SHAPES)):
        p = T.pack(w, 0.5, format)
        assert torch.equal(p.unpack(), w) and p.shape == w.shape
        assert torch.equal(p.dense(), 0.5 * w.float())
    w = weights(640, 6400)
    assert T.pack(w, 1.0, format).nbytes / w.numel() == pytest.approx(1 / per, rel=1e-4)


def test_auto_takes_the_smaller_format_where_it_is_fast():
    small, large = T.pack(weights(64, 64), 1.0), T.pack(weights(2048, 4096), 1.0)
    assert small.format == "2bit" and large.format == ("1.6bit" if "avx512vbmi" in PATHS else "2bit")


def test_gradient_passes_straight_through():
    w, x, bias = (
        weights(35, 21),
        torch.randn(2, 3, 21, requires_grad=True),
        torch.randn(35, requires_grad=True),
    )
    scale, grad = torch.rand(35), torch.randn(2, 3, 35)
    p = T.pack(w, scale)
    got = torch.autograd.grad(T.linear(x, p, bias), (x, bias), grad)
    want = torch.autograd.grad(torch.nn.functional.linear(x, w * scale[:, None], bias), (x, bias), grad)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_checkpoint(tmp_path, format):
    w, x = weights(600, 700), torch.randn(3, 700)
    p = T.pack(w, torch.rand(600), format)
    p.save(tmp_path / "one.safetensors")
    back = T.PackedTernary.load(tmp_path / "one.safetensors")
    assert (
        back.format == format
        and torch.equal(back.unpack(), w)
        and torch.equal(T.linear(x, back), T.linear(x, p))
    )
    assert os.listdir(tmp_path) == ["one.safetensors"]
    save_file(
        p.tensors("a.") | T.pack(-w, 2.0, format).tensors("b."), tmp_path / "two.safetensors"
    )  # side by side in one region
    other = T.PackedTernary.from_tensors(load_file(tmp_path / "two.safetensors"), p.metadata("b."), "b.")
    assert torch.equal(other.unpack(), -w) and other.scale.tolist() == [2.0]
    assert p.to("cpu") is p and p.to("meta").device.type == "meta"


def test_damaged_checkpoints_are_refused():
    p = T.pack(weights(40, 40), 1.0, "1.6bit")
    t, m, make = p.tensors(), p.metadata(), T.PackedTernary.from_tensors
    for tensors, metadata, match in (
        (t, {}, "metadata: there is no 'ternary'"),
        ({"codes": p.codes}, m, "tensors: there is no 'scale'"),
        (t, {"ternary": "{"}, "is not what `PackedTernary.metadata` writes"),
        (t, {"ternary": m["ternary"].replace("1.6", "7")}, "format: '7bit'; allowed are '2bit', '1.6bit'"),
        (t | {"codes": p.codes[:1]}, m, "codes is torch.uint8 .*belongs to 40 x 40"),
        (t | {"codes": p.codes.float()}, m, "codes is torch.float32"),
        (t | {"codes": p.codes | 0xF3}, m, "no ternary weights in 1.6bit"),
        (t | {"scale": torch.ones(3)}, m, r"scale: shape \(3,\)"),
        (t | {"scale": torch.tensor([torch.inf])}, m, "scale: holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            make(tensors, metadata)
    two = T.pack(weights(40, 40), 1.0, "2bit")
    with pytest.raises(ValueError, match="no ternary weights in 2bit"):
        make(two.tensors() | {"codes": two.codes | 3}, two.metadata())


def test_bad_input_is_refused():
    w, x = weights(8, 16), torch.randn(2, 16)
    p, bad = T.pack(w, 1.0), w.clone()
    bad[3, 5], bad[4, 6] = 2, -128
    for match, call in (
        (r"w: 2 of 128 values are outside -1, 0, 1, the first is 2 at \[3, 5\]", lambda: T.pack(bad, 1.0)),
        (r"w: a torch.float32 tensor of shape \(8, 16\); allowed is an int8", lambda: T.pack(w.float(), 1.0)),
        (r"w: a torch.int8 tensor of shape \(16,\)", lambda: T.pack(w[0], 1.0)),
        ("w: a list", lambda: T.pack([[1]], 1.0)),
        ("format: '3bit'; allowed are 'auto', '2bit', '1.6bit'", lambda: T.pack(w, 1.0, "3bit")),
        (
            r"scale: shape \(5,\); allowed are a number, or one for each of the 8 rows",
            lambda: T.pack(w, torch.ones(5)),
        ),
        ("scale: 'a'", lambda: T.pack(w, "a")),
        ("scale: holds NaN", lambda: T.pack(w, float("nan"))),
        ("x: dtype torch.float16; allowed are float32 and bfloat16", lambda: T.linear(x.half(), p)),
        (r"x: shape \(2, 15\); the last axis must be the 16 inputs", lambda: T.linear(x[:, 1:], p)),
        (r"x: shape \(\)", lambda: T.linear(torch.tensor(1.0), p)),
        ("x: on meta, and packed on cpu", lambda: T.linear(x.to("meta"), p)),
        (r"bias: torch.float32 of shape \(7,\); allowed are 8 floats", lambda: T.linear(x, p, torch.ones(7))),
        ("bias: torch.int64", lambda: T.linear(x, p, torch.ones(8, dtype=torch.long))),
        ("packed: Tensor", lambda: T.linear(x, w)),
        ("backend: 'gpu' is no backend", lambda: T.linear(x, p, backend="gpu")),
        ("activations: 'fp8'; allowed are 'int8', 'bf16'", lambda: T.linear(x, p, activations="fp8")),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            call()
    if PATHS:
        with pytest.raises(
            ValueError, match=f"path: 'sse' does not run on this machine; allowed are {PATHS[0]}"
        ):
            T.on_cpu(x, p.codes, p.scale, None, 8, 16, p.format, "sse")


def test_without_the_library(monkeypatch):
    import lmlab.kernels as K

    x, w = torch.randn(2, 300), weights(400, 300)
    want = T.linear(x, T.pack(w, 1.0, "2bit"), backend="reference")
    monkeypatch.setattr(cpu, "missing", lambda: "it was taken away")
    monkeypatch.setattr(K, "_said", set())
    p = T.pack(w, 1.0)
    with pytest.warns(Fallback, match="ternary_linear runs on the torch reference"):
        assert torch.equal(T.linear(x, p), want)
    with pytest.raises(RuntimeError, match="bench: .*C\\+\\+ library"):
        T.bench(quick=True)


@needs_triton
def test_triton_gives_the_same_bits():
    g = torch.Generator().manual_seed(2)
    shapes = [(1, 1, 1), (33, 17, 2), (33, 17, 8), (70, 80, 9), (0, 5, 3), (5, 0, 1), (5, 0, 9), (9, 30, 0)]
    shapes += [
        (40, 3000, 1),
        (40, 2500, 3),
        (129, 64, 33),
        (300, 40, 17),
    ]  # several programs share a row, or a token
    for i, (rows, inputs, tokens) in enumerate(shapes):
        for j, (format, dtype) in enumerate(itertools.product(FORMATS, T.DTYPES)):
            scale = torch.randn(rows, generator=g) if (i + j) % 3 else torch.tensor([0.37])
            bias = torch.randn(rows, generator=g) if (i + j) % 3 == 1 else None
            p = T.pack(weights(rows, inputs, i), scale, format)
            x = (3 * torch.randn(tokens, inputs, generator=g)).to(dtype)
            got, want = (T.linear(x, p, bias, backend=b) for b in ("triton", "reference"))
            assert torch.equal(got, want), (rows, inputs, tokens, format, dtype, got - want)
    assert T.LINEAR.pick("triton", "cpu", torch.bfloat16) == ("triton", T.on_triton)


@needs_triton
def test_triton_at_the_ends_of_the_range():
    n = 2**13
    w = torch.ones(2, n, dtype=torch.int8)
    w[1] = -1
    p = T.pack(w, 127.0, "2bit")
    for tokens in (1, 9):
        x = torch.ones(tokens, n)
        assert torch.equal(T.linear(x, p, backend="triton"), T.linear(x, p, backend="reference"))
    x = torch.randn(10, 40)
    x[0] = 0
    x[1] *= 1e-7
    x[2] *= 1e30
    x[3, 7], x[4, 0], x[5, 39] = torch.nan, torch.inf, -torch.inf
    x[6] = torch.linspace(-127, 127, 40).round() + 0.5
    p = T.pack(weights(33, 40), 2.0)
    for dtype in T.DTYPES:
        for rows in (x.to(dtype), x[2:7].to(dtype).T.contiguous().T):
            got, want = (T.linear(rows, p, backend=b) for b in ("triton", "reference"))
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
    x = torch.randint(
        -127, 128, (9, 200)
    ).bfloat16()  # sums are integers, many of them between two numbers of bfloat16
    x[:, 0], p = 127, T.pack(weights(64, 200), 1.0)
    for rows in (x, x[:3]):
        got, want = (T.linear(rows, p, backend=b) for b in ("triton", "reference"))
        assert torch.equal(got, want)


@needs_triton
def test_triton_on_unrounded_activations():
    shapes = [(1, 1, 1), (33, 17, 3), (40, 3000, 2), (130, 40, 20), (5, 0, 2), (0, 5, 2), (5, 9, 0)]
    for i, ((rows, inputs, tokens), dtype) in enumerate(itertools.product(shapes, T.DTYPES)):
        scale, bias = torch.rand(rows if i % 3 else 1), torch.randn(rows) if i % 4 else None
        p, x = T.pack(weights(rows, inputs), scale, FORMATS[i % 2]), torch.randn(tokens, inputs).to(dtype)
        got = T.linear(x, p, bias, backend="triton", activations="bf16")
        want = T.reference_floats(x.double(), p.codes, scale.double(), bias, rows, inputs, p.format)
        test_rel(got, want.to(dtype), tolerance(dtype, max(1, inputs / 12)))
    p = T.pack(weights(64, 9), 1.0)
    assert T.linear(torch.full((2, 9), torch.nan), p, backend="triton", activations="bf16").isnan().all()


@needs_triton
def test_triton_packs_five_weights_a_byte_anew_once():
    from lmlab.kernels import ternary_triton as K

    p, x = T.pack(weights(40, 50), 1.0, "1.6bit"), torch.randn(2, 50)
    kept = len(K._twice)
    T.linear(x, p, backend="triton")
    made = K._twice[p.codes][1]
    T.linear(x, p, backend="triton")
    assert K._twice[p.codes][1] is made and len(K._twice) == kept + 1
    p.codes.copy_(T.pack(weights(40, 50, 1), 1.0, "1.6bit").codes)  # as loading a checkpoint does
    assert torch.equal(T.linear(x, p, backend="triton"), T.linear(x, p, backend="reference"))
    del p
    gc.collect()
    assert len(K._twice) == kept


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lmlab.kernels import ternary_triton as K

def code(kernel, numbers, **constants):
    "PTX of a kernel: the name of an argument says what it points to"
    types = dict(x="*bf16", y="*bf16", q="*i8", codes="*u8", parts="*i32", total="*i32") | numbers
    types |= dict.fromkeys(("ratio", "scale", "bias"), "*fp32") | dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    types = {n: types.get(n, "i32") for n in names}
    places = {(names.index(n),): v for n, v in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n][0] == "*"}
    source = ASTSource(kernel, types, places, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=dict(enable_fp_fusion=False)).asm

both, words = dict(SCALES=True, BIAS=True), dict(q="*i32", codes="*i32")
assert "fma" not in code(K._quantize, {}, BLOCK=1024)["ptx"]
few = code(K._few, words, N=1, S=64, SPLIT=False, DP4A=True, **both)["ptx"]
assert few.count("dp4a.u32.s32") == 64 and "ld.global.v4" in few and "fma" not in few
many = code(K._many, {}, R=128, N=64, S=16, **both)
assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in many["ptx"] and "fma.rn" not in many["ptx"]
code(K._join, {}, BLOCK=256, **both)
floats = code(K._floats, dict(parts="*fp32"), R=128, N=64, S=16, SPLIT=False, **both)
assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16" in floats["ptx"]
"""


@pytest.mark.skipif(absent("triton", "cuda") is not None, reason="Triton is not there")
def test_triton_compiles_for_a_gpu():
    "For an H100 or H200, without one: four-byte dot products, matrix units in int8, nothing fused that rounds"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr


DRIVER = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>
struct Matrix { const uint8_t* codes; const float *scale, *bias; void* y; int64_t rows; int32_t scales, trits; };
extern "C" const char* lmlab_ternary_paths();
extern "C" int lmlab_ternary_linear(const void*, int64_t, int64_t, int, const void*, int, int, const char*);

static uint32_t state = 1;
static int draw(int n) { state = state * 1664525 + 1013904223; return (state >> 16) % n; }

template <class T> struct Exact {  // memory of just this size, so that one byte beyond it is noticed
    T* p;
    size_t n;
    Exact(size_t n) : p((T*)malloc(n * sizeof(T) + (n == 0))), n(n) { memset((void*)p, 0xff, n * sizeof(T)); }
    ~Exact() { free(p); }
};

static int wrong = 0;

static void one(const std::string& path, int n, int m, int k, int trits, bool full, int threads) {
    int per = trits ? 5 : 4, tiles = (m + 31) / 32, steps = (k + 4 * per - 1) / (4 * per);
    std::vector<int> w(m * k);
    Exact<uint8_t> codes((size_t)tiles * steps * 128);
    Exact<float> x((size_t)n * k), scale(full ? m : 1), bias(m), y((size_t)n * m);
    for (auto& v : w) v = draw(3) - 1;
    for (int t = 0; t < tiles; t++)
        for (int s = 0; s < steps; s++)
            for (int b = 0; b < 128; b++) {
                int row = t * 32 + b / 4, byte = 0, digit = 1;
                for (int p = 0; p < per; p++, digit *= trits ? 3 : 4) {
                    int i = 4 * (s * per + p) + b % 4;
                    byte += digit * (row < m && i < k ? w[row * k + i] + 1 : 1);
                }
                codes.p[((size_t)t * steps + s) * 128 + b] = byte;
            }
    for (size_t i = 0; i < x.n; i++) x.p[i] = (draw(2001) - 1000) * 0.01f;
    for (size_t i = 0; i < scale.n; i++) scale.p[i] = (draw(200) - 100) * 0.01f;
    for (size_t i = 0; i < bias.n; i++) bias.p[i] = (draw(200) - 100) * 0.1f;
    Matrix layer = {codes.p, scale.p, full ? bias.p : nullptr, y.p, m, full, trits};
    if (lmlab_ternary_linear(x.p, n, k, 0, &layer, 1, threads, path.c_str())) { wrong++; return; }
    for (int t = 0; t < n; t++) {
        float largest = 1e-5f;
        for (int i = 0; i < k; i++) largest = std::fmax(largest, std::fabs(x.p[t * k + i]));
        float inverse = 1 / largest * 127, ratio = largest / 127;
        for (int r = 0; r < m; r++) {
            int64_t sum = 0;
            for (int i = 0; i < k; i++) sum += w[r * k + i] * (int64_t)std::nearbyint(x.p[t * k + i] * inverse);
            volatile float want = (float)sum * ratio;
            want = want * scale.p[full ? r : 0];
            if (full) want = want + bias.p[r];
            if (want != y.p[t * m + r] && wrong++ < 5)
                printf("%s n %d m %d k %d trits %d: %g instead of %g\n", path.c_str(), n, m, k, trits, y.p[t * m + r], want);
        }
    }
}

int main() {
    std::istringstream names(lmlab_ternary_paths());
    for (std::string path; names >> path;) {
        for (int n : {0, 1, 2, 5, 12, 13, 27})
            for (int m : {1, 32, 47})
                for (int k : {0, 1, 19, 20, 48, 83})
                    for (int trits : {0, 1}) one(path, n, m, k, trits, n % 2, 1);
        one(path, 3, 300, 400, 1, true, 2);
        printf("%s ", path.c_str());
    }
    printf("wrong %d\n", wrong);
    return wrong != 0;
}
"""


def test_under_sanitizers(tmp_path):
    "No byte outside its memory is touched and nothing undefined happens, on any path, down to matrices of one weight"
    native.under_sanitizers(tmp_path, DRIVER, ("ternary",))


def test_arm(tmp_path):
    native.on_arm(tmp_path, DRIVER, ("ternary",))
