"""The hand-written kernels: each equals its definition on every path, and nothing breaks where a path is missing."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lmlab.kernels as kernels
import pytest
import torch
from lmlab.kernels import backend, cpu, decay, decay_scores, read_bytes
from lmlab.kernels.decay import in_torch

from lmlab.core.check import check_kernel, math_threads, test_rel

test_rel.__test__ = False
KERNELS = Path(kernels.__file__).resolve().parent
built = pytest.mark.skipif(cpu.library() is None, reason=f"no C++ library: {cpu._open()[1]}")


@pytest.fixture(autouse=True)
def silence_kept():
    "Each test hears the messages that are said once"
    said = set(kernels._said)
    kernels._said.clear()
    yield
    kernels._said.clear()
    kernels._said.update(said)


def case(shape, dtype, generator, how="auto"):
    *lead, c = shape
    scores = torch.randn(*lead, c, c, generator=generator).to(dtype)
    g = (-0.2 * torch.rand(*lead, c, generator=generator)).cumsum(-1)
    return scores, g.to(torch.promote_types(dtype, torch.float32)), how


WIDTHS = (0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100)
SHAPES = [(*lead, c) for c in WIDTHS for lead in ((), (3,), (2, 2), (0,))] + [(1, 129), (2, 1, 3, 5)]
QUICK = {
    "the_custom_op_is_well_formed": "looked at on fewer shapes",
    "kernel_compiles": "looked at on fewer shapes",
}


@pytest.mark.parametrize("how", ["reference", pytest.param("cpu", marks=built)])
def test_decay_scores(how):
    "Against torch's own operations and their own backward in float64: values, gradients, threads, strides, NaN, unwritten memory"
    make = lambda shape, dtype, generator: case(shape, dtype, generator, how)
    op, terms = lambda s, g, b: decay_scores(s, g, b), lambda s: s[-1]
    assert len(SHAPES) >= 60
    shapes = SHAPES if how == "cpu" else SHAPES[::4]
    check_kernel(op, lambda s, g, b: in_torch(s, g), make, shapes, terms=terms, skip=QUICK, label=how)
    few = dict(only=tuple(QUICK), custom_op=torch.ops.lmlab.decay_scores.default, terms=terms, label=how)
    check_kernel(op, lambda s, g, b: in_torch(s, g), make, [(2, 17), (0, 3), (2, 0)], **few)


def test_float64_is_exact():
    "The definition by hand, entry by entry; and float64 keeps its precision whatever was asked for"
    s, g, _ = case((5,), torch.float64, torch.Generator().manual_seed(0))
    want = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(5):
        for j in range(i + 1):
            want[i, j] = s[i, j] * (g[i] - g[j]).exp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.Fallback)
        for how in kernels.BACKENDS:
            test_rel(decay_scores(s, g, how), want, 1e-15)
    test_rel(
        decay_scores(torch.ones(4, 4), torch.zeros(4)), torch.ones(4, 4).tril(), 0
    )  # no decay: the causal mask


def test_gates_broadcast_over_heads():
    "`g` shared by several heads gets the sum of their gradients"
    s, g = (
        torch.randn(2, 3, 9, 9, dtype=torch.float64),
        (-torch.rand(2, 1, 9, dtype=torch.float64)).cumsum(-1).requires_grad_(),
    )
    d = torch.randn_like(s)
    got, want = (torch.autograd.grad(f(s, g), g, d)[0] for f in (decay_scores, in_torch))
    test_rel(got, want, 1e-13)


@built
def test_every_path_returns_the_same_bits():
    "AVX-512, AVX2 and the base path do the same operations in the same order: also on infinities, NaN and denormals"
    levels = cpu.info()["levels"]
    odd = torch.tensor([0.0, -0.0, 1e-40, -3e38, torch.inf, -torch.inf, torch.nan, 1.0])
    for dtype in (torch.float32, torch.bfloat16):
        for c in (1, 16, 33, 70):
            s, g, _ = case((3, c), dtype, torch.Generator().manual_seed(c))
            for scale in (1, 30, -30):  # also where exponentials reach infinity and denormals
                s.view(-1)[: 8 * (s.numel() // 8)].view(-1, 8)[::3] = odd.to(dtype)
                seen = []
                for level in levels:
                    with cpu.level(level):
                        out = decay.on_cpu(s, g * scale)
                        seen.append((out, *decay.on_cpu_backward(s.flip(0), out, g * scale)))
                for other in seen[1:]:
                    for a, b in zip(seen[0], other, strict=True):
                        assert ((a == b) | (a.isnan() & b.isnan())).all(), (dtype, c, scale)
    x = torch.randint(-(2**62), 2**62, (5003,))
    for level in levels:
        with cpu.level(level):
            assert read_bytes(x, "cpu") == x.sum()
    with pytest.raises(ValueError, match="sse9"), cpu.level("sse9"):
        pass


@built
def test_exponential():
    "Within 2 ulp of float64's wherever float32 can say it, zero below, infinity above"
    x = torch.linspace(-110, 92, 200_001)[: 200_001 // 128 * 128].view(-1, 128)
    g = torch.cat([torch.zeros(len(x), 1), x], 1)
    got = decay_scores(torch.ones(len(x), 129, 129), g, "cpu")[:, 1:, 0]
    want = x.double().exp()
    fits = (want > torch.finfo(torch.float32).tiny) & (want < torch.finfo(torch.float32).max)
    ulp = (got.double() - want).abs() / (torch.finfo(torch.float32).eps * want)
    assert ulp[fits].max() < 2, ulp[fits].max()
    assert (got[want >= torch.finfo(torch.float32).max] == torch.inf).all()
    assert ((got.double() - want).abs()[want <= torch.finfo(torch.float32).tiny] < 2**-148).all()


def test_nothing_above_the_diagonal_matters():
    "Not a NaN, not an infinity, not an exponential that overflows; and no gradient goes there"
    s, g, _ = case((2, 20), torch.float32, torch.Generator().manual_seed(1))
    above = torch.ones(20, 20).triu(1).bool()
    g = g * 100  # exp(g[i] - g[j]) overflows above the diagonal
    for how in ("reference", "auto"):
        clean = decay_scores(s, g, how)
        assert clean.isfinite().all() and (clean[:, above] == 0).all()
        for bad in (torch.nan, torch.inf):
            x = s.masked_fill(above, bad).requires_grad_()
            y = decay_scores(x, g, how)
            assert torch.equal(y, clean)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert dx.isfinite().all() and (dx[:, above] == 0).all()


def test_autocast_and_compile():
    "Under autocast a product in bfloat16 goes straight in, and the gates stay in float32; compiled as one graph with its backward"
    q, g = torch.randn(2, 19, 8, requires_grad=True), (-0.1 * torch.rand(2, 19)).cumsum(-1).requires_grad_()

    def chunk(q, g):
        with torch.autocast("cpu", torch.bfloat16):
            return decay_scores(q @ q.mT, g).float().sum()

    with torch.autocast("cpu", torch.bfloat16):
        assert decay_scores(q @ q.mT, g).dtype == torch.bfloat16
    eager = torch.autograd.grad(chunk(q, g), (q, g))
    compiled = torch.autograd.grad(torch.compile(chunk, fullgraph=True, backend="aot_eager")(q, g), (q, g))
    for a, b in zip(compiled, eager, strict=True):
        assert a.dtype == torch.float32
        test_rel(a, b, 0.02)


def test_read_bytes():
    "The sum of 64-bit words, whatever the dtype, the stride, the alignment; partial words filled with zeros"
    assert read_bytes(torch.tensor([1, 2, 2**62, 2**62, 2**62, 2**62])) == 3  # modulo 2**64
    g = torch.Generator().manual_seed(0)
    for n in (0, 1, 7, 8, 9, 255, 256, 257, 5003, 40_000):
        x = torch.randint(0, 256, (n + 1,), generator=g).to(torch.uint8)
        for part in (x, x[1:], x[::3], x.view(1, -1).expand(2, -1)):
            want = read_bytes(part, "reference")
            for threads in (1, 2):
                with math_threads(threads):
                    assert read_bytes(part) == want, (n, part.shape, threads)
    for dtype in (torch.bool, torch.int16, torch.bfloat16, torch.float64, torch.complex64):
        x = torch.ones(2, 77).to(dtype)
        assert read_bytes(x) == read_bytes(x, "reference")
    torch.library.opcheck(torch.ops.lmlab.read_bytes.default, (torch.ones(9), "auto"))


def test_wrong_input_fails_at_the_door():
    for s, g, text in (
        (torch.zeros(3, 4), torch.zeros(4), "scores: shape"),
        (torch.zeros(4), torch.zeros(4), "scores: shape"),
        (torch.zeros(4, 4), torch.zeros(5), "g: shape"),
        (torch.zeros(4, 4), torch.tensor(0.0), "g: shape"),
        (torch.zeros(4, 4, dtype=torch.int), torch.zeros(4), "floating point"),
    ):
        with pytest.raises(ValueError, match=text):
            decay_scores(s, g)
    with pytest.raises(RuntimeError):
        decay_scores(torch.zeros(2, 4, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="cuda.*allowed are auto, reference, cpu, triton"):
        decay_scores(torch.zeros(4, 4), torch.zeros(4), "cuda")


def test_the_switch(monkeypatch):
    "Argument before block before environment before automatic"
    monkeypatch.delenv("LMLAB_BACKEND", raising=False)
    best = "cpu" if cpu.library() else "reference"
    name = lambda asked=None: decay.FORWARD.pick(asked, "cpu", torch.float32)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.Fallback)
        assert name() == name("auto") == best
        assert decay.FORWARD.pick("auto", "meta", torch.float32)[0] == "reference"
        with backend("reference"):
            assert name() == name("auto") == "reference" and name("cpu") == best
            with backend("cpu"):
                assert name() == best
            assert name() == "reference"
        monkeypatch.setenv("LMLAB_BACKEND", "reference")
        assert name() == "reference" and name("cpu") == best
        with backend("cpu"):
            assert name() == best
    monkeypatch.setenv("LMLAB_BACKEND", "fast")
    with pytest.raises(ValueError, match="LMLAB_BACKEND: 'fast'"):
        name()
    with pytest.raises(ValueError, match="no backend"), backend("gpu"):
        pass


def library_at(monkeypatch, path):
    monkeypatch.setattr(cpu, "path", lambda: path)
    cpu._open.cache_clear()
    monkeypatch.setattr(kernels, "_said", set())


@pytest.fixture
def reopened():
    yield
    cpu._open.cache_clear()


def test_without_the_library(monkeypatch, tmp_path, reopened):
    "Missing, torn or of another interface: one message that says why, then the reference"
    s, g, _ = case((2, 6), torch.float32, torch.Generator().manual_seed(0))
    want = decay.reference(s, g)
    torn = tmp_path / "_cpu.so"
    torn.write_bytes(b"\x7fELF torn")
    for path, why in ((tmp_path / "none.so", "not built"), (torn, "does not load")):
        library_at(monkeypatch, path)
        for asked in ("auto", "cpu"):
            kernels._said.clear()
            with pytest.warns(kernels.Fallback, match=why) as heard:
                for _ in range(3):
                    assert torch.equal(decay_scores(s, g, asked), want)
            assert len(heard) == 1
        assert cpu.info()["library"] is False
    monkeypatch.undo()
    cpu._open.cache_clear()
    if cpu.library():
        monkeypatch.setattr(cpu, "ABI", -1)
        library_at(monkeypatch, cpu.path())
        with pytest.warns(kernels.Fallback, match="interface"):
            assert torch.equal(decay_scores(s, g), want)


def test_a_backend_that_cannot_run_says_so():
    s, g, _ = case((4,), torch.float64, torch.Generator().manual_seed(0))
    with pytest.warns(kernels.Fallback, match="no Triton form"):
        decay_scores(s, g, "triton")
    if cpu.library():
        with pytest.warns(kernels.Fallback, match="no C\\+\\+ form for torch.float64"):
            decay_scores(s, g, "cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            decay_scores(s, g)  # automatic choice between what is there needs no message


def test_import_is_light(python):
    assert python("import sys, lmlab.kernels; print('torch' in sys.modules)").strip() == "False"


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_pool_of_threads(python):
    "The library runs on the OpenMP runtime that torch brought, not on a second one"
    code = """
