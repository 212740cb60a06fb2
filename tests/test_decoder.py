"""A decoder of ternary layers: its definition against transformers, the C++ against the definition, and bits that depend on nothing but a row's tokens."""

import native
import pytest
import torch
from lmlab.kernels import Fallback, cpu
from lmlab.kernels import decoder as D
from lmlab.kernels import ternary as T

from lmlab.core.check import math_threads, test_rel

test_rel.__test__ = False
built = pytest.mark.skipif(cpu.missing() is not None, reason="the C++ library is not there")
BACKENDS = ["reference", pytest.param("cpu", marks=built)]
SIZES = [  # d, heads, kv_heads, head_dim, f: odd, padded, grouped, whole vectors
    (20, 3, 1, 6, 33), (1, 1, 1, 2, 1), (33, 5, 5, 2, 17), (64, 6, 2, 16, 96), (48, 7, 1, 18, 40), (40, 2, 2, 66, 50), (96, 8, 2, 32, 64),
]  # fmt: skip


def make(size, layers=2, sub_norms=True, act="relu2", seed=0, format="auto"):
    d, heads, kv_heads, head_dim, f = size
    g = torch.Generator().manual_seed(seed)

    def ternary(rows, inputs):
        w = torch.randint(-1, 2, (rows, inputs), dtype=torch.int8, generator=g)
        return T.pack(w, torch.rand(rows, generator=g) / inputs**0.5, format)

    def norm(n, there=True):
        return 1 + 0.1 * torch.randn(n, generator=g) if there else None

    a, b = heads * head_dim, kv_heads * head_dim
    made = [
        D.Layer(
            norm(d), ternary(a, d), ternary(b, d), ternary(b, d), norm(a, sub_norms), ternary(d, a),
            norm(d), ternary(f, d), ternary(f, d), norm(f, sub_norms), ternary(d, f),
        )
        for _ in range(layers)
    ]  # fmt: skip
    inv_freq = 100.0 ** -(torch.arange(head_dim // 2) * 2 / head_dim)
    return D.Decoder(
        made, heads=heads, kv_heads=kv_heads, head_dim=head_dim, inv_freq=inv_freq, eps=1e-5, act=act
    )


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close_but_for_roundings(got, want, tol):
    """Most tokens agree to `tol`. In float32 a sum has as many values as orders, and where one of these moves an activation across the border
    of two int8 values the token differs by what such a step weighs, and so do those that read its keys."""
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    off = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert off.median() <= tol and off.max() <= 0.05, (off.median(), off.max())


# The definition


def by_hand(dec, x):
    "One row without a cache, in float64 but for the roundings to int8, which must see what they see in float32"

    def norm(x, w):
        return x if w is None else w.double() * x * (x.square().mean(-1, keepdim=True) + dec.eps) ** -0.5

    def linear(x, p):
        q, ratio = T.quantize(x.float())
        return q.double() @ p.unpack().double().T * ratio.double() * p.scale.double()

    n, x = len(x), x.double()
    for l in dec.layers:
        q, k, v = (linear(norm(x, l.input_norm), p).view(n, -1, dec.head_dim) for p in (l.q, l.k, l.v))
        out = torch.zeros(n, dec.heads, dec.head_dim, dtype=torch.float64)
        turn = torch.exp(1j * (torch.arange(n)[:, None] * dec.inv_freq).double())[:, None]
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))
        for i in range(n):
            for h in range(dec.heads):
                kv = h // (dec.heads // dec.kv_heads)
                s = (q[i, h] * k[: i + 1, kv].conj()).real.sum(-1) / dec.head_dim**0.5
                out[i, h] = s.softmax(0) @ v[: i + 1, kv]
        x = x + linear(norm(out.flatten(1), l.attn_sub_norm), l.o)
        h = norm(x, l.post_norm)
        g = linear(h, l.gate)
        g = g.relu() ** 2 if dec.act == "relu2" else g * g.sigmoid()
        x = x + linear(norm(g * linear(h, l.up), l.ffn_sub_norm), l.down)
    return x


@pytest.mark.parametrize("act, sub_norms", [("relu2", True), ("silu", False)])
@pytest.mark.parametrize("size", SIZES)
def test_definition_by_hand(size, act, sub_norms):
    dec, x = make(size, act=act, sub_norms=sub_norms), tokens(1, 9, size[0])
    got = dec(x, dec.state(1, 9), backend="reference")
    close_but_for_roundings(got[0].double(), by_hand(dec, x[0]), 1e-5)


