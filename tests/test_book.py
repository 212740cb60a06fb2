"""Every notebook of the book runs to its end in a fresh kernel at scale smoke, in time, and every chapter leaves a verdict for every claim."""

import os
import re
import warnings
from pathlib import Path

import pytest

from lmlab.core.ledger import VERDICTS, book_dir, catalogue, code_hash, read_results
from lmlab.core.runner import run_notebook

BUDGET = 30  # seconds that a page may take on two quiet cores
LIMIT = 300  # seconds after which a page hangs, on any machine
BOOK = sorted(
    p.relative_to(book_dir()).with_suffix("").as_posix()
    for p in book_dir().rglob("*.ipynb")
    if not any(x.startswith((".", "_")) for x in p.relative_to(book_dir()).parts)
)


@pytest.mark.parametrize("name", BOOK)
def test_runs(name):
    path = book_dir() / f"{name}.ipynb"
    out = Path(os.environ["LMLAB_CACHE"]) / "book" / name
    outcome = run_notebook(path, scale="smoke", out=out, timeout=LIMIT)
    assert outcome.ok, str(outcome)
    if outcome.seconds > BUDGET:
        warnings.warn(
            f"{name} took {outcome.seconds:.0f} s at scale smoke; {BUDGET} s is the budget", stacklevel=1
        )
    if path.stem in catalogue():
        results_are_complete(path, out / "results.json")


def results_are_complete(path, file):
    assert file.exists(), f"{path.stem} is a chapter and wrote no results: does it end with `ch.report()`?"
    res = read_results(file)
    assert (res["slug"], res["scale"], res["code_hash"]) == (path.stem, "smoke", code_hash(path))
    assert res["claims"], f"{path.stem} declares no claim"
    ids = [c["id"] for c in res["claims"]]
    assert len(set(ids)) == len(ids)
    for c in res["claims"]:
        assert c["verdict"] in VERDICTS and c["why"], c
        assert c["paper"] and c["where"], f"{path.stem} {c['id']}: what the paper says, and where, is missing"
        if c["verdict"] != "undecided":
            assert c["measured"] is not None and c["seeds"], (
                f"{path.stem} {c['id']}: a verdict without a measurement"
            )
    env = res["environment"]
    assert env["device"] and env["threads"] and {"torch", "transformers"} <= set(env["versions"])
    home = re.escape(str(Path.home()))
    assert not re.search(home + r"\b" if home != "/" else r"(?!)", file.read_text()), (
        "results name a folder of this machine"
    )


@pytest.mark.parametrize("name", [n for n in BOOK if Path(n).stem in catalogue()])
def test_a_chapter_takes_scale_and_seed(name):
    from lmlab.core.runner import parameters_of, read_notebook

    takes = parameters_of(read_notebook(book_dir() / f"{name}.ipynb"))
    assert takes.get("scale") == "smoke" and takes.get("seed") == 0, takes


def test_the_book_is_where_the_catalogue_says():
    "A chapter lies in the folder of its part, under its own slug, and nothing else lies there"
    for name in BOOK:
        part, slug = name.rsplit("/", 1) if "/" in name else ("", name)
        if part in {p.part for p in catalogue().values()} and slug not in ("index", "common"):
            assert slug in catalogue() and catalogue()[slug].part == part, (
                f"nbs/{name}.ipynb is in no row of the catalogue"
            )
