"""Every module of the package that declares `contracts()` is held to them; nothing has to be listed here."""

import ast
import importlib
from pathlib import Path

import pytest

import lmlab
from lmlab.core.ledger import built, catalogue

PACKAGE = Path(lmlab.__file__).parent
ALL = "all"  # where a module computes its list, its entries are run as one test


def declared():
    "Module name -> (kind, label) pairs of its `contracts()`, read from the source: collecting imports no chapter"
    out = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "contracts":
                out[".".join(("lmlab", *path.relative_to(PACKAGE).with_suffix("").parts))] = literals(node)
    return out


def literals(function):
    "The first two entries of each tuple of the returned list, or None where they are not written out"
    returned = [o.value for o in ast.walk(function) if isinstance(o, ast.Return)]
    if len(returned) != 1 or not isinstance(returned[0], ast.List):
        return None
    pairs = [
        [getattr(e, "value", None) for e in o.elts[:2]] if isinstance(o, ast.Tuple) else [None]
        for o in returned[0].elts
    ]
    return (
        [tuple(p) for p in pairs]
        if all(len(p) == 2 and all(isinstance(e, str) for e in p) for p in pairs)
        else None
    )


MODULES = declared()


def entries(module):
    "What the module's `contracts()` returns, checked for shape"
    out = importlib.import_module(module).contracts()
    assert out, f"{module}.contracts() declares nothing"
    for kind, label, arguments in out:
        assert isinstance(kind, str) and isinstance(label, str) and isinstance(arguments, dict), (
            f"{module}: {kind!r}, {label!r}"
        )
    labels = [o[:2] for o in out]
    assert len(set(labels)) == len(labels), f"{module} declares a contract twice: {labels}"
    return out


@pytest.mark.parametrize(
    "module,kind,label", [(m, *p) for m, pairs in MODULES.items() for p in pairs or [(ALL, ALL)]]
)
def test_contract(module, kind, label):
    from lmlab.core.check import run_contract

    mine = [o for o in entries(module) if kind == ALL or o[:2] == (kind, label)]
    assert mine, f"{module}.contracts() has no {(kind, label)}"
    for o in mine:
        print(run_contract(*o))


@pytest.mark.parametrize("module", [m for m, pairs in MODULES.items() if pairs])
def test_nothing_declared_is_missed(module):
    assert sorted(o[:2] for o in entries(module)) == sorted(MODULES[module])


@pytest.mark.parametrize("slug", [slug for slug in catalogue() if built(slug)])
def test_a_built_chapter_declares_a_contract(slug):
    from lmlab.core.check import KINDS

    module = f"lmlab.{catalogue()[slug].part}.{slug}"
    assert module in MODULES, f"{module} has no contracts(); kinds are {', '.join(KINDS)}"
    assert any(kind in KINDS for kind, *_ in entries(module)), (
        f"{module} declares no kind among {', '.join(KINDS)}"
    )


def test_the_scan_reads_lists_and_admits_what_it_cannot():
    read = lambda source: literals(ast.parse(source).body[0])
    assert read(
        'def contracts():\n    x = 1\n    return [("causal_lm", "a", dict(config=x)), ("cache", "b", {})]'
    ) == [("causal_lm", "a"), ("cache", "b")]
    assert read('def contracts():\n    return [("causal_lm", k, {}) for k in "ab"]') is None
    assert read('def contracts():\n    label = "a"\n    return [("causal_lm", label, {})]') is None