import re, torch
from lmlab.kernels import cpu, read_bytes
torch.set_num_threads(2)
x = torch.ones(1 << 20)
x.exp(); read_bytes(x, "cpu")
threads = lambda: int(re.search(r"Threads:\\s+(\\d+)", open("/proc/self/status").read())[1])
n = threads()
for _ in range(3): x.exp(); read_bytes(x, "cpu")
maps = {l.split()[-1] for l in open("/proc/self/maps") if re.search(r"lib(g|i)?omp", l)}
print(len(maps), threads() - n, cpu.info()["openmp"])
"""
    runtimes, grown, openmp = python(code, OMP_NUM_THREADS="2").split()
    if openmp == "True":
        assert (runtimes, grown) == ("1", "0")


def compiler():
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)


FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wno-psabi", "-Wall", "-Wextra", "-Werror"]
# under sanitizers GCC doubts its own AVX-512 headers (GCC bug 105593); clang does not know that warning
FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_under_sanitizers(tmp_path):
    "No access outside a buffer, no undefined behaviour, same bits on all paths, in plain C++"
    sources = [*map(str, sorted(KERNELS.glob("*.cpp"))), str(Path(__file__).parent / "kernels_driver.cpp")]
    program = tmp_path / "driver"
    for openmp in (["-fopenmp"], ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]):
        build = subprocess.run(
            [
                compiler(),
                "-O1",
                "-g",
                "-fsanitize=address,undefined",
                "-fno-sanitize-recover=all",
                *FLAGS,
                *openmp,
                f"-I{KERNELS}",
                *sources,
                "-o",
                str(program),
            ],
            capture_output=True,
            text=True,
        )
        if build.returncode == 0:
            break
        if "asan" in build.stderr or "ubsan" in build.stderr or "unrecognized" in build.stderr:
            pytest.skip(f"{compiler()} has no sanitizers here")
    assert build.returncode == 0, build.stderr[-2000:]
    run = subprocess.run(
        [str(program)], capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert " 0 failures" in run.stdout


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_the_sanitizers_would_notice(tmp_path):
    "One float too little for the gates, and the driver must die"
    code = '#include <cstdlib>\nextern "C" void lmlab_decay_forward(const void*, const float*, void*, int64_t, int, int, int);\n'
    code += "int main() { int c = 17; void *s = malloc(4*c*c), *o = malloc(4*c*c); float* g = (float*)calloc(c - 1, 4);\n"
    code += "lmlab_decay_forward(s, g, o, 1, c, 0, 1); free(s); free(o); free(g); return 0; }\n"
    (tmp_path / "short.cpp").write_text("#include <cstdint>\n" + code)
    parts = [str(KERNELS / "decay.cpp"), str(KERNELS / "machine.cpp"), str(tmp_path / "short.cpp")]
    flags = ["-std=c++17", "-O0", "-fsanitize=address", "-Wno-psabi"]
    build = subprocess.run(
        [compiler(), *flags, *parts, "-o", str(tmp_path / "short")], capture_output=True, text=True
    )
    if build.returncode:
        pytest.skip(f"{compiler()} has no AddressSanitizer here")
    run = subprocess.run(
        [str(tmp_path / "short")],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr


def test_built_for_any_machine(root):
    "Instruction sets are chosen when a kernel runs: nothing is compiled for the machine that builds"
    text = (root / "setup.py").read_text() if (root / "setup.py").exists() else ""
    assert '"-march' not in text and "ffp-contract=off" in text


@built
def test_the_interface_is_plain_c():
    "Every signature that Python knows is there, and nothing but lmlab_* is visible"
    lib = ctypes.CDLL(str(cpu.path()))
    assert all(hasattr(lib, name) for name in cpu._SIGNATURES)
    if nm := shutil.which("nm"):
        out = subprocess.run(
            [nm, "-D", "--defined-only", str(cpu.path())], capture_output=True, text=True
        ).stdout
        names = {l.split()[-1] for l in out.splitlines() if " T " in l}
        assert names and all(n.startswith(("lmlab_", "_init", "_fini")) for n in names), names


def test_families_can_be_raced():
    "What `lmlab bench` runs, on a matrix that costs nothing"
    from lmlab.kernels.decay import _one_case

    for what in ("forward", "forward + backward"):
        timing, work = _one_case(2, 8, torch.float32, what, 1, quick=True)
        assert set(timing.seconds) == {"kernel", "torch", "plain read"} and min(work.values()) > 0
    for name in kernels.FAMILIES:
        assert callable(kernels.family(name).bench)
    with pytest.raises(ValueError, match="'ternry'.*decay, decoder, differential, postings, read"):
        kernels.family("ternry")


@pytest.fixture
def raced(tmp_path, monkeypatch):
    "A results folder, limits that cost nothing, and families of which one cannot run here"
    from lmlab.core import bench

    n = torch.get_num_threads()
    timing = bench.Timing({"2bit": [1.0, 1.1, 1.2], "torch": [4.0, 4.0, 4.0]}, threads=n)
    work = {"bytes": 100, "flops": 400, "dtype": "int8", "time over plain read": {"2bit": (1.04, 1.0, 1.2)}}
    work |= {"fraction of int8 peak": {"2bit": (0.6, 0.5, 0.7), "1.6bit": (0.9, 0.8, 1.0)}}
    cases = {f"9 x 9, {k} token{'s' * (k > 1)}, 2 threads": (timing, work) for k in (1, 128)}

    def impossible(quick=False):
        raise RuntimeError("bench: no library")

    def family(name):
        if name not in kernels.FAMILIES:
            raise ValueError(f"name: there is no kernel family {name!r}")
        race = (lambda quick=False: cases) if name == "ternary" else impossible
        return SimpleNamespace(__doc__=f"What {name} is.\nMore.", bench=race)

    rates = [("read", None, 50.0), ("gemm", "float32", 100.0), ("peak", "int8", 900.0)]
    rows = [dict(limit=k, dtype=d, threads=n, device="cpu", rate=r, by="lmlab") for k, d, r in rates]
    monkeypatch.setattr(bench, "ceilings", lambda: bench.Ceilings({"cpu": "an abacus", "gpu": None}, rows))
    monkeypatch.setattr(bench, "results_dir", lambda: tmp_path / "results")
    monkeypatch.setattr(kernels, "family", family)
    monkeypatch.delenv("LMLAB_OUT", raising=False)
    monkeypatch.setenv("LMLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_bench_keeps_a_family_for_the_site(raced, capsys):
    from lmlab.cli import main
    from lmlab.core.bench import saved
    from lmlab.core.kernels import goals, times

    assert saved("ternary") is None and not goals("ternary").rows
    assert main(["bench", "ternary"]) == 0 and not (raced / "results").exists()
    assert (raced / "cache/runs/bench/ternary.json").exists()
    assert main(["bench", "ternary", "--save"]) == 0
    kept = sorted((raced / "results/bench").iterdir())
    assert [p.name for p in kept] == ["ternary.json", "ternary.svg"]
    figure = kept[1].read_text()
    assert "arithmetic units" in figure and "matrix library" not in figure  # the roof of int8, not of float32
    assert main(["bench", "ternary", "--save"]) == 0 and kept[1].read_text() == figure
    assert len(times("ternary").rows) == 2
    told = {(r["case"], r["measure"]): (r["median"], r["must"], r["reached"]) for r in goals("ternary").rows}
    assert told == {
        ("9 x 9, 1 token, 2 threads", "time over plain read, 2bit"): ("1.04", "≤ 1.08", "must"),
        ("9 x 9, 128 tokens, 2 threads", "fraction of int8 peak, 2bit"): ("0.6", "≥ 0.7", "short"),
    }
    kept[0].write_text('{"cases": [{}]}')
    with pytest.raises(ValueError, match="not what `lmlab bench ternary --save` writes"):
        saved("ternary")
    capsys.readouterr()


def test_bench_lists_and_goes_on(raced, capsys, monkeypatch):
    from lmlab.cli import main

    assert main(["bench"]) == 0
    listed = capsys.readouterr().out
    assert all(f"What {n} is." in listed for n in kernels.FAMILIES) and "lmlab bench all" in listed
    assert main(["bench", "all", "--save"]) == 1  # one family can run, the others say why not
    out, err = capsys.readouterr()
    assert str(raced / "results/bench/ternary.json") in out
    assert err.count("no library") == len(kernels.FAMILIES) - 1
    assert main(["bench", "ternry"]) == 2 and "'ternry'" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *a: False)
    assert main(["bench", "ternary", "--save"]) == 2
    out, err = capsys.readouterr()
    assert "cannot be written to" in err and "plain read" not in out  # before anything was measured


def test_the_page_shows_what_is_saved():
    from lmlab.core.kernels import goals, times
    from lmlab.core.ledger import book_dir

    nb = json.loads((book_dir() / "core" / "kernels.ipynb").read_text(encoding="utf-8"))
    shown = [
        "".join(o.get("data", {}).get("text/markdown", "")) for c in nb["cells"] for o in c.get("outputs", ())
    ]
    for name in kernels.FAMILIES:
        tables = [t._repr_markdown_() for t in (goals(name), times(name)) if t.rows]
        assert all(t in shown for t in tables) and any(f"`{name}`" in s for s in shown), (
            f"{name}: run `lmlab run core/kernels --save`"
        )
