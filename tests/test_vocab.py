"""`vocab_max` on every path: values, winners and gradients against the whole table, memory, autocast, what it refuses."""

import importlib.util
import os

import native
import pytest
import torch
from lmlab.kernels import cpu, vocab_max
from lmlab.kernels.vocab import reference

from lmlab.core.bench import peak_memory
from lmlab.core.check import check_kernel, math_threads, test_rel

test_rel.__test__ = False
built = pytest.mark.skipif(cpu.library() is None, reason=f"no C++ library: {cpu.missing()}")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not importlib.util.find_spec("triton"),
    reason="Triton's interpreter is not there",
)
FORMS = ["reference", pytest.param("cpu", marks=built), pytest.param("triton", marks=interpreted)]
FAST = [pytest.param("cpu", marks=built), pytest.param("triton", marks=interpreted)]
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 7, 5),
    (3, 17, 16, 63),
    (1, 65, 65, 100),
    (2, 5, 33, 2049),
    (2, 257, 3, 16),
    (0, 3, 4, 5),
]


def case(shape, dtype, generator, how="auto"):
    "Small whole numbers: products are exact in every dtype, so ties are ties everywhere"
    b, length, d, words = shape
    hidden = torch.randint(-2, 3, (b, length, d), generator=generator).to(dtype)
    weight = torch.randint(-2, 3, (words, d), generator=generator).to(dtype)
    mask = torch.rand(b, length, generator=generator) < 0.7
    if length:
        mask[:, length // 2] = True  # none is all out: -inf is looked at apart
    return hidden, weight, mask, how


def definition(hidden, weight, mask, how):
    return reference(hidden, weight, mask)


@pytest.mark.parametrize("how", FORMS)
def test_it_is_the_maximum_over_the_table(how):
    "Values and gradients in float64 on every path, dtype and number of threads; strides, NaN, unwritten memory"
    make = lambda shape, dtype, generator: case(shape, dtype, generator, how)
    op = lambda h, w, m, b: vocab_max(h, w, mask=m, backend=b)
    skip = {"the_custom_op_is_well_formed": "below", "kernel_compiles": "below"}
    shapes = SHAPES if how != "triton" else SHAPES[:4]
    check_kernel(
        op,
        definition,
        make,
        shapes,
        terms=lambda s: max(1, s[2]) + s[0] + s[3],
        skip=skip,
        label=how,
        nan=False,
    )
    few = dict(only=tuple(skip), custom_op=torch.ops.lmlab.vocab_max.default)
    if how == "reference":  # one operation is behind all of them
        make = lambda shape, dtype, generator: case(shape, dtype, generator)
        check_kernel(
            torch.ops.lmlab.vocab_max.default, definition, make, [(2, 3, 7, 5)], terms=lambda s: s[2], **few
        )


@pytest.mark.parametrize("how", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_tokens_wins(how, dtype):
    "The winner is the first token, and the same one as in the definition"
    g = torch.Generator().manual_seed(0)
    for shape in SHAPES[1:5]:
        h, w, m, _ = case(shape, dtype, g)
        values, tokens = vocab_max(h, w, mask=m, backend=how)
        want, first = reference(h, w, m)
        assert torch.equal(values, want)
        assert torch.equal(tokens, first)
        assert tokens.dtype == torch.int32


@pytest.mark.parametrize("how", FORMS)
def test_tokens_that_do_not_count(how):
    "Padding changes nothing; a text without a token is -inf with no winner and no gradient; a NaN comes out only where it counts"
    g = torch.Generator().manual_seed(1)
    h, w, m, _ = case((2, 17, 16, 63), torch.float32, g)
    m[1] = False
    values, tokens = vocab_max(h, w, mask=m, backend=how)
    padded = torch.cat([h, torch.full((2, 7, 16), torch.nan)], 1)
    longer = torch.cat([m, torch.zeros(2, 7, dtype=torch.bool)], 1)
    again, same = vocab_max(padded, w, mask=longer, backend=how)
    assert torch.equal(again, values)
    assert torch.equal(same, tokens)
    assert (values[1] == -torch.inf).all()
    assert (tokens[1] == -1).all()
    h, w = h.requires_grad_(), w.requires_grad_()
    values, _ = vocab_max(h, w, mask=m, backend=how)
    by_h, _ = torch.autograd.grad(values, (h, w), torch.ones_like(values))
    assert not by_h[1].any()
    assert not by_h[0][~m[0]].any()
    h = h.detach().clone()
    h[0, m[0].nonzero()[0, 0], 3] = torch.nan
    assert vocab_max(h, w, mask=m, backend=how)[0][0].isnan().all()


@built
def test_threads_and_instruction_sets_agree():
    "Folding and gradients return the same bits"
    g = torch.Generator().manual_seed(2)
    h, w, m, _ = case((3, 33, 130, 700), torch.float32, g)
    w = w + torch.rand(w.shape, generator=g)

    def run():
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        values, tokens = vocab_max(a, b, mask=m, backend="cpu")
        return tokens, *torch.autograd.grad(values, (a, b), torch.ones_like(values))

    with math_threads(1):
        want = run()
    for threads in (2, 3):
        with math_threads(threads):
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
    for name in cpu.info()["levels"]:
        with cpu.level(name), math_threads(1):
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


@built
def test_the_table_is_never_there():
    "Memory is that of what comes out and some tiles, for a table 20 times as large"
    h, w = torch.randn(8, 128, 32), torch.randn(20_000, 32)
    table = 8 * 128 * 20_000 * 4
    used = peak_memory(lambda: vocab_max(h, w))
    assert used < table / 4, f"{used} bytes, the table has {table}"


def test_autocast():
    "Under autocast products take bfloat16, and gradients come back in float32"
    h, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = vocab_max(h, w)
    assert values.dtype == torch.bfloat16
    grads = torch.autograd.grad(values.float().sum(), (h, w))
    assert all(o.dtype == torch.float32 for o in grads)
    want, _ = vocab_max(h.bfloat16(), w.bfloat16())
    assert torch.equal(values, want)


def test_bias():
    h, w, bias = torch.randn(2, 5, 8), torch.randn(31, 8), torch.randn(31, requires_grad=True)
    values, _ = vocab_max(h, w, bias)
    test_rel(values, vocab_max(h, w)[0] + bias, 1e-6)
    assert torch.equal(torch.autograd.grad(values.sum(), bias)[0], torch.full((31,), 2.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(hidden=torch.zeros(2, 8)), "hidden, weight"),
        (dict(weight=torch.zeros(31, 9)), "hidden, weight"),
        (dict(weight=torch.zeros(31, 8, dtype=torch.bfloat16)), "one floating point dtype"),
        (dict(bias=torch.zeros(30)), "bias"),
        (dict(mask=torch.ones(2, 4)), "mask"),
    ],
)
def test_what_it_refuses(change, says):
    with pytest.raises(ValueError, match=says):
        vocab_max(**(dict(hidden=torch.zeros(2, 5, 8), weight=torch.zeros(31, 8)) | change))


DRIVER = r"""
#include "common.h"
#include <cmath>
#include <cstdio>
#include <vector>
extern "C" {
void lmlab_vocab_fold(const float*, int64_t, int64_t, const int32_t*, const int32_t*, float*, int32_t*, int64_t, int64_t, int);
void lmlab_vocab_backward(const float*, const int32_t*, const float*, const float*, float*, float*, int64_t, int64_t, int64_t, int64_t, int);
const char* lmlab_levels();
}
int main() {
    int wrong = 0;
    uint32_t seed = 1;
    auto next = [&] { return (float)((seed = seed * 1664525 + 1013904223) >> 24) - 100; };
    for (int64_t words : {1, 15, 16, 17, 513})
        for (int64_t d : {1, 63, 64, 130}) {
            const int64_t b = 2, l = 5;
            std::vector<float> tile(b * l * words), value(b * words, -INFINITY), hidden(b * l * d), weight(words * d), grad(b * words), dh(b * l * d), dw(words * d);
            std::vector<int32_t> text, token, best(b * words, -1);
            for (int i = 0; i < b * l; i++) text.push_back(i / l), token.push_back(i % l);
            for (auto* v : {&tile, &hidden, &weight, &grad}) for (float& x : *v) x = next();
            lmlab_vocab_fold(tile.data(), b * l, words, text.data(), token.data(), value.data(), best.data(), words, 0, 2);
            for (int64_t i = 0; i < b; i++)
                for (int64_t v = 0; v < words; v++) {
                    int at = 0;
                    for (int t = 1; t < l; t++) if (tile[(i * l + t) * words + v] > tile[(i * l + at) * words + v]) at = t;
                    wrong += best[i * words + v] != at || value[i * words + v] != tile[(i * l + at) * words + v];
                }
            lmlab_vocab_backward(grad.data(), best.data(), hidden.data(), weight.data(), dh.data(), dw.data(), b, l, d, words, 2);
            for (int64_t v = 0; v < words; v++)
                for (int64_t f = 0; f < d; f++) {
                    float s = 0;
                    for (int64_t i = 0; i < b; i++) s += hidden[(i * l + best[i * words + v]) * d + f] * grad[i * words + v];
                    wrong += s != dw[v * d + f];
                }
        }
    printf("%s\nwrong %d\n", lmlab_levels(), wrong);
    return 0;
}
"""


def test_sanitizers(tmp_path):
    native.under_sanitizers(tmp_path, DRIVER, ("vocab",))


def test_arm(tmp_path):
    native.on_arm(tmp_path, DRIVER, ("vocab",))
