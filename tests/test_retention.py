"""Gated retention: every form against the recurrence token by token, its gradients, its state, its limits."""

import importlib.util
import os
from pathlib import Path

import lmlab.kernels as kernels
import native
import pytest
import torch
from lmlab.kernels import cpu, gated_retention
from lmlab.kernels import retention as R
from torch.utils.flop_counter import FlopCounterMode

from lmlab.core.check import check_kernel, test_rel

test_rel.__test__ = False
OP = torch.ops.lmlab.gated_retention.default
built = pytest.mark.skipif(cpu.library() is None, reason="the C++ library is not there")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"),
    reason="Triton's interpreter is not there",
)
FORMS = ["reference", pytest.param("cpu", marks=built), pytest.param("triton", marks=interpreted)]
pytestmark = pytest.mark.filterwarnings("ignore::lmlab.kernels.Fallback")  # float64 runs on the reference


def loop(q, k, v, log_gamma, state):
    "The recurrence, token by token"
    outs, scale = [], k.shape[-1] ** -0.5 if k.shape[-1] else 1
    for n in range(q.shape[2]):
        written = scale * k[:, :, n, :, None] * v[:, :, n, None]
        state = log_gamma[:, :, n].exp()[..., None, None] * state + written
        outs.append((q[:, :, n, None] @ state)[:, :, 0])
    return (torch.stack(outs, 2) if outs else 0 * v), state


def case(shape, dtype, generator, fade=0.5):
    "Inputs of size (b, h, t, d, e); the log decays lie between -fade and 0"
    b, h, t, d, e = shape
    r = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    log_gamma = -fade * torch.rand(b, h, t, generator=generator, dtype=torch.float64)
    return r(b, h, t, d), r(b, h, t, d), r(b, h, t, e), log_gamma.to(wide), r(b, h, d, e).to(wide)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


WIDTHS = [(1, 1), (4, 4), (5, 3), (8, 16), (15, 17), (16, 15), (17, 33), (31, 1), (1, 32), (33, 48)]
LENGTHS = (0, 1, 2, 15, 16, 17, 33)
SHAPES = [(1, 1 + i % 2, t, *w) for i, w in enumerate(WIDTHS) for t in LENGTHS]
SHAPES += [
    (0, 2, 5, 3, 4),
    (2, 0, 5, 3, 4),
    (2, 3, 4, 0, 3),
    (2, 3, 4, 3, 0),
    (3, 1, 50, 20, 7),
    (1, 1, 65, 64, 64),
]
QUICK = {
    "the_custom_op_is_well_formed": "looked at on fewer shapes",
    "kernel_compiles": "looked at on fewer shapes",
    "gradients_survive_gradcheck": "looked at on fewer shapes",
}
terms = lambda s: s[3] * (1 + s[2])
FEW = {"reference": SHAPES[::12], "cpu": SHAPES, "triton": [(1, 2, 17, 5, 3), (1, 1, 33, 16, 17)]}


@pytest.mark.parametrize("how", FORMS)
def test_equals_the_recurrence(how):
    "Values, last state, five gradients, threads, strides, NaN, unwritten memory"

    def op(*args):
        o, state = gated_retention(*args, chunk=16, backend=how)
        return o, state.to(o.dtype)  # the checker wants outputs in the dtype of the inputs

    assert len(SHAPES) >= 60
    about = dict(terms=terms, label=how)
    dtypes = R.DTYPES if how == "triton" else None
    threads = (1,) if how == "triton" else None
    check_kernel(op, loop, case, FEW[how], dtypes=dtypes, threads=threads, skip=QUICK, **about)
    small = [(1, 1, 5, 2, 3), (2, 0, 3, 2, 2), (1, 1, 0, 2, 2)]
    if how != "triton":
        check_kernel(op, loop, case, small, only=("kernel_compiles", "gradients_survive_gradcheck"), **about)
    whole = lambda *x: (*case(*x), 16, how)
    check_kernel(
        R._forward,
        R.reference,
        whole,
        small[:1],
        only=("the_custom_op_is_well_formed",),
        custom_op=OP,
        **about,
    )


