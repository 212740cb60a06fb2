"""What an importer pays and what a wheel carries: light imports, everything inside, and no need for a compiler."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lmlab
from lmlab.core.ledger import built, catalogue

ROOT = Path(__file__).resolve().parents[1]
PAPERS = len(catalogue())


def test_import_is_light(python):
    code = (
        "import sys, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t, *sys.modules)"
    )
    for name in ("lmlab", "lmlab.cli", "lmlab.core.ledger", "lmlab.core.chapter"):
        best = 9.0
        for _ in range(5):
            took, *modules = python(code.format(name)).split()
            assert name in modules and not {"torch", "transformers", "numpy"} & set(modules), name
            if (best := min(best, float(took))) < 0.2:
                break
        assert best < 0.2, f"import {name} took {best:.2f} s"


def trains(module):
    "Does it hand over a trainer of `transformers`, which brings `datasets` along?"
    tree = ast.parse(Path(lmlab.__file__).parent.joinpath(*module.split(".")).with_suffix(".py").read_text())
    bases = [ast.unparse(b) for o in tree.body if isinstance(o, ast.ClassDef) for b in o.bases]
    return any(b.endswith("Trainer") for b in bases)


@pytest.mark.parametrize("training", [False, True])
def test_a_chapter_brings_only_what_it_needs(python, training):
    "Figures, datasets, servers and notebooks are for those who draw, load and run"
    chapters = [f"{p.part}.{p.slug}" for p in catalogue().values() if built(p.slug)]
    chapters = [o for o in chapters if trains(o) == training]
    if not chapters:
        pytest.skip("no chapter is written yet")
    lines = [f"import lmlab.{o}" for o in chapters]
    heavy = [
        "matplotlib",
        "papermill",
        "nbclient",
        "IPython",
        "joblib",
        "sphinx",
        "faiss",
        "bm25s",
        "jiwer",
        "sentence_transformers",
        "trl",
        "tensorflow",
    ]
    heavy += [] if training else ["datasets", "pandas"]
    out = python(
        "\n".join(["import sys", *lines, f"print('found', *[m for m in {heavy} if m in sys.modules])"])
    )
    assert out.split() == ["found"], out


def build(tmp, **env):
    "A wheel of the checkout, built offline from a copy, so that nothing is left in the checkout"
    src = tmp / "src"
    skip = shutil.ignore_patterns(
        "__pycache__", "*.so", "*.egg-info", ".*", "build", "dist", "_docs", "_runs", "_proc"
    )
    src.mkdir()
    for name in ("lmlab", "kernels", "nbs", "results"):
        shutil.copytree(ROOT / name, src / name, ignore=skip)
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, src)
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "--no-cache-dir"]
    offline = dict(PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    run = lambda *a: subprocess.run(
        [*pip, *map(str, a)],
        cwd=tmp,
        env=os.environ | offline | env,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    p = run("wheel", "--no-index", "--no-build-isolation", "--no-deps", "-v", "-w", tmp, src)
    assert p.returncode == 0, p.stdout[-3000:] + p.stderr[-3000:]
    (wheel,) = tmp.glob("lmlab-*.whl")
    p = run("install", "--no-index", "--no-deps", "--target", tmp / "site", wheel)
    assert p.returncode == 0, p.stdout + p.stderr
    return wheel, tmp / "site"


def elsewhere(site, code, **env):
    "Run code against the installed wheel, far from the checkout"
    full = os.environ | dict(PYTHONPATH=str(site), COLUMNS="200") | env
    return subprocess.run(
        [sys.executable, "-c", code], cwd=site.parent, env=full, capture_output=True, text=True, timeout=120
    )


CLI = "import sys, lmlab; assert {site!r} in lmlab.__file__, lmlab.__file__; from lmlab.cli import main; sys.exit(main({args}))"


def test_the_wheel_has_everything(tmp_path):
    wheel, site = build(tmp_path)
    inside = set(zipfile.ZipFile(wheel).namelist())
    want = {"lmlab/_book/catalogue.tsv"}
    for p in (ROOT / "nbs").rglob("*.ipynb"):
        if not any(x.startswith(("_", ".")) for x in p.relative_to(ROOT / "nbs").parts):
            want.add(f"lmlab/_book/{p.relative_to(ROOT / 'nbs').as_posix()}")
    want |= {
        f"lmlab/_results/{p.relative_to(ROOT / 'results').as_posix()}"
        for p in (ROOT / "results").rglob("*.json")
    }
    want |= {
        f"lmlab/kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.suffix in (".py", ".cpp", ".h")
    }
    want |= {f"lmlab/{p.relative_to(ROOT / 'lmlab').as_posix()}" for p in (ROOT / "lmlab").rglob("*.py")}
    assert want <= inside, f"the wheel lacks {sorted(want - inside)}"
    assert not [
        n for n in inside if n.startswith(("tests", "kernels", "nbs", "results")) or "__pycache__" in n
    ]
    if shutil.which("g++") or shutil.which("c++"):
        assert any(n.startswith("lmlab/kernels/_cpu") and n.endswith(".so") for n in inside), (
            "a compiler is here and no kernel was built"
        )
    p = elsewhere(site, CLI.format(site=str(site), args=["list"]))
    assert p.returncode == 0, p.stderr
    assert len(p.stdout.splitlines()[1:-2]) == PAPERS
    p = elsewhere(
        site, CLI.format(site=str(site), args=["run", "core/ledger"]), LMLAB_CACHE=str(tmp_path / "cache")
    )
    assert p.returncode == 0, p.stdout + p.stderr
    script = subprocess.run(
        [site / "bin" / "lmlab", "--version"],
        env=os.environ | dict(PYTHONPATH=str(site)),
        capture_output=True,
        text=True,
    )
    assert script.stdout.startswith("lmlab 0."), script


def test_no_compiler_no_problem(tmp_path):
    "Built where every compiler fails, the package works and runs on the reference kernels"
    (tmp_path / "bin").mkdir()
    for name in (
        "cc",
        "c++",
        "gcc",
        "g++",
        "clang",
        "clang++",
        "x86_64-linux-gnu-gcc",
        "x86_64-linux-gnu-g++",
    ):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    wheel, site = build(
        tmp_path,
        CC="cc",
        CXX="c++",
        LDSHARED="cc -shared",
        LDCXXSHARED="c++ -shared",
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
    )
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")], (
        "something was compiled after all"
    )
    code = """
import warnings, torch, lmlab, lmlab.kernels as k
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(3):
        out = k.decay_scores(torch.ones(2, 3, 3), torch.zeros(2, 3))
assert torch.equal(out, torch.ones(2, 3, 3).tril()), out
print(lmlab.__file__, k.__file__, k.family("decay").FORWARD.pick("auto", "cpu", torch.float32)[0], sum(w.category is k.Fallback for w in said))
"""
    p = elsewhere(site, code)
    assert p.returncode == 0, p.stderr
    where, kernels, name, warned = p.stdout.split()
    assert where.startswith(str(site)) and kernels.startswith(str(site))
    assert (name, warned) == ("reference", "1"), "it should run on the reference and say so once"
