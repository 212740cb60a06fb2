"""Differential attention: every form against two softmax maps written out, its gradients, its norm, its limits."""

import importlib.util
import os

import lmlab.kernels as kernels
import pytest
import torch
import torch.nn.functional as F
from lmlab.kernels import attention, cpu, differential_attention
from lmlab.kernels import differential as D
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lmlab.core.check import check_kernel, rel_error, test_rel

test_rel.__test__ = False
built = pytest.mark.skipif(cpu.library() is None, reason="the C++ library is not there")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"),
    reason="Triton's interpreter is not there",
)
FORMS = ["reference", pytest.param("cpu", marks=built), pytest.param("triton", marks=interpreted)]
pytestmark = pytest.mark.filterwarnings("ignore::lmlab.kernels.Fallback")  # float64 runs on the reference

# rows of the batch, pairs of heads, key pairs, queries, keys, width
SHAPES = [(1, 1, 1, n, m, d) for n, m, d in [(1, 1, 1), (1, 7, 3), (2, 2, 2), (5, 9, 7), (13, 13, 8), (17, 40, 12), (33, 33, 16), (1, 130, 17)]]  # fmt: skip
SHAPES += [(b, h, hk, n, m, d) for b, h, hk in [(2, 2, 1), (1, 6, 2), (3, 2, 2)] for n, m, d in [(1, 17, 16), (7, 20, 5)]]  # fmt: skip
SHAPES += [(0, 2, 1, 3, 3, 4), (2, 2, 1, 0, 5, 4), (1, 2, 1, 0, 0, 4)]


def draw(shape, dtype, generator=None):
    "Queries, keys, values, lambda and a gain"
    b, h, hk, n, m, d = shape
    g = generator or torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    lam = torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32))
    return r(b, 2 * h, n, d), r(b, 2 * hk, m, d), r(b, hk, m, 2 * d), lam, 1 + r(2 * d) / 4