@pytest.mark.parametrize("how", FORMS)
def test_any_chunk_and_any_pieces(how):
    "The chunk changes nothing, and a state handed on in pieces is one call, gradients through it included"
    dtype = torch.float64 if how == "reference" else torch.float32
    x = [o.requires_grad_() for o in case((1, 2, 30, 6, 5), dtype, seeded())]
    tol = 1e-12 if how == "reference" else 3e-6
    run = lambda x, chunk=64: gated_retention(*x, chunk=chunk, backend=how)
    want = run(x)
    grads = torch.autograd.grad((want[0].square().sum() + want[1].sin().sum()), x)
    for chunk in (1, 16, 300):
        for a, b in zip(run(x, chunk), want, strict=True):
            test_rel(a, b, tol)
    outs, state, at = [], x[4], 0
    for n in (1, 18, 0, 11):
        o, state = run([*(y[:, :, at : at + n] for y in x[:4]), state], 16)
        outs.append(o)
        at += n
    o = torch.cat(outs, 2)
    test_rel(o, want[0], tol)
    test_rel(state, want[1], tol)
    for a, b in zip(torch.autograd.grad(o.square().sum() + state.sin().sum(), x), grads, strict=True):
        test_rel(a, b, 10 * tol)
    test_rel(run(x[:4])[0], run([*x[:4], 0 * x[4]])[0], 0)  # no state is an empty one


@pytest.mark.parametrize("how", FORMS)
def test_no_decay_and_strong_decay(how):
    "Without decay it is causal linear attention; -30 a step leaves hardly more than a token's own score; a gate may also be shut"
    q, k, v, log_gamma, state = case((1, 2, 40, 8, 8), torch.float32, seeded())
    run = lambda lg, s=None: gated_retention(q, k, v, lg, s, chunk=16, backend=how)
    test_rel(run(0 * log_gamma)[0], (q @ k.mT).tril() @ v / 8**0.5, 2e-6)
    for fade in (-30.0, -1e4, -1e30):
        o, last = run(torch.full_like(log_gamma, fade), state)
        test_rel(o, (q * k).sum(-1, keepdim=True) * v / 8**0.5, 2e-6)
        assert last.isfinite().all()
    x = [o.requires_grad_() for o in (q, k, v, torch.full_like(log_gamma, -30.0), state)]
    wide = [o.detach().double().requires_grad_() for o in x]
    grad = torch.randn(q.shape, generator=seeded(1))
    got = torch.autograd.grad(gated_retention(*x, chunk=16, backend=how)[0], x, grad)
    want = torch.autograd.grad(loop(*wide)[0], wide, grad.double())
    for a, b in zip(got, want, strict=True):
        test_rel(a, b, 2e-4)  # exp of a running sum near -480: its last bit is 3e-5


@pytest.mark.parametrize("how", FORMS)
def test_what_is_not_finite_goes_forward_only(how):
    "A token that is not finite changes no earlier output, and a finite one neither"
    x = case((1, 1, 40, 4, 20), torch.float32, seeded())
    clean = gated_retention(*x, chunk=16, backend=how)[0]
    for i in range(4):
        for at, bad in ((0, torch.nan), (15, torch.inf), (21, torch.nan), (39, torch.inf)):
            y = [o.clone() for o in x]
            y[i][:, :, at] = bad
            o, last = gated_retention(*y, chunk=16, backend=how)
            assert torch.equal(o[:, :, :at], clean[:, :, :at]), (i, at, bad)
            assert not o[:, :, at].isfinite().all()
            if i:  # a query leaves nothing behind
                assert not last.isfinite().any() and not o[:, :, at:].isfinite().any()
    y = [o.clone() for o in x]
    y[2][:, :, 20, 7] = torch.nan  # one channel of the values spoils no other
    o, last = gated_retention(*y, chunk=16, backend=how)
    assert o.isnan().sum() == 20 and o[:, :, 20:, 7].isnan().all() and last[..., 7].isnan().all()


