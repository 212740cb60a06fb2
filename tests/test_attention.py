"""Attention: its definition on every path, nothing from keys that are not seen, and stock models that do not notice the change."""

import native
import pytest
import torch
import torch.nn.functional as F
from lmlab.kernels import Fallback, cpu
from lmlab.kernels import attention as A
from torch.library import opcheck

from lmlab.core.check import check_attention, check_kernel, math_threads, poisoned_memory, rel_error

PATHS = A.paths()
needs_library = pytest.mark.skipif(not PATHS, reason="the C++ library is not there")
TOL = {
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
}  # the last is two roundings to 8 bits: of the weights, of the output

# rows of the batch, heads, key heads, queries, keys, width, width of the values
EDGES = [  # a group is 3, 6 or 12 queries, a tile 96, a panel 16 or 32 keys, a block 128
    (1, 1, 1, n, m, d, d)
    for n, m, d in [
        (1, 1, 1), (1, 2, 3), (2, 2, 2), (3, 3, 4), (4, 4, 5), (5, 9, 7), (7, 7, 8), (11, 11, 9), (12, 12, 15), (13, 13, 16),
        (15, 15, 17), (16, 16, 31), (17, 17, 32), (31, 31, 33), (32, 32, 8), (33, 33, 63), (24, 25, 64), (95, 95, 8),
        (96, 96, 16), (97, 97, 8), (127, 127, 4), (128, 128, 8), (129, 129, 4), (1, 127, 8), (1, 128, 16), (1, 129, 32),
        (1, 300, 33), (2, 129, 8), (5, 260, 12), (8, 8, 65), (3, 40, 96), (9, 9, 128), (6, 30, 129), (1, 257, 128),
    ]
]  # fmt: skip
GROUPS = [
    (b, h, hk, n, m, d, dv)
    for b, h, hk in [(2, 2, 1), (1, 6, 2), (3, 4, 4), (1, 9, 1), (2, 8, 2)]
    for n, m, d, dv in [(1, 17, 16, 9), (7, 20, 12, 12), (13, 13, 8, 24), (33, 150, 5, 3)]
]
EMPTY = [(0, 2, 1, 3, 3, 4, 4), (2, 2, 1, 0, 0, 4, 4), (2, 2, 1, 0, 5, 4, 4), (1, 2, 2, 3, 3, 4, 0), (1, 1, 1, 3, 4, 0, 5), (0, 1, 1, 1, 7, 4, 4)]  # fmt: skip
SHAPES = EDGES + GROUPS + EMPTY


def draw(shape, dtype, seed=0):
    b, h, hk, n, m, d, dv = shape
    g = torch.Generator().manual_seed(seed)
    sizes = (b, h, n, d), (b, hk, m, d), (b, hk, m, dv)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)