def ours_from(model, ternary, act):
    "The decoder of a transformers model, `ternary(linear)` packing each of its linear layers"
    c, layers = model.config, []
    for l in model.model.layers:
        a, m = l.self_attn, l.mlp
        sub = [
            getattr(o, n).weight if hasattr(o, n) else None
            for o, n in ((a, "attn_sub_norm"), (m, "ffn_sub_norm"))
        ]
        q, k, v, o, gate, up, down = (
            ternary(p) for p in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        )
        norms = l.input_layernorm.weight, l.post_attention_layernorm.weight
        layers.append(D.Layer(norms[0], q, k, v, sub[0], o, norms[1], gate, up, sub[1], down))
    return D.Decoder(
        layers, heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=model.model.layers[0].self_attn.head_dim,
        inv_freq=model.model.rotary_emb.inv_freq, eps=c.rms_norm_eps, act=act,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["BitNet", "Llama"])
def test_against_transformers(family, backend):
    "Stock models whose linear layers are replaced by ones with weights and activations rounded as transformers' BitNet rounds them"
    transformers = pytest.importorskip("transformers")
    bitnet = pytest.importorskip("transformers.integrations.bitnet")

    class Online(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(bitnet.ActQuant.apply(x), self.weight)

    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=70, rms_norm_eps=1e-5, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    packed = {}
    for name, m in list(model.model.named_modules()):
        if isinstance(m, torch.nn.Linear):
            online = Online(m.in_features, m.out_features, bias=False)
            scale = m.weight.abs().mean()
            codes = (m.weight / scale).round().clamp(-1, 1)
            online.weight.data = codes * scale
            packed[online] = T.pack(codes.to(torch.int8), scale)
            model.model.set_submodule(name, online)
        elif "norm" in name:
            m.weight.data += 0.1 * torch.randn_like(m.weight)
    dec = ours_from(model, packed.__getitem__, "relu2" if family == "BitNet" else "silu")
    ids = torch.randint(0, 50, (3, 20))
    with torch.no_grad():
        with torch.compiler.set_stance(
            "force_eager"
        ):  # their rounding is compiled, which takes a C++ compiler
            want = model(ids).logits
        x, state = model.model.embed_tokens(ids), dec.state(3, 20)
        y = torch.cat([dec(x[:, :13], state, backend=backend), dec(x[:, 13:], state, backend=backend)], 1)
        got = D.head(model.model.norm(y).flatten(0, 1), model.lm_head.weight, backend=backend).view(
            want.shape
        )
    close_but_for_roundings(got, want, 1e-5)


# C++ against the definition


@built
@pytest.mark.parametrize("dtype", D.DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_definition(size, dtype):
    for act, sub_norms, batch, n in (("relu2", True, 2, 21), ("silu", False, 1, 5), ("silu", True, 3, 40)):
        dec, x = make(size, act=act, sub_norms=sub_norms, seed=n), tokens(batch, n, size[0])
        states = [dec.state(batch, n + 3, dtype) for _ in range(2)]
        got, want = dec(x, states[0], backend="cpu"), dec(x, states[1], backend="reference")
        close_but_for_roundings(got, want, 1e-5)
        (k, v), (k2, v2) = (
            s.of(0, batch - 1) for s in states
        )  # the first layer's have met no rounding that could differ
        assert torch.equal(v, v2) and torch.equal(k, k2)
        assert states[0].lengths.tolist() == [n] * batch


@built
@pytest.mark.parametrize("dtype", D.DTYPES)
def test_equals_the_definition_where_segments_are_joined(dtype):
    "More keys than one softmax takes, by prompt and by single tokens; without sub-norms, which would hide a wrong sum of weights"
    dec, x = make(SIZES[0], layers=1, sub_norms=False, act="silu"), tokens(1, 600, 20)
    want = dec(x, dec.state(1, 600, dtype), backend="reference")
    state = dec.state(1, 600, dtype)
    whole = dec(x[:, :590], state, backend="cpu")
    single = torch.cat([dec(x[:, i : i + 1], state, backend="cpu") for i in range(590, 600)], 1)
    for got, part in (
        (whole[:, 256:512], want[:, 256:512]),
        (whole[:, 512:], want[:, 512:590]),
        (single, want[:, 590:]),
    ):
        close_but_for_roundings(got, part, 1e-5)


@built
def test_bfloat16_cache_is_within_its_rounding():
    "Against float32, at the first layer's attention alone: no int8 in between that could jump"
    dec = make((96, 8, 2, 32, 64), layers=1)
    x, outs = tokens(1, 300, 96), []
    for dtype in D.DTYPES:
        state = dec.state(1, 300, dtype)
        dec(x, state)
        outs.append([t[:, :300].float() for t in state.of(0, 0)])
    for a, b in zip(*outs, strict=True):
        assert ((a - b).abs() <= 2**-8 * a.abs()).all() and not torch.equal(a, b)


def run_in_pieces(dec, x, pieces, dtype, **how):
    state, at, out = dec.state(x.shape[0], x.shape[1], dtype), 0, []
    for n in pieces:
        out.append(dec(x[:, at : at + n], state, **how))
        at += n
    assert at == x.shape[1]
    return torch.cat(out, 1)


@built
@pytest.mark.parametrize("dtype", D.DTYPES)
@pytest.mark.parametrize("size", [(20, 3, 1, 6, 33), (64, 6, 2, 16, 96), (48, 7, 1, 18, 40)])
def test_a_row_is_the_same_whatever_is_around_it(size, dtype):
    "Bit for bit: pieces of a prompt, ragged batches, rows in any order, one or two threads, across the ends of segments and of chunks"
    dec, n = make(size), 300
    x = tokens(3, n, size[0])
    with math_threads(1):
        want = run_in_pieces(dec, x, [n], dtype)
    for threads in (1, 2):
        with math_threads(threads):
            for pieces in ([1] * 5 + [250, 1, 1, 1, 42], [7, 13, 128, 108, 44], [255, 1, 44]):
                assert torch.equal(run_in_pieces(dec, x, pieces, dtype), want)
            state = dec.state(3, n, dtype)
            counts = [260, 7, 1]
            rows = [2, 0, 1]
            y = dec(torch.cat([x[r, :c] for r, c in zip(rows, counts, strict=True)]), state, rows, counts)
            for r, part in zip(rows, y.split(counts), strict=True):
                assert torch.equal(part, want[r, : len(part)])
            assert state.lengths.tolist() == [7, 1, 260]
            assert torch.equal(dec(x[[0], 7:8], state, rows=[0]), want[[0], 7:8])
            y = dec(torch.cat([x[1, 1:3], x[0, 8:9]]), state, rows=[1, 2, 0], counts=[2, 0, 1])
            assert torch.equal(y, torch.cat([want[1, 1:3], want[0, 8:9]]))
            state.lengths[2] = 258  # forget two
            assert torch.equal(dec(x[[2], 258:], state, rows=[2]), want[[2], 258:])


@built
@pytest.mark.parametrize("dtype", D.DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype):
    for size in SIZES[::2]:
        dec, x = make(size, act="silu"), tokens(2, 30, size[0])
        want = None
        for level in cpu.info()["levels"]:
            with cpu.level(level):
                for path in T.paths():
                    state = dec.state(2, 30, dtype)
                    y = [
                        D.on_cpu(dec, o.contiguous(), state, None, None, o.shape[1], path, threads=3)
                        for o in x.split([25, 1, 4], 1)
                    ]
                    y = torch.cat(y, 1)
                    want = y if want is None else want
                    assert torch.equal(y, want), (level, path, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(backend):
    dec, x = make(SIZES[0]), tokens(3, 9, 20)
    want = dec(x, dec.state(3, 9), backend=backend)
    x[1, 4, 7], x[2, 8, 0] = torch.nan, torch.inf
    y = dec(x, dec.state(3, 9), backend=backend)
    assert (
        torch.equal(y[0], want[0])
        and torch.equal(y[1, :4], want[1, :4])
        and torch.equal(y[2, :8], want[2, :8])
    )
    assert y[1, 4:].isnan().all() and y[2, 8].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_used_again_knows_nothing_of_its_past(backend):
    dec, x = make(SIZES[0]), tokens(2, 6, 20)
    state = dec.state(2, 6)
    dec(torch.full((2, 6, 20), torch.nan), state, backend=backend)
    state.lengths.zero_()
    assert torch.equal(dec(x, state, backend=backend), dec(x, dec.state(2, 6), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_in_nothing_out(backend):
    dec = make(SIZES[0])
    state = dec.state(2, 4)
    assert dec(torch.empty(2, 0, 20), state, backend=backend).shape == (2, 0, 20)
    assert dec(torch.empty(0, 3, 20), state, rows=[], backend=backend).shape == (0, 3, 20)
    assert dec(torch.empty(0, 20), state, counts=[0, 0], backend=backend).shape == (0, 20)
    assert state.lengths.tolist() == [0, 0]


# The head


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", D.DTYPES)
def test_head(dtype, backend):
    for m, vocab, d in [
        (1, 1, 1),
        (1, 5, 15),
        (3, 7, 17),
        (4, 9, 100),
        (7, 33, 64),
        (0, 5, 7),
        (2, 0, 5),
        (2, 5, 0),
        (9, 130, 31),
        (2, 8, 33),
    ]:
        x, w = tokens(m, d, seed=d), tokens(vocab, d, seed=m).to(dtype)
        for threads in (1, 2, 3):
            with math_threads(threads):
                y = D.head(x, w, backend=backend)
            want = x.double() @ w.double().T
            bound = (d + 2) * 2**-24 * (x.double().abs() @ w.double().abs().T)
            assert y.shape == (m, vocab) and y.dtype == torch.float32 and ((y - want).abs() <= bound).all()
            if backend == "cpu":
                assert all(
                    torch.equal(y[i : i + 1], D.head(x[i : i + 1], w, backend=backend)) for i in range(m)
                )
        strided = torch.stack([w, w], -1).flatten(1)[:, ::2]
        assert (
            torch.equal(D.head(x.T.contiguous().T, strided, backend=backend), D.head(x, w, backend=backend))
            or backend == "reference"
        )


@built
def test_head_has_the_same_bits_on_every_instruction_set():
    for dtype in D.DTYPES:
        x, w, out = tokens(5, 77), tokens(41, 77, seed=1).to(dtype), []
        for level in cpu.info()["levels"]:
            with cpu.level(level):
                out.append(D.head(x, w, backend="cpu"))
        assert all(torch.equal(o, out[0]) for o in out)


# Refusals


def test_bad_layers_are_refused():
    good = make(SIZES[0])
    args = dict(heads=3, kv_heads=1, head_dim=6, inv_freq=torch.ones(3))
    fields = {n: getattr(good.layers[0], n) for n in D.Layer.__dataclass_fields__}

    def one(**changed):
        return [good.layers[0], D.Layer(**fields | changed)]

    other = T.pack(torch.zeros(20, 20, dtype=torch.int8), 1.0)
    for match, layers, changed in (
        (r"layers\[1\].o: 20 x 20 on cpu; this decoder needs 20 x 18", one(o=other), {}),
        (r"layers\[1\].k: 20 x 20", one(k=other), {}),
        (r"layers\[1\].down: Tensor; allowed is a PackedTernary", one(down=torch.ones(20, 33)), {}),
        (r"layers\[1\].input_norm: None; allowed is a float tensor of 20", one(input_norm=None), {}),
        (r"layers\[1\].ffn_sub_norm: torch.float32 of shape \(32,\); allowed is a float tensor of 33", one(ffn_sub_norm=torch.ones(32)), {}),
        (r"layers\[1\].post_norm: torch.int64", one(post_norm=torch.ones(20, dtype=torch.long)), {}),
        (r"layers\[1\].up: 33 x 20 on meta", one(up=fields["up"].to("meta")), {}),
        ("layers: empty", [], {}),
        ("heads: 3; it must be a multiple of kv_heads, which is 2", one(), dict(kv_heads=2)),
        ("head_dim: 6.0; allowed is a whole number", one(), dict(head_dim=6.0)),
        (r"inv_freq: shape \(4,\); it must be \(3,\)", one(), dict(inv_freq=torch.ones(4))),
        ("act: 'gelu'; allowed are 'relu2', 'silu'", one(), dict(act="gelu")),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=match):
            D.Decoder(layers, **args | changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_calls_are_refused(backend):
    dec, other = make(SIZES[0]), make(SIZES[0])
    state, x = dec.state(2, 4), torch.zeros(2, 3, 20)
    one = lambda **k: dec(**dict(x=x, state=state, backend=backend) | k)  # noqa: E731
    for match, call in (
        ("dtype: torch.float16; allowed are", lambda: dec.state(1, 1, torch.float16)),
        ("length: 0; allowed is a whole number from 1", lambda: dec.state(1, 0)),
        ("batch: 1.5", lambda: dec.state(1.5, 1)),
        ("state: of another decoder", lambda: one(state=other.state(2, 4))),
        ("state: a dict", lambda: one(state={})),
        ("x: torch.float64 on cpu; allowed is float32", lambda: one(x=x.double())),
        (r"x: shape \(2, 3, 19\); it must be 2 rows, n tokens, 20", lambda: one(x=x[..., 1:])),
        (r"x: shape \(1, 3, 20\); it must be 2 rows", lambda: one(x=x[:1])),
        (r"x: shape \(3, 20\)", lambda: one(x=x[0])),
        (r"x: shape \(2, 3, 20\); it must be 1 rows", lambda: one(rows=[1])),
        (r"rows: \[0, 0\]; allowed are different rows from 0 to 1", lambda: one(rows=[0, 0])),
        (r"rows: \[0, 2\]", lambda: one(rows=[0, 2])),
        (r"rows: \[-1\]", lambda: one(rows=[-1])),
        (r"counts: \[1\]; allowed is a number of tokens for each of the 2 rows", lambda: one(counts=[1])),
        (r"counts: \[3, -1\]", lambda: one(counts=[3, -1])),
        (r"x: shape \(2, 3, 20\); with counts it must be all 4 tokens", lambda: one(counts=[3, 1])),
        (r"state: row 0 holds 0 tokens and has room for 4; 5 more do not fit", lambda: one(x=torch.zeros(2, 5, 20))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    assert state.lengths.tolist() == [0, 0]
    one(rows=[1], x=x[:1])
    with pytest.raises(ValueError, match="state: row 1 holds 3 tokens and has room for 4; 2 more do not fit"):
        one(x=x[:, :2])
    assert state.lengths.tolist() == [0, 3]  # nothing was done
    state.lengths[0] = -1
    with pytest.raises(ValueError, match="state: row 0 holds -1 tokens"):
        one(x=x[:, :1])
    w = torch.zeros(5, 20)
    for match, call in (
        (r"x: torch.float32 of shape \(2, 3, 20\); allowed is float32 \[m, d\]", lambda: D.head(x, w)),
        ("x: torch.bfloat16", lambda: D.head(x[0].bfloat16(), w)),
        (r"weight: torch.float32 of shape \(5, 19\); allowed is float32 or bfloat16 \[vocab, 20\]", lambda: D.head(x[0], w[:, 1:])),
        ("weight: torch.int8", lambda: D.head(x[0], w.to(torch.int8))),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            call()
    if backend == "cpu":
        with pytest.raises(ValueError, match="path: 'sse' does not run on this machine"):
            D.on_cpu(dec, x[:, :1].contiguous(), dec.state(2, 1), None, None, 1, "sse")


def test_without_the_library(monkeypatch):
    import lmlab.kernels as K

    dec, x = make(SIZES[0]), tokens(1, 5, 20)
    want = dec(x, dec.state(1, 5), backend="reference")
    monkeypatch.setattr(cpu, "missing", lambda: "it was taken away")
    monkeypatch.setattr(K, "_said", set())
    with pytest.warns(Fallback, match="decoder runs on the torch reference"):
        assert torch.equal(dec(x, dec.state(1, 5)), want)
    with pytest.warns(Fallback, match="head runs on the torch reference"):
        D.head(x[0], torch.zeros(3, 20))


DRIVER = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <sstream>
#include <string>
#include <vector>
struct Matrix { const uint8_t* codes; const float *scale, *bias; void* y; int64_t rows; int32_t scales, trits; };
struct Layer { const float* norms[4]; Matrix q, k, v, o, gate, up, down; };
struct Shape { int64_t layers, d, f, heads, kv_heads, head_dim, batch, length; double eps; float scale; int32_t silu, half; };
extern "C" const char* lmlab_ternary_paths();
extern "C" int lmlab_decoder_step(const void*, const void*, const float*, void*, void*, int64_t*, const float*, float*, const int64_t*,
                                  const int64_t*, int64_t, int64_t, int, const char*);
extern "C" int lmlab_head(const float*, int64_t, const void*, int64_t, int64_t, int, float*, int);

static uint32_t state = 1;
static int draw(int n) { state = state * 1664525 + 1013904223; return (state >> 16) % n; }

static std::vector<std::unique_ptr<char[]>> kept;
static void* memory(size_t bytes, int fill = 0xff) {  // of just this size, so that one byte beyond it is noticed
    kept.emplace_back(new char[bytes]);
    memset(kept.back().get(), fill, bytes);
    return kept.back().get();
}
static float* numbers(size_t n) {
    float* p = (float*)memory(n * 4);
    for (size_t i = 0; i < n; i++) p[i] = (draw(2001) - 1000) * 0.001f;
    return p;
}
static Matrix matrix(int64_t rows, int64_t k) {
    int trits = draw(2), per = trits ? 5 : 4, full = draw(2);
    size_t n = (rows + 31) / 32 * ((k + 4 * per - 1) / (4 * per)) * 128;
    uint8_t* codes = (uint8_t*)memory(n);
    for (size_t i = 0; i < n; i++) {
        codes[i] = 0;
        for (int p = 0, digit = 1; p < per; p++, digit *= trits ? 3 : 4) codes[i] += digit * draw(3);
    }
    return {codes, numbers(full ? rows : 1), nullptr, nullptr, rows, full, trits};
}

static int wrong = 0;
static void expect(bool ok, const char* what, const std::string& path) {
    if (!ok && wrong++ < 5) printf("%s: %s\n", path.c_str(), what);
}

static void one(const std::string& path, int64_t d, int64_t heads, int64_t kv, int64_t dim, int64_t f, int half, int subs, int threads, int64_t length) {
    kept.clear();
    const int64_t a = heads * dim, b = kv * dim, batch = 3, blocks = (length + 15) / 16, wide = (dim + PAD - 1) / PAD * PAD;
    Layer layers[2];
    for (auto& l : layers)
        l = {{numbers(d), subs ? numbers(a) : nullptr, numbers(d), subs ? numbers(f) : nullptr},
             matrix(a, d), matrix(b, d), matrix(b, d), matrix(d, a), matrix(f, d), matrix(f, d), matrix(d, f)};
    Shape s = {2, d, f, heads, kv, dim, batch, length, 1e-5, 0.5f, subs, half};
    const float* rotations = numbers(length * dim);
    size_t keys = 2 * batch * kv * blocks * dim * 16 * (half ? 2 : 4), values = 2 * batch * kv * blocks * 16 * wide * (half ? 2 : 4);
    const float* x = numbers(length * d);
    float *whole = (float*)memory(length * d * 4), *y = (float*)memory(length * d * 4);
    auto step = [&](void* k, void* v, int64_t* lengths, const float* x, float* y, std::vector<int64_t> rows, std::vector<int64_t> counts) {
        return lmlab_decoder_step(layers, &s, rotations, k, v, lengths, x, y, rows.data(), counts.data(), rows.size(), 0, threads, path.c_str());
    };
    int64_t lengths[3] = {};
    void *k = memory(keys, 0), *v = memory(values, 0);
    expect(!step(k, v, lengths, x, whole, {2}, {length}), "fails", path);
    expect(lengths[2] == length && step(k, v, lengths, x, y, {2}, {1}) == -3, "a full row", path);
    for (int64_t i = 0; i < length * d; i++) expect(std::isfinite(whole[i]), "not finite", path);
    int64_t at = 0;
    for (int64_t n : {(int64_t)1, (int64_t)3, length - 54, (int64_t)15, (int64_t)1, (int64_t)31, (int64_t)3}) {  // row 0 in pieces, another beside it
        std::vector<float> two(x + at * d, x + (at + n) * d);
        two.insert(two.end(), x, x + d);
        float* out = (float*)memory((n + 1) * d * 4);
        lengths[1] = 0;
        expect(!step(k, v, lengths, two.data(), out, {0, 1}, {n, 1}), "fails", path);
        expect(!memcmp(out, whole + at * d, n * d * 4) && !memcmp(out + n * d, whole, d * 4), "other bits", path);
        at += n;
    }
    expect(!lmlab_decoder_step(layers, &s, rotations, k, v, lengths, x, y, nullptr, nullptr, 0, 1, threads, path.c_str()), "nothing", path);
}

int main() {
    std::istringstream names(lmlab_ternary_paths());
    for (std::string path; names >> path;) {
        for (int half : {0, 1}) {
            one(path, 1, 1, 1, 2, 1, half, 1, 1, 60);
            one(path, 20, 3, 1, 6, 33, half, 1, 2, 290);  // more than a chunk of tokens and a segment of keys
            one(path, 33, 5, 5, 18, 17, half, 0, 1, 60);
            one(path, 40, 4, 2, 34, 70, half, 1, 2, 60);
        }
        printf("%s ", path.c_str());
    }
    for (int half : {0, 1})
        for (int64_t m : {0, 1, 2, 4, 7})
            for (int64_t vocab : {0, 1, 5, 12})
                for (int64_t d : {0, 1, 31, 32, 33, 70}) {
                    kept.clear();
                    float* y = (float*)memory(m * vocab * 4);
                    void* w = memory(vocab * d * (half ? 2 : 4), 0x3c);
                    expect(!lmlab_head(numbers(m * d), m, w, vocab, d, half, y, 1 + (int)(m & 1)), "fails", "head");
                    for (int64_t i = 0; i < m * vocab; i++) expect(std::isfinite(y[i]), "not written", "head");
                }
    printf("wrong %d\n", wrong);
    return wrong != 0;
}
"""


def test_under_sanitizers(tmp_path):
    "No byte outside its memory is touched and nothing undefined happens, whatever the sizes, the path and the cut of a prompt"
    native.under_sanitizers(tmp_path, DRIVER.replace("PAD", str(D.WIDE)), ("ternary", "decoder"))


def test_llama_cpp_says_the_same(tmp_path):
    "Another program on the same file: what llama.cpp's rounding of activations and its float16 leave between them"
    pytest.importorskip("llama_cpp", reason="extra `bench`")
    from lmlab.kernels import peers

    torch.manual_seed(0)
    d, f, heads, kv, vocab, n = 256, 512, 4, 2, 300, 40
    sizes = dict(q=(d, d), k=(d // 2, d), v=(d // 2, d), o=(d, d), gate=(f, d), up=(f, d), down=(d, f))
    norms = dict(input_norm=d, attn_sub_norm=d, post_norm=d, ffn_sub_norm=f)
    codes = [{k: torch.randint(-1, 2, s, dtype=torch.int8) for k, s in sizes.items()} for _ in range(3)]
    gains = [{k: 1 + 0.1 * torch.randn(s) for k, s in norms.items()} for _ in codes]
    embedding = torch.randn(vocab, d) * 0.5
    ids = torch.randint(3, vocab, (n,))
    dense = [{k: w * 0.03125 for k, w in c.items()} | g for c, g in zip(codes, gains, strict=True)]
    peers.write_gguf(tmp_path / "F16.gguf", dense, embedding, heads, kv)
    layers = [
        D.Layer(**{k: T.pack(w, 0.03125) for k, w in c.items()}, **g)
        for c, g in zip(codes, gains, strict=True)
    ]
    freq = 1e4 ** -(torch.arange(0, d // heads, 2) / (d // heads))
    dec = D.Decoder(layers, heads, kv, d // heads, freq, act="silu")
    y = dec(embedding[ids][None], dec.state(1, n))[0, -1:]
    want = D.head(D.rms_norm(y, torch.ones(d), 1e-5), embedding)[0]
    for type, bound in (("F16", 0.05), ("TQ2_0", 0.05), ("Q4_0", 0.5)):
        path = tmp_path / f"{type}.gguf"
        if type != "F16":
            peers.quantise(tmp_path / "F16.gguf", path, type)
        other = peers.LlamaCpp(path, threads=1, context=64)
        got = other.feed(ids[:30].tolist()), other.feed(ids[30:].tolist())
        other.clear()
        assert torch.allclose(other.feed(ids.tolist()), got[1], rtol=0.05, atol=0.05)
        other.close()
        assert ((got[1] - want).norm() / want.norm()) < bound, type