def test_simple_gla_of_another_library():
    "Flash-linear-attention's plain torch forms, from their file: importing the package would need its GPU kernels"
    spec = importlib.util.find_spec("fla")
    folder = spec and Path(spec.submodule_search_locations[0]) / "ops" / "simple_gla" / "naive.py"
    if not folder or not folder.exists():
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("simple_gla_naive", folder)
    fla = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(fla)
    except ImportError as e:
        pytest.skip(f"flash-linear-attention needs more: {e}")
    q, k, v, log_gamma, state = case((2, 3, 70, 8, 8), torch.float32, seeded())
    swapped = [o.transpose(1, 2) for o in (q, k, v, log_gamma)]
    grown = state * 8**0.5  # it scales queries, so its state is larger
    for name in ("naive_recurrent_simple_gla", "naive_chunk_simple_gla"):
        want, last = getattr(fla, name)(*swapped, initial_state=grown, output_final_state=True)
        for how in ("reference", "auto"):
            got, state_ = gated_retention(q, k, v, log_gamma, state, chunk=16, backend=how)
            test_rel(got.transpose(1, 2), want.float(), 5e-6)
            test_rel(state_ * 8**0.5, last, 5e-6)


@built
def test_instruction_sets_agree():
    "AVX2 and AVX-512 return the same bits; the base path, which has no fused multiply-add, the same up to rounding"
    for dtype in R.DTYPES:
        x = case((2, 2, 150, 37, 50), dtype, seeded())
        seeds = torch.randn(2, 2, 150, 50).to(dtype), torch.randn(2, 2, 37, 50)
        made = {}
        for level in cpu.info()["levels"]:
            with cpu.level(level):
                made[level] = *R.on_cpu(*x, 64), *R.on_cpu_backward(*seeds, *x, 64)
        best = made[cpu.info()["level"]]
        for level, outs in made.items():
            for a, b in zip(outs, best, strict=True):
                if level == "base":
                    test_rel(a, b, 5e-3 if a.dtype == torch.bfloat16 else 3e-6)
                else:
                    assert torch.equal(a, b), (level, dtype)


def test_autocast_compile_and_a_wrong_gate():
    "bfloat16 tokens go with float32 gates and states, in one graph with the backward; and the checks would notice a wrong gate"
    x = case((1, 2, 37, 8, 8), torch.float32, seeded())
    w = torch.eye(8).requires_grad_()

    def layer(w):
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = (o @ w for o in x[:3])
            o, state = gated_retention(q, k, v, *x[3:])
        return o, state

    o, state = layer(w)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    total = lambda w: sum(y.float().square().sum() for y in layer(w))
    (eager,) = torch.autograd.grad(total(w), w)
    (compiled,) = torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(w), w)
    test_rel(compiled, eager, 0.02)
    want = loop(*(y.double() for y in x))[0]
    test_rel(gated_retention(*x)[0], want, 3e-6)
    late = x[3].roll(1, -1)  # each token fades by the gate of the one before
    with pytest.raises(AssertionError):
        test_rel(gated_retention(*x[:3], late, x[4])[0], want, 1e-2)


def test_wrong_input_fails_at_the_door():
    q, k, v, lg, s = case((1, 2, 5, 4, 3), torch.float32, seeded())
    for match, args in (
        (r"q: shape \(2, 5, 4\); allowed are four axes", (q[0], k, v, lg)),
        (r"k: shape \(1, 2, 4, 4\); \(1, 2, 5, 4\) belongs to q", (q, k[:, :, 1:], v, lg)),
        (r"v: shape \(1, 2, 4, 3\)", (q, k, v[:, :, 1:], lg)),
        (r"log_gamma: shape \(1, 2, 5, 1\)", (q, k, v, lg[..., None])),
        (r"state: shape \(1, 2, 3, 4\); \(1, 2, 4, 3\) belongs", (q, k, v, lg, s.mT)),
        ("q, k, v: dtypes torch.float32, torch.bfloat16, torch.float32", (q, k.bfloat16(), v, lg)),
        ("q, k, v: dtypes torch.int64", (q.long(), k, v, lg)),
        ("log_gamma: dtype torch.int64", (q, k, v, lg.long())),
        ("state: on meta, and q on cpu", (q, k, v, lg, s.to("meta"))),
        ("chunk: 0; at least 1", (q, k, v, lg, s, 0)),
        ("backend: 'gpu' is no backend", (q, k, v, lg, s, 64, "gpu")),
    ):
        with pytest.raises(ValueError, match=match):
            gated_retention(*args)