def by_hand(q, k, v, lam, weight=None, causal=True, start=None, stop=None, lambda_init=None, scale=None):
    "The definition again, one query at a time, with the keys that it sees and no others"
    (b, h, n, d), (hk, m) = q.shape, v.shape[1:3]
    q, k, v, out = q.double(), k.double(), v.double(), []
    for r in range(b):
        first = 0 if start is None else int(start[r])
        for i in range(h // 2):
            own = i // (h // 2 // hk)
            for x in range(n):
                end = min(m if stop is None else int(stop[r]), m - n + x + 1 if causal else m)
                if first >= end:
                    out.append(v.new_zeros(2 * d) * lam)
                    continue
                a1, a2 = (
                    ((scale or d**-0.5) * k[r, 2 * own + s, first:end] @ q[r, 2 * i + s, x]).softmax(-1)
                    for s in (0, 1)
                )
                o = (a1 - lam.double() * a2) @ v[r, own, first:end]
                if lambda_init is not None:
                    gain = 1 if weight is None else weight.double()
                    o = (1 - lambda_init) * gain * o / (o.square().mean() + 1e-5).sqrt()
                out.append(o)
    none = 0 * (q.sum() + k.sum() + v.sum() + (0 if weight is None else weight.sum()))
    return torch.stack([none.expand(2 * d), *out])[1:].view(b, h // 2, n, 2 * d)


LAM = torch.tensor(
    0.7
)  # its gradient is a sum in which much cancels: it is looked at below, against what it sums


@pytest.mark.parametrize("how", FORMS)
def test_equals_the_definition(how):
    "Values, gradients, threads, strides, NaN, unwritten memory; the norm of odd shapes follows"

    def op(q, k, v, weight):
        lam = LAM.to(torch.promote_types(q.dtype, torch.float32))
        normed = dict(lambda_init=0.2, weight=weight) if q.shape[2] % 2 else {}
        return differential_attention(q, k, v, lam, **normed, backend=how)

    def definition(q, k, v, weight):
        return by_hand(q, k, v, LAM, weight, lambda_init=0.2 if q.shape[2] % 2 else None)

    def make(*args):
        q, k, v, _, weight = draw(*args)
        return q, k, v, weight

    about = dict(terms=lambda s: s[4] + s[5], label=how)
    about |= dict(
        slack=3
    )  # a difference of two maps of nearly its own size, and the gradient of a score again
    if how != "triton":
        check_kernel(op, definition, make, SHAPES[:: 3 if how == "reference" else 1], **about)
    else:
        skip = dict.fromkeys(
            ("gradients_survive_gradcheck", "kernel_compiles"), "the same whatever the backend"
        )
        check_kernel(
            op,
            definition,
            make,
            [(2, 4, 2, 5, 9, 3), (1, 1, 1, 33, 40, 12)],
            threads=(1,),
            skip=skip,
            **about,
        )


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding(how, causal):
    "Rows of the batch that begin late and end early, one that sees nothing; values and gradients"
    start, stop = torch.tensor([0, 5, 30, 12]), torch.tensor([40, 33, 40, 12])
    for dtype in (torch.float32, torch.bfloat16):
        x = [t.requires_grad_() for t in draw((4, 2, 1, 22, 40, 8), dtype)]
        y = [t.detach().double().requires_grad_() for t in x]
        o = differential_attention(*x[:4], causal, 0.4, start, stop, 0.3, x[4], backend=how)
        want = by_hand(*y, causal, start, stop, 0.3, 0.4)
        tol = 2e-6 if dtype == torch.float32 else 2e-2
        test_rel(o, want, tol)
        assert (o[3] == 0).all() and (not causal or (o[2, :, :12] == 0).all())
        seed = torch.randn(o.shape)
        got = torch.autograd.grad(o, x, seed.to(dtype))
        for a, b in zip(got, torch.autograd.grad(want, y, seed.double()), strict=True):
            if a.ndim:
                test_rel(a, b, 2 * tol)
            else:  # a sum in which much cancels
                assert abs(a - b) < tol * want.norm() * seed.norm()


def test_gradients_in_float64():
    "By finite differences, the five of them"
    start, stop = torch.tensor([3, 9]), torch.tensor([9, 7])
    for causal in (True, False):
        for init in (None, 0.5):
            x = [t.requires_grad_() for t in draw((2, 4, 2, 5, 9, 3), torch.float64)][
                : 4 + (init is not None)
            ]
            f = lambda *a, c=causal, i=init: differential_attention(*a[:4], c, 0.5, start, stop, i, *a[4:])
            assert torch.autograd.gradcheck(f, x)


@pytest.mark.parametrize("how", FORMS)
def test_limits_of_the_method(how):
    "Row sums are 1 - lam; equal maps leave (1 - lam) of one, and the norm takes the factor out; lam = 0 is plain attention"
    q, k, v, lam, _ = draw((1, 3, 3, 19, 19, 8), torch.float32)
    run = lambda *x, **kw: differential_attention(*x, **kw, backend=how)
    ones = run(q, k, torch.ones_like(v), lam)
    test_rel(ones, torch.full_like(ones, 0.3), 2e-6)
    single = attention.reference(q[:, ::2], k[:, ::2], v, None, None, 8**-0.5, True)
    test_rel(run(q, k, v, 0 * lam), single, 2e-6)
    x = q[:, ::2].repeat_interleave(2, 1), k[:, ::2].repeat_interleave(2, 1), v
    test_rel(run(*x, lam), 0.3 * single, 4e-6)
    norm = lambda o: 0.8 * F.rms_norm(o, (16,), eps=1e-12)
    for at in (lam, 0.5 * lam):
        test_rel(run(*x, at, lambda_init=0.2, eps=1e-12), norm(single), 2e-5)
    other = v.clone()
    other[:, 1] *= 100
    a, b = (run(q, k, w, lam, lambda_init=0.2) for w in (v, other))
    assert torch.equal(a[:, ::2], b[:, ::2])
    assert rel_error(a[:, 1], b[:, 1]) < 1e-3  # of its own values only the eps of the norm sees the size


@pytest.mark.parametrize("how", FORMS)
def test_chunks_and_decoding(how):
    "A prompt, a chunk onto a cache and single tokens are one call; query pairs share key pairs as the Flash files map them"
    q, k, v, lam, _ = draw((2, 4, 2, 21, 21, 8), torch.float32)
    run = lambda i, j: differential_attention(q[:, :, i:j], k[:, :, :j], v[:, :, :j], lam, backend=how)
    whole = run(0, 21)
    test_rel(
        torch.cat([run(i, j) for i, j in ((0, 9), (9, 18), (18, 19), (19, 20), (20, 21))], 2), whole, 2e-6
    )
    wide_k = k.unflatten(1, (2, 2)).repeat_interleave(2, 1).flatten(1, 2)  # pairs are repeated, not heads
    test_rel(differential_attention(q, wide_k, v.repeat_interleave(2, 1), lam, backend=how), whole, 2e-6)
    assert whole.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy under the interpreter
def test_what_is_not_seen_reaches_nothing(how):
    "NaN and infinities of later keys, and of keys out of bounds"
    for at, bounds in ((30, None), (3, 5), (39, 39)):
        x = draw((1, 2, 1, 40, 40, 8), torch.float32)
        kw = {} if bounds is None else dict(start=torch.tensor([5]), stop=torch.tensor([39]))
        run = lambda *x, kw=kw: differential_attention(*x[:4], **kw, lambda_init=0.2, backend=how)
        clean = run(*x)
        for which, what in ((1, torch.nan), (2, torch.nan), (2, torch.inf)):
            y = [t.clone() for t in x]
            y[which][:, 0, at, 3] = what
            got, reached = run(*y), at if bounds is None else 40
            test_rel(got[:, :, :reached], clean[:, :, :reached], 1e-6)
            assert not got[:, :, reached:].isfinite().all(-1).any()


def test_subtraction_is_in_float32():
    "Two maps that nearly cancel: in bfloat16 the loss is that of its inputs, not of a rounded difference"
    q, k, v, lam, _ = (t.float() for t in draw((1, 2, 2, 33, 33, 16), torch.bfloat16))
    k[:, 1::2], q[:, 1::2], lam = k[:, ::2], q[:, ::2], torch.tensor(0.999)
    o = differential_attention(*(t.bfloat16() for t in (q, k, v)), lam, backend="reference")
    test_rel(o, by_hand(q, k, v, lam), 4e-3)


def test_operation_for_torch():
    q, k, v, lam, weight = draw((2, 4, 2, 5, 9, 6), torch.float32)
    bounds = torch.tensor([1, 2]), torch.tensor([9, 8])
    for x in (
        (q, k, v, lam),
        [t.clone().requires_grad_() for t in (q, k, v, lam)],
        [t.bfloat16() for t in (q, k, v)] + [lam],
    ):
        for rest in ((weight, *bounds, 0.5, True, 0.2), (None, None, None, 0.5, True, None)):
            opcheck(D._forward, (*x, *rest, 1e-5, "auto"))
    for rest in ((weight, *bounds, 0.5, True, 0.2), (None, None, None, 0.5, False, None)):
        opcheck(D._backward, (torch.randn(2, 4, 5, 12), q, k, v, lam, *rest, 1e-5, "auto"))


def test_autocast_and_compile():
    "bfloat16 tokens go with a float32 lambda and gain, in one graph with the backward"
    q, k, v, lam, weight = draw((1, 2, 1, 13, 13, 8), torch.float32)
    w = torch.eye(8).requires_grad_()
    lam.requires_grad_()

    def total(w, lam):
        with torch.autocast("cpu", torch.bfloat16):
            o = differential_attention(q @ w, k @ w, v.bfloat16(), lam.exp(), lambda_init=0.2, weight=weight)
        assert o.dtype == torch.bfloat16
        return o.float().square().sum() + o[..., 0].float().sum()

    eager = torch.autograd.grad(total(w, lam), (w, lam))
    made = torch.compile(total, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(made(w, lam), (w, lam)), eager, strict=True):
        assert a.dtype == torch.float32
        test_rel(a, b, 0.02)


def test_operations_are_counted():
    "By torch's counter; the backward shares two of its products between the maps"
    b, h, hk, n, m, d = 2, 4, 2, 16, 24, 8
    x = [t.requires_grad_() for t in draw((b, h, hk, n, m, d), torch.float32)[:4]]
    with FlopCounterMode(display=False) as forward:
        o = differential_attention(*x)
    assert forward.get_total_flops() == 2 * b * 2 * h * n * m * (d + 2 * d)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    assert backward.get_total_flops() == 2 * b * h * n * m * (6 * d + 3 * 2 * d)


def test_wrong_input_fails_at_the_door():
    q, k, v, lam, weight = draw((2, 4, 2, 5, 9, 6), torch.float32)
    whole, bad = torch.tensor([1, 2]), torch.tensor
    for match, args, kw in (
        (r"q: shape \(8, 5, 6\); allowed are four axes", (q[0], k, v, lam), {}),
        ("k: torch.bfloat16 on cpu, and q torch.float32", (q, k.bfloat16(), v, lam), {}),
        ("v: torch.float32 on meta", (q, k, v.to("meta"), lam), {}),
        ("q: torch.int64; it must be floating", (q.long(), k.long(), v.long(), lam), {}),
        ("q: 7 heads; allowed is an even number", (q[:, :7], k, v, lam), {}),
        (r"k: shape \(2, 3, 9, 6\); \(2, 4, 9, 6\) belongs", (q, k[:, :3], v, lam), {}),
        (r"k: shape \(2, 4, 9, 5\)", (q, k[..., 1:], v, lam), {}),
        (r"v: shape \(2, 2, 9, 6\); \(2, 2, 9, 12\) belongs to k, twice as wide", (q, k, v[..., ::2], lam), {}),
        (r"v: shape \(2, 2, 8, 12\)", (q, k, v[:, :, 1:], lam), {}),
        ("v: 2 heads; allowed is a divisor of the 3 pairs", (q[:, :6], k, v, lam), {}),
        ("k: 4 keys for 5 queries", (q, k[:, :, :4], v[:, :, :4], lam), {}),
        (r"lam: \(1,\), torch.float32; allowed is a scalar", (q, k, v, lam[None]), {}),
        (r"lam: \(\), torch.bfloat16", (q, k, v, lam.bfloat16()), {}),
        ("lam: float; allowed is a scalar tensor", (q, k, v, 0.7), {}),
        ("lam: on meta", (q, k, v, lam.to("meta")), {}),
        ("lam: nan; it must be finite", (q, k, v, bad(torch.nan)), {}),
        ("lam: inf; it must be finite", (q, k, v, bad(torch.inf)), {}),
        ("weight: a gain without a norm", (q, k, v, lam), dict(weight=weight)),
        (r"weight: shape \(11,\)", (q, k, v, lam), dict(weight=weight[1:], lambda_init=0.2)),
        ("lambda_init: nan", (q, k, v, lam), dict(lambda_init=float("nan"))),
        ("eps: 0; allowed is a positive", (q, k, v, lam), dict(eps=0)),
        ("start: torch.float32; allowed is", (q, k, v, lam), dict(start=whole.float())),
        (r"stop: shape \(2, 8\)", (q, k, v, lam), dict(stop=whole[:, None].expand(2, 8))),
        ("backend: 'gpu' is no backend", (q, k, v, lam), dict(backend="gpu")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            differential_attention(*args, **kw)


@pytest.mark.filterwarnings("default::lmlab.kernels.Fallback")
def test_without_the_library(monkeypatch):
    x = draw((1, 2, 1, 9, 9, 4), torch.float32)[:4]
    want = differential_attention(*x, backend="reference")
    monkeypatch.setattr(cpu, "missing", lambda: "it was taken away")
    monkeypatch.setattr(kernels, "_said", set())
    with pytest.warns(kernels.Fallback, match="differential_attention runs on the torch reference, because"):
        assert torch.equal(differential_attention(*x), want)


COMPILE = """
import triton, triton.language as tl
import lmlab.kernels.differential_triton as R
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tensors = dict.fromkeys(("q", "k", "v", "out", "grad", "G", "dq", "dk", "dv", "weight"), "*bf16")
tensors |= dict.fromkeys(("lam", "logs", "inner", "dweight"), "*fp32") | dict.fromkeys(("start", "stop"), "*i64")
floats = dict.fromkeys(("scale", "factor", "eps", "plain"), "fp32")
given = dict(M=64, N=64, D=64, E=128, CAUSAL=True, NORM=True, DOT=tl.bfloat16)
for kernel in (R._outputs, R._prepare, R._query_gradients, R._key_gradients):
    names = kernel.arg_names
    sizes = {n: v for n, v in given.items() if n in names}
    kinds = {n: "constexpr" if n in sizes else (tensors | floats).get(n, "i32") for n in names}
    odd = {"n", "m", "heads", "kv_heads", *sizes, *floats}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in odd}
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in sizes.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8, num_stages=2))
    print("wgmma.mma_async" in made.asm["ptx"])
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_compiles_for_a_gpu(python, tmp_path):
    "Down to machine code for compute capability 9.0, products on its matrix units; no GPU is needed for that"
    said = python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split()
    assert said == ["True"] * 4