def by_hand(q, k, v, scale, causal=True, start=None, stop=None):
    "The definition again, one query at a time, with the keys that it sees and no others"
    (b, h, n, _), (hk, m) = q.shape, k.shape[1:3]
    q, k, v = q.double(), k.double(), v.double()
    out = q.new_zeros(b, h, n, v.shape[-1])
    for r in range(b):
        first = 0 if start is None else int(start[r])
        for j in range(h):
            for i in range(n):
                end = min(m if stop is None else int(stop[r]), m - n + i + 1 if causal else m)
                if first < end:
                    keys, values = (t[r, j * hk // h, first:end] for t in (k, v))
                    out[r, j, i] = (scale * keys @ q[r, j, i]).softmax(-1) @ values
    return out


def test_definition_and_contract():
    "Values, gradients, strides, threads, NaN, compilation, the operation's registration"
    assert len(SHAPES) >= 60
    check_kernel(
        A.attention,
        lambda q, k, v: A.reference(q, k, v, None, None, q.shape[-1] ** -0.5 if q.shape[-1] else 0.0, True),
        draw_for_check,
        SHAPES,
        terms=lambda s: s[4] + s[5],
        slack=2,  # the gradient of a score is a difference of two numbers of nearly its own size
    )


def draw_for_check(shape, dtype, generator):
    return draw(shape, dtype)


def test_reference_is_the_definition(monkeypatch):
    for shape in [(2, 4, 2, 5, 9, 7, 3), (1, 2, 1, 1, 6, 4, 4), (2, 2, 2, 8, 8, 5, 5)]:
        x, b, m = draw(shape, torch.float64), shape[0], shape[4]
        for causal, start, stop in (
            (True, None, None),
            (False, None, None),
            (True, torch.tensor([2, 4])[:b], torch.tensor([m, m - 1])[:b]),
            (False, None, torch.tensor([3, 0])[:b]),
        ):
            for largest in (A.LARGEST, 1):  # in one block, a query at a time
                monkeypatch.setattr(A, "LARGEST", largest)
                got = A.attention(*x, causal, 0.7, start, stop, backend="reference")
                assert rel_error(got, by_hand(*x, 0.7, causal, start, stop)) < 1e-14


@needs_library
@pytest.mark.parametrize("dtype", A.DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path(path, dtype):
    "Causal or not, padded or not, wide and narrow; every number of the output is written"
    shapes = GROUPS[::3] + [
        (1, 1, 1, 130, 200, 64, 96),
        (2, 4, 1, 40, 300, 128, 128),
        (1, 3, 1, 1, 700, 96, 256),
        (1, 2, 2, 3, 9, 256, 32),
    ]
    for shape in shapes:
        x, (b, m) = draw(shape, dtype), (shape[0], shape[4])
        start, stop = torch.arange(b) * 5 % m, m - torch.arange(b) * 3 % m
        for causal in (True, False):
            for bounds in ((None, None), (start, None), (None, stop), (start, stop)):
                for scale in (0.3, -0.2):
                    want = A.reference(*(t.double() for t in x), *bounds, scale, causal)
                    with poisoned_memory():
                        got = A.on_cpu(*x, *bounds, scale, causal, path)
                    assert got.dtype == dtype and rel_error(got, want) < TOL[dtype], (
                        shape,
                        causal,
                        bounds,
                        scale,
                    )


@needs_library
@pytest.mark.parametrize("dtype", A.DTYPES)
def test_threads_change_no_bit(dtype):
    "Also where there are more heads than are packed at a time"
    for shape in [
        (1, 4, 2, 250, 333, 64, 64),
        (2, 8, 2, 1, 1000, 32, 32),
        (1, 6, 3, 9, 500, 40, 24),
        (40, 2, 1, 130, 900, 128, 128),
    ]:
        x = draw(shape, dtype)
        with math_threads(1):
            want = A.attention(*x)
        for n in (2, 3):
            with math_threads(n):
                assert torch.equal(A.attention(*x), want)


@needs_library
@pytest.mark.parametrize("dtype", A.DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite(path, dtype):
    "NaN and infinity reach the queries that see them, as in the definition, and no others"
    for shape in [(1, 2, 1, 40, 150, 16, 33), (1, 4, 2, 1, 150, 16, 33)]:
        n, m = shape[3:5]
        start, stop = torch.tensor([7]), torch.tensor([m - 3])
        for what in (torch.nan, torch.inf, -torch.inf):
            for which in range(3):
                for at in (0, 6, 7, 60, m - n + 5, m - 4, m - 3, m - 1) if which else (0, n // 2):
                    if at >= (n if which == 0 else m):
                        continue
                    x = [t.clone() for t in draw(shape, dtype)]
                    x[which][0, -1, at, 3] = what
                    want = by_hand(*x, 0.25, True, start, stop)
                    got = A.on_cpu(*x, start, stop, 0.25, True, path).double()
                    assert torch.equal(got.isnan(), want.isnan()), (what, which, at)
                    assert torch.equal(got.isinf(), want.isinf())
                    fine = want.isfinite()
                    assert rel_error(got[fine], want[fine]) < 2 * TOL[dtype]


@needs_library
@pytest.mark.parametrize("path", PATHS)
def test_extreme_scores(path):
    "Scores far beyond what exp can hold, weights that vanish, a scale of zero"
    q, k, v = draw((1, 2, 1, 50, 300, 32, 8), torch.float32)
    for gain in (30.0, 1e4, 1e15):
        x = gain * q, k, v
        want = by_hand(*x, 1.0)
        got = A.on_cpu(*x, None, None, 1.0, True, path)
        assert got.isfinite().all() and (gain > 30 or rel_error(got, want) < 1e-4)
        hard = want.double().sub(got).norm(dim=-1) < 1e-3 * want.norm(dim=-1)
        assert hard.float().mean() > 0.95  # a tie of the two largest scores may go either way
    got = A.on_cpu(q, k, v, None, None, 0.0, True, path)
    assert rel_error(got, by_hand(q, k, v, 0.0)) < 1e-6  # the mean of what is seen


def test_a_query_that_sees_nothing_gives_zeros():
    x = draw((2, 2, 1, 6, 6, 8, 8), torch.float32)
    start, stop = torch.tensor([4, 6]), torch.tensor([6, 2])
    for backend in ("auto", "reference"):
        y = [t.clone().requires_grad_() for t in x]
        out = A.attention(*y, start=start, stop=stop, backend=backend)
        assert (out[0, :, :4] == 0).all() and (out[1] == 0).all() and (out[0, :, 4:] != 0).all()
        grads = torch.autograd.grad(out.square().sum(), y)
        assert (
            all(g.isfinite().all() for g in grads)
            and (grads[0][1] == 0).all()
            and (grads[0][0, :, 5:] != 0).any()
        )
    single = A.attention(x[0][:, :, :1], x[1], x[2], start=start, stop=stop)
    assert (single[1] == 0).all() and (single[0] != 0).all()


def test_gradients_with_padding():
    x = [t.requires_grad_() for t in draw((2, 4, 2, 5, 9, 3, 2), torch.float64)]
    start, stop = torch.tensor([3, 5]), torch.tensor([9, 7])
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, v, c=causal: A.attention(q, k, v, c, 0.5, start, stop), x
        )


def test_layouts():
    "Heads last, slices of a cache, one projection for all three, expanded keys"
    qkv = torch.randn(2, 40, 3, 4, 24)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    cache = torch.full((2, 4, 64, 24), torch.nan)
    cache[:, :, :40] = k
    want = by_hand(q, k, v, 24**-0.5)
    for x in ((q, k, v), (q, cache[:, :, :40], v), (q, k, v[..., ::2]), (q[:, :, 30:], k, v)):
        got = A.attention(*x)
        assert rel_error(got, by_hand(*x, 24**-0.5)) < 1e-6 and got.transpose(1, 2).is_contiguous()
    assert (
        rel_error(
            A.attention(q, k[:, :1].expand(-1, 4, -1, -1), v),
            by_hand(q, k[:, :1].expand(-1, 4, -1, -1), v, 24**-0.5),
        )
        < 1e-6
    )
    assert want.shape == q.shape


@pytest.mark.parametrize("dtype", A.DTYPES)
def test_as_torch(dtype):
    x = draw((2, 4, 2, 130, 130, 64, 64), dtype)
    want = F.scaled_dot_product_attention(*(t.double() for t in x), is_causal=True, enable_gqa=True)
    peer = F.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True)
    assert rel_error(A.attention(*x), want) <= 1.5 * rel_error(peer, want)


def test_operation_for_torch():
    q, k, v = draw((2, 4, 2, 5, 9, 6, 3), torch.float32)
    bounds = torch.tensor([1, 2]), torch.tensor([9, 8])
    for x in ((q, k, v), [t.clone().requires_grad_() for t in (q, k, v)], [t.bfloat16() for t in (q, k, v)]):
        for b in (bounds, (None, None)):
            opcheck(A._attention, (*x, *b, 0.5, True, "auto"))
    opcheck(A._backward, (torch.randn(2, 4, 5, 3), q, k, v, *bounds, 0.5, True))
    layer = torch.compile(lambda *x: 2 * A.attention(*x), fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(q, k, v), 2 * A.attention(q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        assert A.attention(q, k, v).dtype == torch.float32


def test_bad_input_is_refused():
    q, k, v = draw((2, 4, 2, 5, 9, 6, 3), torch.float32)
    whole = torch.tensor([1, 2])
    for match, call in (
        (r"q: shape \(4, 5, 6\); allowed are four axes", lambda: A.attention(q[0], k, v)),
        ("k: torch.bfloat16, and q torch.float32", lambda: A.attention(q, k.bfloat16(), v)),
        ("q: torch.int64", lambda: A.attention(q.long(), k.long(), v.long())),
        ("v: on meta, and q on cpu", lambda: A.attention(q, k, v.to("meta"))),
        (
            r"k: shape \(2, 3, 9, 6\) for q .*a divisor of 4 heads",
            lambda: A.attention(q, torch.randn(2, 3, 9, 6), v),
        ),
        (r"k: shape \(2, 2, 9, 5\)", lambda: A.attention(q, k[..., 1:], v)),
        (r"k: shape \(1, 2, 9, 6\)", lambda: A.attention(q, k[:1], v)),
        (r"v: shape \(2, 2, 8, 3\) for k", lambda: A.attention(q, k, v[:, :, 1:])),
        ("k: 4 keys for 5 queries", lambda: A.attention(q, k[:, :, :4], v[:, :, :4])),
        ("start: torch.float32", lambda: A.attention(q, k, v, start=whole.float())),
        ("stop: int; allowed is a tensor", lambda: A.attention(q, k, v, stop=3)),
        (r"start: shape \(1,\) on cpu; allowed is \(2,\)", lambda: A.attention(q, k, v, start=whole[:1])),
        ("backend: 'gpu' is no backend", lambda: A.attention(q, k, v, backend="gpu")),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert A.attention(q, k[:, :, :4], v[:, :, :4], causal=False).shape == (2, 4, 5, 3)
    if PATHS:
        with pytest.raises(
            ValueError, match=f"path: 'sse' does not run on this machine; allowed are {PATHS[0]}"
        ):
            A.on_cpu(q, k, v, None, None, 1.0, True, "sse")


def test_without_the_library(monkeypatch):
    import lmlab.kernels as K
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    x = draw((1, 2, 1, 5, 9, 6, 3), torch.float32)
    want = A.attention(*x, backend="reference")
    monkeypatch.setattr(cpu, "missing", lambda: "it was taken away")
    monkeypatch.setattr(K, "_said", set())
    with pytest.warns(Fallback, match="attention runs on the torch reference"):
        assert torch.equal(A.attention(*x), want)
    with pytest.raises(RuntimeError, match="bench: .*C\\+\\+ library"):
        A.bench(quick=True)
    assert A.register("lmlab_without") == "lmlab_without"
    assert AttentionInterface()["lmlab_without"] is sdpa_attention_forward


# ---- in transformers


@pytest.fixture
def kernel_calls(monkeypatch):
    "How often the kernel ran"
    calls, real = [], A.attention
    monkeypatch.setattr(A, "attention", lambda *a, **kw: calls.append(a) or real(*a, **kw))
    A.register()
    return calls


def test_as_an_attention_of_transformers():
    A.register()
    check_attention("lmlab", masks="bool")
    check_attention(
        "lmlab", masks="additive", only=("attention_equals_its_definition", "attention_rows_are_independent")
    )


def models(kind, **overrides):
    "The same weights under torch's attention (or the model's own) and under ours"
    from lmlab.core.nano import build

    pair = [build(kind, "pico", attn_implementation=a, **overrides).eval() for a in ("sdpa", "lmlab")]
    assert pair[1].config._attn_implementation == "lmlab"
    return pair


@needs_library
@pytest.mark.parametrize("side", ("left", "right", None))
def test_a_stock_llama_does_not_notice(kernel_calls, side):
    "Logits of a whole call, of a chunk onto a cache, and greedy tokens; with padding too all of it runs on the kernel"
    theirs, ours = models("llama", num_attention_heads=4, num_key_value_heads=2)
    ids, mask = torch.randint(3, 259, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    for r, pads in enumerate((0, 7, 21) if side else ()):
        mask[r, slice(0, pads) if side == "left" else slice(40 - pads, 40)] = 0
    pos = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want, got = (m(ids, attention_mask=mask, position_ids=pos).logits for m in (theirs, ours))
        assert rel_error(got[mask.bool()], want[mask.bool()]) < 2e-6 and len(kernel_calls) == 2
        past = None
        for i, j in ((0, 17), (17, 39), (39, 40)):
            out = ours(
                ids[:, i:j],
                attention_mask=mask[:, :j],
                position_ids=pos[:, i:j],
                past_key_values=past,
                use_cache=True,
            )
            past, seen = out.past_key_values, mask[:, i:j].bool()
            assert rel_error(out.logits[seen], want[:, i:j][seen]) < 2e-6
        assert len(kernel_calls) == 8
        if side != "right":
            for cache in (None, "static"):
                a, b = (
                    m.generate(
                        ids,
                        attention_mask=mask,
                        max_new_tokens=6,
                        do_sample=False,
                        cache_implementation=cache,
                        disable_compile=True,
                    )
                    for m in (theirs, ours)
                )
                assert torch.equal(a, b)
            assert len(kernel_calls) == 32


@needs_library
def test_bfloat16_model(kernel_calls):
    theirs, ours = (m.bfloat16() for m in models("llama"))
    ids = torch.randint(3, 259, (2, 150))
    with torch.no_grad():
        exact = theirs.float()(ids).logits
        theirs.bfloat16()
        a, b = (rel_error(m(ids).logits.float(), exact) for m in (theirs, ours))
    assert b <= 1.2 * a and kernel_calls


@needs_library
def test_what_others_do_better_is_left_to_them(kernel_calls):
    "Windows, caps, sinks, dropout, odd masks, other dtypes: the model's own result, and the kernel stays out of it"
    import transformers as T

    from lmlab.core.nano import build

    shape = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=8,
    )
    shape |= dict(num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    ids = torch.randint(3, 61, (2, 23))
    odd = torch.ones(2, 23, dtype=torch.long)
    odd[0, 5] = odd[1, 9:12] = 0  # a hole
    for config, peer, kw in (
        (T.MistralConfig(sliding_window=5, **shape), "sdpa", {}),
        (T.Gemma2Config(attn_logit_softcapping=0.5, sliding_window=100, **shape), "eager", {}),
        (
            T.GptOssConfig(
                sliding_window=100,
                num_local_experts=2,
                num_experts_per_tok=1,
                layer_types=["full_attention"] * 2,
                **shape,
            ),
            "eager",
            {},
        ),
        (T.LlamaConfig(**shape), "sdpa", dict(attention_mask=odd)),
        (T.LlamaConfig(dtype=torch.float64, **shape), "sdpa", {}),
        (T.LlamaConfig(dtype=torch.float16, **shape), "sdpa", {}),
    ):
        torch.manual_seed(0)
        model = T.AutoModelForCausalLM.from_config(config, attn_implementation=peer).eval()
        if config.model_type == "gpt_oss":
            for layer in model.model.layers:
                torch.nn.init.normal_(layer.self_attn.sinks)
        with torch.no_grad():
            want = model(ids, **kw).logits
            model.set_attn_implementation("lmlab")
            assert model.config._attn_implementation == "lmlab"
            got = model(ids, **kw).logits
        assert rel_error(got, want) < (2e-3 if config.dtype == torch.float16 else 2e-6), config.model_type
        assert not kernel_calls, config.model_type
    model = build("llama", "pico", attn_implementation="lmlab", attention_dropout=0.5)
    model(ids)
    assert not kernel_calls
    model.eval()(ids)
    assert kernel_calls
    weights = model(ids, output_attentions=True).attentions
    assert len(kernel_calls) == 2 and torch.allclose(weights[0].sum(-1), torch.ones(()))


@needs_library
def test_encoders_too(kernel_calls):
    theirs, ours = models("bert")
    ids, mask = torch.randint(3, 259, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    for kw in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            want, got = (m(ids, **kw).logits for m in (theirs, ours))
        assert rel_error(got[mask.bool()], want[mask.bool()]) < 2e-6
    assert len(kernel_calls) == 4


def test_masks_are_recognised_or_not():
    n, m = 5, 9
    causal = torch.ones(n, m, dtype=torch.bool).tril(m - n)[None, None]
    keep = torch.arange(m) >= torch.tensor([0, 2, 9])[:, None]
    found = A._recognised(causal & keep[:, None, None])
    assert (
        found[0] == m
        and found[1].tolist()[:2] == [0, 2]
        and found[2].tolist() == [9, 9, found[1][2]]
        and found[3]
    )
    early = torch.zeros(1, 1, n, m, dtype=torch.bool)  # a cache with room for more
    early[..., :n] = torch.ones(n, n, dtype=torch.bool).tril()
    assert A._recognised(early)[0] == n
    assert A._recognised(torch.ones(1, 1, n, m, dtype=torch.bool))[3] is False
    window = causal & torch.ones(n, m, dtype=torch.bool).triu(m - n - 2)
    hole = causal.clone()
    hole[..., 3] = False
    one = causal.clone()
    one[0, 0, 1, 2] = False
    for mask in (window, hole, one, causal.expand(1, 2, n, m), causal.float(), causal[..., :0]):
        assert A._recognised(mask) is None
    mask = causal.clone()
    assert A._understood(mask)[0] == m
    mask[0, 0, 1, 2] = False  # written to after it was looked at
    assert A._understood(mask) is None


DRIVER = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>
struct Call {
    const void *q, *k, *v; void* out; const int64_t *start, *stop;
    int64_t b, h, hk, n, m, d, dv, qs[3], ks[3], vs[3], os[3];
    float scale; int32_t causal, half;
};
extern "C" const char* lmlab_attention_paths();
extern "C" int lmlab_attention(const void*, int, const char*);

static uint32_t state = 1;
static float draw() { state = state * 1664525 + 1013904223; return ((int)(state >> 16) - 32768) / 16384.f; }

struct Exact {  // memory of just this size, so that one byte beyond it is noticed
    char* p; size_t n; int half;
    Exact(size_t n, int half) : p((char*)malloc(n * (half ? 2 : 4) + (n == 0))), n(n), half(half) {
        for (size_t i = 0; i < n; i++) {
            float f = draw();
            uint32_t u;
            memcpy(&u, &f, 4);
            u &= 0xffff0000;
            half ? (void)memcpy(p + 2 * i, (char*)&u + 2, 2) : (void)memcpy(p + 4 * i, &u, 4);
        }
    }
    ~Exact() { free(p); }
    double at(size_t i) const {
        uint32_t u = 0;
        float f;
        half ? (void)memcpy((char*)&u + 2, p + 2 * i, 2) : (void)memcpy(&u, p + 4 * i, 4);
        memcpy(&f, &u, 4);
        return f;
    }
};

static int wrong = 0;

static void one(const std::string& path, int64_t b, int64_t h, int64_t hk, int64_t n, int64_t m, int64_t d, int64_t dv, int causal, int half, bool bounds, int threads) {
    Exact q(b * h * n * d, half), k(b * hk * m * d, half), v(b * hk * m * dv, half), out(b * h * n * dv, half);
    memset(out.p, 0xff, out.n * (half ? 2 : 4));
    std::vector<int64_t> start(b), stop(b);
    for (int64_t r = 0; r < b; r++) start[r] = r * 3 - 1, stop[r] = m + 2 - 4 * r;  // beyond both ends too
    Call a = {q.p, k.p, v.p, out.p, bounds ? start.data() : nullptr, bounds ? stop.data() : nullptr, b, h, hk, n, m, d, dv,
              {h * n * d, n * d, d}, {hk * m * d, m * d, d}, {m * hk * dv, dv, hk * dv}, {h * n * dv, dv, h * dv}, 0.5f, causal, half};
    if (lmlab_attention(&a, threads, path.c_str())) { wrong++; return; }
    for (int64_t r = 0; r < b; r++) for (int64_t j = 0; j < h; j++) for (int64_t i = 0; i < n; i++) {
        int64_t from = bounds ? std::max<int64_t>(0, start[r]) : 0, to = causal ? m - n + i + 1 : m, g = j / (h / hk);
        if (bounds) to = std::min(to, stop[r]);
        std::vector<double> w;
        double top = -1e300, sum = 0;
        for (int64_t t = from; t < to; t++) {
            double s = 0;
            for (int64_t e = 0; e < d; e++) s += q.at(((r * h + j) * n + i) * d + e) * k.at(((r * hk + g) * m + t) * d + e);
            w.push_back(s * 0.5);
            top = std::max(top, w.back());
        }
        for (auto& x : w) sum += x = std::exp(x - top);
        for (int64_t e = 0; e < dv; e++) {
            double want = 0, got = out.at(((r * n + i) * h + j) * dv + e);
            for (int64_t t = from; t < to; t++) want += w[t - from] / sum * v.at(((r * m + t) * hk + g) * dv + e);
            if (!(std::fabs(want - got) <= (half ? 0.03 : 1e-5)) && wrong++ < 5)
                printf("%s b %d h %d n %d m %d d %d half %d: %g instead of %g\n", path.c_str(), (int)b, (int)h, (int)n, (int)m, (int)d, half, got, want);
        }
    }
}

int main() {
    std::istringstream names(lmlab_attention_paths());
    for (std::string path; names >> path;) {
        for (int half : {0, 1})
            for (int causal : {0, 1}) {
                for (int64_t n : {1, 2, 5, 13})
                    for (int64_t d : {1, 7, 16, 33}) one(path, 2, 2, 1, n, n + 4 * causal, d, 40 - d, causal, half, n % 2, 1);
                one(path, 1, 2, 2, 1, 140, 20, 66, causal, half, true, 2);
                one(path, 1, 1, 1, 100, 131, 9, 6, causal, half, false, 2);
                one(path, 2, 5, 1, 1, 3, 5, 4, causal, half, true, 1);
            }
        one(path, 0, 1, 1, 1, 1, 1, 1, 1, 0, false, 1);
        one(path, 1, 1, 1, 0, 3, 2, 2, 1, 0, false, 1);
        one(path, 1, 1, 1, 2, 3, 0, 2, 1, 1, false, 1);
        one(path, 1, 1, 1, 3, 0, 2, 2, 0, 0, false, 1);
        printf("%s ", path.c_str());
    }
    printf("wrong %d\n", wrong);
    return wrong != 0;
}
"""


def test_under_sanitizers(tmp_path):
    "No byte outside its memory is touched and nothing undefined happens, on any path, down to one key of one number"
    native.under_sanitizers(tmp_path, "#include <algorithm>\n" + DRIVER, ("attention",))


def test_arm(tmp_path):
    native.on_arm(tmp_path, "#include <algorithm>\n" + DRIVER, ("attention",))