@pytest.mark.filterwarnings("default::lmlab.kernels.Fallback")
def test_without_the_library(monkeypatch):
    x = case((1, 2, 9, 4, 3), torch.float32, seeded())
    want = gated_retention(*x, backend="reference")[0]
    monkeypatch.setattr(cpu, "missing", lambda: "it was taken away")
    monkeypatch.setattr(kernels, "_said", set())
    with pytest.warns(kernels.Fallback, match="gated_retention runs on the torch reference, because it was"):
        assert torch.equal(gated_retention(*x)[0], want)


COMPILE = """
import triton, triton.language as tl
import lmlab.kernels.retention_triton as R
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

tensors = dict.fromkeys(("q", "k", "v", "do", "o", "dq", "dk", "dv", "states", "gradients"), "*bf16")
tensors |= dict.fromkeys(("log_gamma", "first", "last", "dlog_gamma"), "*fp32") | {"scale": "fp32"}
sizes = dict(C=64, D=64, E=64, DOT=tl.bfloat16)
for kernel in (R._states, R._outputs, R._state_gradients, R._gradients, R._value_gradients):
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in sizes else tensors.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in sizes and n not in ("t", "scale")}
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in sizes.items()}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=2))
    print("wgmma.mma_async" in made.asm["ptx"])
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_compiles_for_a_gpu(python, tmp_path):
    "Down to machine code for compute capability 9.0, products on its matrix units; no GPU is needed for that"
    said = python(COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).split()
    assert said == ["True"] * 5


@pytest.mark.parametrize("backward", [False, True])
def test_can_be_raced(backward):
    "The form that the kernel is raced against computes the same, and a case runs"
    x = case((1, 2, 150, 8, 8), torch.float32, seeded())[:4]
    test_rel(R.in_torch(*x), gated_retention(*x)[0], 3e-6)
    timing, work = R._one_case(1, 2, 20, 8, torch.float32, backward, 1, quick=True)
    assert next(iter(timing.seconds)) == "kernel" and work["bytes"] > 0 and work["flops"] > 0
    assert work["share of elementwise time"][0] < 1


def test_operations_are_counted():
    "By torch's counter: scores and values over whole chunks, reading and writing the state; with the backward"
    q, k, v, log_gamma, _ = (x.requires_grad_() for x in case((2, 3, 128, 8, 5), torch.float32, seeded()))
    with FlopCounterMode(display=False) as forward:
        o, _ = gated_retention(q, k, v, log_gamma)
    assert forward.get_total_flops() == 2 * 2 * 3 * 128 * (64 * (8 + 5) + 2 * 8 * 5)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    assert backward.get_total_flops() == 2 * 2 * 3 * 128 * (64 * (3 * 8 + 2 * 5) + 5 * 8 * 5)


DRIVER = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>
struct Tokens { const void* data; int64_t b, h, t; };
struct Call {
    Tokens q, k, v, dout;
    const float *log_gamma, *state, *dstate_out;
    void *o, *dq, *dk, *dv;
    float *state_out, *dlog_gamma, *dstate;
    int64_t n, h, t, d, e, chunk;
    float scale;
    int32_t half, threads;
};
extern "C" int lmlab_retention(const Call*, int);
extern "C" const char* lmlab_levels();
extern "C" int lmlab_set_level(const char*);

static uint32_t drawn = 1;
static float draw() { drawn = drawn * 1664525 + 1013904223; return (int(drawn >> 16) - 32768) / 32768.f; }

struct Exact {  // memory of just this size, so that one byte beyond it is noticed; NaN until it is written
    char* p;
    size_t n, width;
    Exact(size_t n, int half) : n(n), width(half ? 2 : 4) { p = (char*)malloc(n * width); memset(p, 0xff, n * width); }
    Exact(const Exact&) = delete;
    ~Exact() { free(p); }
    Exact& fill(float low, float high) {
        for (size_t i = 0; i < n; i++) { float f = low + (high - low) * (draw() + 1) / 2; memcpy(p + i * width, (char*)&f + 4 - width, width); }
        return *this;
    }
    double at(size_t i) const { float f = 0; memcpy((char*)&f + 4 - width, p + i * width, width); return f; }
};

static int wrong = 0;

static void one(const std::string& level, int n, int t, int d, int e, int chunk, int half, int threads) {
    size_t nt = (size_t)n * t, nm = (size_t)n * d * e;
    Exact q(nt * d, half), k(nt * d, half), v(nt * e, half), dout(nt * e, half), g(nt, 0), state(nm, 0), dlast(nm, 0);
    Exact o(nt * e, half), dq(nt * d, half), dk(nt * d, half), dv(nt * e, half), last(nm, 0), dg(nt, 0), first(nm, 0);
    for (auto* x : {&q, &k, &v, &dout, &state, &dlast}) x->fill(-1, 1);
    g.fill(-1, 0);
    auto tokens = [&](Exact& x, int64_t w) { return Tokens{x.p, t * w, t * w, w}; };
    Call c = {tokens(q, d), tokens(k, d), tokens(v, e), tokens(dout, e), (float*)g.p, (float*)state.p, (float*)dlast.p,
              o.p, dq.p, dk.p, dv.p, (float*)last.p, (float*)dg.p, (float*)first.p,
              n, 1, t, d, e, chunk, 1 / std::sqrt((float)d), half, threads};
    if (lmlab_retention(&c, 0) || lmlab_retention(&c, 1)) { wrong++; return; }
    for (auto* x : {&o, &dq, &dk, &dv, &last, &dg, &first})
        for (size_t i = 0; i < x->n; i++)
            if (!std::isfinite(x->at(i)) && wrong++ < 5) printf("%s t %d d %d e %d: left unwritten\n", level.c_str(), t, d, e);
    for (int w = 0; w < n; w++) {
        std::vector<double> R(d * e);
        for (int i = 0; i < d * e; i++) R[i] = state.at((size_t)w * d * e + i);
        for (int at = w * t; at < (w + 1) * t; at++)
            for (int j = 0; j < e; j++) {
                double sum = 0;
                for (int i = 0; i < d; i++) {
                    R[i * e + j] = std::exp(g.at(at)) * R[i * e + j] + k.at(at * d + i) * v.at(at * e + j) / std::sqrt((double)d);
                    sum += q.at(at * d + i) * R[i * e + j];
                }
                if (std::fabs(sum - o.at(at * e + j)) > (half ? 0.05 : 1e-4) && wrong++ < 5)
                    printf("%s t %d d %d e %d: %g instead of %g\n", level.c_str(), t, d, e, o.at(at * e + j), sum);
            }
    }
}

int main() {
    std::istringstream names(lmlab_levels());
    for (std::string level; names >> level;) {
        lmlab_set_level(level.c_str());
        for (int t : {1, 15, 16, 17, 50})
            for (int d : {1, 7, 16, 33})
                for (int e : {1, 16, 21})
                    for (int half : {0, 1}) one(level, 1 + t % 2, t, d, e, t < 16 ? t : 16, half, 1);
        one(level, 3, 70, 20, 12, 33, 0, 2);
        printf("%s ", level.c_str());
    }
    printf("wrong %d\n", wrong);
    return wrong != 0;
}
"""


def test_under_sanitizers(tmp_path):
    "No byte outside its memory is touched, all of the results are written and nothing undefined happens, on any path"
    native.under_sanitizers(tmp_path, DRIVER, ("retention",))


def test_arm(tmp_path):
    native.on_arm(tmp_path, DRIVER, ("retention",))
